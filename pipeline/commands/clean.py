"""Remove folders of runs; models, studies and MLflow runs stay.

A run's folder has its checkpoints, journal and samples; a study's has its trials and figures. `dvc repro -f train` then
trains from step 0.
"""

import argparse
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from pipeline.commands.arguments import Add
from pipeline.system.errors import InputError, PipelineError

STUDY = "a study"


def add_arguments(add: Add) -> None:
    add(
        "name",
        metavar="NAME",
        nargs="?",
        help="fingerprint of a run, or name of a study; default: all runs that can be repeated exactly, and no study",
    )
    add("--dry-run", action="store_true", help="print what would be removed, and remove nothing")


def run(arguments: argparse.Namespace) -> None:
    from pipeline.system.files import locked
    from pipeline.system.host import project_root
    from pipeline.tracking.recorder import RECORDER_LOCK

    home, name = project_root() / "checkpoints", arguments.name
    folders = [path for path in sorted(home.glob("*")) if path.is_dir() and path.name != "jobs"]
    named = [path for path in folders if name in (path.name, path.stem)]
    if name is not None and not named:
        raise InputError(f"no run or study {name!r} in {home}: `ls {home}` shows them")
    only_by_name = {path: reasons for path in folders if (reasons := [*_only_by_name(path)])}
    to_remove = named or [path for path in folders if path not in only_by_name]
    if (home / "jobs").is_dir():  # a job holds no lock while it waits in the queue
        from pipeline.cluster.jobs import find_live

        trained_by = dict(
            (f"study-{path.name}", f"study {path.name}") if STUDY in only_by_name.get(path, []) else ("train", "a run")
            for path in to_remove
        )
        for job_name, what in trained_by.items():
            if job := find_live(job_name):
                raise InputError(f"job {job.id} trains {what}: `python -m pipeline jobs --cancel {job.id}` ends it")
    total_files = total_bytes = 0
    with ExitStack() as locks:
        if not arguments.dry_run:  # of all runs, so that nothing is removed while one of them is trained
            locked_too = named or [path for path in folders if STUDY not in only_by_name.get(path, [])]
            for lock in sorted({folder.with_suffix(".lock") for folder in locked_too}):
                locks.enter_context(locked(lock))
            # Those of a study's trials, and of recorders.
            inner = [lock for folder in to_remove for lock in folder.rglob("*.lock")]
            for lock in sorted(inner, key=lambda lock: lock.name == RECORDER_LOCK):
                with locked(lock, wait=lock.name == RECORDER_LOCK):  # not held: a study may have a thousand
                    pass
        for folder in to_remove:
            n_files, n_bytes = _print_content(folder, only_by_name.get(folder, []))
            total_files, total_bytes = total_files + n_files, total_bytes + n_bytes
        for folder in [] if arguments.dry_run else to_remove:
            shutil.rmtree(folder)
            folder.with_suffix(".lock").unlink(missing_ok=True)  # an earlier run of this fingerprint may share it
    print(f"{'would remove' if arguments.dry_run else 'removed'} {total_files:,} files, {total_bytes:,} bytes")
    for folder in [] if name else only_by_name:
        why = "; ".join(only_by_name[folder])
        print(f"kept {folder.name}, {why}: it is removed only by name, `python -m pipeline clean {folder.name}`")


def _only_by_name(folder: Path) -> Iterator[str]:
    """The reasons why a folder is removed only by name: a study, or a run that no training gives again."""
    from pipeline.tracking.fingerprint import IDENTITY
    from pipeline.tracking.journal import STEPS
    from pipeline.tracking.mlflow_tracker import RUN_ID

    if not (folder / IDENTITY).is_file():
        yield STUDY
        return
    if changes := _identity(folder).get("inexact"):
        yield f"a run that was resumed inexactly ({'; '.join(changes)}) and cannot be repeated exactly"
    if (folder / STEPS).is_file() and not (folder / RUN_ID).is_file():
        yield "a run whose steps and times are not in MLflow"


def _print_content(folder: Path, reasons: list[str]) -> tuple[int, int]:
    """Print what removing `folder` frees and loses; return its files and bytes."""
    from pipeline.tracking.fingerprint import source_hashes
    from pipeline.tracking.journal import STEPS, TIMES

    sizes: dict[str, list[int]] = {"checkpoints": [], "samples": [], "journals": [], "other files": []}
    for path in folder.rglob("*"):
        if path.is_file():
            kind = {STEPS: "journals", TIMES: "journals"}.get(path.name, "other files")
            kind = "samples" if path.parent.name == "samples" else kind
            sizes["checkpoints" if path.parent.name.startswith("step-") else kind].append(path.stat().st_size)
    print(f"{folder}:")
    for kind, found in sizes.items():
        if found:
            print(f"  {kind:11} {len(found):>7,} files {sum(found):>16,} bytes")
    if STUDY in reasons:
        print("  the study keeps its trials' values; their checkpoints are lost")
    for reason in set(reasons) - {STUDY}:
        print(f"  cannot be made again: {reason}")
    if _identity(folder).get("sources", hashes := source_hashes()) != hashes:
        print("  trained by other code than the present: only that code trains it again")
    return sum(map(len, sizes.values())), sum(map(sum, sizes.values()))


def _identity(folder: Path) -> dict[str, Any]:
    """A run's identity.json; empty if it is missing or damaged."""
    from pipeline.system.files import read_json
    from pipeline.tracking.fingerprint import IDENTITY

    with suppress(PipelineError):
        if isinstance(found := read_json(folder / IDENTITY), dict):
            return found
    return {}
