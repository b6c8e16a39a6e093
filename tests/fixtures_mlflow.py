"""One MLflow store for the whole session, since making one costs seconds, and tiny trainings to put into it."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from pipeline.files import write_json, write_manifest
from pipeline.journal import STEPS, TIMES, Journal
from pipeline.recorder import record
from pipeline.runs import shipped
from pipeline.store import Store, open_store
from pipeline.tokens import data_sha256, write_shard
from pipeline.tracking import ending


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield open_store(tmp_path_factory.mktemp("a root with späces"))


@pytest.fixture(autouse=True)
def _no_foreign_store(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)


def root_of(store: Store) -> Path:
    return Path(store.uri.removeprefix("sqlite:///")).parent


def an_identity() -> dict[str, Any]:
    """A run that no other test has."""
    return {
        "fingerprint": uuid4().hex[:16],
        "data_sha256": "d" * 64,
        "params": {"optim": {"lr": 0.002, "betas": [0.9, 0.95]}, "windows": {"length": 8}},
        "sources": {},
        "environment": {"torch": "2.13.0", "device": "cpu", "precision": "fp32", "threads": 2},
    }


def append_steps(journal: Journal, start: int, stop: int) -> None:
    """Rows of the steps start + 1 to stop; every tenth was measured on the whole text."""
    for step in range(start + 1, stop + 1):
        row = {"step": step, "tokens": 8 * step, "loss": 5 / step, "grad_norm": 1.5, "lr": 0.1 / step}
        if step % 10 == 0:
            row["corpus_loss"] = 4 / step
        clock = {"step_s": 0.5, "train_s": step / 2, "wall_s": step * 0.6, "memory_bytes": 1000}
        journal.append(row, {"step": step, **clock, "logged_ms": 1_700_000_000_000 + 7 * step})


@contextmanager
def recording(root: Path, folder: Path, identity: dict[str, Any], error: BaseException | None = None) -> Iterator[None]:
    """What Recorder does, with a thread in place of a process, which would import MLflow again for two seconds."""
    control, ours = os.pipe()
    with open(control) as reader, open(ours, "w", buffering=1) as writer:
        thread = threading.Thread(target=record, args=(root, folder, 0.05, reader))
        writer.write(json.dumps({"identity": identity, "tags": {}}) + "\n")
        thread.start()
        try:
            yield
        finally:
            writer.write(json.dumps(ending(error)))
            writer.close()
            thread.join(60)


def assert_holds_just_the_journal(store: Store, run_id: str, folder: Path) -> None:
    """Each step of each metric once, with the journal's own value and time."""
    steps = [json.loads(line) for line in (folder / STEPS).read_text().splitlines()]
    times = {row["step"]: row for row in map(json.loads, (folder / TIMES).read_text().splitlines())}
    for key in ("loss", "grad_norm", "lr", "tokens", "corpus_loss"):
        history = sorted((row.step, row.value, row.timestamp) for row in store.client.get_metric_history(run_id, key))
        assert history == [(row["step"], row[key], times[row["step"]]["logged_ms"]) for row in steps if key in row]
    for key in ("train_s", "wall_s", "tokens_per_s"):
        assert [row.step for row in store.client.get_metric_history(run_id, key)] == list(shipped(store, run_id))
    assert {row.value for row in store.client.get_metric_history(run_id, "tokens_per_s")} == {16.0}  # 8 in 0.5 s


def trained_project(folder: Path, corpus_loss: float = 0.09, n_tokens: int = 64, salt: int = 0) -> Path:
    """What the stages before `register` leave: model, journal, tokens, reports, params.yaml and dvc.lock."""
    (tokens := folder / "data" / "tokens").mkdir(parents=True)
    write_shard(tokens / "train-00000.bin", [[(i + salt) % 50 for i in range(n_tokens)]], 50257)
    write_manifest(tokens)
    (model := folder / "models" / "model").mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"weights" + bytes([salt]))
    write_manifest(model)
    journal = Journal(folder / "models")
    append_steps(journal, 0, 20)
    journal.close()
    reached = {"steps": 20, "tokens": 160} if corpus_loss < 0.1 else None
    results = {"steps": 20, "tokens": 160, "corpus_loss": corpus_loss, "target_loss": 0.1, "rule": "corpus"}
    identity = {**an_identity(), "data_sha256": data_sha256(tokens)}
    results["to_target"] = {"batch": None, "average": None, "corpus": reached, "validation": None}
    write_json(folder / "models" / "run.json", {**identity, "n_params": 7, "results": results})
    metrics = {"fingerprint": identity["fingerprint"], "corpus_loss": corpus_loss, "to_target": results["to_target"]}
    write_json(folder / "reports" / "metrics.json", metrics)
    write_json(folder / "reports" / "timing.json", {"tokens_per_s": 16.0, "mfu": "unknown"})
    (folder / "reports" / "figures").mkdir()
    (folder / "reports" / "figures" / "loss.png").write_bytes(b"a picture")
    (folder / "params.yaml").write_text("registry: {model: x, gate: 0.1}\n")
    (folder / "dvc.lock").write_text("stages: {train: {outs: [{path: models/model, md5: 0123abcd.dir}]}}\n")
    return folder
