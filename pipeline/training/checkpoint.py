"""The folder of a run: checkpoints that are complete or absent, and the choice of the one to resume from."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from pipeline.config.sections import TargetConfig
from pipeline.model.weights import load_tensors, require_alike, save_tensors
from pipeline.system.errors import IntegrityError
from pipeline.system.files import (
    UNFINISHED,
    atomic_folder,
    locked,
    read_json,
    sweep_unfinished,
    verify_manifest,
    write_json,
)
from pipeline.tracking.fingerprint import Identity, differences
from pipeline.tracking.journal import STEPS, Journal
from pipeline.tracking.mlflow_tracker import RUN_ID
from pipeline.tracking.recorder import RECORDER_LOCK
from pipeline.training.loop import TrainState
from pipeline.training.optim import Muon
from pipeline.training.target import best_step

STATE = "state.json"
LOST = "it cannot be gone on from"
Tensors = dict[str, dict[str, Tensor]]  # file stem -> name -> tensor
Require = Callable[[Path, Tensors, Any], None]  # raises IntegrityError


def save_checkpoint(run_folder: Path, step: int, tensors: Tensors, facts: dict[str, Any]) -> Path:
    """Write `run_folder/step-<step>/` atomically; return it. Raises OutOfSpaceError, all earlier ones left intact."""
    folder = _folder_of(run_folder, step)
    needed = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    with atomic_folder(folder, needed) as unfinished:
        for stem, group in tensors.items():
            save_tensors(group, unfinished / f"{stem}.safetensors")
        write_json(unfinished / STATE, facts)
    return folder


def load_checkpoint(run_folder: Path, step: int) -> tuple[Tensors, dict[str, Any]]:
    """Read back what was saved. Raises IntegrityError, naming the file, unless every byte is as it was written."""
    folder = _folder_of(run_folder, step)
    verify_manifest(folder, LOST)
    tensors = {path.stem: load_tensors(path, LOST) for path in sorted(folder.glob("*.safetensors"))}
    return tensors, read_json(folder / STATE)


def checkpoint_steps(run_folder: Path) -> list[int]:
    """Steps of the complete checkpoints, newest first."""
    names = (path.name.removeprefix("step-") for path in run_folder.glob("step-*"))
    return sorted((int(name) for name in names if re.fullmatch("[0-9]{8,}", name)), reverse=True)


def newest_valid(
    run_folder: Path, up_to: int | None = None, require: Require | None = None
) -> tuple[Tensors, dict[str, Any]] | None:
    """Load the newest checkpoint that is intact, at step `up_to` at most; None where there is none.

    Sweeps what a killed save left; warns of each checkpoint that it passes over, altered or such that `require` raises
    IntegrityError. Raises that too where none is left.
    """
    sweep_unfinished(run_folder)
    steps = [step for step in checkpoint_steps(run_folder) if up_to is None or step <= up_to]
    for step in steps:
        try:
            tensors, facts = load_checkpoint(run_folder, step)
            if require:
                require(_folder_of(run_folder, step), tensors, facts)
            return tensors, facts
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
    """Remove all checkpoints but the newest `keep` and that of step `also`, each renamed first: none is half there."""
    for step in checkpoint_steps(run_folder)[keep:]:
        if step != also:
            to_remove = run_folder / f"{UNFINISHED}removed-{step}"
            _folder_of(run_folder, step).rename(to_remove)
            shutil.rmtree(to_remove)


def _folder_of(run_folder: Path, step: int) -> Path:
    return run_folder / f"step-{step:08d}"


IDENTITY = "identity.json"
SLOTS: dict[type[Optimizer], tuple[str, ...]] = {AdamW: ("step", "exp_avg", "exp_avg_sq"), Muon: ("momentum_buffer",)}


def claim_folder(folder: Path, identity: Identity, elastic: bool = False) -> tuple[Identity, list[str]]:
    """Make the run's folder, or accept it as it is; return who the run is, and what has changed since it began.

    One that another set-up began is moved aside, and kept; an `elastic` run goes on in it with the new set-up.
    """
    changed: list[str] = []
    if (folder / IDENTITY).is_file():
        before: Identity = read_json(folder / IDENTITY)
        changed = differences(before["environment"], identity["environment"])
        if not changed:
            return before, changed
        if elastic:
            identity = {**identity, "inexact": before["inexact"]}
        else:
            aside = next(path for i in range(1, 1000) if not (path := folder.with_suffix(f".{i}")).exists())
            with locked(folder / RECORDER_LOCK, wait=True):  # the last attempt may still be sent
                folder.rename(aside)
            print(
                f"starting anew: {', '.join(changed)} (--elastic goes on); the checkpoints so far are kept in {aside}"
            )
            changed = []
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / IDENTITY, identity)
    return identity, changed


def tell_what_is_new(folder: Path, identity: Identity) -> None:
    """Say how a run differs from the one begun before it."""
    others = sorted(set(folder.parent.glob(f"*/{IDENTITY}")) - {folder / IDENTITY}, key=lambda p: p.stat().st_mtime)
    if others:
        changed = differences(read_json(others[-1]), identity)
        print(f"a new run, not the last one's ({others[-1].parent.name}): {', '.join(changed)}")


def newest_state(journal: Journal, target: TargetConfig, state: TrainState) -> tuple[Tensors, dict[str, Any]] | None:
    """Load the newest checkpoint that can take the place of `state`; None where there is none.

    The checkpoint of the best look is needed at the end: where it is lost, go on from before it, and look again. Raises
    IntegrityError where none is intact, or the journal does not reach up to it.
    """
    folder = journal.folder

    def require(checkpoint: Path, tensors: Tensors, facts: Any) -> None:
        require_state(checkpoint, tensors, facts, state)

    loaded = newest_valid(folder, require=require)
    best = best_step(journal.steps, target)
    if loaded and best and best <= loaded[1]["step"] and not is_intact(folder, best):
        loaded = newest_valid(folder, best - 1, require)
    if loaded and len(journal.steps) < (step := loaded[1]["step"]):
        raise IntegrityError(
            f"{folder / STEPS} has {len(journal.steps)} rows, the checkpoint is of step {step}: "
            f"`python -m pipeline clean {folder.name}`"
        )
    return loaded


def require_state(checkpoint: Path, tensors: Tensors, facts: Any, state: TrainState) -> None:
    """Raise IntegrityError, naming the file, unless what was read of a checkpoint can take the place of `state`.

    Hashes do not tell: whoever can write the files can write their manifest.
    """
    weights = state.model.state_dict()
    slots = {
        f"{state.names[id(parameter)]}/{slot}": torch.Size() if slot == "step" else parameter.shape
        for optimizer in state.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        for slot in SLOTS[type(optimizer)]
    }
    for stem, shapes in (("weights", {name: tensor.shape for name, tensor in weights.items()}), ("optimizer", slots)):
        require_alike(checkpoint / f"{stem}.safetensors", tensors.get(stem, {}), shapes, LOST)
    randoms = {"cpu-0": torch.empty(0)} | tensors.get("rng", {})
    if not all(_is_random_state(tensor) for name, tensor in randoms.items() if name.startswith("cpu-")):
        raise IntegrityError(f"{checkpoint / 'rng.safetensors'} holds no state of random numbers: {LOST}")
    kinds = {"step": int, "tokens": int, "loss_scale": float, "good_steps": int}
    if (
        not isinstance(facts, dict)
        or {key: type(value) for key, value in facts.items()} != kinds
        or f"step-{facts['step']:08d}" != checkpoint.name
        or not 0 < facts["loss_scale"] < float("inf")
    ):
        raise IntegrityError(f"{checkpoint / STATE} is not the state after that step: {LOST}")


def _is_random_state(tensor: Tensor) -> bool:
    """Whether a generator on the CPU takes it."""
    try:
        torch.Generator().set_state(tensor)
    except (RuntimeError, TypeError):
        return False
    return tensor.ndim == 1


def change_set_up(journal: Journal, step: int, identity: Identity, changed: list[str]) -> None:
    """Note in `identity` that the run goes on after `step` with another set-up, if it had come so far.

    The steps behind it that were taken already will come out otherwise: MLflow's run keeps them, and a new one begins.
    """
    if journal.steps[step:]:
        journal.cut(step)
        (journal.folder / RUN_ID).unlink(missing_ok=True)
    if step:
        identity["inexact"].append(f"{', '.join(changed)} after step {step}")
        write_json(journal.folder / IDENTITY, identity)
        print(f"not exact from here on: {identity['inexact'][-1]}")
