"""The recorder with fake trackers: what they get, also after failures and from recorders that start late."""

import json
import os
import threading
from contextlib import ExitStack, nullcontext, suppress
from io import StringIO
from types import SimpleNamespace

import pytest
from fixtures_mlflow import an_identity, append_steps, recording

from pipeline.config.params import load_params
from pipeline.system.errors import DivergedError, Interrupted, PeerLost, Pruned
from pipeline.system.files import locked
from pipeline.tracking import mlflow_tracker, recorder
from pipeline.tracking.descriptions import Result
from pipeline.tracking.journal import STEPS, Journal
from pipeline.tracking.mlflow_runs import BATCH
from pipeline.tracking.mlflow_tracker import MlflowTracker
from pipeline.tracking.recorder import ARRIVED, KILLED, OWNER_PID, RECORDER_LOCK, Recorder, ending, serve
from pipeline.training import train
from tests.waiting import wait_until


@pytest.mark.parametrize(
    ("error", "status", "ended"),
    [
        (None, "FINISHED", "done"),
        (Pruned("too slow"), "FINISHED", "PRUNED: too slow"),
        (DivergedError("loss nan\nat step 3"), "FAILED", "DivergedError: loss nan"),
        (ValueError(), "FAILED", "ValueError: ValueError"),
        (Interrupted("at step 3", 15), "KILLED", "Interrupted: at step 3"),
        (PeerLost("rank 1"), "KILLED", "PeerLost: rank 1"),
        (KeyboardInterrupt(), "KILLED", "KeyboardInterrupt: KeyboardInterrupt"),
    ],
)
def test_the_error_that_ends_a_training_decides_the_status_of_its_run(error, status, ended):  # C1
    assert ending(error) == {"status": status, "ended": ended}


class Fake:
    """A kind of tracker, and the tracker that it makes: it keeps what it gets, and fails while `down` is set."""

    def __init__(self):
        self.starts, self.records, self.samples, self.ends = [], [], [], []
        self.down, self.failed = threading.Event(), threading.Semaphore(0)

    def __call__(self, root, run_folder, identity, tags, started_ms):
        self.starts.append(identity)
        return self

    def errors(self):
        return (TimeoutError,)

    def log_records(self, records):
        assert len(records) <= BATCH
        if self.down.is_set():
            self.failed.release()
            raise TimeoutError("not yet\nand more")
        self.records += records

    def log_sample(self, path):
        self.samples.append(path.name)

    def end(self, **end):
        self.ends.append(end)


@pytest.fixture
def fakes(monkeypatch):
    """Two trackers in place of MLflow."""
    fakes = Fake(), Fake()
    monkeypatch.setattr(recorder, "TRACKERS", dict(zip(("first", "second"), fakes, strict=True)))
    return fakes


@pytest.fixture
def folder(tmp_path):
    """That of a run of 12 steps, which this process has to send."""
    (folder := tmp_path / "run").mkdir()
    append_steps(journal := Journal(folder), 0, 12)
    journal.close()
    (folder / OWNER_PID).write_text(str(os.getpid()))
    return folder


def record_after_the_end(folder, end=None):
    """What the recorder's process does if training has ended already; it was killed if `end` is None."""
    start = {"run_folder": str(folder), "identity": an_identity(), "tags": {}, "started_ms": 7}
    (folder.parent / "control").write_text(json.dumps(start) + "\n" + (json.dumps(end) + "\n" if end else ""))
    with (folder.parent / "control").open("rb", buffering=0) as control:
        serve(folder.parent, 0.05, control, answers := StringIO())
    return answers.getvalue() == f"{ARRIVED}\n"


def test_every_tracker_gets_every_record_once_though_one_fails_for_a_while(folder, fakes, capfd):
    working, failing = fakes
    failing.down.set()
    (folder / "samples").mkdir()
    (folder / "samples" / "step-000010.txt").write_text("ROMEO:")
    with recording(folder.parent, folder, identity := an_identity()):
        assert all(failing.failed.acquire(timeout=60) for _ in range(2))  # two failures, one warning
        append_steps(journal := Journal(folder), 12, BATCH + 40)
        journal.close()
        assert wait_until(lambda: len(working.records) == BATCH + 40, 60)
        failing.down.clear()
    lines = [json.loads(line) for line in (folder / STEPS).read_text().splitlines()]
    for fake in fakes:
        assert fake.starts == [identity]
        assert [values["step"] for values in fake.records] == list(range(1, BATCH + 41))
        assert all(line.items() <= values.items() for line, values in zip(lines, fake.records, strict=True))
        assert {"tokens_per_s", "train_s", "memory_bytes"} <= fake.records[-1].keys()
        assert (fake.samples, fake.ends) == (["step-000010.txt"], [{**ending(None), "result": None}])
    assert capfd.readouterr().err == "warning: second fails (not yet): training continues\n"


@pytest.mark.parametrize(
    ("end", "down", "owned_after"),
    [
        (None, False, True),  # killed: the next start sends another end, even if no step is left to train
        (ending(Interrupted("at step 3", 15)), False, True),
        (ending(None), False, False),
        (ending(None), True, True),
    ],
)
def test_the_folder_names_its_recorder_until_all_trackers_have_the_finished_run(folder, fakes, end, down, owned_after):
    if down:
        fakes[1].down.set()
    assert record_after_the_end(folder, end) == (not down)
    assert [fake.ends for fake in fakes] == [[end or KILLED], [] if down else [end or KILLED]]
    assert (folder / OWNER_PID).exists() == owned_after


def test_a_recorder_gets_its_first_line_only_when_the_folder_names_it(folder, fakes, recorder_threads, monkeypatch):
    (folder / OWNER_PID).unlink()
    send_line, owners = recorder.send_line, []

    def send(process, line):
        owners.append((folder / OWNER_PID).read_text())
        send_line(process, line)

    monkeypatch.setattr(recorder, "send_line", send)
    with Recorder(folder.parent) as opened, opened.recording(folder, an_identity(), {}):
        assert owners == [str(os.getpid())]


@pytest.mark.parametrize("error", [None, Pruned("too slow"), Interrupted("at step 3", 15)])
@pytest.mark.parametrize("result", [Result(0.5, 12, 96, True), None])
def test_trackers_get_the_result_of_a_finished_run(folder, fakes, recorder_threads, error, result):
    with (
        suppress(Exception),
        Recorder(folder.parent) as opened,
        opened.recording(folder, an_identity(), {}, lambda: result),
    ):
        if error:
            raise error
    expected = ending(error) | ({"result": result} if ending(error)["status"] == "FINISHED" else {})
    assert [fake.ends for fake in fakes] == [[expected]] * 2


def test_one_process_records_runs_one_after_the_other_until_it_dies_or_is_still_sending(
    folder, fakes, recorder_threads, monkeypatch, capfd
):
    with Recorder(folder.parent) as opened:

        def record_a_run():
            with opened.recording(folder, an_identity(), {}):
                pass
            return len(recorder_threads)

        assert [record_a_run(), record_a_run()] == [1, 1]
        fakes[1].down.set()
        assert record_a_run() == 1
        assert capfd.readouterr().err == (
            "warning: second fails (not yet): training continues\n"
            "warning: MLflow lacks a part of the run: `python -m pipeline doctor --fix` sends it\n"
        )
        fakes[1].down.clear()
        recorder_threads[0].poll = lambda: -9
        recorder_threads[0].stdin.close()
        assert record_a_run() == 2
        with monkeypatch.context() as patch, locked(folder / RECORDER_LOCK):
            patch.setattr(recorder, "FINISH_S", 0.05)
            assert record_a_run() == 2
        assert capfd.readouterr().err == "the rest of the run is sent in the background\n"
        recorder_threads[1].wait()
        assert record_a_run() == 3
    for thread in recorder_threads:
        thread.wait(60)
    assert [len(fake.ends) for fake in fakes] == [6, 5]
    assert len(fakes[0].starts) == 6


def test_a_stopped_training_waits_some_seconds_for_a_recorder_that_is_still_sending(
    folder, fakes, recorder_threads, capfd
):
    (held := ExitStack()).enter_context(locked(folder / RECORDER_LOCK))
    threading.Timer(1.2, held.close).start()
    with suppress(Interrupted), Recorder(folder.parent) as opened, opened.recording(folder, an_identity(), {}):
        raise Interrupted("at step 3", 15)
    assert capfd.readouterr().err == ""
    assert [fake.ends for fake in fakes] == [[ending(Interrupted("at step 3", 15))]] * 2


def test_a_recorder_without_a_first_line_sends_nothing(folder, fakes):
    (folder.parent / "control").touch()
    with (folder.parent / "control").open("rb", buffering=0) as control:
        serve(folder.parent, 0.05, control, answers := StringIO())
    assert (answers.getvalue(), fakes[0].starts) == ("", [])


@pytest.mark.parametrize("owner", [None, "1"])  # another recorder has sent the finished run; training started again
@pytest.mark.parametrize("while_waiting", [False, True])
@pytest.mark.parametrize("end", [None, ending(None)])  # which is not the start of another run
def test_a_recorder_that_does_not_own_the_run_when_its_turn_comes_sends_nothing(
    folder, fakes, monkeypatch, owner, while_waiting, end
):
    def change(*_, **__):
        (folder / OWNER_PID).write_text(owner) if owner else (folder / OWNER_PID).unlink()
        return nullcontext()

    if while_waiting:
        monkeypatch.setattr(recorder, "locked", change)
    else:
        change()
    assert record_after_the_end(folder, end)
    assert not fakes[0].starts
    assert not (folder / recorder.RECORDER_LOCK).exists()


@pytest.mark.parametrize("owned", [False, True])
def test_a_start_of_a_finished_run_opens_the_recorder_only_if_the_end_was_not_sent(folder, monkeypatch, owned):
    if not owned:
        (folder / OWNER_PID).unlink()
    run = SimpleNamespace(finished=True, folder=folder, state=SimpleNamespace(step=12), origin_tags={})
    opened = []
    monkeypatch.setattr(train, "open_run", lambda *_: nullcontext(run))
    monkeypatch.setattr(train, "_tracked", lambda run, *_: opened.append(run) or nullcontext([]))
    monkeypatch.setattr(train, "count_tokens", lambda _: 34_219)
    monkeypatch.setattr(train, "n_vocab_in", lambda _: 50_257)
    for name in ("prepare_machine", "read_data", "write_results"):
        monkeypatch.setattr(train, name, lambda *_: None)
    train.run_tracked(load_params(), folder, folder, folder)
    assert len(opened) == owned


def test_system_metrics_are_sent_with_new_records_only(monkeypatch):
    tracker = MlflowTracker.__new__(MlflowTracker)
    tracker.store, tracker.run_id, tracker._logged, sent = None, "r", 2, []
    monkeypatch.setattr(mlflow_tracker, "log_records", lambda store, run_id, records: sent.append(records))
    monkeypatch.setattr(tracker, "_log_system_metrics", sent.append)
    for steps in ((1, 2), (2, 3)):  # sent by the last attempt, and partly by this one
        tracker.log_records([{"step": step} for step in steps])
    assert sent == [[{"step": 3}], 3]
