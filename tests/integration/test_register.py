import json
import re
import shutil
from pathlib import Path
from uuid import uuid4

import mlflow.pyfunc
import pandas as pd
import pytest
import torch
import yaml
from fixtures_mlflow import _cheap_versions, root_of, trained_project  # noqa: F401 (a fixture)

from pipeline.config.sections import ModelConfig, RegistryConfig
from pipeline.data.vocab import Vocabulary
from pipeline.model.generator import load_generator
from pipeline.model.gpt import GPT
from pipeline.model.sampling import Sampling
from pipeline.model.weights import save_model
from pipeline.registry.artifacts import fetch_version, open_version
from pipeline.registry.register import register
from pipeline.system.errors import IntegrityError, ModelMissing
from pipeline.system.files import read_json, verify_manifest, write_json
from pipeline.system.host import SOURCE_ROOT
from pipeline.tracking.mlflow_runs import runs_of
from pipeline.tracking.mlflow_store import Store


@pytest.fixture
def config() -> RegistryConfig:
    """A registered model that no other test has."""
    return RegistryConfig(model=f"model-{uuid4().hex[:8]}", max_target_loss=0.1)


@pytest.fixture
def register_it(store: Store, config: RegistryConfig, cheap_versions: None):
    """Register a project; a loss on foreign tokens is what the test says."""

    def call(project: Path, foreign_loss: float | Exception = 0.0) -> dict:
        def loss_on(_project: Path, tokens: Path) -> float:
            verify_manifest(tokens)
            if isinstance(foreign_loss, Exception):
                raise foreign_loss
            return foreign_loss

        return register(root_of(store), project, config, loss_on)

    return call


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
    files = fetch_version(
        store, store.client.get_model_version(config.model, done["version"]), "artifacts/model"
    ).parent.parent
    names = [path.relative_to(files).as_posix() for path in files.rglob("*") if path.is_file()]
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".pth", ".pyc"))]
    assert {"artifacts/params.yaml", "artifacts/tokens/train-00000.bin", "code/pipeline/model/gpt.py"} <= set(names)
    assert "code/pipeline/report/templates/model_card.md.j2" in names
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
    assert runs_of(store, identity["fingerprint"])[0].info.run_id == done["run_id"] == tags["run_id"]
    assert tags["fingerprint"] == identity["fingerprint"]
    assert tags["data_sha256"] == identity["data_sha256"]
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


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.mark.fault
@pytest.mark.parametrize(("dying", "after"), [*((call, False) for call in CALLS), *((call, True) for call in MAKING)])
def test_killed_anywhere_a_repetition_makes_no_duplicate(
    dying, after, store, config, register_it, tmp_path, monkeypatch
):  # C5
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
        verify_manifest(fetch_version(store, version, "artifacts/model"))  # what an alias names is whole
    done = register_it(project)
    assert done["aliases"] == ["candidate", "champion"]
    assert len(all_versions(store, config)) == 1
    run = store.client.get_run(done["run_id"])
    models = store.client.search_logged_models([store.experiment_id], f"source_run_id = '{done['run_id']}'")
    assert [model.status for model in models] == ["READY"]  # none is left half-filled
    assert len({output.model_id for output in run.outputs.model_outputs}) == 1
    assert len(store.client.search_runs([store.experiment_id], f"tags.fingerprint = '{done['fingerprint']}'")) == 1


@pytest.mark.fault
@pytest.mark.slow
def test_dying_at_any_call_that_changes_the_store_the_champion_loads_and_the_repetition_is_complete(  # C5
    store, cheap_versions, tmp_path, monkeypatch
):
    client = type(store.client)
    changing = [name for name in dir(client) if name.startswith(("create_", "log_", "set_", "update_", "finalize_"))]
    dying_at, whole = 0, False
    while not whole:
        dying_at += 1
        config, place = RegistryConfig(model=f"model-{uuid4().hex[:8]}", max_target_loss=0.1), tmp_path / str(dying_at)
        register(root_of(store), trained_project(place / "champion"), config)
        rival, calls = trained_project(place / "rival", corpus_loss=0.08), iter(range(1, 1000))

        def dying(call, calls=calls, last=dying_at):
            def counted(*arguments, **named):
                if next(calls) == last:
                    raise Killed
                return call(*arguments, **named)

            return counted

        with monkeypatch.context() as crash:
            for name in changing:
                crash.setattr(client, name, dying(getattr(client, name)))
            try:
                register(root_of(store), rival, config)
                whole = True
            except Killed:
                pass
        for number in aliases(store, config).values():
            open_version(store, store.client.get_model_version(config.model, number))
        done = register(root_of(store), rival, config)
        assert aliases(store, config) == {"champion": "2", "candidate": "2"}
        assert len(all_versions(store, config)) == 2
        assert len(store.client.search_runs([store.experiment_id], f"tags.fingerprint = '{done['fingerprint']}'")) == 1
        assert len(store.client.get_run(done["run_id"]).outputs.model_outputs) == 1
        assert store.client.get_model_version(config.model, "2").tags["passed_gate"] == "true"
    assert dying_at > 20, "run, rows, figures, reports, model, files, version, tags and two aliases"


@pytest.mark.fault
@pytest.mark.parametrize("spoil", [shutil.rmtree, lambda folder: (folder / "model.safetensors").write_bytes(b"evil")])
def test_a_champion_whose_files_are_lost_or_altered_is_registered_again_and_followed_by_that(
    spoil, store, config, register_it, tmp_path
):
    project = trained_project(tmp_path / "project")
    register_it(project)
    spoil(folder := fetch_version(store, all_versions(store, config)[0], "artifacts/model"))
    left = [path.read_bytes() for path in folder.glob("*")]
    assert register_it(project)["version"] == "2"
    assert aliases(store, config) == {"champion": "2", "candidate": "2"}
    open_version(store, store.client.get_model_version(config.model, "2"))
    assert [path.read_bytes() for path in folder.glob("*")] == left  # nothing is written over
    assert register_it(project)["version"] == "2"


@pytest.mark.fault
@pytest.mark.parametrize(
    ("project", "foreign_loss", "reason"),
    [
        ({"corpus_loss": 0.099}, 0.0, "worse: loss 0.0990 on the tokens of champion 1, whose own is 0.0900"),
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


def edited(name: str, **changes):
    """Change keys of a report by hand; `results_x` is x among the results of a run."""

    def edit(project: Path) -> None:
        values = json.loads((project / name).read_text())
        values |= {key: value for key, value in changes.items() if not key.startswith("results_")}
        inner = {key.removeprefix("results_"): value for key, value in changes.items() if key.startswith("results_")}
        values |= {"results": values["results"] | inner} if inner else {}
        (project / name).write_text(json.dumps(values))

    return edit


def both(*edits):
    return lambda project: [edit(project) for edit in edits]


METRICS, RUN = "reports/metrics.json", "models/run.json"


@pytest.mark.fault
@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda project: (project / METRICS).unlink(), "is not evaluated: `dvc repro evaluate`"),
        (
            edited(METRICS, corpus_loss=0.01),
            "metrics.json says loss 0.0100, training measured 0.0900",
        ),
        (edited(METRICS, corpus_loss="0.01"), "could not be judged: TypeError"),
        (
            both(edited(METRICS, corpus_loss=0.01), edited(RUN, results_corpus_loss=0.01)),
            r"run\.json disagrees with its journal: loss 0\.0100 at step 20",
        ),
        (edited(RUN, results_model_step=10), r"run\.json disagrees with its journal: loss 0\.0900 at step 10"),
        (edited(RUN, results_model_step=99), "could not be judged: KeyError: 99"),
    ],
)
def test_figures_that_were_edited_or_are_missing_make_no_champion(  # C6
    edit, reason, store, config, register_it, tmp_path
):
    register_it(trained_project(tmp_path / "champion"))
    edit(rival := trained_project(tmp_path / "rival"))
    done = register_it(rival)
    assert re.match(reason, done["reason"]), done["reason"]
    assert aliases(store, config) == {"champion": "1", "candidate": "2"}
    assert store.client.get_run(done["run_id"]).info.status == "FINISHED"


@pytest.mark.fault
@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (edited(METRICS, fingerprint="another"), "is not about the run"),
        (lambda project: (project / METRICS).write_text("{"), "is not JSON"),
        (edited(RUN, fingerprint="another"), "is not about the run another"),
        (edited(RUN, results_to_target=None), r"run\.json is not the record of a run"),
        (edited(RUN, results={}), r"run\.json is not the record of a run"),
        (lambda project: (project / RUN).write_text("[]"), r"run\.json is not the record of a run"),
        (
            lambda project: shutil.copytree(
                trained_project(project / "other", salt=7) / "data", project / "data", dirs_exist_ok=True
            ),
            "is not what the model was trained on",
        ),
    ],
)
def test_what_does_not_belong_together_is_not_registered(edit, words, store, config, register_it, tmp_path):  # C6
    register_it(trained_project(tmp_path / "champion"))
    edit(rival := trained_project(tmp_path / "rival"))
    with pytest.raises(IntegrityError, match=words) as told:
        register_it(rival)
    assert "\n" not in str(told.value)
    assert aliases(store, config) == {"champion": "1", "candidate": "1"}
    assert len(all_versions(store, config)) == 1


@pytest.mark.security
def test_beside_a_champion_that_was_forged_the_gate_stays_shut_and_says_why(store, config, register_it, tmp_path):
    store.client.create_registered_model(config.model)
    store.client.create_model_version(config.model, str(tmp_path), tags={"corpus_loss": "0.0"})
    store.client.set_registered_model_alias(config.model, "champion", "1")
    done = register_it(trained_project(tmp_path / "project"))
    assert done["reason"].endswith("champion 1 has no tag data_sha256, it was not made by `register`")
    assert aliases(store, config) == {"champion": "1", "candidate": "2"}


@pytest.mark.security
def test_forged_tags_of_a_version_are_set_right_when_it_is_registered_again(store, config, register_it, tmp_path):
    register_it(trained_project(tmp_path / "champion"))
    worse = trained_project(tmp_path / "worse", corpus_loss=0.099)
    register_it(worse)
    store.client.set_model_version_tag(config.model, "2", "corpus_loss", "0.0")
    assert register_it(worse)["reason"].startswith("worse: loss 0.0990")
    assert store.client.get_model_version(config.model, "2").tags["corpus_loss"] == "0.099"


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


def test_run_json_is_read_once(register_it, tmp_path, monkeypatch):
    project, read = trained_project(tmp_path / "project"), []
    text = Path.read_text

    def counted(path: Path, *arguments, **named) -> str:
        read.append(path.name)
        return text(path, *arguments, **named)

    monkeypatch.setattr(Path, "read_text", counted)
    register_it(project)
    assert read.count("run.json") == 1


@pytest.mark.parametrize("promoted", [True, False])
def test_models_of_other_texts_are_compared_on_the_champions_tokens_without_a_stand_in(
    promoted, store, config, cheap_versions, tmp_path, bpe
):
    """Both models are the same; the champion's own loss, here made up, decides."""
    torch.manual_seed(0)
    shape = ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=16, vocab_size=50257, dropout=0.0, fold_vocab=True)
    model, threads = GPT(shape, Vocabulary.full(50257)), torch.get_num_threads()
    train = yaml.safe_load((SOURCE_ROOT / "params.yaml").read_text())["train"]
    for number in range(2):
        project = trained_project(tmp_path / str(number), corpus_loss=0.05, n_tokens=64 + number, salt=number)
        save_model(project / "models" / "model", model, bpe)
        (project / "params.yaml").write_text(yaml.safe_dump({"train": train}))
        old = read_json(project / "models" / "run.json")
        old["params"]["windows"] = {"length": 8}  # as in records of before `seq_len`, without train.processes too
        write_json(project / "models" / "run.json", old)
        done = register(root_of(store), project, config)
        if number == 0:  # an untrained model has about 11 nats per token
            store.client.set_model_version_tag(config.model, "1", "corpus_loss", "20" if promoted else "5")
    torch.set_num_threads(threads)
    assert re.fullmatch(
        r"(worse: )?loss 1\d\.\d+ on the tokens of champion 1, whose own is (20|5)\.0000", done["reason"]
    )
    assert done["champion"] is promoted
