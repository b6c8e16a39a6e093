"""One MLflow store for the whole session, since creating one takes seconds, and tiny trainings to put into it."""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from mlflow.entities import Run

from pipeline.data.token_files import data_sha256, write_shard
from pipeline.registry import artifacts as versions
from pipeline.system.files import write_json, write_manifest, write_text
from pipeline.tracking import recorder
from pipeline.tracking.descriptions import Result
from pipeline.tracking.journal import STEPS, TIMES, Journal, StepRecord
from pipeline.tracking.mlflow_store import Store, open_store
from pipeline.tracking.mlflow_tracker import RUN_ID
from pipeline.tracking.recorder import OWNER_PID, ending, serve
from pipeline.training.target import RULES

STARTED_MS = 1_600_000_000_000  # of the runs that `recording` records


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield open_store(tmp_path_factory.mktemp("a root with späces"))


@pytest.fixture(autouse=True)
def _no_foreign_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test uses the store of the user who runs it."""
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)


def root_of(store: Store) -> Path:
    return Path(store.uri.removeprefix("sqlite:///")).parent


def an_identity() -> dict[str, Any]:
    """The identity of a run that no other test uses."""
    return {
        "fingerprint": uuid4().hex[:16],
        "data_sha256": "d" * 64,
        "params": {"optim": {"lr": 0.002, "betas": [0.9, 0.95]}, "windows": {"seq_len": 8}},
        "sources": {},
        "environment": {"torch": "2.13.0", "device": "cpu", "precision": "fp32", "threads": 2},
    }


def append_steps(
    journal: Journal, start: int, stop: int, last_loss: float | None = None, name: str = "sliding_loss"
) -> None:
    """Append records of the steps start + 1 to stop; every tenth has the loss `name`, the last one the given value."""
    for step in range(start + 1, stop + 1):
        clock = {"step_s": 0.5, "train_s": step / 2, "wall_s": step * 0.6, "memory_bytes": 1000}
        record = StepRecord(step, 8 * step, 5 / step, 1.5, 0.1 / step, **clock)
        record.logged_ms = 1_700_000_000_000 + 7 * step
        if step % 10 == 0:
            record.corpus_loss = 1.5
            setattr(record, name, 4 / step if last_loss is None or step < stop else last_loss)
        journal.append(record)


@contextmanager
def recording(root: Path, folder: Path, identity: dict[str, Any], result: Result | None = None) -> Iterator[None]:
    """Do what Recorder does, in a thread: a process would take seconds to import MLflow. `result`: of the run."""
    control, ours = os.pipe()
    with open(control, "rb", buffering=0) as reader, open(ours, "w", buffering=1) as writer:
        write_text(folder / OWNER_PID, str(os.getpid()))
        thread = threading.Thread(target=serve, args=(root, 0.05, reader, StringIO()))
        start = {"run_folder": str(folder), "identity": identity, "tags": {}, "started_ms": STARTED_MS}
        writer.write(json.dumps(start) + "\n")
        thread.start()
        try:
            yield
        finally:
            writer.write(json.dumps({**ending(None), "result": result}) + "\n")
            writer.close()
            thread.join(60)


@pytest.fixture
def recorder_threads(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """Recorders in threads, which keep their priority, in place of processes; those that were started."""
    started: list[SimpleNamespace] = []

    def start(module: str, root: str, _tick_s: str, stdout: int) -> SimpleNamespace:
        assert (module, stdout) == (recorder.__name__, subprocess.PIPE)
        (control, ours), (theirs, answers) = os.pipe(), os.pipe()

        def work() -> None:
            with open(control, "rb", buffering=0) as lines, open(answers, "w", buffering=1) as said:
                serve(Path(root), 0.1, lines, said)

        (thread := threading.Thread(target=work)).start()
        streams = {"stdin": open(ours, "w"), "stdout": open(theirs)}  # noqa: SIM115
        started.append(SimpleNamespace(pid=os.getpid(), poll=lambda: None, wait=thread.join, **streams))
        return started[-1]

    monkeypatch.setattr(os, "setpriority", lambda *_: None)
    monkeypatch.setattr(recorder, "spawn_module", start)
    return started


def run_id_of(folder: Path) -> str:
    """The id of a folder's run in MLflow."""
    return (folder / RUN_ID).read_text().strip()


def runs_in(store: Store, folder: Path) -> list[Run]:
    """The MLflow runs of the training in `folder`; another test's project may have runs of the same fingerprint."""
    return list(store.client.search_runs([store.experiment_id], f"tags.run_folder = '{folder.absolute()}'"))


def assert_has_exactly_the_journal(store: Store, folder: Path, run_id: str | None = None) -> None:
    """Each value of each metric is in the run once, with the journal's timestamp."""
    run_id = run_id or run_id_of(folder)
    expected: dict[str, list[tuple[int, float, int]]] = {}
    lines = zip(*((folder / name).read_text().splitlines() for name in (STEPS, TIMES)), strict=True)
    for values in (json.loads(step) | json.loads(times) for step, times in lines):
        for key in values.keys() - {"step", "step_s", "logged_ms"}:
            expected.setdefault(key, []).append((values["step"], float(values[key]), values["logged_ms"]))
    assert expected.keys() >= {"loss", "grad_norm", "lr", "tokens", "train_s", "wall_s", "memory_bytes"}
    expected["tokens_per_s"] = [(step, 16.0, logged_ms) for step, _, logged_ms in expected["loss"]]  # 8 in 0.5 s
    metrics = {key for key in store.client.get_run(run_id).data.metrics if "/" not in key}  # without system/...
    assert metrics == expected.keys()
    for key, history in expected.items():
        found = store.client.get_metric_history(run_id, key)
        assert sorted((metric.step, metric.value, metric.timestamp) for metric in found) == history, key


@pytest.fixture(name="cheap_versions")
def _cheap_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give versions their own files and little code, without MLflow's files for serving, which take a second."""

    def save_files(whole: Path, project: Path, _run_id: str, _model_id: str) -> None:
        shutil.copytree(project / "models" / "model", whole / "artifacts" / "model")
        shutil.copytree(project / "data" / "tokens", whole / "artifacts" / "tokens")
        shutil.copyfile(project / "params.yaml", whole / "artifacts" / "params.yaml")
        (whole / "code" / "pipeline").mkdir(parents=True)
        (whole / "code" / "pipeline" / "serving.py").write_text("SERVED = True")
        (whole / "MLmodel").write_text("flavors: {}")

    monkeypatch.setattr(versions, "_save_files", save_files)


def trained_project(
    folder: Path, loss: float = 0.09, n_tokens: int = 64, salt: int = 0, rule: str = "sliding", target: float = 0.1
) -> Path:
    """Make the files of the stages before `register`: model, journal, tokens, reports, params.yaml and dvc.lock.

    `loss` is what `rule` compares with `target`.
    """
    (tokens := folder / "data" / "tokens").mkdir(parents=True)
    write_shard(tokens / "train-00000.bin", [[(i + salt) % 50 for i in range(n_tokens)]], 50257)
    write_manifest(tokens)
    (model := folder / "models" / "model").mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"weights" + bytes([salt]))
    write_manifest(model)
    journal = Journal(folder / "models")
    append_steps(journal, 0, 20, loss, RULES[rule].loss)
    journal.close()
    reached = {"steps": 20, "tokens": 160} if loss < target else None
    to_target = {**dict.fromkeys(RULES), rule: reached}
    losses = {"loss": loss, "target_loss": target, "rule": rule}
    results = {"steps": 20, "tokens": 160, "model_step": 20, **losses, "to_target": to_target}
    identity = {**an_identity(), "data_sha256": data_sha256(tokens)}
    write_json(folder / "models" / "run.json", {**identity, "n_params": 7, "results": results})
    metrics = {"fingerprint": identity["fingerprint"], "corpus_loss": 1.5, "to_target": to_target}
    metrics |= {RULES[rule].loss: loss}
    write_json(folder / "reports" / "metrics.json", metrics)
    write_json(folder / "reports" / "timing.json", {"tokens_per_s": 16.0, "mfu": "unknown"})
    (folder / "reports" / "figures").mkdir()
    (folder / "reports" / "figures" / "loss.png").write_bytes(b"a picture")
    (folder / "params.yaml").write_text("registry: {model: x, max_target_loss: 0.1}\n")
    (folder / "dvc.lock").write_text("stages: {train: {outs: [{path: models/model, md5: 0123abcd.dir}]}}\n")
    return folder
