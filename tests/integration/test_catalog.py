"""The versions of a model in a real store: found, verified, described, promoted, rolled back; forged ones refused."""

import json
import pickle
import re
import shutil
import time
from functools import partial
from pathlib import Path
from uuid import uuid4

import mlflow.pyfunc
import pytest
import yaml
from fixtures_mlflow import _cheap_versions, root_of, trained_project  # noqa: F401 (a fixture)
from fixtures_registry import (  # noqa: F401 (fixtures)
    Canary,
    _command,
    _keep_threads,
    _name,
    add_version,
    alter,
    write_version,
)
from mlflow.exceptions import MlflowException

from pipeline.config.params import load_params
from pipeline.config.sections import RegistryConfig
from pipeline.ops.plan import _require_own_name
from pipeline.ops.sources import Source
from pipeline.registry import catalog
from pipeline.registry.artifacts import LISTING_TAG
from pipeline.registry.catalog import (
    describe_version,
    find_version,
    list_versions,
    open_registry,
    open_version,
    print_versions,
    verify_versions,
)
from pipeline.registry.promotion import promote, rollback
from pipeline.registry.register import register
from pipeline.system.errors import InputError, IntegrityError, ModelMissing

OLDER = {
    "windows": {"length": 16, "batch": 4, "accumulate": 1, "order": "shuffled"},
    "optim": {"kind": "adamw", "clip": 1.0, "final_lr": 0.0},
    "target": {"loss": 0.1, "look_steps": None, "patience": None},
    "record": {"checkpoint_s": 20, "sample_prompts": ["ROMEO:"]},
    "registry": {"model": "x", "gate": 0.1},
}


@pytest.fixture(scope="module")
def intact(bpe, tokenizer, tmp_path_factory) -> Path:
    return write_version(tmp_path_factory.mktemp("intact"), bpe, tokenizer)


@pytest.fixture
def folders(intact, tmp_path) -> list[Path]:
    """Three versions' folders that a test may alter."""
    return [shutil.copytree(intact, tmp_path / "versions" / str(number)) for number in (1, 2, 3)]


def champion(store, name: str) -> str:
    return str(store.client.get_registered_model(name).aliases["champion"])


def test_a_version_is_found_by_number_or_alias_else_the_message_lists_them(store, name, intact, monkeypatch):
    for find in (lambda *a: find_version(*a, "champion"), list_versions, print_versions, rollback):
        with pytest.raises(ModelMissing, match=f"no model {name} in sqlite:.*: run `make repro`"):
            find(store, name)
    store.client.create_registered_model(name)
    with pytest.raises(ModelMissing, match=f"{name} has no version yet: run `make repro`"):
        print_versions(store, name)
    add_version(store, name, intact)
    with pytest.raises(ModelMissing, match=r"has no version 'champion': .*`python -m pipeline models promote N` makes"):
        find_version(store, name, "champion")

    store.client.set_registered_model_alias(name, "champion", "1")
    add_version(store, name, intact, "candidate")
    found = [str(find_version(store, name, which).version) for which in ("1", "champion", "candidate")]
    assert found == ["1", "1", "2"]
    with monkeypatch.context() as without_a_query_for_each:
        without_a_query_for_each.delattr(type(store.client), "get_model_version")
        assert [str(version.version) for version in list_versions(store, name)] == ["2", "1"]
        assert [version.aliases for version in list_versions(store, name)] == [["candidate"], ["champion"]]
    for which in ("3", "9" * 30, "", "²", "nobody"):
        with pytest.raises(ModelMissing) as raised:
            find_version(store, name, which)
        assert f"has no version {which!r}: choose one of candidate, champion, 2, 1" in str(raised.value)


def test_a_missing_store_is_not_created(tmp_path):  # E1
    with pytest.raises(ModelMissing, match=r"no MLflow store sqlite:.*run `make repro`"):
        open_registry(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_store_that_fails_in_the_middle_is_one_line(store, name, intact, monkeypatch):  # E1
    version = add_version(store, name, intact)

    def down(*_arguments, **_named):
        raise MlflowException("no answer\nand much more")

    for call in ("get_model_version_download_uri", "get_run", "search_registered_models"):
        monkeypatch.setattr(type(store.client), call, down)
    describe = partial(describe_version, files=intact / "artifacts")
    for read in (open_version, describe, lambda *_: promote(store, name, "1")):
        with pytest.raises(ModelMissing, match=f"fails \\({name}.*: no answer\\): repair it") as raised:
            read(store, version)
        assert "\n" not in str(raised.value)


def test_a_version_that_register_did_not_make_is_refused(store, name, tmp_path, capsys):  # C8
    store.client.create_registered_model(name)
    store.client.create_model_version(name, str(tmp_path))
    version = find_version(store, name, "1")
    with pytest.raises(IntegrityError, match=f"{name} version 1 has no hash as its tag model_sha256"):
        open_version(store, version)
    with pytest.raises(ModelMissing, match=f"{name} version 1 has no run"):
        describe_version(store, version, tmp_path)
    print_versions(store, name)
    assert capsys.readouterr().out.splitlines()[1].split()[:8] == ["1", *["-"] * 7]


def test_the_table_has_aligned_columns(store, name, intact, capsys):
    reached = {"rule": "sliding", "sliding_loss": "0.09", "steps_to_target": "20", "tokens_to_target": "160"}
    reached |= {"sliding_bits_per_byte": "0.0385"}
    data = {"git_commit": "0123456789abcdef"}
    add_version(store, name, intact, "champion", train_tokens="64", **reached, **data)
    add_version(store, name, intact, "candidate", train_tokens="3000", rule="validation", validation_loss="2.5", **data)
    print_versions(store, name)
    today = time.strftime("%Y-%m-%d", time.gmtime())
    sha256 = find_version(store, name, "1").tags["data_sha256"][:8]
    assert capsys.readouterr().out == (
        "version  aliases    rule          loss  bits/byte  target  steps to target  tokens to target  train tokens"
        "  data      commit    created\n"
        "2        candidate  validation  2.5000          -     0.1                -                 -         3,000"
        f"  {sha256}  01234567  {today}\n"
        "1        champion   sliding     0.0900     0.0385     0.1               20               160            64"
        f"  {sha256}  01234567  {today}\n"
    )


def test_verify_names_the_fault_of_each_version_and_no_rollback_goes_to_it(store, name, folders, capsys):  # C7
    for folder in folders:
        add_version(store, name, folder)
    promote(store, name, "2")
    promote(store, name, "1")
    verify_versions(store, name)
    (folders[0] / "artifacts" / "model").rename(folders[0] / "elsewhere")
    with pytest.raises(ModelMissing, match=f"altered or missing: version 1 of {name}"):
        verify_versions(store, name)
    alter(folders[1] / "artifacts" / "tokens" / "train-00000.bin")
    with pytest.raises(IntegrityError, match=f"altered or missing: version 2, 1 of {name}"):
        verify_versions(store, name)
    ok, missing, altered = "ok, model ", "is missing: ", "is altered "
    endings = (ok, ok, ok, ok, ok, missing, ok, altered, missing)
    for line, number, ending in zip(capsys.readouterr().out.splitlines(), "321" * 3, endings, strict=True):
        assert line.startswith(f"{name} version {number}: ")
        assert ending in line
    with pytest.raises(IntegrityError, match="version 2"):
        rollback(store, name)
    store.client.delete_model_version(name, "2")
    with pytest.raises(ModelMissing, match="version '2'"):
        rollback(store, name)
    assert champion(store, name) == "1"


def test_the_version_info_is_that_of_the_run_and_of_the_version(store, name, cheap_versions, tmp_path):
    project = trained_project(tmp_path / "project")
    done = register(root_of(store), project, RegistryConfig(model=name, max_target_loss=0.1))
    version = find_version(store, name, "champion")
    files = open_version(store, version)
    assert describe_version(store, version, files)["samples"] == []
    store.client.log_text(done["run_id"], "ROMEO:\nO\n", "samples/step-000010.txt")
    store.client.log_text(done["run_id"], "ROMEO:\nOh\n", "samples/step-000020.txt")
    info = describe_version(store, version, files)
    assert json.loads(json.dumps(info, allow_nan=False)) == info
    journal = [json.loads(line) for line in (project / "models" / "steps.jsonl").read_text().splitlines()]
    for key in ("loss", "grad_norm", "lr", "sliding_loss", "corpus_loss"):
        assert info["history"][key] == [[record["step"], record[key]] for record in journal if key in record]
    assert info["history"]["tokens_per_s"] == [[step, 16.0] for step in range(1, 21)]
    assert info["samples"] == [{"step": 10, "text": "ROMEO:\nO"}, {"step": 20, "text": "ROMEO:\nOh"}]
    aliases = ["candidate", "champion", "champion-sliding"]
    assert (info["name"], info["version"], info["aliases"]) == (name, "1", aliases)
    assert (info["rule"]["name"], info["rule"]["loss"], info["rule"]["held_out"]) == ("sliding", "sliding_loss", False)
    assert info["params"] == {"registry": {"model": "x", "max_target_loss": 0.1}}
    assert info["environment"] == {"torch": "2.13.0", "device": "cpu", "precision": "fp32", "threads": "2"}
    to_target = {"to_target.sliding.steps": 20, "to_target.sliding.tokens": 160}
    metrics = {"sliding_loss": 0.09, "corpus_loss": 1.5, **to_target, "tokens_per_s": 16.0}
    assert info["metrics"] == metrics
    assert info["tags"]["fingerprint"] == done["fingerprint"]
    assert info["created"] == time.strftime("%Y-%m-%d", time.gmtime())


def test_the_command_moves_the_champion_and_says_so(command, store, name, folders, monkeypatch, capsys):
    def outcome(*words: str) -> str:
        assert command("models", *words) == 0
        return capsys.readouterr().out.strip()

    def killed(*_arguments, **_named):
        raise KeyboardInterrupt

    add_version(store, name, folders[0], "champion")
    assert outcome("promote", "1") == f"{name} version 1 is already champion"
    assert command("models", "rollback") == 7
    assert f"{name} has no former champion: a rollback needs" in capsys.readouterr().err
    add_version(store, name, folders[1])
    add_version(store, name, folders[2], passed_gate="false", verdict="so\nbad")
    with monkeypatch.context() as crash:  # C5
        crash.setattr(type(store.client), "set_registered_model_alias", killed)
        assert command("models", "promote", "2") == 130
    assert champion(store, name) == "1"
    assert outcome("promote", "2") == f"{name} version 2 is now champion instead of version 1"
    with monkeypatch.context() as permissions:
        for deletes in ("delete_model_version_tag", "delete_registered_model_alias"):  # a server may forbid them
            permissions.setattr(type(store.client), deletes, None)
        for number, other in (("1", "2"), ("2", "1")):  # the second one undoes the first; version 3 plays no part
            assert outcome("rollback") == f"{name} version {number} is now champion instead of version {other}"
            assert champion(store, name) == number
            tags = [find_version(store, name, each).tags.get("rolled_back") == "true" for each in (other, number)]
            assert tags == [True, False]
    refused = f"{name} version 3 is now champion instead of version 2, although the gate refused it: so�bad"
    assert outcome("promote", "3") == refused
    store.client.delete_registered_model_alias(name, "champion")
    assert outcome("promote", "1") == f"{name} version 1 is now champion"
    assert outcome().count("\n") == 3

    assert outcome("verify").count(": ok, model ") == 3
    alter(folders[1] / "artifacts" / "model" / "model.safetensors")
    assert ": ok, model " in outcome("verify", "champion")
    for words, code in ((("verify",), 3), (("verify", "2"), 3), (("promote", "2"), 3), (("verify", "7"), 7)):
        assert command("models", *words) == code
        assert capsys.readouterr().err.count("error: ") == 1
    monkeypatch.setattr(catalog, "open_registry", None)  # nothing is opened for invalid arguments
    for words in ("promote", "list 1", "rollback 1", "verify --retrain", "promote 1 --retrain"):
        assert command("models", *words.split()) == InputError.exit_code
        assert capsys.readouterr().err.count("\n") == 1


def test_a_name_that_the_registry_has_for_another_text_is_refused(store, name, folders, command, monkeypatch, tmp_path):
    (tmp_path / "params.yaml").write_text("{}")  # the registry alone knows the name
    given, params = Source("texts/mine.txt", name, "/home/me/mine.txt"), load_params()
    _require_own_name(given, params)  # there is no such model
    for folder, text in zip(folders, ("null", "texts/mine.txt", "texts/yours.txt"), strict=True):
        _require_own_name(given, params)
        (folder / "artifacts" / "params.yaml").write_text(f"corpus: {{source: {text}}}")
        add_version(store, name, folder)
    with pytest.raises(InputError, match=f"the model name {name} belongs to the text texts/yours.txt: choose another"):
        _require_own_name(given, params)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    _require_own_name(given, params)


def test_a_version_with_older_parameters_is_usable(store, name, folders, command, tmp_path):
    """params.yaml from before seq_len, optim.name, eval_interval, checkpoint.* and max_target_loss."""
    ((folder := folders[0]) / "artifacts" / "params.yaml").write_text(yaml.safe_dump(OLDER))
    version = add_version(store, name, folder, "champion")
    assert command("models") == command("models", "verify") == command("models", "promote", "1") == 0
    assert command("generate", "ROMEO:", "--max-tokens", "2") == 0
    assert command("export", "hf", "hf") == command("export", "space", "space") == 0
    assert describe_version(store, version, folder / "artifacts")["params"] == OLDER
    assert yaml.safe_load((tmp_path / "hf" / "params.yaml").read_text()) == OLDER


def make_hostile(folder: Path, canary: Path) -> None:
    """Give a version a loader, code, pickles and requirements that each touch a file when they are run."""
    module = f"hostile_{uuid4().hex[:8]}"
    touch = f"from pathlib import Path\nPath({str(canary)!r}).touch()\n"
    for place in (f"code/{module}.py", "code/pipeline/__init__.py", "serving.py", "package/setup.py"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(f"{touch}def _load_pyfunc(path): return open")
    (folder / "python_model.pkl").write_bytes(pickle.dumps(Canary(canary)))
    flavor = {"loader_module": module, "code": "code", "python_model": "python_model.pkl", "env": "conda.yaml"}
    flavors = {"python_function": flavor, "sklearn": {"pickled_model": "python_model.pkl"}}
    (folder / "MLmodel").write_text(yaml.safe_dump({"flavors": flavors, "mlflow_version": "3.17"}))
    (folder / "requirements.txt").write_text(f"{folder / 'package'}\n")
    pip = {"pip": [str(folder / "package")]}
    (folder / "conda.yaml").write_text(yaml.safe_dump({"dependencies": ["python", pip]}))


def test_no_command_runs_anything_of_a_forged_champion(store, name, folders, command, tmp_path, capfd):  # C8
    folder, canary = folders[0], tmp_path / "canary"
    make_hostile(folder, canary)
    add_version(store, name, folder, "champion")
    for words in (("verify",), ("verify", "1"), ("promote", "1"), ()):
        assert command("models", *words) == 0
    assert command("generate", "ROMEO:", "--max-tokens", "2") == 0
    assert command("export", "hf", "hf") == command("export", "space", "space") == 0
    assert command("models", "verify", "1", "--retrain") == 7  # its run has no identity.json
    assert not canary.exists()
    exported = {path.name for kind in ("hf", "space") for path in (tmp_path / kind).rglob("*")}
    assert not exported & {"python_model.pkl", "MLmodel", "conda.yaml"}
    assert [line.split(":")[0] for line in capfd.readouterr().err.splitlines() if line.startswith("error")] == ["error"]

    with pytest.raises(MlflowException):  # the control: MLflow runs it, and finds no model in it
        mlflow.pyfunc.load_model(str(folder))
    assert canary.exists()
    canary.unlink()
    pickle.loads((folder / "python_model.pkl").read_bytes())
    assert canary.exists()


COMMANDS = (["generate", "O"], ["export", "hf", "new"], ["models", "verify", "1"], ["models", "promote", "1"])


def test_no_command_uses_an_altered_or_lost_champion(store, name, folders, command, tmp_path, capfd):  # C7, C8
    add_version(store, name, folder := folders[0], "champion")
    alter(folder / "artifacts" / "params.yaml")

    def expect(code: int, words: str, commands=COMMANDS) -> None:
        for arguments in commands:
            assert command(*arguments) == code
            (line,) = capfd.readouterr().err.splitlines()
            assert re.search(words, line), line
        assert not (tmp_path / "new").exists()

    cannot = f"{name} version 1 cannot be used"
    expect(3, rf"params\.yaml is altered \(SHA-256 \w{{64}}, expected \w{{64}}\): {cannot}")
    (folder / "artifacts" / "model").rename(tmp_path / "elsewhere")
    expect(7, f"model is missing: {cannot}")
    (tmp_path / "elsewhere").rename(folder / "artifacts" / "model")

    export = [["export", "hf", "new", "--version", "2"]]
    (folder / "artifacts" / "params.yaml").write_text("!!python/object/apply:pathlib.Path.touch [canary]")
    add_version(store, name, folder)
    expect(3, r"^error: .*params\.yaml", export)
    assert not (tmp_path / "canary").exists()
    store.client.set_model_version_tag(name, "2", "target_loss", "low")
    expect(3, "has no valid tag target_loss", export)
    store.client.set_model_version_tag(name, "2", LISTING_TAG, "no\nhash")
    expect(3, f"{name} version 2 has no hash as its tag {LISTING_TAG}", export)
