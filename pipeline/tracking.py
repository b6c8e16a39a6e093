"""tracking: a training run's folder -> its run in MLflow, kept up to date by a thread of its own.

The journal is the truth and MLflow gets its rows: training neither imports MLflow nor waits for it.
"""

import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pipeline.errors import Interrupted
from pipeline.files import write_text
from pipeline.runs import JournalTail, Row, create_run, describe_inputs, runs_of, ship, shipped
from pipeline.store import Store, first_line, machine_facts, open_store, store_errors
from pipeline.store import project_root as project_root  # with Recorder, for who trains

if TYPE_CHECKING:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

RUN_ID = "mlflow_run_id"  # file in the run's folder
TICK_S = 5.0  # between two looks at the journal
LAST_CALL_S = 60.0  # how long the end of training waits for the store
REST = "`dvc repro -f -s register` ships the rest"


class Recorder:
    """While it is open, a training run's rows, samples and system metrics go to MLflow.

    Open it while the run folder's lock is held and after its Journal, which cuts torn rows off. A store that is down,
    locked or slow costs one warning; nothing is lost, for the journal has it.
    """

    def __init__(self, root: Path, run_folder: Path, identity: dict[str, Any]) -> None:
        self.root, self.run_folder, self.identity = root, run_folder, identity
        self._link: _Link | None = None  # to the store, once it has answered
        self._tail = JournalTail(run_folder)
        self._status, self._ended = "FINISHED", "done"
        self._stopping = threading.Event()
        self._warned = self._settled = False
        self._thread = self._new_thread()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._status = "KILLED" if isinstance(error, Interrupted | KeyboardInterrupt) else "FAILED"
            self._ended = f"{type(error).__name__}: {first_line(error)}"
        self._stopping.set()
        if not self._thread.is_alive():  # it met an error that nobody foresaw; try once more
            self._thread = self._new_thread()
            self._thread.start()
        self._thread.join(LAST_CALL_S)
        if not self._settled:
            print(f"warning: MLflow's store did not get all of the run: {REST}", file=sys.stderr)

    def _new_thread(self) -> threading.Thread:
        return threading.Thread(target=self._work, name="recorder", daemon=True)

    def _work(self) -> None:
        """Tick until told to stop, and once more then."""
        while not self._stopping.is_set():
            self._tick(last=False)
            self._stopping.wait(TICK_S)
        self._tick(last=True)

    def _tick(self, last: bool) -> None:
        """Bring the store up to date; where it fails, say so once and leave the rest to the next tick."""
        try:
            if self._link is None:
                self._link = _Link(self.root, self.run_folder, self.identity)
            self._link.send(self._tail)
            if last:
                self._link.end(self._status, self._ended)
                self._settled = True
        except store_errors() as error:
            if not self._warned:
                print(f"warning: MLflow's store fails ({first_line(error)}): training goes on", file=sys.stderr)
            self._warned = True


class _Link:
    """The store and the run in it that belongs to a run folder; made anew or found again."""

    def __init__(self, root: Path, run_folder: Path, identity: dict[str, Any]) -> None:
        self.store, self.run_folder, self.identity = open_store(root), run_folder, identity
        self.run_id = self._recall() or self._create()
        self.store.client.update_run(self.run_id, status="RUNNING")
        describe_inputs(self.store, self.run_id, identity)
        self.store.client.log_dict(self.run_id, machine_facts(), "environment.json")
        self.shipped = len(shipped(self.store, self.run_id))
        self._rows: list[Row] = []  # read, but not yet in the store
        self._samples: set[str] = set()  # names of those that the store has
        self._monitor = _system_monitor(self.run_id, self.store)

    def send(self, tail: JournalTail) -> None:
        """Send what is new since the last call."""
        self._rows += [row for row in tail.read() if row["step"] > self.shipped]
        ship(self.store, self.run_id, self._rows)
        for path in sorted((self.run_folder / "samples").glob("step-*.txt")):
            if path.name not in self._samples:
                self.store.client.log_artifact(self.run_id, str(path), "samples")
                self._samples.add(path.name)
        self._send_system_metrics(tail.step)

    def end(self, status: str, ended: str) -> None:
        self.store.client.set_tag(self.run_id, "ended", ended)
        self.store.client.set_terminated(self.run_id, status)

    def _recall(self) -> str | None:
        """The run that this folder began with, unless the store has lost or deleted it."""
        from mlflow.exceptions import MlflowException

        if not (path := self.run_folder / RUN_ID).is_file():
            return None
        run_id = path.read_text(encoding="utf-8").strip()
        try:
            run = self.store.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run_id if run.info.lifecycle_stage == "active" else None

    def _create(self) -> str:
        """Close what a killed process left RUNNING, create a run and note its id."""
        place = {"host": socket.gethostname(), "run_folder": str(self.run_folder.absolute())}
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


def _system_monitor(run_id: str, store: Store) -> "SystemMetricsMonitor":
    """MLflow's own meters, without its thread, which would end with the first answer that the store fails to give."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    return SystemMetricsMonitor(run_id, tracking_uri=store.uri)
