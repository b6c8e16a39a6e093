"""The process beside a training that sends its journal to MLflow: `python -m MODULE ROOT RUN_FOLDER TICK_S`.

Its standard input gives the run's identity and tags and, at the end, how the training ended: two lines of JSON. Where
the second one is missing the training was killed.
"""

import json
import os
import select
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pipeline.system.files import locked, write_text
from pipeline.system.host import host_info
from pipeline.tracking.mlflow_runs import (
    JournalTail,
    Row,
    create_run,
    describe_inputs,
    identity_tags,
    log_records,
    logged_steps,
    runs_of,
)
from pipeline.tracking.mlflow_store import Store, first_line, open_store, store_errors

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

RUN_ID = "mlflow_run_id"  # file in the run's folder
RECORDER_LOCK = "recorder.lock"  # likewise; held while the run's rows are being sent
OWNER_PID = "recorder.pid"  # likewise; the process that has to send them, the last that was started; gone once FINISHED
KILLED = {"status": "KILLED", "ended": "killed"}


def record(root: Path, run_folder: Path, tick_s: float, control: TextIO) -> bool:
    """Send what the run folder gets to the store of `root`, until `control` can be read again; whether all arrived.

    What fails is told once and tried again at the next tick. Where training was started again before its turn came, the
    recorder of that start has it all to send, and the last word.
    """
    start = json.loads(control.readline())
    if not _owes(run_folder):
        return True
    with locked(run_folder / RECORDER_LOCK, wait=True):  # the one before may still ship what a kill left
        if not _owes(run_folder):
            return True
        tail, link, warned = JournalTail(run_folder), None, False
        while True:
            stopped = bool(select.select([control], [], [], 0)[0])  # asked first, so that the last look sees all
            try:
                link = link or Link(root, run_folder, **start)
                link.send(tail)
                if stopped:
                    link.end(**(json.loads(control.read() or "null") or KILLED))
                    return True
            except store_errors() as error:
                if not warned:
                    print(f"warning: MLflow's store fails ({first_line(error)}): training goes on", file=sys.stderr)
                warned = True
                if stopped:
                    return False
            select.select([control], [], [], tick_s)


def _owes(run_folder: Path) -> bool:
    """Whether this process is the one that has to send the run's rows; the folder may be gone."""
    path = run_folder / OWNER_PID
    return path.is_file() and path.read_text(encoding="utf-8") == str(os.getpid())


class Link:
    """The store and the run in it that belongs to a run folder, made anew or found again."""

    def __init__(self, root: Path, run_folder: Path, identity: dict[str, Any], tags: dict[str, str]) -> None:
        self.store, self.run_folder, self.identity = open_store(root), run_folder, identity
        self.run_id = self._recall() or self._create()
        self.store.client.update_run(self.run_id, status="RUNNING")
        for key, value in {**identity_tags(identity), **tags}.items():
            self.store.client.set_tag(self.run_id, key, value)
        describe_inputs(self.store, self.run_id, identity)
        self.store.client.log_dict(self.run_id, host_info(), "environment.json")
        self._shipped = len(logged_steps(self.store, self.run_id))
        self._rows: list[Row] = []  # read, but not yet in the store
        self._samples: set[str] = set()  # names of those that the store has
        self._monitor = _system_monitor(self.run_id, self.store)

    def send(self, tail: JournalTail) -> None:
        """Send what is new since the last call."""
        self._rows += [row for row in tail.read() if row["step"] > self._shipped]
        log_records(self.store, self.run_id, self._rows)
        for path in sorted((self.run_folder / "samples").glob("step-*.txt")):
            if path.name not in self._samples:
                self.store.client.log_artifact(self.run_id, str(path), "samples")
                self._samples.add(path.name)
        self._send_system_metrics(tail.step)

    def end(self, status: str, ended: str) -> None:
        """Close the run."""
        self.store.client.set_tag(self.run_id, "ended", ended)
        self.store.client.set_terminated(self.run_id, status)
        if status == "FINISHED":
            (self.run_folder / OWNER_PID).unlink()

    def _recall(self) -> str | None:
        """The run that this folder began with, unless the store has lost or deleted it."""
        run = noted_run(self.store, self.run_folder)
        return str(run.info.run_id) if run and run.info.lifecycle_stage == "active" else None

    def _create(self) -> str:
        """Close what a killed process left RUNNING, create a run and note its id."""
        place = {"host": socket.gethostname(), "run_folder": str(self.run_folder)}
        for run in runs_of(self.store, self.identity["fingerprint"]):
            if run.info.status == "RUNNING" and place.items() <= run.data.tags.items():
                self.store.client.set_terminated(run.info.run_id, "KILLED")
        experiment = {"dvc_experiment": os.environ["DVC_EXP_NAME"]} if "DVC_EXP_NAME" in os.environ else {}
        run_id = create_run(self.store, self.identity, place | experiment)
        write_text(self.run_folder / RUN_ID, f"{run_id}\n")
        return run_id

    def _send_system_metrics(self, step: int) -> None:
        """Send the machine's state, under the names that MLflow's own page of system metrics looks for."""
        from mlflow.entities import Metric

        self._monitor.collect_metrics()
        now_ms = int(time.time() * 1000)
        state = self._monitor.aggregate_metrics()
        self.store.client.log_batch(
            self.run_id, metrics=[Metric(f"system/{key}", value, now_ms, step) for key, value in state.items()]
        )
        for monitor in self._monitor.monitors:
            monitor.clear_metrics()


def noted_run(store: Store, run_folder: Path) -> "Run | None":
    """The run that a folder says its rows went to, deleted or not; None where it says none, or the store lost it."""
    from mlflow.exceptions import MlflowException

    if not (path := run_folder / RUN_ID).is_file():
        return None
    try:
        return store.client.get_run(path.read_text(encoding="utf-8").strip())
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _system_monitor(run_id: str, store: Store) -> "SystemMetricsMonitor":
    """MLflow's own meters, without its thread, which would end with the first answer that the store fails to give."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    return SystemMetricsMonitor(run_id, tracking_uri=store.uri)


if __name__ == "__main__":
    sys.exit(not record(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), sys.stdin))
