"""run_folder: the folder of a run -> claimed by the set-up that may go on in it, and the state to go on from."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from pipeline.system.errors import IntegrityError
from pipeline.system.files import locked, read_json, write_json
from pipeline.tracking.fingerprint import Identity, differences
from pipeline.tracking.journal import STEPS, Journal
from pipeline.tracking.recorder_process import RECORDER_LOCK, RUN_ID
from pipeline.training.checkpoint import LOST, STATE, Tensors, is_intact, newest_valid, require_alike
from pipeline.training.loop import TrainState
from pipeline.training.optim import Muon
from pipeline.training.target import TargetConfig, best_step

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
