"""A version's files and the code that MLflow would run: hashed, restored, never run by us, whoever forged them."""

import json
import pickle
import re
import shutil
import struct
import sys
from pathlib import Path
from uuid import uuid4

import mlflow.pyfunc
import pytest
import torch
import yaml
from fixtures_mlflow import _cheap_versions, root_of, trained_project  # noqa: F401 (a fixture)
from mlflow.exceptions import MlflowException
from safetensors.torch import save_file

from pipeline import __main__
from pipeline.config.sections import ModelConfig, RegistryConfig
from pipeline.data.vocab import Vocabulary
from pipeline.model.gpt import GPT
from pipeline.model.weights import save_model
from pipeline.registry import artifacts as versions
from pipeline.registry.artifacts import LISTING, LISTING_TAG, _write_listing
from pipeline.registry.catalog import describe_version, find_version, identity_of, open_version, print_versions, verify
from pipeline.registry.promotion import promote
from pipeline.registry.register import register
from pipeline.system.entrypoint import exit_code_of
from pipeline.system.errors import IntegrityError
from pipeline.system.files import MANIFEST, sha256_file, write_manifest

OLDER = {
    "windows": {"length": 16, "batch": 4, "accumulate": 1, "order": "shuffled"},
    "optim": {"kind": "adamw", "clip": 1.0, "final_lr": 0.0},
    "target": {"loss": 0.1, "look_steps": None, "patience": None},
    "record": {"checkpoint_s": 20, "sample_prompts": ["ROMEO:"]},
    "registry": {"model": "x", "gate": 0.1},
}
SHAPE = {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 16, "vocab_size": 50257, "dropout": 0.0}


@pytest.fixture
def name() -> str:
    """A registered model that no other test has."""
    return f"model-{uuid4().hex[:8]}"


@pytest.fixture
def register_it(store, name, tmp_path, cheap_versions):
    """Register one tiny project, again and again; return the version."""
    project = trained_project(tmp_path / "project")

    def call():
        register(root_of(store), project, RegistryConfig(model=name, max_target_loss=0.1))
        return find_version(store, name, "champion")

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- the files beside model and tokens


def alter(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def add_file(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("import os")


def list_it_too(path: Path) -> None:
    """Add a file, and forge the listing that says so."""
    add_file(path)
    _write_listing(path.parents[2])


@pytest.mark.fault
@pytest.mark.parametrize(
    ("file", "spoil", "named", "words"),
    [
        ("code/pipeline/serving.py", alter, "code/pipeline/serving.py", "is altered (SHA-256"),
        ("code/pipeline/serving.py", Path.unlink, "code/pipeline/serving.py", "is missing"),
        ("code/pipeline/extra.py", add_file, "code/pipeline/extra.py", "is not one of its files"),
        ("code/torch/__init__.py", add_file, "code/torch/__init__.py", "is not one of its files"),
        ("code/pipeline/extra.py", list_it_too, LISTING, "is altered (SHA-256"),
        ("MLmodel", alter, "MLmodel", "is altered (SHA-256"),
        (LISTING, Path.unlink, LISTING, "is missing"),
    ],
)
def test_code_that_mlflow_would_run_is_what_was_registered(file, spoil, named, words, store, name, register_it):  # C7
    version = register_it()
    whole = open_version(store, version).parent
    spoil(whole / file)
    with pytest.raises(IntegrityError) as told:
        open_version(store, version)
    assert str(told.value).startswith(f"{whole / named} {words}")
    assert f"{name} version 1 cannot be used; `dvc repro -f -s register`" in str(told.value)


@pytest.mark.security
def test_what_python_cached_beside_the_code_is_removed_and_in_a_foreign_store_refused(store, register_it, monkeypatch):
    """A forged cache is run in place of its source, and Python makes one wherever MLflow loads a version."""
    version = register_it()
    cache = open_version(store, version).parent / "code" / "pipeline" / "__pycache__" / "serving.cpython-311.pyc"
    add_file(cache)
    open_version(store, version)
    assert not cache.parent.exists()
    add_file(cache)
    monkeypatch.setattr(versions, "_is_local", lambda _uri: False)
    with pytest.raises(IntegrityError, match=r"__pycache__/serving\.cpython-311\.pyc is not one of its files"):
        open_version(store, version)


def test_what_mlflow_notes_in_a_version_that_it_loads_does_no_harm(store, register_it):
    version = register_it()
    (open_version(store, version).parent / "registered_model_meta").write_text("model_name: x")
    assert verify(store, version).endswith(f"ok, model {version.tags['model_sha256']}")


def test_a_version_of_before_the_listing_stays_usable_and_is_said_to_be_unchecked(store, name, register_it):
    version = register_it()
    store.client.delete_model_version_tag(name, "1", LISTING_TAG)
    alter(open_version(store, version).parent / "MLmodel")
    said = verify(store, find_version(store, name, "1"))
    assert said.endswith("its code has no hash and is not verified")
    assert LISTING_TAG not in register_it().tags  # nothing that nobody checked is given a hash


@pytest.mark.fault
def test_a_version_whose_code_was_altered_is_registered_again_and_nothing_of_it_is_written_over(
    store, name, register_it
):
    version = register_it()
    whole = open_version(store, version).parent
    before = contents(whole)
    add_file(whole / "code" / "pipeline" / "planted.py")
    alter(whole / "MLmodel")
    altered = contents(whole)
    again = register_it()
    assert str(again.version) == "2"  # champion, as its weights are the same
    assert contents(open_version(store, again).parent) == before
    assert contents(whole) == altered
    assert register_it().tags == again.tags  # and that was all


def test_a_version_of_older_parameters_is_listed_verified_described_and_exported(store, name, real, forged, tmp_path):
    """params.yaml of before seq_len, optim.name, eval_interval, checkpoint.* and max_target_loss."""

    def older(artifacts: Path) -> None:
        (artifacts / "params.yaml").write_text(yaml.safe_dump(OLDER))

    command = forged(older)
    assert command("models") == command("models", "verify") == command("models", "promote", "1") == 0
    assert command("generate", "ROMEO:", "--max-tokens", "2") == 0
    assert command("export", "hf", str(tmp_path / "hf")) == command("export", "space", str(tmp_path / "space")) == 0
    info = describe_version(store, find_version(store, name, "1"))
    assert info["params"] == OLDER
    assert yaml.safe_load((tmp_path / "hf" / "params.yaml").read_text()) == OLDER


# -- forged by hand, through MLflow's own interface


@pytest.fixture(scope="module")
def real(bpe, tmp_path_factory) -> Path:
    """A version's folder that loads."""
    whole = tmp_path_factory.mktemp("real")
    project = trained_project(whole / "project")
    shape = ModelConfig(**SHAPE, fold_vocab=False)
    save_model(whole / "artifacts" / "model", GPT(shape, Vocabulary.full(50257)), bpe)
    shutil.copytree(project / "data" / "tokens", whole / "artifacts" / "tokens")
    shutil.rmtree(project)
    (whole / "artifacts" / "params.yaml").write_text("windows: {length: 16}\n")
    return whole


@pytest.fixture
def forged(store, name, real, tmp_path, monkeypatch):
    """Make a folder that `spoil` has changed champion, all hashes in its tags right; return the command line."""
    whole = tmp_path / "forged"
    shutil.copytree(real, whole)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"registry": {"model": name, "max_target_loss": 0.1}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)

    def call(spoil=lambda _artifacts: None, **tags):
        spoil(whole / "artifacts")
        for folder in ("model", "tokens"):
            if not (whole / "artifacts" / folder / MANIFEST).is_symlink():
                write_manifest(whole / "artifacts" / folder)
        hashes = {f"{tag}_sha256": sha256_file(whole / "artifacts" / folder / MANIFEST)
                  for tag, folder in (("model", "model"), ("data", "tokens"))}  # fmt: skip
        hashes |= {LISTING_TAG: _write_listing(whole), "fingerprint": "f" * 16, "target_loss": "0.1"}
        run = store.client.create_run(store.experiment_id)
        store.client.create_registered_model(name)
        store.client.create_model_version(name, str(whole), run.info.run_id, tags=hashes | tags)
        store.client.set_registered_model_alias(name, "champion", "1")

        def command(*words) -> int:
            monkeypatch.setattr(sys, "argv", ["pipeline", *words])
            arguments = __main__.parse()
            return exit_code_of(lambda: arguments.command(arguments))

        return command

    return call


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Touching:
    """Touches a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def make_hostile(whole: Path, canary: Path) -> None:
    """Give a version a loader, code, pickles and requirements that each leave a canary where they are run."""
    module = f"hostile_{uuid4().hex[:8]}"
    leave = f"from pathlib import Path\nPath({str(canary)!r}).touch()\n"
    for place in (f"code/{module}.py", "code/pipeline/__init__.py", "serving.py", "package/setup.py"):
        (whole / place).parent.mkdir(parents=True, exist_ok=True)
        (whole / place).write_text(f"{leave}def _load_pyfunc(path): return open")
    (whole / "python_model.pkl").write_bytes(pickle.dumps(Touching(canary)))
    flavor = {"loader_module": module, "code": "code", "python_model": "python_model.pkl", "env": "conda.yaml"}
    flavors = {"python_function": flavor, "sklearn": {"pickled_model": "python_model.pkl"}}
    (whole / "MLmodel").write_text(yaml.safe_dump({"flavors": flavors, "mlflow_version": "3.17"}))
    (whole / "requirements.txt").write_text(f"{whole / 'package'}\n")
    pip = {"pip": [str(whole / "package")]}
    (whole / "conda.yaml").write_text(yaml.safe_dump({"dependencies": ["python", pip]}))


@pytest.mark.security
def test_nothing_that_a_forged_champion_brings_is_run(store, name, forged, tmp_path, capfd):  # C8
    canary = tmp_path / "canary"
    command = forged(lambda artifacts: make_hostile(artifacts.parent, canary))
    for words in (("verify",), ("verify", "1"), ("promote", "1"), ()):
        assert command("models", *words) == 0
    assert command("generate", "ROMEO:", "--max-tokens", "2") == 0
    assert command("export", "hf", str(tmp_path / "hf")) == command("export", "space", str(tmp_path / "space")) == 0
    assert command("models", "verify", "1", "--retrain") == 7  # nor does its run say what trained it
    assert not canary.exists()
    exported = {path.name for kind in ("hf", "space") for path in (tmp_path / kind).rglob("*")}
    assert not exported & {"python_model.pkl", "MLmodel", "conda.yaml"}
    with pytest.raises(MlflowException):  # the control: MLflow runs it, and finds no model in it
        mlflow.pyfunc.load_model(str(tmp_path / "forged"))
    assert canary.exists()
    canary.unlink()
    pickle.loads((tmp_path / "forged" / "python_model.pkl").read_bytes())
    assert canary.exists()
    errors = capfd.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in errors if line.startswith("error")] == ["error"]  # of --retrain


def shape_with(**changes):
    def spoil(artifacts: Path) -> None:
        path = artifacts / "model" / "config.json"
        shape = json.loads(path.read_text())
        shape["model"] |= {key: value for key, value in changes.items() if key != "trained_length"}
        path.write_text(json.dumps(shape | {key: changes[key] for key in changes if key == "trained_length"}))

    return spoil


def file_with(place: str, content: bytes):
    return lambda artifacts: (artifacts / place).write_bytes(content)


def pickled_weights(artifacts: Path) -> None:
    torch.save(Touching(artifacts.parents[1] / "canary"), artifacts / "model" / "model.safetensors")


def other_weights(artifacts: Path) -> None:
    save_file({"wte.weight": torch.zeros(1, 1)}, artifacts / "model" / "model.safetensors")


def linked(artifacts: Path) -> None:
    (weights := artifacts / "model" / "model.safetensors").rename(artifacts.parents[1] / "elsewhere")
    weights.symlink_to(artifacts.parents[1] / "elsewhere")


def linked_folder(artifacts: Path) -> None:
    (artifacts / "tokens").rename(artifacts.parents[1] / "elsewhere")
    (artifacts / "tokens").symlink_to(artifacts.parents[1] / "elsewhere")


NESTED = b"[" * 100_000
BEYOND = json.dumps({"wte.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
HEADER = struct.Struct("<8sHHIQ")  # of a token file: magic, format, dtype, vocab_size, number of ids
FORGERIES = {
    "a shape of terabytes": shape_with(n_layer=1000, n_embd=65536, block_size=2**20),
    "positions of terabytes": shape_with(block_size=2**20),
    "heads that do not divide": shape_with(n_head=3),
    "a vocabulary that is a list": shape_with(vocab_size=[50257]),
    "a vocabulary that is none": shape_with(vocab_size=None),
    "a vocabulary beyond all numbers": shape_with(vocab_size=10**400),
    "a field too many": shape_with(activation="exec"),
    "a trained length in words": shape_with(trained_length="sixteen"),
    "a trained length below zero": shape_with(trained_length=-1),
    "a trained length beyond the positions": shape_with(trained_length=10**9),
    "a shape that is a list": file_with("model/config.json", b"[]"),
    "a shape that is no JSON": file_with("model/config.json", b"\xff{"),
    "a shape nested without end": file_with("model/config.json", NESTED),
    "weights of an endless header": file_with("model/model.safetensors", struct.pack("<Q", 2**62) + b"{}"),
    "weights beyond their file": file_with("model/model.safetensors", struct.pack("<Q", len(BEYOND)) + BEYOND),
    "weights that are a pickle": pickled_weights,
    "weights of another model": other_weights,
    "weights that are a link": linked,
    "tokens that are a link": linked_folder,
    "tokens of an endless vocabulary": file_with(
        "tokens/train-00000.bin", HEADER.pack(b"GPT2TOKS", 1, 16, 2**32 - 1, 1) + b"\0\0"
    ),
    "more tokens than bytes": file_with("tokens/train-00000.bin", HEADER.pack(b"GPT2TOKS", 1, 16, 50257, 2**62)),
    "another tokenizer": file_with("model/vocab.bpe", b"#version: 0.2\n"),
}


@pytest.mark.fault
@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (
            lambda artifacts: alter(artifacts / "params.yaml"),
            3,
            r"params\.yaml is altered \(SHA-256 \w{64}, expected \w{64}\)",
        ),
        (lambda artifacts: (artifacts / "model").rename(artifacts / "elsewhere"), 7, "model is missing"),
    ],
)
def test_no_command_takes_an_altered_or_lost_champion(spoil, code, words, name, forged, tmp_path, capfd):  # C7
    command = forged()
    spoil(tmp_path / "forged" / "artifacts")
    commands = (["generate", "O"], ["export", "hf", "new"], ["models", "verify", "1"], ["models", "promote", "1"])
    for words_of in commands:
        assert command(*words_of) == code
        (line,) = capfd.readouterr().err.splitlines()
        assert re.search(f"{words}: {name} version 1 cannot be used", line), line
    assert not (tmp_path / "new").exists()


@pytest.mark.security
@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_champion_that_is_no_model_is_one_line(forgery, forged, tmp_path, capfd):  # C8
    command = forged(FORGERIES[forgery])
    assert command("generate", "ROMEO:", "--max-tokens", "2") in (3, 7)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert not (tmp_path / "canary").exists()


@pytest.mark.security
@pytest.mark.parametrize(
    "params",
    [b"!!python/object/apply:pathlib.Path.touch [canary]", b"- a list", b"\xff", b"a: {", NESTED],
    ids=["an object", "a list", "no text", "torn", "nested"],
)
def test_forged_parameters_are_one_line(params, forged, tmp_path, capfd):  # C8
    command = forged(file_with("params.yaml", params))
    assert command("export", "hf", str(tmp_path / "hf")) in (3, 7)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "hf").exists()


@pytest.mark.security
@pytest.mark.parametrize("identity", [b"[]", b"{}", b'{"sources": [], "environment": {}}', NESTED])
def test_a_forged_identity_is_told_before_anything_is_trained(
    identity, store, name, forged, tmp_path, monkeypatch
):  # C8
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    forged()
    (tmp_path / "identity.json").write_bytes(identity)
    version = find_version(store, name, "1")
    store.client.log_artifact(version.run_id, str(tmp_path / "identity.json"))
    with pytest.raises(IntegrityError, match=r"identity\.json"):
        identity_of(store, version)


@pytest.mark.security
def test_forged_tags_are_shown_as_they_stand_and_obeyed_by_no_terminal(store, name, forged, capsys):
    tags = {
        "corpus_loss": "low",
        "train_tokens": "∞",
        "target_loss": "\x1b[2J",
        "verdict": "so\nwell",
        "passed_gate": "false",
    }
    forged(**tags)
    print_versions(store, name)
    promote_said = promote(store, name, "1")
    said = capsys.readouterr().out
    assert all(word in said for word in ("low", "∞", "�[2J"))
    assert "\x1b" not in said
    assert "\n" not in promote_said + promote(store, name, "champion")


@pytest.mark.security
def test_a_hash_in_a_forged_tag_is_a_hash_or_refused(store, name, forged):
    forged(files_sha256="no\nhash")
    with pytest.raises(IntegrityError, match=f"{name} version 1 has no hash as its tag files_sha256"):
        open_version(store, find_version(store, name, "1"))


@pytest.mark.security
@pytest.mark.parametrize("tags", [{"target_loss": "low"}, {"steps_to_target": "x"}, {"tokens_to_target": "1e9"}])
def test_forged_figures_are_one_line_where_they_are_reckoned_with(tags, forged, tmp_path, capfd):  # C8
    assert forged(**tags)("export", "hf", str(tmp_path / "hf")) == 3
    (line,) = capfd.readouterr().err.splitlines()
    assert f"has no sound tag {next(iter(tags))}" in line
