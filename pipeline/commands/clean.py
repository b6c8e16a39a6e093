"""Remove checkpoints; models, studies and MLflow runs stay.

`dvc repro -f train` then trains from step 0.
"""

import argparse
import shutil

from pipeline.commands.arguments import Add
from pipeline.system.errors import InputError


def add_arguments(add: Add) -> None:
    add(
        "name",
        metavar="NAME",
        nargs="?",
        help="fingerprint of a run, or name of a study; default: all runs, and no study",
    )


def run(arguments: argparse.Namespace) -> None:
    from pipeline.system.files import locked
    from pipeline.system.host import project_root
    from pipeline.tracking.fingerprint import IDENTITY
    from pipeline.tracking.recorder import RECORDER_LOCK

    home, name = project_root() / "checkpoints", arguments.name
    folders = [path for path in sorted(home.glob("*")) if path.is_dir() and path.name != "jobs"]
    to_remove = [path for path in folders if (name in (path.name, path.stem) if name else (path / IDENTITY).is_file())]
    if name and not to_remove:
        raise InputError(f"no run or study {name} in {home}: `ls {home}` shows them")
    if name and (home / "jobs").is_dir():
        from pipeline.cluster.jobs import find_live

        if job := find_live(f"study-{name}"):
            raise InputError(f"job {job.id} trains study {name}: `python -m pipeline jobs --cancel {job.id}` ends it")
    for folder in to_remove:
        with locked(folder.with_suffix(".lock")), locked(folder / RECORDER_LOCK, wait=True):
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            shutil.rmtree(folder)
        folder.with_suffix(".lock").unlink()
        print(f"removed {folder.name}, {size / 1e6:,.0f} MB")
    if kept := [path.name for path in folders if path not in to_remove and not name]:
        print(f"kept {', '.join(kept)}: a study is removed only by name, `python -m pipeline clean {kept[0]}`")
