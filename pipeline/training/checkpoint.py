"""Save, verify, load and remove the checkpoints of a run."""

import re
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.model.weights import load_tensors, save_tensors
from pipeline.system.errors import InputError, IntegrityError
from pipeline.system.files import UNFINISHED, atomic_folder, read_json, sweep_unfinished, verify_manifest, write_json

STATE = "state.json"
FORMAT = 1  # of the files and their content; a checkpoint without a number has format 1
HINT = "it cannot be resumed from"
Tensors = dict[str, dict[str, Tensor]]  # file stem -> name -> tensor
Saved = tuple[Tensors, dict[str, Any]]  # the results of TrainState.tensors and TrainState.scalars


def save_checkpoint(run_folder: Path, step: int, tensors: Tensors, scalars: dict[str, Any]) -> Path:
    """Write `run_folder/step-<step>/` atomically and return its path. Raises OutOfSpaceError on a full disk."""
    folder = checkpoint_folder(run_folder, step)
    needed = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    with atomic_folder(folder, needed) as unfinished:
        for stem, group in tensors.items():
            save_tensors(group, unfinished / f"{stem}.safetensors")
        write_json(unfinished / STATE, {"format": FORMAT, **scalars})
    return folder


def load_checkpoint(run_folder: Path, step: int) -> Saved:
    """Load the checkpoint of `step`.

    Raises IntegrityError, with the name of the file, if any byte has changed, InputError if its format is unknown.
    """
    folder = checkpoint_folder(run_folder, step)
    verify_manifest(folder, HINT)
    scalars = read_json(folder / STATE)
    if (found := scalars.pop("format", 1)) != FORMAT:
        raise InputError(
            f"{folder} has the checkpoint format {found}, but this program reads format {FORMAT}: resume with the "
            f"program that wrote it, or start from step 0 after `python -m pipeline clean {run_folder.name}`"
        )
    return {path.stem: load_tensors(path, HINT) for path in sorted(folder.glob("*.safetensors"))}, scalars


def checkpoint_steps(run_folder: Path) -> list[int]:
    """Steps of the complete checkpoints, newest first."""
    names = (path.name.removeprefix("step-") for path in run_folder.glob("step-*"))
    return sorted((int(name) for name in names if re.fullmatch("[0-9]{8,}", name)), reverse=True)


def newest_valid(run_folder: Path, best: int | None = None) -> Saved | None:
    """Load the newest intact checkpoint and warn of each damaged one; None if the run has no checkpoint.

    The model of step `best` is kept at the end of the run, so a later checkpoint is valid only if that of `best` is
    intact too. Removes unfinished folders of a killed save. Raises IntegrityError if all checkpoints are damaged.
    """
    sweep_unfinished(run_folder)
    for step in (steps := checkpoint_steps(run_folder)):
        try:
            if best is not None and best < step:
                verify_manifest(checkpoint_folder(run_folder, best), HINT)
            return load_checkpoint(run_folder, step)
        except IntegrityError as error:
            print(f"warning: {error}; falling back to the previous checkpoint", file=sys.stderr)
    if steps:
        raise IntegrityError(f"no checkpoint in {run_folder} is intact: `python -m pipeline clean {run_folder.name}`")
    return None


def keep_newest(run_folder: Path, step: int, keep: int, also: Collection[int | None] = ()) -> None:
    """Remove all checkpoints except the newest `keep` up to `step`, the present one, and those of `also`.

    Later ones could not be resumed from, since the run has not resumed from them. Each is renamed before it is deleted.
    """
    steps = checkpoint_steps(run_folder)
    kept = {*[each for each in steps if each <= step][:keep], *also}
    for step in steps:
        if step not in kept:
            to_remove = run_folder / f"{UNFINISHED}removed-{step}"
            checkpoint_folder(run_folder, step).rename(to_remove)
            shutil.rmtree(to_remove)


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    return run_folder / f"step-{step:08d}"
