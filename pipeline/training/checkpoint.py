"""Checkpoints of a run: folders that are complete or absent."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.sections import OptimConfig
from pipeline.model.weights import load_tensors, require_alike, save_tensors
from pipeline.system.errors import IntegrityError
from pipeline.system.files import UNFINISHED, atomic_folder, read_json, sweep_unfinished, verify_manifest, write_json
from pipeline.training.loop import TrainState
from pipeline.training.optim import state_slots

STATE = "state.json"
HINT = "it cannot be resumed from"
Tensors = dict[str, dict[str, Tensor]]  # file stem -> name -> tensor
Saved = tuple[Tensors, dict[str, Any]]  # what TrainState.tensors and TrainState.scalars give
Require = Callable[[Path, Tensors, Any], None]  # raises IntegrityError


def save_checkpoint(run_folder: Path, step: int, tensors: Tensors, scalars: dict[str, Any]) -> Path:
    """Write `run_folder/step-<step>/` atomically; return it. Raises OutOfSpaceError, all earlier ones left intact."""
    folder = _folder_of(run_folder, step)
    needed = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    with atomic_folder(folder, needed) as unfinished:
        for stem, group in tensors.items():
            save_tensors(group, unfinished / f"{stem}.safetensors")
        write_json(unfinished / STATE, scalars)
    return folder


def load_checkpoint(run_folder: Path, step: int) -> Saved:
    """Read back what was saved. Raises IntegrityError, naming the file, unless every byte is as it was written."""
    folder = _folder_of(run_folder, step)
    verify_manifest(folder, HINT)
    tensors = {path.stem: load_tensors(path, HINT) for path in sorted(folder.glob("*.safetensors"))}
    return tensors, read_json(folder / STATE)


def checkpoint_steps(run_folder: Path) -> list[int]:
    """Steps of the complete checkpoints, newest first."""
    names = (path.name.removeprefix("step-") for path in run_folder.glob("step-*"))
    return sorted((int(name) for name in names if re.fullmatch("[0-9]{8,}", name)), reverse=True)


def newest_valid(run_folder: Path, up_to: int | None = None, require: Require | None = None) -> Saved | None:
    """Load the newest checkpoint that is intact, at step `up_to` at most; None where there is none.

    Removes what a killed save left. Warns of each checkpoint that it skips: an altered one, or one for which `require`
    raises IntegrityError. Raises that too where none is left.
    """
    sweep_unfinished(run_folder)
    steps = [step for step in checkpoint_steps(run_folder) if up_to is None or step <= up_to]
    for step in steps:
        try:
            tensors, scalars = load_checkpoint(run_folder, step)
            if require:
                require(_folder_of(run_folder, step), tensors, scalars)
            return tensors, scalars
        except IntegrityError as error:
            print(f"warning: {error}; falling back to the checkpoint before", file=sys.stderr)
    if steps:
        raise IntegrityError(f"no checkpoint in {run_folder} is intact: `python -m pipeline clean {run_folder.name}`")
    return None


def is_intact(run_folder: Path, step: int) -> bool:
    """Whether the checkpoint of `step` is there, every byte as it was written."""
    try:
        verify_manifest(_folder_of(run_folder, step))
    except IntegrityError:
        return False
    return True


def keep_newest(run_folder: Path, keep: int, also: int | None) -> None:
    """Remove all checkpoints but the newest `keep` and that of step `also`; each is renamed before it is deleted."""
    for step in checkpoint_steps(run_folder)[keep:]:
        if step != also:
            to_remove = run_folder / f"{UNFINISHED}removed-{step}"
            _folder_of(run_folder, step).rename(to_remove)
            shutil.rmtree(to_remove)


def require_state(checkpoint: Path, tensors: Tensors, scalars: Any, state: TrainState, optim: OptimConfig) -> None:
    """Raise IntegrityError, naming the file, unless what was read of a checkpoint can take the place of `state`.

    Hashes do not tell: whoever can write the files can write their manifest.
    """
    expected = {
        "weights": {name: tensor.shape for name, tensor in state.model.state_dict().items()},
        "optimizer": {
            f"{state.names[id(parameter)]}/{slot}": torch.Size(shape)
            for parameter, slot, shape in state_slots(state.optimizers, optim)
        },
    }
    for stem, shapes in expected.items():
        require_alike(checkpoint / f"{stem}.safetensors", tensors.get(stem, {}), shapes, HINT)
    randoms = {"cpu-0": torch.empty(0)} | tensors.get("rng", {})
    if not all(_is_random_state(tensor) for name, tensor in randoms.items() if name.startswith("cpu-")):
        raise IntegrityError(f"{checkpoint / 'rng.safetensors'} holds no state of random numbers: {HINT}")
    if (
        not isinstance(scalars, dict)
        or {key: type(value) for key, value in scalars.items()} != state.SCALARS
        or _folder_of(checkpoint.parent, scalars["step"]) != checkpoint
        or not 0 < scalars["loss_scale"] < float("inf")
    ):
        raise IntegrityError(f"{checkpoint / STATE} is not the state after that step: {HINT}")


def _folder_of(run_folder: Path, step: int) -> Path:
    return run_folder / f"step-{step:08d}"


def _is_random_state(tensor: Tensor) -> bool:
    """Whether a generator on the CPU takes it."""
    try:
        torch.Generator().set_state(tensor)
    except (RuntimeError, TypeError):
        return False
    return tensor.ndim == 1
