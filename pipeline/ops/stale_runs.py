"""Close MLflow runs that killed processes left RUNNING, and send journal records that the store lacks."""

import fcntl
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.ops.checks import Finding
from pipeline.system.errors import PipelineError, first_line
from pipeline.system.files import flock, lock_holder, locked, read_json, write_text
from pipeline.tracking.fingerprint import IDENTITY
from pipeline.tracking.journal import STEPS, StepRecord
from pipeline.tracking.mlflow_runs import (
    JournalTail,
    Record,
    create_run,
    describe_inputs,
    describe_outcome,
    log_records,
    logged_steps,
    run_with,
    start_of,
)
from pipeline.tracking.mlflow_store import Store, all_found, own_database
from pipeline.tracking.mlflow_tracker import RUN_ID, noted_run
from pipeline.tracking.recorder import KILLED, RECORDER_LOCK
from pipeline.training.target_result import result_of

if TYPE_CHECKING:
    from mlflow.entities import Run

FIX = "`python -m pipeline doctor --fix`"


def examine_running(store: Store, root: Path) -> Iterator[Finding]:
    """Find the runs with the status RUNNING; one is `to fix` if its process on this machine has ended."""
    found = all_found(store.client.search_runs, [store.experiment_id], "attributes.status = 'RUNNING'")
    for run in found:
        name, folder = f"run {run.info.run_name} ({run.info.run_id})", _folder_of(run, root)
        if folder is None or run.data.tags.get("host", socket.gethostname()) != socket.gethostname():
            yield Finding("note", "runs", f"{name} is RUNNING, perhaps on another machine")
        elif holder := run_holder(folder) or _job_of(run):
            yield Finding("ok", "runs", f"{name} is RUNNING in {holder}")
        else:
            hint = f"{FIX} closes it as KILLED"
            yield Finding(
                "to fix",
                "runs",
                f"{name} is RUNNING, but its process has ended",
                hint,
                partial(_close, store, run, folder),
            )
    if not found:
        yield Finding("ok", "runs", "no run has the status RUNNING")


def examine_journals(store: Store, root: Path) -> Iterator[Finding]:
    """Check the journals of runs and trials; one is `to fix` if the store lacks some of its records."""
    n_records, complete = 0, True
    for folder in sorted(path.parent for depth in ("*", "*/*") for path in root.glob(f"checkpoints/{depth}/{STEPS}")):
        name = str(folder.relative_to(root))
        if holder := run_holder(folder):
            yield Finding("ok", "journals", f"{name} is in use by {holder}")
            continue
        try:
            identity, records = read_json(folder / IDENTITY), JournalTail(folder).read()
            missing = _missing(store, _find_run(store, folder, identity, records), records)
        except (PipelineError, ValueError, KeyError, TypeError) as error:
            what, hint = f"{name} cannot be read ({first_line(error)})", f"`python -m pipeline clean {folder.name}`"
            yield Finding("to fix", "journals", what, hint)
            complete = False
            continue
        n_records += len(records)
        if missing:
            what = f"the store lacks {len(missing):,} of the {len(records):,} steps of {name}"
            yield Finding("to fix", "journals", what, f"{FIX} sends them", partial(_send, store, folder, identity))
            complete = False
    if complete:
        yield Finding("ok", "journals", f"the store has all {n_records:,} steps")


def run_holder(folder: Path) -> str | None:
    """The process that trains the run or sends its records; None if there is none. Creates and changes no file."""
    for lock in _locks(folder):
        with lock.open() as file:
            try:
                flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return f"process {lock_holder(file)}"
    return None


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold the locks of a run, except those without a file. Raises RunLocked if another process holds one."""
    with ExitStack() as stack:
        for lock in _locks(folder):
            stack.enter_context(locked(lock))
        yield


def _locks(folder: Path) -> list[Path]:
    return [lock for lock in (folder.with_suffix(".lock"), folder / RECORDER_LOCK) if lock.is_file()]


def _folder_of(run: "Run", root: Path) -> Path | None:
    """The folder whose lock the run's process holds; None if the run's tags do not name it."""
    tags = run.data.tags
    if "run_folder" in tags:
        return Path(tags["run_folder"])
    return root / "checkpoints" / tags["study"] if "study" in tags and own_database(root) else None


def _job_of(run: "Run") -> str | None:
    """The job on Slurm that runs the workers of a study, also after the process that submitted it has ended."""
    from pipeline.cluster.jobs import find_live

    tags = run.data.tags
    job = find_live(f"study-{tags['study']}") if "study" in tags and "run_folder" not in tags else None
    return f"job {job.id}" if job else None


def _close(store: Store, run: "Run", folder: Path) -> str:
    run_id = run.info.run_id
    with holding(folder):
        last_ms = max(logged_steps(store, run_id).values(), default=None)
        store.client.set_tag(run_id, "ended", KILLED["ended"])
        store.client.set_terminated(run_id, KILLED["status"], end_time=last_ms)
    return f"run {run.info.run_name} ({run_id}) is KILLED"


def _find_run(store: Store, folder: Path, identity: dict[str, Any], records: list[Record]) -> str | None:
    """The run whose id is in the folder, or else one whose records are all in the journal."""
    run = noted_run(store, folder)
    return run.info.run_id if run else run_with(store, identity["fingerprint"], records)


def _missing(store: Store, run_id: str | None, records: list[Record]) -> list[Record]:
    """The records that the store lacks; none if a user deleted the run."""
    if run_id is None:
        return records
    if store.client.get_run(run_id).info.lifecycle_stage == "deleted":
        return []
    logged = logged_steps(store, run_id)
    return [record for record in records if int(record["step"]) not in logged]


def _send(store: Store, folder: Path, identity: dict[str, Any]) -> str:
    """Send the records that the store lacks, to a new run if it has none of them."""
    with holding(folder):
        records = JournalTail(folder).read()
        run_id = _find_run(store, folder, identity, records) or _create(store, folder, identity, records)
        n_missing = len(missing := _missing(store, run_id, records))
        log_records(store, run_id, missing)
        if store.client.get_run(run_id).info.status == "RUNNING":
            steps = [StepRecord.of(record) for record in records]
            is_finished = _is_finished(steps[-1])
            result = result_of(steps, identity["params"].get("target", {})) if is_finished else None
            describe_outcome(store, run_id, identity, result)
            store.client.set_tag(run_id, "ended", "unknown, sent by `python -m pipeline doctor`")
            status = "FINISHED" if is_finished else KILLED["status"]
            store.client.set_terminated(run_id, status, end_time=int(records[-1]["logged_ms"]))
    return f"sent {n_missing:,} of {len(records):,} steps of {folder.name} to run {run_id}"


def _create(store: Store, folder: Path, identity: dict[str, Any], records: list[Record]) -> str:
    """Create a run for a journal, with its inputs and samples, and write its id into the folder."""
    study = {"study": folder.parent.name} if folder.parent.name != "checkpoints" else {}
    tags = {"host": socket.gethostname(), "run_folder": str(folder), "rebuilt": "true"} | study
    run_id = create_run(store, identity, tags, start_of(records))
    write_text(folder / RUN_ID, f"{run_id}\n")  # first, so that a second attempt finds it
    describe_inputs(store, run_id, identity)
    if (folder / "samples").is_dir():
        store.client.log_artifacts(run_id, str(folder / "samples"), "samples")
    return run_id


def _is_finished(last: StepRecord) -> bool:
    """Whether the journal's run reached its end: only its last step measures all losses of the training text."""
    from pipeline.model.evaluate import LOSSES

    return all(getattr(last, name) is not None for name, (part, _) in LOSSES.items() if part == "train")
