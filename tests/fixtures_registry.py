"""Small real models, versions of them that are registered without a training, and servers of them."""

import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
import torch
import yaml

from pipeline import __main__ as command_line
from pipeline.config.sections import ModelConfig
from pipeline.data.token_files import write_shard
from pipeline.data.tokenizer import Tokenizer
from pipeline.data.vocab import Vocabulary
from pipeline.model.gpt import GPT
from pipeline.model.weights import save_model
from pipeline.registry.artifacts import FOLDER_TAGS, LISTING_TAG, _write_listing
from pipeline.registry.catalog import find_version
from pipeline.report.cards import TINY_SHAKESPEARE
from pipeline.system.files import MANIFEST, sha256_file, write_manifest
from pipeline.tracking.mlflow_store import Store
from tests.waiting import wait_until

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n"
SECRET = "postgresql://me:s3cret@db.example/studies"


@pytest.fixture(name="name")
def _name() -> str:
    """The name of a registered model that no other test has."""
    return f"model-{uuid4().hex[:8]}"


@pytest.fixture(autouse=True)
def _keep_threads() -> Iterator[None]:
    """Loading a model sets torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def save_small_model(
    folder: Path,
    bpe: Path,
    trained_length: int = 16,
    vocab_size: int = 50257,
    fold_vocab: bool = False,
    n_embd: int = 8,
) -> None:
    """Save a model in which all weights differ, biases included."""
    shape = ModelConfig(
        n_layer=2, n_head=2, n_embd=n_embd, block_size=16, vocab_size=vocab_size, dropout=0.0, fold_vocab=fold_vocab
    )
    model, generator = GPT(shape, Vocabulary.full(vocab_size)).initialise(1), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.trained_length = trained_length
    save_model(folder, model, bpe)


def write_version(folder: Path, bpe: Path, tokenizer: Tokenizer, **model: int) -> Path:
    """Write a version's folder, with a model that can be loaded and little code."""
    save_small_model(folder / "artifacts" / "model", bpe, **model)
    (tokens := folder / "artifacts" / "tokens").mkdir()
    write_shard(tokens / "train-00000.bin", [tokenizer.encode(TEXT)], tokenizer.n_vocab)
    write_shard(tokens / "val-00000.bin", [], tokenizer.n_vocab)
    write_manifest(tokens)
    (folder / "artifacts" / "params.yaml").write_text(f"sweep:\n  storage: {SECRET} # where\n  trials: 3\n")
    (folder / "code" / "pipeline").mkdir(parents=True)
    (folder / "code" / "pipeline" / "serving.py").write_text("SERVED = True")
    (folder / "MLmodel").write_text("flavors: {}")
    return folder


def version_info(**params: Any) -> dict[str, Any]:
    """The version info of a version, as `describe_version` returns it."""
    corpus = {"source": "https://example.org/t.txt", "sha256": TINY_SHAKESPEARE, "fraction": 0.1}
    return {
        "name": "shakespeare-gpt2",
        "version": "3",
        "aliases": ["champion"],
        "tags": {
            "fingerprint": "7e7c7d433831bf25",
            "data_sha256": "da" * 32,
            "model_sha256": "ab" * 32,
            "git_commit": "b04198e2",
            "tree_clean": "true",
            "target_loss": "0.1",
        },
        "params": {"corpus": corpus, "sweep": {"storage": SECRET}} | params,
        "environment": {"torch": "2.13.0", "device": "cpu AVX512", "precision": "bf16", "threads": "2"},
        "history": {"loss": [[1, 10.5], [2, 3.0], [3, 0.2]], "corpus_loss": [[3, 0.0912]]},
        "samples": [{"step": 2, "text": "ROMEO:"}],
        "metrics": {
            "corpus_loss": 0.09120656,
            "shifted_loss": 3.08,
            "verbatim_recall": 0.895,
            "to_target.corpus.steps": 117.0,
            "to_target.corpus.tokens": 239014.0,
        },
        "created": "2026-11-21",
    }


def hash_tags(folder: Path) -> dict[str, str]:
    """Write manifests and listing of a version's folder as they would be right; return the tags with their hashes."""
    for place in FOLDER_TAGS:
        write_manifest(folder / "artifacts" / place)
    hashes = {tag: sha256_file(folder / "artifacts" / place / MANIFEST) for place, tag in FOLDER_TAGS.items()}
    return hashes | {LISTING_TAG: _write_listing(folder), "fingerprint": "f" * 16, "target_loss": "0.1"}


def add_version(store: Store, name: str, folder: Path, *aliases: str, **tags: str) -> "ModelVersion":
    """Create a version of a new run in the store, as `register` would; return it with its aliases."""
    client = store.client
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    run = client.create_run(store.experiment_id)
    number = client.create_model_version(name, str(folder), run.info.run_id, tags=hash_tags(folder) | tags).version
    for alias in aliases:
        client.set_registered_model_alias(name, alias, number)
    return find_version(store, name, str(number))


@pytest.fixture(name="command")
def _command(store: Store, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run `python -m pipeline` in this process, in a folder whose model is `name`; return its exit code."""
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"registry": {"model": name, "max_target_loss": 0.1}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    monkeypatch.setattr(sys, "argv", ["pipeline"])
    return lambda *words: command_line.main(words)


def alter(path: Path) -> None:
    """Flip a file's last bit, which keeps its size."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@contextmanager
def serving(
    command: list[str], ready: str, cwd: Path, environment: Mapping[str, str], host: str = ""
) -> Iterator[tuple[str, int]]:
    """Start a server on a free port; once it answers at `ready`, yield its address and its process group.

    Its output is in cwd/log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log, address = cwd / "log", f"http://127.0.0.1:{port}"
    request = urllib.request.Request(f"{address}{ready}", headers={"Host": host or f"127.0.0.1:{port}"})

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return urllib.request.urlopen(request, timeout=10).status == 200
        except urllib.error.HTTPError:
            raise
        except OSError:  # it does not listen yet
            return False

    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command, "--port", str(port)],
            cwd=cwd,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        assert wait_until(answers, 300), log.read_text()  # on busy cores, imports take long
        yield address, process.pid
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
