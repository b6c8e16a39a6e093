"""The recorder: other trackers beside MLflow, and starts of one training whose recorders get the lock late."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from fixtures_mlflow import an_identity, append_steps, assert_holds_just_the_journal, recording, root_of

from pipeline.tracking.journal import Journal, StepRecord
from pipeline.tracking.mlflow_runs import runs_of
from pipeline.tracking.mlflow_store import Store
from pipeline.tracking.mlflow_tracker import RUN_ID
from pipeline.tracking.recorder import OWNER_PID, TRACKERS, record
from pipeline.training import train as tracked
from tests.trainings import Untracked, run_folder, train
from tests.waiting import wait_until


@dataclass
class WithToy(StepRecord):
    """A record with one more metric."""

    toy: float | None = None


def test_a_field_that_is_added_to_the_record_arrives_in_mlflow_under_its_own_name(store, tmp_path, identity):
    (folder := tmp_path / "run").mkdir()
    journal = Journal(folder)
    with recording(root_of(store), folder, identity):
        for step in (1, 2, 3):
            journal.append(WithToy(step, 8 * step, 1.0, 1.0, 0.1, step_s=0.5, logged_ms=step, toy=step / 2))
    (run,) = runs_of(store, identity["fingerprint"])
    found = store.client.get_metric_history(run.info.run_id, "toy")
    assert sorted((metric.step, metric.value) for metric in found) == [(1, 0.5), (2, 1.0), (3, 1.5)]


@pytest.fixture
def identity() -> dict:
    return an_identity()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """That of a run of 12 steps."""
    (folder := tmp_path / "run").mkdir()
    append_steps(journal := Journal(folder), 0, 12)
    journal.close()
    return folder


def record_killed(store: Store, folder: Path, identity: dict) -> bool:
    """What the recorder of a start does that was killed before its turn came."""
    control, ours = os.pipe()
    with open(control) as reader, open(ours, "w") as writer:
        writer.write(json.dumps({"identity": identity, "tags": {}}) + "\n")
        writer.close()
        return record(root_of(store), folder, 0.05, reader)


@pytest.mark.fault
def test_a_run_that_is_finished_is_not_closed_as_killed_by_the_recorder_of_an_earlier_start(store, folder, identity):
    with recording(root_of(store), folder, identity):
        pass
    assert not (folder / OWNER_PID).exists()
    assert record_killed(store, folder, identity)
    (run,) = runs_of(store, identity["fingerprint"])
    assert run.info.status == "FINISHED"
    assert_holds_just_the_journal(store, run.info.run_id, folder)


@pytest.mark.fault
def test_the_recorder_of_an_earlier_start_leaves_its_rows_to_that_of_the_last_one(store, folder, identity):
    (folder / OWNER_PID).write_text(str(os.getpid() + 1))
    assert record_killed(store, folder, identity)
    assert not (folder / RUN_ID).exists()
    (folder / OWNER_PID).write_text(str(os.getpid()))
    assert record_killed(store, folder, identity)
    (run,) = runs_of(store, identity["fingerprint"])
    assert run.info.status == "KILLED"
    assert (folder / OWNER_PID).exists()  # so that the next start sends the end, even if no step is left
    assert_holds_just_the_journal(store, run.info.run_id, folder)


@pytest.mark.fault
def test_a_run_that_was_removed_is_not_made_again_by_a_recorder_that_comes_late(store, tmp_path, identity):
    assert record_killed(store, tmp_path / "removed", identity)
    assert not (tmp_path / "removed").exists()
    assert not runs_of(store, identity["fingerprint"])


@pytest.mark.fault
def test_the_next_start_of_a_finished_run_sends_the_end_that_mlflow_lacks_and_no_other_one(workspace, monkeypatch):
    opened = []

    class Opened(Untracked):
        def __enter__(self):
            opened.append(self)
            return self

    train()
    monkeypatch.setattr(tracked, "Recorder", Opened)
    train()
    assert not opened
    (run_folder() / OWNER_PID).write_text("1")  # as a kill of training and recorder after the last save leaves it
    train()
    assert len(opened) == 1


class Toy:
    """A tracker that keeps what it gets, and cannot be reached at first."""

    def __init__(self, root, run_folder, identity, tags):
        self.got, self.samples, self.ended = [], [], None
        self.fingerprint = identity["fingerprint"]
        made.append(self)

    @staticmethod
    def errors():
        return (TimeoutError,)

    def log_records(self, records):
        if not failed:
            failed.append(True)
            raise TimeoutError("not yet")
        self.got += records

    def log_sample(self, path):
        self.samples.append(path.name)

    def end(self, status, ended):
        self.ended = (status, ended)


made: list[Toy] = []
failed: list[bool] = []


def test_another_tracker_gets_every_record_though_it_fails_for_a_while_and_mlflow_too(
    store, folder, identity, monkeypatch, capfd
):
    monkeypatch.setitem(TRACKERS, "the toy", Toy)
    (folder / "samples").mkdir()
    (folder / "samples" / "step-000010.txt").write_text("ROMEO:")
    with recording(root_of(store), folder, identity):
        assert wait_until(lambda: failed, 60)
        append_steps(journal := Journal(folder), 12, 120)
        journal.close()
        assert wait_until(lambda: made[0].got, 60)
    (toy,) = made
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert [record["step"] for record in toy.got] == list(range(1, 121))
    assert all(line.items() <= record.items() for line, record in zip(lines, toy.got, strict=True))
    assert {"tokens_per_s", "train_s", "memory_bytes"} <= toy.got[-1].keys()
    assert (toy.fingerprint, toy.samples, toy.ended) == (
        identity["fingerprint"],
        ["step-000010.txt"],
        ("FINISHED", "done"),
    )
    assert capfd.readouterr().err == "warning: the toy fails (not yet): training continues\n"
    (run,) = runs_of(store, identity["fingerprint"])
    assert run.info.status == "FINISHED"
    assert_holds_just_the_journal(store, run.info.run_id, folder)
