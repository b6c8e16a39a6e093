"""stranded: what trainings left unsettled in MLflow when they died -> findings, and the journal's rows in their place.

A run of a process that is no more stays RUNNING for ever, and what a store missed while it was down is in the journals
of checkpoints/ alone. Split are sent as `runs` sends them, so that none comes twice.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from pipeline.config.sections import OptimConfig, TargetConfig, WindowsConfig
from pipeline.ops.finding import Finding
from pipeline.ops.leftovers import run_holder
from pipeline.system.errors import PipelineError
from pipeline.system.files import locked, read_json, write_text
from pipeline.tracking.fingerprint import IDENTITY
from pipeline.tracking.journal import STEPS, StepRecord
from pipeline.tracking.mlflow_runs import (
    JournalTail,
    Row,
    create_run,
    describe_inputs,
    ensure_run,
    log_records,
    logged_steps,
    run_with,
)
from pipeline.tracking.mlflow_store import Store, all_found, first_line, own_database
from pipeline.tracking.mlflow_tracker import RUN_ID, noted_run
from pipeline.tracking.recorder import KILLED, RECORDER_LOCK
from pipeline.tracking.run_record import read_run
from pipeline.training.target import is_finished

if TYPE_CHECKING:
    from mlflow.entities import Run

UNKNOWN = "unknown, the run was sent by `python -m pipeline doctor`"


def examine_running(store: Store, root: Path) -> Iterator[Finding]:
    """The runs that say they are RUNNING: whether a process of this machine is at it still."""
    found = all_found(store.client.search_runs, [store.experiment_id], "attributes.status = 'RUNNING'")
    for run in found:
        name, place = f"run {run.info.run_name} ({run.info.run_id})", _place_of(run, root)
        host = run.data.tags.get("host", socket.gethostname())
        if place is None or host != socket.gethostname():
            whose = f"of {host}" if place else "of unknown origin"
            yield Finding("note", "runs", f"{name} is RUNNING {whose}, which cannot be told from here")
        elif holder := run_holder(place):
            yield Finding("ok", "runs", f"{name} is RUNNING, and {holder} is at it")
        else:
            hint = "`python -m pipeline doctor --fix` closes it as KILLED"
            yield Finding(
                "mend", "runs", f"{name} is RUNNING, but no process is at it", hint, _closing(store, run, place)
            )
    if not found:
        yield Finding("ok", "runs", "none is left RUNNING")


def examine_journals(store: Store, root: Path) -> Iterator[Finding]:
    """The rows of each journal, of runs, of studies' trials and of the present model, and those that the store has."""
    n_rows, whole, seen = 0, True, set()
    for folder in sorted(path.parent for depth in ("*", "*/*") for path in root.glob(f"checkpoints/{depth}/{STEPS}")):
        name = str(folder.relative_to(root))
        try:
            identity, rows = read_json(folder / IDENTITY), JournalTail(folder).read()
            seen.add((identity["fingerprint"], rows[0]["logged_ms"] if rows else 0))
        except (PipelineError, ValueError, KeyError, TypeError) as error:
            what, hint = f"{name} cannot be read ({first_line(error)})", f"`python -m pipeline clean {folder.name}`"
            whole = False
            yield Finding("mend", "journals", what, hint)
            continue
        if holder := run_holder(folder):
            yield Finding("ok", "journals", f"{name} is being written, and sent, by {holder}")
            continue
        n_rows += len(rows)
        if rows and (finding := _unsent(store, folder, name, identity, rows)):
            whole = False
            yield finding
    if (model := _models_journal(root)) and (model[0]["fingerprint"], model[1][0]["logged_ms"]) not in seen:
        n_rows += len(model[1])
        if _missing(store, run_with(store, model[0]["fingerprint"], model[1]), model[1]):
            whole = False
            hint = "`dvc repro -f -s register` sends them"
            yield Finding(
                "mend", "journals", f"models/{STEPS} has rows that the store lacks", hint, _restoring(store, root)
            )
    if whole:
        yield Finding("ok", "journals", f"the store has all of their rows, {n_rows:,} steps")


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold a run's locks, those that are there. Raises RunLocked where a process has one."""
    with ExitStack() as stack:
        for lock in (folder.with_suffix(".lock"), folder / RECORDER_LOCK):
            if lock.is_file():
                stack.enter_context(locked(lock))
        yield


def _place_of(run: "Run", root: Path) -> Path | None:
    """The folder beside whose lock the run's process is known; None where nothing says which."""
    tags = run.data.tags
    if "run_folder" in tags:
        return Path(tags["run_folder"])
    return root / "checkpoints" / tags["study"] if "study" in tags and own_database(root) else None


def _closing(store: Store, run: "Run", folder: Path) -> Callable[[], str]:
    def close() -> str:
        run_id = run.info.run_id
        with holding(folder):
            last_ms = max(logged_steps(store, run_id).values(), default=None)
            store.client.set_tag(run_id, "ended", KILLED["ended"])
            store.client.set_terminated(run_id, KILLED["status"], end_time=last_ms)
        return f"run {run.info.run_name} ({run_id}) is KILLED"

    return close


def _restoring(store: Store, root: Path) -> Callable[[], str]:
    def restore() -> str:
        with locked(root / "mlruns" / ".register.lock"):  # which does the same
            return (
                f"run {ensure_run(store, root, read_run(root / 'models')).info.run_id} has all rows of models/{STEPS}"
            )

    return restore


def _unsent(store: Store, folder: Path, name: str, identity: dict[str, Any], rows: list[Row]) -> Finding | None:
    """What the store lacks of a run folder's rows; None where it lacks nothing, or a user deleted the run."""
    if (run := noted_run(store, folder)) and run.info.lifecycle_stage == "deleted":
        return None
    run_id = _run_of(store, folder, identity, rows)
    if not (missing := _missing(store, run_id, rows)):
        return None
    lost = f"the store lacks {len(missing):,} of {len(rows):,} steps" if run_id else "the store has no run of it"

    def send() -> str:
        with holding(folder):
            run_id = _run_of(store, folder, identity, rows) or _create(store, folder, identity, rows)
            n_rows = len(missing := _missing(store, run_id, rows))
            log_records(store, run_id, missing)
            if store.client.get_run(run_id).info.status == "RUNNING":
                status, ended = _ending(identity, rows)
                store.client.set_tag(run_id, "ended", ended)
                store.client.set_terminated(run_id, status, end_time=int(rows[-1]["logged_ms"]))
        return f"{name}: sent {n_rows:,} of its {len(rows):,} steps to run {run_id}"

    return Finding("mend", "journals", f"{name}: {lost}", "`python -m pipeline doctor --fix` sends its rows", send)


def _run_of(store: Store, folder: Path, identity: dict[str, Any], rows: list[Row]) -> str | None:
    """The run that a folder notes, or else one that holds a part of just its rows."""
    run = noted_run(store, folder)
    return run.info.run_id if run else run_with(store, identity["fingerprint"], rows)


def _missing(store: Store, run_id: str | None, rows: list[Row]) -> list[Row]:
    there = logged_steps(store, run_id) if run_id else {}
    return [row for row in rows if int(row["step"]) not in there]


def _create(store: Store, folder: Path, identity: dict[str, Any], rows: list[Row]) -> str:
    """Make the run that a store was down for, with the samples of its folder, below its study's."""
    tags = {"host": socket.gethostname(), "run_folder": str(folder), "rebuilt": "true"}
    if folder.parent.name != "checkpoints":
        tags |= _study_tags(store, folder.parent.name)
    run_id = create_run(store, identity, tags, int(rows[0]["logged_ms"]))
    write_text(folder / RUN_ID, f"{run_id}\n")  # at once, so that repeating goes on with it
    describe_inputs(store, run_id, identity)
    if (folder / "samples").is_dir():
        store.client.log_artifacts(run_id, str(folder / "samples"), "samples")
    return run_id


def _study_tags(store: Store, study: str) -> dict[str, str]:
    """What a trial's run says of its study, and of that one's own run, where there is one."""
    runs = all_found(store.client.search_runs, [store.experiment_id], f"tags.study = '{study}'")
    parents = [run.info.run_id for run in runs if "mlflow.parentRunId" not in run.data.tags]
    return {"study": study} | ({"mlflow.parentRunId": parents[0]} if parents else {})


def _ending(identity: dict[str, Any], rows: list[Row]) -> tuple[str, str]:
    """How a run ended, as far as its journal can tell, in MLflow's word and in ours."""
    params = identity["params"]
    try:
        target, windows = TargetConfig.model_validate(params["target"]), WindowsConfig.model_validate(params["windows"])
        max_steps = OptimConfig.model_validate(params["optim"]).max_steps(windows)
    except (KeyError, ValidationError):  # the params of other code
        return KILLED["status"], UNKNOWN
    finished = is_finished([StepRecord.of(row) for row in rows], max_steps, target)
    return ("FINISHED", "done") if finished else (KILLED["status"], UNKNOWN)


def _models_journal(root: Path) -> tuple[dict[str, Any], list[Row]] | None:
    """Who the run behind the present model is, and its rows; None where there is no model, or another stage's fault."""
    try:
        identity = read_run(root / "models")
    except PipelineError:
        return None
    rows = JournalTail(root / "models").read()
    return (identity, rows) if rows else None
