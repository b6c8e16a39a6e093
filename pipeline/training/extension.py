"""Start a run from the checkpoint of an earlier run that took the same steps, such as one with a smaller budget."""

from contextlib import nullcontext, suppress
from pathlib import Path
from shutil import copyfile, copytree
from typing import Any

from pipeline.config.sections import OptimConfig, WindowsConfig, steps_in
from pipeline.data.batches import TrainingData, steps_per_epoch
from pipeline.system.errors import IntegrityError, PipelineError, RunLocked
from pipeline.system.files import atomic_folder, locked, read_json, verify_manifest, write_json
from pipeline.tracking.fingerprint import IDENTITY, Identity, flatten
from pipeline.tracking.journal import STEPS, TIMES, read_records, write_lines
from pipeline.tracking.recorder import RECORDER_LOCK
from pipeline.training.checkpoint import HINT, checkpoint_folder, checkpoint_steps
from pipeline.training.config import RunConfig
from pipeline.training.optim import SCHEDULES, lr_factor
from pipeline.training.target import best_step, without_end

# Keys that act on a step only by its learning rate, or that the identity's `environment` shows.
BY_EFFECT = (
    *(f"params.optim.{key}" for key in ("max_epochs", "schedule", "warmup", "decay", "initial_lr", "min_lr_ratio")),
    *(f"params.train.{key}" for key in ("device", "precision", "threads", "compile")),
)


def set_aside(folder: Path) -> Path:
    """Rename a run's folder to FOLDER.1, FOLDER.2, ..., whichever is free; return its new path."""
    kept = next(path for i in range(1, 1000) if not (path := folder.with_suffix(f".{i}")).exists())
    with locked(folder / RECORDER_LOCK, wait=True):  # a recorder may still read the folder
        return folder.rename(kept)


def extend(folder: Path, identity: Identity, config: RunConfig, text: TrainingData, elastic: bool) -> bool:
    """Create the run's `folder` with the steps and the checkpoint that it shares with another run in its parent.

    The other run has the same data, code, environment (unless `elastic`) and parameters, except those of BY_EFFECT, and
    the same learning rates up to the checkpoint. Of several runs, the one with the latest such checkpoint is used. The
    other run is not changed. Return whether there was one. The process holds the lock of `folder`.

    If `folder` is there already, only folders that were set aside for it count, and only if the run is `elastic` and
    their checkpoint is later: then `folder` is set aside.
    """
    exists, own = (folder / IDENTITY).is_file(), max(checkpoint_steps(folder), default=0)
    if exists and not elastic:
        return False
    n_tokens, own_lock = text.train.size, folder.with_suffix(".lock")
    found: list[tuple[int, Path, Identity]] = []
    reasons: list[tuple[int, str]] = []
    for path in sorted(set(folder.parent.glob(f"[!.]*/{IDENTITY}")) - {folder / IDENTITY}):
        if exists and path.parent.with_suffix(".lock") != own_lock:
            continue
        with suppress(PipelineError):  # another run's damaged files are no reason to stop
            other: Identity = read_json(path)
            if _comparable(other, elastic) != _comparable(identity, elastic):
                continue
            optim = OptimConfig.model_validate(other["params"]["optim"])
            steps = _shared_checkpoints(path.parent, optim, config.optim, config.windows, n_tokens)
            found += [(step, path.parent, other) for step in steps if step > own]
            if not steps:
                n_same = same_steps(optim, config.optim, config.windows, n_tokens)
                reasons.append((n_same, _reason(path.parent, n_same, optim, config, n_tokens)))
    for step, source, other in sorted(found, key=lambda each: each[0], reverse=True):
        place, lock = {"environment": other["environment"], "inexact": other["inexact"]}, source.with_suffix(".lock")
        try:
            with nullcontext() if lock == own_lock else locked(lock):
                _copy(source, step, folder, {**identity, **place}, config, text)  # type: ignore[typeddict-item]
        except (IntegrityError, RunLocked) as error:  # an earlier checkpoint, or another run's, may do
            reasons.append((step, str(error)))
        else:
            print(f"the run {source.name} took the same {step} steps: its checkpoint is copied")
            return True
    if reasons and not own:
        print(f"starting from step 0: {max(reasons)[1]}")
    return False


def same_steps(optim: OptimConfig, other: OptimConfig, windows: WindowsConfig, n_tokens: int) -> int:
    """The number of steps, from the first, that have the same learning rate with both optimiser settings."""
    totals = optim.max_steps(windows, n_tokens), other.max_steps(windows, n_tokens)
    differ = (lr_factor(n, totals[0], optim) != lr_factor(n, totals[1], other) for n in range(1, min(totals) + 1))
    return next((n for n, other_rate in enumerate(differ) if other_rate), min(totals))


def plateau_end(optim: OptimConfig, windows: WindowsConfig, n_tokens: int) -> int:
    """The last step before the decay of a schedule with a plateau; the last step of other schedules."""
    total = optim.max_steps(windows, n_tokens)
    decay = steps_in(optim.decay, total) if SCHEDULES[optim.schedule].has_plateau else 0
    return min(total, total - decay + 1)  # the first step of the decay still has the peak rate


def advice(optim: OptimConfig, windows: WindowsConfig, n_tokens: int) -> str:
    """What a larger budget does after a run that has used up its own, in one line."""
    end, warmup = plateau_end(optim, windows, n_tokens), steps_in(optim.warmup, optim.max_steps(windows, n_tokens))
    longer = optim.updated(max_epochs=2 * optim.max_epochs)
    if same_steps(optim, longer, windows, n_tokens) >= end:
        return f"a larger optim.max_epochs resumes from step {end}"
    if same_steps(optim, longer.updated(warmup=warmup), windows, n_tokens) >= end:
        return f"a larger optim.max_epochs resumes from step {end} if optim.warmup is {warmup}, in steps"
    return f"a larger optim.max_epochs is a new run from step 0: {_depends(optim)}"


def _reason(source: Path, n_same: int, optim: OptimConfig, config: RunConfig, n_tokens: int) -> str:
    """Why a run cannot start from the checkpoints of `source`, and what would change that."""
    warmup, hint = steps_in(optim.warmup, optim.max_steps(config.windows, n_tokens)), ""
    if _shared_checkpoints(source, optim, config.optim.updated(warmup=warmup), config.windows, n_tokens):
        hint = f": set optim.warmup to its {warmup} steps"
    elif n_same < plateau_end(config.optim, config.windows, n_tokens):
        hint = f": {_depends(config.optim)}"
    if n_same == 0:
        return f"the run {source.name} has other learning rates from the first step on{hint}"
    return f"the run {source.name} took the same steps up to {n_same}, and has no checkpoint of them{hint}"


def _depends(optim: OptimConfig) -> str:
    return f"optim.schedule {optim.schedule} depends on the budget, constant and the plateau of wsd do not"


def _shared_checkpoints(
    source: Path, optim: OptimConfig, other: OptimConfig, windows: WindowsConfig, n_tokens: int
) -> list[int]:
    """The checkpoints of `source`, a run with `optim`, from which a run with `other` can take its remaining steps."""
    last = min(same_steps(optim, other, windows, n_tokens), other.max_steps(windows, n_tokens) - 1)
    return [step for step in checkpoint_steps(source) if step <= last]


def _comparable(identity: Identity, elastic: bool) -> dict[str, Any]:
    """The parts of an identity that must be equal."""
    free = ("fingerprint", "inexact", *BY_EFFECT, *(("environment.",) if elastic else ()))
    return {key: value for key, value in flatten(identity).items() if not key.startswith(free)}


def _copy(source: Path, step: int, folder: Path, identity: Identity, config: RunConfig, text: TrainingData) -> None:
    """Copy what belongs to the first `step` steps. Raises IntegrityError if a part is missing or damaged."""
    records = read_records(source)[:step]
    if len(records) < step:
        raise IntegrityError(f"{source / STEPS} has {len(records)} records: {HINT}")
    n_tokens, windows = text.train.size, config.windows
    total, epoch = config.optim.max_steps(windows, n_tokens), steps_per_epoch(n_tokens, windows)
    records[-1] = without_end(records, total, epoch, text.validation is not None, config.target)
    checkpoints = [checkpoint_folder(source, n) for n in {step, best_step(records, config.target) or step}]
    for checkpoint in checkpoints:
        verify_manifest(checkpoint, HINT)
    with atomic_folder(folder, manifest=False) as unfinished:
        for checkpoint in checkpoints:
            copytree(checkpoint, unfinished / checkpoint.name)
        for sample in sorted((source / "samples").glob("step-*.txt")):
            if int(sample.stem.removeprefix("step-")) <= step:
                (unfinished / "samples").mkdir(exist_ok=True)
                copyfile(sample, unfinished / "samples" / sample.name)
        for name in (STEPS, TIMES):
            write_lines(unfinished / name, [record.line(name) for record in records])
        write_json(unfinished / IDENTITY, identity)
        if folder.exists():
            set_aside(folder)
