"""The files of a version: altered, missing and surplus ones are refused, and a forged model is not loaded."""

import json
import os
import re
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fixtures_registry import Canary, _keep_threads, alter, hash_tags, write_version  # noqa: F401 (a fixture)
from safetensors.torch import save_file

from pipeline.model.generator import load_generator
from pipeline.registry import artifacts
from pipeline.registry.artifacts import LISTING, TEMPORARY, _write_listing, fetch_version, open_version, verify_files
from pipeline.system.errors import IntegrityError, ModelMissing, PipelineError
from pipeline.system.files import write_manifest
from pipeline.tracking.mlflow_store import MLFLOW_DEFAULTS, TIMEOUT

MODEL, WEIGHTS, TOKENS = "artifacts/model", "artifacts/model/model.safetensors", "artifacts/tokens/train-00000.bin"
CODE = "code/pipeline/serving.py"


@pytest.fixture(scope="module")
def intact(bpe, tokenizer, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A version's folder and its tags."""
    folder = write_version(tmp_path_factory.mktemp("intact"), bpe, tokenizer)
    return folder, hash_tags(folder)


@pytest.fixture
def version(intact, tmp_path) -> tuple[Path, dict[str, str]]:
    """A copy that a test may alter."""
    return shutil.copytree(intact[0], tmp_path / "version"), intact[1]


def verify(version: tuple[Path, dict[str, str]], remove_caches: bool = True) -> None:
    verify_files(*version, "x version 1", remove_caches)


def alter_with_manifest(path: Path) -> None:
    alter(path)
    write_manifest(path.parent)


def alter_with_listing(path: Path) -> None:
    add(path)
    _write_listing(path.parents[2])


def add(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("import os")


def move(path: Path) -> None:
    path.rename(path.parents[2] / "elsewhere")


def link(path: Path) -> None:
    """Replace a file or folder by a symbolic link to itself, outside of the version."""
    (elsewhere := Path(f"{path.parents[2]}-elsewhere")).mkdir()
    path.rename(elsewhere / path.name)
    path.symlink_to(elsewhere / path.name)


@pytest.mark.parametrize(
    ("file", "spoil", "error", "named", "words"),
    [
        (WEIGHTS, alter, IntegrityError, WEIGHTS, "is altered (SHA-256"),
        (WEIGHTS, alter_with_manifest, IntegrityError, f"{MODEL}/manifest.json", "is altered (SHA-256"),
        (WEIGHTS, Path.unlink, IntegrityError, WEIGHTS, "is missing"),
        (f"{MODEL}/manifest.json", Path.unlink, IntegrityError, f"{MODEL}/manifest.json", "is missing"),
        (f"{MODEL}/model.pkl", add, IntegrityError, f"{MODEL}/model.pkl", "is not in its manifest"),
        (WEIGHTS, link, IntegrityError, WEIGHTS, "is a symbolic link"),
        (TOKENS, alter_with_manifest, IntegrityError, "artifacts/tokens/manifest.json", "is altered (SHA-256"),
        ("artifacts/tokens", link, IntegrityError, "artifacts/tokens", "is a symbolic link"),
        ("artifacts/params.yaml", alter, IntegrityError, "artifacts/params.yaml", "is altered (SHA-256"),
        ("artifacts/params.yaml", Path.unlink, IntegrityError, "artifacts/params.yaml", "is missing"),
        (CODE, alter, IntegrityError, CODE, "is altered (SHA-256"),
        ("code/pipeline/extra.py", add, IntegrityError, "code/pipeline/extra.py", "is not one of its files"),
        ("code/torch/__init__.py", add, IntegrityError, "code/torch/__init__.py", "is not one of its files"),
        ("code/pipeline/extra.py", alter_with_listing, IntegrityError, LISTING, "is altered (SHA-256"),
        ("MLmodel", alter, IntegrityError, "MLmodel", "is altered (SHA-256"),
        (LISTING, Path.unlink, IntegrityError, LISTING, "is missing"),
        (MODEL, move, ModelMissing, MODEL, "is missing"),
        ("artifacts/tokens", move, ModelMissing, "artifacts/tokens", "is missing"),
    ],
)
def test_an_altered_missing_or_surplus_file_is_named(file, spoil, error, named, words, version):  # C7
    verify(version)
    spoil(version[0] / file)
    with pytest.raises(error) as raised:
        verify(version)
    message = str(raised.value)
    assert message.startswith(f"{version[0] / named} {words}")
    assert "x version 1 cannot be used; run `dvc repro -f -s register`" in message
    assert "\n" not in message


def test_a_python_cache_is_removed_from_the_stores_folder_and_refused_in_a_copy(version):  # C7
    """Python would run a forged cache in place of the verified source."""
    add(cache := version[0] / "code" / "pipeline" / "__pycache__" / "serving.cpython-311.pyc")
    with pytest.raises(IntegrityError, match=r"__pycache__/serving\.cpython-311\.pyc is not one of its files"):
        verify(version, remove_caches=False)
    verify(version)
    assert not cache.parent.exists()


def test_a_file_that_mlflow_adds_is_allowed(version):
    (version[0] / "registered_model_meta").write_text("model_name: x")
    verify(version)


def shape_with(**changes):
    def spoil(artifacts: Path) -> None:
        path = artifacts / "model" / "config.json"
        values = json.loads(path.read_text())
        values |= {key: changes.pop(key) for key in ("trained_length",) if key in changes}
        values["model"] |= changes
        path.write_text(json.dumps(values))

    return spoil


def file_with(place: str, content: bytes):
    return lambda artifacts: (artifacts / place).write_bytes(content)


def pickled_weights(artifacts: Path) -> None:
    torch.save(Canary(artifacts / "canary"), artifacts / "model" / "model.safetensors")


def other_weights(artifacts: Path) -> None:
    save_file({"wte.weight": torch.zeros(1, 1)}, artifacts / "model" / "model.safetensors")


BEYOND = json.dumps({"wte.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
FORGERIES = {
    "a shape of terabytes": shape_with(n_layer=20, n_embd=65536, block_size=2**20),
    "positions of terabytes": shape_with(block_size=2**20),
    "heads that do not divide the width": shape_with(n_head=3),
    "vocab_size is a list": shape_with(vocab_size=[50257]),
    "vocab_size has 400 digits": shape_with(vocab_size=10**400),
    "an unknown field": shape_with(activation="exec"),
    "trained_length is a word": shape_with(trained_length="sixteen"),
    "trained_length is negative": shape_with(trained_length=-1),
    "trained_length above block_size": shape_with(trained_length=10**9),
    "config.json is a list": file_with("model/config.json", b"[]"),
    "weights with a header of 4 EB": file_with("model/model.safetensors", struct.pack("<Q", 2**62) + b"{}"),
    "weights longer than their file": file_with("model/model.safetensors", struct.pack("<Q", len(BEYOND)) + BEYOND),
    "weights are a pickle": pickled_weights,
    "weights of another model": other_weights,
    "another tokenizer": file_with("model/vocab.bpe", b"#version: 0.2\n"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_model_with_right_hashes_is_one_line(forgery, version):  # C8
    folder, _ = version
    FORGERIES[forgery](folder / "artifacts")
    verify_files(folder, hash_tags(folder), "x version 1", remove_caches=True)  # the hashes do not show it
    with pytest.raises(PipelineError) as raised:
        load_generator(folder / "artifacts")
    assert "\n" not in str(raised.value)
    assert not (folder / "artifacts" / "canary").exists()


def test_a_version_of_a_later_format_is_refused_before_the_store_is_asked(intact):
    version = SimpleNamespace(name="x", version="1", tags=intact[1] | {"format": "2"})
    with pytest.raises(IntegrityError, match=r"^x version 1 has the format 2, but this program reads format 1: "):
        open_version(None, version)


@pytest.mark.parametrize(
    ("uri", "own", "copied_to"),
    [
        ("/store/1", True, r"None"),
        ("file:///store/1", False, r"None"),
        ("mlflow-artifacts:/1", True, r".*/own"),
        ("s3://bucket/1", False, rf".*/{TEMPORARY}[^/]+"),
    ],
)
def test_only_a_remote_version_is_copied_to_the_folder_of_the_caller_if_there_is_one(
    uri, own, copied_to, tmp_path, monkeypatch
):
    def download(artifact_uri, tracking_uri, dst_path):
        assert (artifact_uri, tracking_uri) == (f"{uri}/artifacts", "http://store")
        return f"{dst_path}"

    monkeypatch.setattr("mlflow.artifacts.download_artifacts", download)
    client = SimpleNamespace(get_model_version_download_uri=lambda name, version: uri)
    store, version = SimpleNamespace(uri="http://store", client=client), SimpleNamespace(name="x", version="1")
    copy = fetch_version(store, version, copies=tmp_path / "own" if own else None)
    assert re.fullmatch(copied_to, str(copy))


@pytest.mark.parametrize(("given", "used"), [(MLFLOW_DEFAULTS[TIMEOUT], "600"), ("60", "60")])
def test_only_requests_for_files_have_a_long_timeout_unless_the_user_has_set_one(given, used, tmp_path, monkeypatch):
    monkeypatch.setenv(TIMEOUT, given)
    timeouts = []

    def download(**_) -> str:
        timeouts.append(os.environ[TIMEOUT])
        return str(tmp_path)

    monkeypatch.setattr("mlflow.artifacts.download_artifacts", download)
    monkeypatch.setattr(artifacts, "_save_files", lambda files, *_: files.mkdir())
    client = SimpleNamespace(
        get_model_version_download_uri=lambda name, version: "http://store/1",
        search_model_versions=lambda _: [],
        search_logged_models=lambda *_: [],
        create_logged_model=lambda *_, params: SimpleNamespace(model_id="m"),
        log_model_artifacts=lambda *_: timeouts.append(os.environ[TIMEOUT]),
        finalize_logged_model=lambda *_: None,
    )
    store = SimpleNamespace(uri="http://store", client=client, experiment_id="1")
    run = SimpleNamespace(info=SimpleNamespace(run_id="r"), data=SimpleNamespace(params={}))
    artifacts._store_files(store, tmp_path, run)
    fetch_version(store, SimpleNamespace(name="x", version="1"), copies=tmp_path)
    assert (timeouts, os.environ[TIMEOUT]) == ([used, used], given)
