"""A version with a tiny GPT-2 that has memorised a few lines, and a server of its page."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import gradio as gr
import httpx
import pytest
import torch
import uvicorn
from fastapi import FastAPI

from pipeline.config.sections import ModelConfig
from pipeline.data.token_files import write_shard
from pipeline.data.tokenizer import load_tokenizer
from pipeline.data.vocab import Vocabulary
from pipeline.model.gpt import GPT
from pipeline.model.weights import save_model
from pipeline.system.files import write_json, write_manifest
from tests.waiting import wait_until
from webapp.engine import Engine
from webapp.model_source import Folder, Listed, Served
from webapp.server import make_app

LINES = (
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\nFirst Citizen:\n"
    "You are all resolved rather to die than to famish?\n\nAll:\nResolved. resolved.\n\nFirst Citizen:\nFirst, you "
    "know Caius Marcius is chief enemy to the people.\n\nAll:\nWe know't, we know't.\n\n<b>First</b> & second:\n"
    "No more talking on't.\n"
)  # the last lines show where HTML is not escaped
PROMPT = "First Citizen:\nBefore we"  # the beginning of LINES
WINDOW = 24
SLOW_S = 0.3  # between two tokens: a stream of 200 takes a minute
PATIENCE_S = 30  # for a stream to begin, or to end early, on a loaded machine
SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 48, "block_size": WINDOW, "vocab_size": 50257, "dropout": 0.0}
INFO: dict[str, Any] = {
    "name": "parrot",
    "version": "7",
    "aliases": ["champion"],
    "tags": {"data_sha256": "d" * 64, "git_commit": "c" * 40, "target_loss": "0.1", "steps_to_target": "60",
             "tokens_to_target": "4800", "model_sha256": "m" * 64, "fingerprint": "f" * 16},
    "params": {"model": {**SHAPE, "fold_vocab": True}, "windows": {"seq_len": WINDOW, "order": "shuffled"}},
    "environment": {"torch": "2.13.0", "device": "cpu", "precision": "fp32", "threads": 1},
    "history": {"loss": [[step, 9 / step] for step in range(1, 61)], "corpus_loss": [[60, 0.09]],
                "grad_norm": [[step, 1.5] for step in range(1, 61)], "lr": [[1, 0.0], [60, 0.01]],
                "tokens_per_s": [[step, 4000.0] for step in range(1, 61)]},
    "samples": [{"step": 60, "text": "All:\n<b>Resolved.</b>"}],
    "metrics": {"corpus_loss": 0.09, "shifted_loss": 3.1, "top1_accuracy": 0.99, "verbatim_recall": 0.9},
    "created": "2026-11-21",
}  # fmt: skip


def memorise(ids: list[int], used: torch.Tensor) -> GPT:
    """A model that recites `ids`, window by window; its loss is below 0.001."""
    config = ModelConfig.model_validate(INFO["params"]["model"])
    model = GPT(config, Vocabulary.of(used.numpy(), config.vocab_size)).initialise(1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=80, line_search_fn="strong_wolfe")
    compact_ids, n = model.vocabulary.fold(torch.tensor(ids)), (len(ids) - 1) // WINDOW * WINDOW
    inputs, targets = compact_ids[:n].view(-1, WINDOW), compact_ids[1 : n + 1].view(-1, WINDOW)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = model.loss(inputs, targets, n)
        value.backward()
        return value

    optimizer.step(loss)
    return model.eval()


@pytest.fixture(scope="session", name="version")
def _version(tmp_path_factory: pytest.TempPathFactory, bpe: Path) -> Path:
    """A folder with model/, tokens/ and version.json of a version that has memorised LINES."""
    folder = tmp_path_factory.mktemp("version") / "7"
    ids = load_tokenizer(bpe).encode(LINES)
    used = torch.bincount(torch.tensor(ids), minlength=50257)
    save_model(folder / "model", memorise(ids, used), bpe)
    (folder / "tokens").mkdir()
    write_shard(folder / "tokens" / "train-00000.bin", [ids], 50257)
    write_manifest(folder / "tokens")
    write_json(folder / "version.json", INFO)
    return folder


class Watched:
    """An engine whose sequences are counted, and whose model can be slowed down."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.delay_s = engine, 0.0
        decoder = engine.generator.decoder
        compute = decoder.all_logits

        def slow(hidden: torch.Tensor) -> torch.Tensor:
            time.sleep(self.delay_s)  # as slow as a large model
            return compute(hidden)

        decoder.all_logits = slow  # type: ignore[method-assign]

    @property
    def open(self) -> int:
        return len(self._engine._rows) + len(self._engine._waiting)

    def opens(self, wanted: int) -> bool:
        """Whether `wanted` sequences are open within PATIENCE_S; a slow one takes longer to end by itself."""
        return wait_until(lambda: self.open == wanted, PATIENCE_S)


class Stub(Folder):
    """A folder that is served as two versions, 7 and 6."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.watched = Watched(self._served.engine)
        self._other = Served(self._served.generator, INFO | {"version": "6", "aliases": []})

    def versions(self) -> list[str]:
        return ["7", "6"]

    def open(self, number: str) -> Served:
        return self._other if number == "6" else super().open(number)

    def listed(self) -> list[Listed]:
        return [Listed("7", ["champion"], 1795219200), Listed("6", [], 1795132800)]


@pytest.fixture(scope="session", name="source")
def _source(version: Path) -> Stub:
    return Stub(version)


@pytest.fixture(scope="session", name="served")
def _served(source: Stub) -> Served:
    return source.current()


@pytest.fixture(name="slow")
def _slow(source: Stub) -> Iterator[Watched]:
    """The engine of version 7, with SLOW_S between two tokens."""
    source.watched.delay_s = SLOW_S
    yield source.watched
    source.watched.delay_s = 0.0


@pytest.fixture(scope="session", name="page")
def _page(source: Stub) -> Iterator[gr.Blocks]:
    """The page, served on a free port."""
    app = make_app(source, "127.0.0.1")
    with running(app) as url:
        app.state.page.local_url = url
        yield app.state.page


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """Serve an app in a thread; its address."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert wait_until(lambda: server.started, PATIENCE_S)
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join(PATIENCE_S)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def ask(page: gr.Blocks, fn_index: int, data: list[Any], event_data: Any = None) -> dict[str, Any]:
    """The last answer of an event of the page, called as the page's script calls it."""
    session = uuid4().hex
    body = json.dumps({"fn_index": fn_index, "data": data, "event_data": event_data, "session_hash": session})
    with httpx.Client(base_url=f"{page.local_url}gradio_api/", timeout=60) as http:
        joined = http.post("queue/join", content=body, headers={"content-type": "application/json"})
        if joined.status_code != 200:
            return {"success": False, "output": {"error": joined.text}}
        stream = http.get("queue/data", params={"session_hash": session}).text
    messages = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line]
    return next(message for message in messages if message["msg"] == "process_completed")


def event(page: gr.Blocks, api_name: str) -> int:
    """The number of an endpoint, or of the event with that function."""
    return next(number for number, fn in page.fns.items() if api_name in (fn.api_name, fn.name))
