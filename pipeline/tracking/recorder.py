"""Send the records and samples of a training run to the trackers, from a separate process.

The process reads them from the run folder, so that training neither imports MLflow nor waits for it; a thread would
slow training down. It is started as `python -m MODULE ROOT TICK_S` and records one run after the other. Its standard
input has two lines of JSON for each run: the run's folder, identity, tags and start, and at the end how the training
ended and what it reached. Without the second line, training was killed. To its standard output it writes a line for
each run: whether all records have arrived.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import RawIOBase
from pathlib import Path
from typing import Any, Protocol, Self, TextIO

from pipeline.system.errors import Interrupted, PeerLost, Pruned, first_line
from pipeline.system.files import locked, write_text
from pipeline.system.processes import send_line, spawn_module
from pipeline.tracking.descriptions import Result
from pipeline.tracking.mlflow_errors import explain
from pipeline.tracking.mlflow_runs import BATCH, JournalTail, Record, start_of
from pipeline.tracking.mlflow_store import require_usable
from pipeline.tracking.mlflow_tracker import MlflowTracker

FINISH_S = 60.0  # how long the end of training waits for the trackers
INTERRUPTED_S = 10.0  # how long it waits after a signal: in a container, the process ends with training
EXIT_S = 1.0  # how long it waits for the process to end after its last answer
RECORDER_LOCK = "recorder.lock"  # file in the run folder, locked while the run's records are being sent
OWNER_PID = "recorder.pid"  # file in the run folder: the newest recorder's pid; removed when a FINISHED run is sent
KILLED = {"status": "KILLED", "ended": "killed"}
ARRIVED, MISSING = "all records have arrived", "records are missing"  # answers of the process


class Tracker(Protocol):
    """A service that stores a run's records; created in the recorder's process at each start of a training.

    A call that raises one of `errors()` is repeated at the next tick. So records may arrive twice, but always in order.
    Each start sends all records of the run from the beginning.
    """

    def __init__(
        self, root: Path, run_folder: Path, identity: dict[str, Any], tags: dict[str, str], started_ms: int
    ) -> None:
        """`started_ms`: when the training began, before its first step, in Unix milliseconds."""

    @staticmethod
    def errors() -> tuple[type[Exception], ...]:
        """What its methods raise when the service cannot be reached."""
        ...

    def log_records(self, records: list[Record]) -> None:
        """Store some of the journal's records: all fields of StepRecord, and tokens_per_s."""

    def log_sample(self, path: Path) -> None:
        """Store a file of texts that the model generated, such as samples/step-000050.txt."""

    def end(self, status: str, ended: str, result: Result | None = None) -> None:
        """Close the run with the status FINISHED, FAILED or KILLED.

        `ended` is the reason, `result` what a FINISHED run reached; None if its target rule's loss was not measured.
        """


TRACKERS: dict[str, type[Tracker]] = {"MLflow": MlflowTracker}  # all of them get each run


class Recorder:
    """Sends the records of training runs, one run after the other, from one process.

    The process is started with the first run and used for all of them, since it imports MLflow for seconds. If training
    is killed, it sends the rest and closes the run as KILLED. A tracker that is down or slow causes a warning; the
    records stay in the journal.
    """

    def __init__(self, root: Path, tick_s: float = 5.0) -> None:
        """Raises InputError, before any process is started, if the store's URI cannot be used."""
        require_usable(root)
        self._arguments = [str(root.absolute()), str(tick_s)]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if process := self._process:
            self._release(process)
            with suppress(subprocess.TimeoutExpired):
                process.wait(EXIT_S)

    @contextmanager
    def recording(
        self,
        run_folder: Path,
        identity: dict[str, Any],
        tags: dict[str, str],
        result: Callable[[], Result | None] = lambda: None,
    ) -> Iterator[None]:
        """Record a run; at the end, wait until its records have arrived, but not long.

        Enter it while the run folder's lock is held, and after the run's Journal, which removes incomplete lines.
        `result` returns what the run has reached; it is called at the end of a run with the status FINISHED.
        """
        records = JournalTail(run_folder).read()
        started_ms = start_of(records) if records else int(time.time() * 1000)
        process = self._started()
        write_text(run_folder / OWNER_PID, str(process.pid))  # before the process may look for it
        run = {"run_folder": str(run_folder.absolute()), "identity": identity, "tags": tags, "started_ms": started_ms}
        _send(process, run)
        try:
            yield
        except BaseException as error:
            self._end(process, ending(error), result)
            raise
        self._end(process, ending(None), result)

    def _started(self) -> "subprocess.Popen[str]":
        """The process; a new one if there is none that waits for a run."""
        if self._process is None or self._process.poll() is not None:
            self._process = spawn_module("pipeline.tracking.recorder", *self._arguments, stdout=subprocess.PIPE)
            if hasattr(os, "setpriority"):  # works only within a session: the process must not get its own
                os.setpriority(os.PRIO_PROCESS, self._process.pid, 19)  # the lowest, also for its imports
        return self._process

    def _end(self, process: "subprocess.Popen[str]", end: dict[str, Any], result: Callable[[], Result | None]) -> None:
        """Tell the process how the run has ended, and wait for its answer."""
        _send(process, end | ({"result": result()} if end["status"] == "FINISHED" else {}))
        wait_s = INTERRUPTED_S if end["status"] == "KILLED" else FINISH_S
        assert process.stdout is not None, "stdout=PIPE"
        if not select.select([process.stdout], [], [], wait_s)[0]:
            print("the rest of the run is sent in the background", file=sys.stderr)
            self._release(process)
        elif process.stdout.readline() != f"{ARRIVED}\n":
            print(
                "warning: MLflow lacks a part of the run: `python -m pipeline doctor --fix` sends it", file=sys.stderr
            )

    def _release(self, process: "subprocess.Popen[str]") -> None:
        """Let the process end once all is sent."""
        self._process = None
        if process.stdin:
            with suppress(BrokenPipeError):
                process.stdin.close()


def _send(process: "subprocess.Popen[str]", line: dict[str, Any]) -> None:
    """Send a line to a recorder, which may have been killed: training continues without it."""
    with suppress(BrokenPipeError):
        send_line(process, line)


def ending(error: BaseException | None) -> dict[str, str]:
    """The status in MLflow of a training that ended with `error`, and the reason."""
    if error is None:
        return {"status": "FINISHED", "ended": "done"}
    if isinstance(error, Pruned):
        return {"status": "FINISHED", "ended": f"PRUNED: {first_line(error)}"}
    stopped = isinstance(error, Interrupted | PeerLost | KeyboardInterrupt)
    return {"status": "KILLED" if stopped else "FAILED", "ended": f"{type(error).__name__}: {first_line(error)}"}


def serve(root: Path, tick_s: float, control: RawIOBase, answers: TextIO) -> None:
    """Record one run after the other, and answer each with a line, until `control` is closed.

    `answers` is line-buffered.
    """
    while line := control.readline():
        arrived = record(root, json.loads(line), tick_s, control)
        with suppress(BrokenPipeError):  # training has ended
            answers.write(f"{ARRIVED if arrived else MISSING}\n")


def record(root: Path, start: dict[str, Any], tick_s: float, control: RawIOBase) -> bool:
    """Send a run's records to all trackers until `control`, which is not buffered, has a line or is closed.

    Return whether all of them arrived. Also return True if training was started again before this process got the
    lock: then the newer recorder sends everything.
    """
    run_folder = Path(start.pop("run_folder"))
    if _owns(run_folder):
        with locked(run_folder / RECORDER_LOCK, wait=True):  # the previous recorder may still be sending
            if _owns(run_folder):
                return _record(root, run_folder, start, tick_s, control)
    control.readline()  # the run's end, which is not the next run
    return True


def _record(root: Path, run_folder: Path, start: dict[str, Any], tick_s: float, control: RawIOBase) -> bool:
    feeds = [_Feed(name, root, run_folder, start) for name in TRACKERS]
    while True:
        stopped, _, _ = select.select([control], [], [], 0)  # before the last tick, so that it sends everything
        end = _end_of(control.readline()) if stopped else None
        arrived = [feed.send(end) for feed in feeds]
        if end:
            if all(arrived) and end["status"] == "FINISHED":
                (run_folder / OWNER_PID).unlink()
            return all(arrived)
        select.select([control], [], [], tick_s)


def _end_of(line: bytes) -> dict[str, Any]:
    """The arguments of Tracker.end, from the second line; training was killed if it is empty."""
    end: dict[str, Any] = json.loads(line) if line else KILLED
    return end | {"result": Result(*end["result"])} if end.get("result") else end


def _owns(run_folder: Path) -> bool:
    """Whether this process has to send the run's records; the folder may have been removed."""
    path = run_folder / OWNER_PID
    return path.is_file() and path.read_text(encoding="utf-8") == str(os.getpid())


class _Feed:
    """Sends one run folder's records and samples to one tracker."""

    def __init__(self, name: str, root: Path, run_folder: Path, start: dict[str, Any]) -> None:
        self.name, self.root, self.run_folder, self.start = name, root, run_folder, start
        self.tail, self.warned = JournalTail(run_folder), False
        self.tracker: Tracker | None = None
        self.records: list[Record] = []  # read, but not yet sent
        self.samples: set[str] = set()  # names of the files that were sent

    def send(self, end: dict[str, Any] | None) -> bool:
        """Send what is new, then `end` if given; return whether the tracker stored everything."""
        kind = TRACKERS[self.name]
        try:
            tracker = self.tracker = self.tracker or kind(self.root, self.run_folder, **self.start)
            self.records += self.tail.read()
            while batch := self.records[:BATCH]:
                tracker.log_records(batch)
                del self.records[: len(batch)]
            for path in sorted((self.run_folder / "samples").glob("step-*.txt")):
                if path.name not in self.samples:
                    tracker.log_sample(path)
                    self.samples.add(path.name)
            if end:
                tracker.end(**end)
        except kind.errors() as error:
            if not self.warned:
                cause, remedy = explain(error)
                what = f"{remedy}; training continues" if remedy else "training continues"
                print(f"warning: {self.name} fails ({cause}): {what}", file=sys.stderr)
            self.warned = True
            return False
        return True


def main() -> None:
    """Serve the process that has started this one. Only answers reach standard output: MLflow may print to it."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with open(0, "rb", buffering=0) as control:
        serve(Path(sys.argv[1]), float(sys.argv[2]), control, answers)


if __name__ == "__main__":
    main()
