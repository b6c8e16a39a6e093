"""Send what a training run writes into its folder to the trackers, from a process of its own.

The journal is the truth, and a tracker gets its records. Training neither imports MLflow nor waits for it, nor shares
its interpreter with it: a thread would cost training seconds. The process is `python -m MODULE ROOT RUN_FOLDER TICK_S`.
Its standard input gives the run's identity and tags and, at the end, how the training ended: two lines of JSON. Where
the second one is missing the training was killed.
"""

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from pipeline.system.errors import Interrupted, PeerLost, Pruned
from pipeline.system.files import locked, write_text
from pipeline.system.host import start_module
from pipeline.tracking.mlflow_runs import BATCH, JournalTail, Row
from pipeline.tracking.mlflow_store import first_line, require_usable
from pipeline.tracking.mlflow_tracker import MlflowTracker

LAST_CALL_S = 60.0  # how long the end of training waits for the trackers
INTERRUPTED_S = 1.0  # and how long after a signal, when its sender waits
RECORDER_LOCK = "recorder.lock"  # file in the run's folder; held while the run's records are being sent
OWNER_PID = "recorder.pid"  # likewise; the process that has to send them, the last one started; gone once FINISHED
KILLED = {"status": "KILLED", "ended": "killed"}


class Tracker(Protocol):
    """Where records go; created in the recorder's process at each start of a run.

    A call that raises one of `errors()` is repeated at the next tick, so that a record may arrive twice, but in order.
    After another start all records of the run arrive again.
    """

    def __init__(self, root: Path, run_folder: Path, identity: dict[str, Any], tags: dict[str, str]) -> None: ...

    @staticmethod
    def errors() -> tuple[type[Exception], ...]:
        """What its calls raise when it cannot be reached."""
        ...

    def log_records(self, records: list[Row]) -> None:
        """Take some of the journal's records: all fields of StepRecord, and tokens_per_s."""

    def log_sample(self, path: Path) -> None:
        """Take a file of texts that the model wrote, samples/step-000050.txt."""

    def end(self, status: str, ended: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED; `ended` says why."""


TRACKERS: dict[str, type[Tracker]] = {"MLflow": MlflowTracker}  # all of them get each run


class Recorder:
    """While it is open, what a training run writes into its folder goes to the trackers.

    Open it while the run folder's lock is held and after its Journal, which cuts torn lines off. A tracker that is down
    or slow costs a warning; nothing is lost, for the journal has it. Where this process is killed, the other one
    notices, sends the rest and marks the run so.
    """

    def __init__(
        self, root: Path, run_folder: Path, identity: dict[str, Any], tags: dict[str, str], tick_s: float = 5.0
    ) -> None:
        """Raises InputError, before anything is started, where the address of MLflow's store cannot be used."""
        require_usable(root)
        self._run_folder = run_folder
        self._arguments = [str(root.absolute()), str(run_folder.absolute()), str(tick_s)]
        self._start = {"identity": identity, "tags": tags}

    def __enter__(self) -> Self:
        self._process = start_module(  # in a session of its own a low priority would count for nothing
            "pipeline.tracking.recorder", *self._arguments, line=self._start, stdout=subprocess.DEVNULL
        )
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, self._process.pid, 19)  # training comes first, from the first import on
        write_text(self._run_folder / OWNER_PID, str(self._process.pid))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            wait_s = INTERRUPTED_S if isinstance(error, Interrupted | PeerLost) else LAST_CALL_S
            self._process.communicate(json.dumps(ending(error)), timeout=wait_s)
        except subprocess.TimeoutExpired:
            print("the rest of the run is sent in the background", file=sys.stderr)
        else:
            if self._process.returncode:
                print(
                    "warning: MLflow lacks a part of the run: `dvc repro -f -s register` sends it",
                    file=sys.stderr,
                )


def ending(error: BaseException | None) -> dict[str, str]:
    """How a run ended: its status in MLflow, and why."""
    if error is None:
        return {"status": "FINISHED", "ended": "done"}
    if isinstance(error, Pruned):
        return {"status": "FINISHED", "ended": f"PRUNED: {first_line(error)}"}
    stopped = isinstance(error, Interrupted | PeerLost | KeyboardInterrupt)
    return {"status": "KILLED" if stopped else "FAILED", "ended": f"{type(error).__name__}: {first_line(error)}"}


def record(root: Path, run_folder: Path, tick_s: float, control: TextIO) -> bool:
    """Send what the run folder gets to all trackers, until `control` can be read again; return whether all arrived.

    Where training was started again before this process got the lock, the recorder of that start sends everything.
    """
    start = json.loads(control.readline())
    if not _owns(run_folder):
        return True
    with locked(run_folder / RECORDER_LOCK, wait=True):  # the one before may still send what a kill left
        if not _owns(run_folder):
            return True
        feeds = [_Feed(name, root, run_folder, start) for name in TRACKERS]
        while True:
            stopped = bool(select.select([control], [], [], 0)[0])  # asked first, so that the last tick sees all
            end = (json.loads(control.read() or "null") or KILLED) if stopped else None
            arrived = [feed.send(end) for feed in feeds]
            if end:
                if all(arrived) and end["status"] == "FINISHED":
                    (run_folder / OWNER_PID).unlink()
                return all(arrived)
            select.select([control], [], [], tick_s)


def _owns(run_folder: Path) -> bool:
    """Whether this process is the one that has to send the run's records; the folder may be gone."""
    path = run_folder / OWNER_PID
    return path.is_file() and path.read_text(encoding="utf-8") == str(os.getpid())


class _Feed:
    """What one tracker has of a run folder, and what it lacks."""

    def __init__(self, name: str, root: Path, run_folder: Path, start: dict[str, Any]) -> None:
        self.name, self.root, self.run_folder, self.start = name, root, run_folder, start
        self.tail, self.warned = JournalTail(run_folder), False
        self.tracker: Tracker | None = None
        self.records: list[Row] = []  # read, but not yet sent
        self.samples: set[str] = set()  # names of those that were sent

    def send(self, end: dict[str, str] | None) -> bool:
        """Send what is new, then the end where it has come; return whether the tracker took it all."""
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
                print(f"warning: {self.name} fails ({first_line(error)}): training continues", file=sys.stderr)
            self.warned = True
            return False
        return True


if __name__ == "__main__":
    sys.exit(not record(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), sys.stdin))
