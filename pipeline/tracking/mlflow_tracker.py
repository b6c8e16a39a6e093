"""Write a training's records to its MLflow run."""

import logging
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.system.errors import InputError
from pipeline.system.files import write_text
from pipeline.system.host import host_info
from pipeline.tracking.descriptions import Result
from pipeline.tracking.mlflow_runs import (
    Record,
    create_run,
    describe_inputs,
    describe_outcome,
    identity_tags,
    log_records,
    logged_steps,
    runs_of,
)
from pipeline.tracking.mlflow_store import Store, open_store, store_errors

if TYPE_CHECKING:
    from mlflow.entities import Run

RUN_ID = "mlflow_run_id"  # file in the run's folder


class MlflowTracker:
    """The tracker for MLflow. It resumes the MLflow run whose id is in the run folder, or creates one."""

    def __init__(
        self, root: Path, run_folder: Path, identity: dict[str, Any], tags: dict[str, str], started_ms: int
    ) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self.store, self.client = (store := open_store(root)), store.client
        self.identity = identity
        run = noted_run(store, run_folder)
        if run is None or run.info.lifecycle_stage == "deleted":
            self.run_id = self._create(run_folder, identity, tags, started_ms)
        else:
            self.run_id = run.info.run_id
        self.client.update_run(self.run_id, status="RUNNING")
        for key, value in {**identity_tags(identity), **tags}.items():
            self.client.set_tag(self.run_id, key, value)
        describe_outcome(store, self.run_id, identity, None)
        describe_inputs(store, self.run_id, identity)
        self.client.log_dict(self.run_id, host_info(), "environment.json")
        self._logged = len(logged_steps(store, self.run_id))
        # MLflow's own monitor. Its thread is not started, because it would end at the store's first failure.
        self._monitor = SystemMetricsMonitor(self.run_id, tracking_uri=store.uri)
        for monitor in self._monitor.monitors:
            logging.getLogger(type(monitor).__module__).addFilter(_Once())

    @staticmethod
    def errors() -> tuple[type[Exception], ...]:
        return *store_errors(), InputError  # a database that `connect` refuses

    def log_records(self, records: list[Record]) -> None:
        """Send the records that the store lacks, and the present system metrics."""
        log_records(self.store, self.run_id, [record for record in records if record["step"] > self._logged])
        self._log_system_metrics(int(records[-1]["step"]))

    def log_sample(self, path: Path) -> None:
        self.client.log_artifact(self.run_id, str(path), "samples")

    def end(self, status: str, ended: str, result: Result | None = None) -> None:
        describe_outcome(self.store, self.run_id, self.identity, result)
        self.client.set_tag(self.run_id, "ended", ended)
        self.client.set_terminated(self.run_id, status)

    def _create(self, run_folder: Path, identity: dict[str, Any], tags: dict[str, str], started_ms: int) -> str:
        """Close the runs that a killed process left RUNNING, create a run and write its id into the run folder."""
        place = {"host": socket.gethostname(), "run_folder": str(run_folder)}
        for run in runs_of(self.store, identity["fingerprint"]):
            if run.info.status == "RUNNING" and place.items() <= run.data.tags.items():
                self.client.set_terminated(run.info.run_id, "KILLED")
        experiment = {"dvc_experiment": os.environ["DVC_EXP_NAME"]} if "DVC_EXP_NAME" in os.environ else {}
        run_id = create_run(self.store, identity, tags | place | experiment, started_ms)
        write_text(run_folder / RUN_ID, f"{run_id}\n")
        return run_id

    def _log_system_metrics(self, step: int) -> None:
        """Send CPU, memory, disk and GPU usage under the names that MLflow's page of system metrics expects."""
        from mlflow.entities import Metric

        self._monitor.collect_metrics()
        state, now_ms = self._monitor.aggregate_metrics(), int(time.time() * 1000)
        metrics = [Metric(f"system/{key}", value, now_ms, step) for key, value in state.items()]
        self.client.log_batch(self.run_id, metrics=metrics)
        for monitor in self._monitor.monitors:
            monitor.clear_metrics()


class _Once(logging.Filter):
    """Pass each message once: a GPU that lacks a metric, as parts of a GPU do (MIG), is no warning at every tick."""

    def __init__(self) -> None:
        super().__init__()
        self._passed: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        is_new = (text := record.getMessage()) not in self._passed
        self._passed.add(text)
        return is_new


def noted_run(store: Store, run_folder: Path) -> "Run | None":
    """The run whose id is in the run folder, deleted or not; None if there is no id, or the store lacks the run."""
    from mlflow.exceptions import MlflowException

    if not (path := run_folder / RUN_ID).is_file():
        return None
    try:
        return store.client.get_run(path.read_text(encoding="utf-8").strip())
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
