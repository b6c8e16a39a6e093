import shutil
from pathlib import Path
from uuid import uuid4

import mlflow.pyfunc
import pandas as pd
import pytest
import torch
import yaml
from fixtures_mlflow import root_of, trained_project

from pipeline import registry, versions
from pipeline.checkpoint import save_model
from pipeline.errors import IntegrityError, ModelMissing
from pipeline.files import read_json, verify_manifest, write_json
from pipeline.generate import load_generator
from pipeline.model import GPT, ModelConfig
from pipeline.registry import Registered, RegistryConfig, fetch_version, register
from pipeline.runs import find_run
from pipeline.sampling import Sampling
from pipeline.store import Store
from pipeline.vocab import Vocabulary


@pytest.fixture
def config() -> RegistryConfig:
    """A registered model that no other test has."""
    return RegistryConfig(model=f"model-{uuid4().hex[:8]}", gate=0.1)


@pytest.fixture
def register_it(store: Store, config: RegistryConfig, cheap_files: None):
    """Register a project; a loss on foreign tokens is what the test says."""

    def call(project: Path, foreign_loss: float | Exception = 0.0) -> Registered:
        def loss_on(_project: Path, tokens: Path) -> float:
            verify_manifest(tokens)
            if isinstance(foreign_loss, Exception):
                raise foreign_loss
            return foreign_loss

        return register(root_of(store), project, config, loss_on)

    return call


@pytest.fixture
def cheap_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a version's own files, leave out what MLflow adds for serving, which takes a second."""

    def log_files(store: Store, project: Path, _run: object, model_id: str) -> None:
        store.client.log_model_artifacts(model_id, str(project / "models" / "model"), "artifacts/model")
        store.client.log_model_artifacts(model_id, str(project / "data" / "tokens"), "artifacts/tokens")
        store.client.log_model_artifact(model_id, str(project / "params.yaml"), "artifacts")
        store.client.finalize_logged_model(model_id, "READY")

    monkeypatch.setattr(versions, "_log_files", log_files)


def aliases(store: Store, config: RegistryConfig) -> dict[str, str]:
    return {key: str(value) for key, value in store.client.get_registered_model(config.model).aliases.items()}


def all_versions(store: Store, config: RegistryConfig) -> list:
    return list(store.client.search_model_versions(f"name = '{config.model}'"))


def test_the_registered_model_continues_prompts_and_holds_no_pickle(store, config, tmp_path, bpe, monkeypatch):
    project = trained_project(tmp_path / "project")
    torch.manual_seed(0)
    shape = ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=16, vocab_size=50257, dropout=0.0, fold_vocab=False)
    save_model(project / "models" / "model", GPT(shape, Vocabulary.full(50257)), bpe)
    done = register(root_of(store), project, config)
    files = fetch_version(store, store.client.get_model_version(config.model, done["version"]), "model").parent.parent
    names = [path.relative_to(files).as_posix() for path in files.rglob("*") if path.is_file()]
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".pth", ".pyc"))]
    assert {"artifacts/params.yaml", "artifacts/tokens/train-00000.bin", "code/pipeline/model.py"} <= set(names)
    requirements = (files / "requirements.txt").read_text()
    assert "torch==" in requirements
    assert "cloudpickle" not in requirements
    assert "+" not in requirements  # a local suffix such as +cpu is on no index

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    served = mlflow.pyfunc.load_model(f"models:/{config.model}@candidate")
    generator = load_generator(files / "artifacts")
    prompts, drawn = pd.DataFrame({"prompt": ["ROMEO:", "O"]}), {"max_tokens": 5, "temperature": 1.0, "seed": 3}
    expected = [generator.text(prompt, Sampling(**drawn)) for prompt in prompts["prompt"]]
    assert served.predict(prompts, params=drawn) == expected
    assert served.predict(prompts, params={"max_tokens": 0}) == ["ROMEO:", "O"]
    assert served.metadata.get_input_schema().input_names() == ["prompt"]
    assert list(served.input_example["prompt"]) == ["ROMEO:"]


def test_the_first_model_that_reached_the_target_is_candidate_and_champion(store, config, register_it, tmp_path):
    project = trained_project(tmp_path / "project")
    done = register_it(project)
    assert done == read_json(project / "reports" / "registered.json")
    assert (done["champion"], done["aliases"]) == (True, ["candidate", "champion"])
    identity = read_json(project / "models" / "run.json")
    tags = all_versions(store, config)[0].tags
    assert find_run(store, identity["fingerprint"]).info.run_id == done["run_id"] == tags["run_id"]
    assert tags["fingerprint"] == identity["fingerprint"]
    assert tags["data_sha256"] == identity["data_sha256"]
    assert tags["md5.models/model"] == "0123abcd.dir"
    assert (tags["corpus_loss"], tags["target_loss"], tags["train_tokens"]) == ("0.09", "0.1", "64")
    assert (tags["steps_to_target"], tags["tokens_to_target"]) == ("20", "160")
    assert {"git_commit", "tree_clean", "verdict"} <= tags.keys()


def test_registering_again_changes_nothing(store, config, register_it, tmp_path):
    project = trained_project(tmp_path / "project")
    first, again = register_it(project), register_it(project)
    assert again == {**first, "reason": "is the champion"}
    assert len(all_versions(store, config)) == 1


MAKING = ["create_run", "create_logged_model", "create_model_version", "set_registered_model_alias"]
CALLS = [*MAKING, "log_batch", "log_artifact", "create_registered_model", "log_outputs", "log_model_artifacts",
         "finalize_logged_model", "set_model_version_tag"]  # fmt: skip


@pytest.mark.fault
@pytest.mark.parametrize(("dying", "after"), [*((call, False) for call in CALLS), *((call, True) for call in MAKING)])
def test_killed_anywhere_a_repetition_makes_no_duplicate(
    dying, after, store, config, register_it, tmp_path, monkeypatch
):
    class Killed(BaseException):
        """Nothing catches it, as nothing catches SIGKILL."""

    project = trained_project(tmp_path / "project")
    client = type(store.client)
    whole = getattr(client, dying)

    def killed(*arguments, **named):
        if after:
            whole(*arguments, **named)
        raise Killed

    with monkeypatch.context() as crash:
        crash.setattr(client, dying, killed)
        with pytest.raises(Killed):
            register_it(project)
    for alias in aliases(store, config) if store.client.search_registered_models(f"name = '{config.model}'") else ():
        version = store.client.get_model_version_by_alias(config.model, alias)
        verify_manifest(fetch_version(store, version, "model"))  # what an alias names is whole
    done = register_it(project)
    assert done["aliases"] == ["candidate", "champion"]
    assert len(all_versions(store, config)) == 1
    run = store.client.get_run(done["run_id"])
    assert len({output.model_id for output in run.outputs.model_outputs}) == 1
    assert len(store.client.search_runs([store.experiment_id], f"tags.fingerprint = '{done['fingerprint']}'")) == 1


@pytest.mark.fault
@pytest.mark.parametrize("spoil", [shutil.rmtree, lambda folder: (folder / "model.safetensors").write_bytes(b"evil")])
def test_a_version_whose_files_are_lost_or_altered_is_mended(spoil, store, config, register_it, tmp_path):
    project = trained_project(tmp_path / "project")
    register_it(project)
    spoil(fetch_version(store, all_versions(store, config)[0], "model"))
    register_it(project)
    (version,) = all_versions(store, config)
    verify_manifest(fetch_version(store, version, "model"))


@pytest.mark.fault
@pytest.mark.parametrize(
    ("project", "foreign_loss", "reason"),
    [
        ({"corpus_loss": 0.2}, 0.0, "corpus rule not met: loss 0.2000, target 0.1"),
        ({"corpus_loss": 0.099}, 0.0, "worse: loss 0.0990 on the tokens of champion 1, whose own is 0.0900"),
        ({"corpus_loss": 0.05, "n_tokens": 32}, 0.0, "learnt 32 tokens, champion 1 64"),
        ({"corpus_loss": 0.05, "salt": 1}, 0.095, "worse: loss 0.0950 on the tokens of champion 1"),
        ({"corpus_loss": 0.05, "salt": 1}, IntegrityError("it broke"), "could not be judged: IntegrityError: it broke"),
    ],
)
def test_the_champion_stays_and_the_reason_is_told(project, foreign_loss, reason, store, config, register_it, tmp_path):
    register_it(trained_project(tmp_path / "champion"))
    done = register_it(trained_project(tmp_path / "rival", **project), foreign_loss)
    assert aliases(store, config) == {"champion": "1", "candidate": "2"}
    assert (done["champion"], done["aliases"]) == (False, ["candidate"])
    assert done["reason"].startswith(reason)
    assert store.client.get_model_version(config.model, "2").tags["verdict"] == done["reason"]
    assert store.client.get_run(done["run_id"]).info.status == "FINISHED"


@pytest.mark.parametrize(
    ("project", "foreign_loss"),
    [({"corpus_loss": 0.08}, 1.0), ({"corpus_loss": 0.095, "n_tokens": 65, "salt": 1}, 0.09)],
)
def test_a_model_that_is_no_worse_on_the_champions_tokens_takes_its_place(
    project, foreign_loss, store, config, register_it, tmp_path
):
    register_it(trained_project(tmp_path / "champion"))
    assert register_it(trained_project(tmp_path / "rival", **project), foreign_loss)["champion"]
    assert aliases(store, config) == {"champion": "2", "candidate": "2"}


@pytest.mark.fault
def test_a_target_above_the_gate_or_a_missing_evaluation_makes_no_champion(store, config, register_it, tmp_path):
    project = trained_project(tmp_path / "easy")
    run = read_json(project / "models" / "run.json")
    write_json(project / "models" / "run.json", {**run, "results": {**run["results"], "target_loss": 2.0}})
    assert register_it(project)["reason"] == "target 2 is above the gate 0.1"
    unevaluated = trained_project(tmp_path / "unevaluated")
    (unevaluated / "reports" / "metrics.json").unlink()
    assert "metrics.json not found" in register_it(unevaluated)["reason"]
    assert aliases(store, config) == {"candidate": "2"}


@pytest.mark.fault
def test_a_missing_model_is_told_from_an_altered_one(register_it, tmp_path):
    project = trained_project(tmp_path / "project")
    (project / "models" / "model" / "model.safetensors").write_bytes(b"flipped")
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        register_it(project)
    shutil.rmtree(project / "models" / "model")
    with pytest.raises(ModelMissing, match="dvc repro train"):
        register_it(project)


@pytest.mark.fault
def test_a_store_that_is_down_is_one_line(config, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ModelMissing, match=r"127\.0\.0\.1:9 fails .* `dvc repro -f -s register`") as told:
        register(tmp_path, trained_project(tmp_path / "project"), config)
    assert "\n" not in str(told.value)


def test_the_section_is_the_one_of_params_yaml():
    params = yaml.safe_load((Path(registry.__file__).parent.parent / "params.yaml").read_text())
    assert RegistryConfig.model_validate(params["registry"]).model == "shakespeare-gpt2"
