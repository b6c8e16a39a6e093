"""Check the search space of params.yaml, and set a trial's values in the parameters."""

import json
from typing import Any

from pipeline.config.params import Params, nearest
from pipeline.config.sections import SweepConfig
from pipeline.system.errors import InputError
from pipeline.training.config import RUN_SECTIONS, RunConfig

# The space has the shape of params.yaml, and one key of its own: the batch size in tokens, which sets two parameters.
STEP_TOKENS, BATCH_KEYS = "windows.step_tokens", ("windows.micro_batch_size", "windows.gradient_accumulation_steps")
# They define the task, or do not change the result. All trials share the weights that they start from.
NOT_SEARCHED = ("target", "checkpoint", "samples", "model.init")


def check_space(sweep: SweepConfig, params: Params, n_tokens: int | None = None) -> None:
    """Raise an InputError that names every key that cannot be searched and every value that is not allowed.

    `n_tokens`, the length of the training text if it is known, decides whether a schedule fits into its run.
    """
    sections = {kind.section_name: kind for kind in RUN_SECTIONS if kind.section_name not in NOT_SEARCHED}
    known = [f"{name}.{key}" for name, kind in sections.items() for key in kind.model_fields] + [STEP_TOKENS]
    known = [key for key in known if key not in NOT_SEARCHED]
    faults = [] if sweep.axes else ["sweep.space: names no key, so that nothing can be searched"]
    for key, axis in sweep.axes.items():
        if key not in known:
            is_fixed = {key, key.split(".")[0]} & {*NOT_SEARCHED}
            why = "cannot be searched" if is_fixed else f"unknown key{nearest(key, known)}"
            faults.append(f"sweep.space.{key}: {why}")
            continue
        for value in axis if isinstance(axis, list) else axis.ends:
            try:
                config = RunConfig.of(with_values(params, {key: value}, sweep.micro_batch_tokens))
                if n_tokens is not None:
                    config.require_length(n_tokens)
            except InputError as error:
                faults.append(f"sweep.space.{str(error).removeprefix(f'{params.path}: ')}")
    if faults:
        raise InputError(f"{params.path}: " + "; ".join(faults))


def with_values(params: Params, values: dict[str, Any], micro_batch_tokens: int) -> Params:
    """Copy `params`, with other values for the dotted keys of `values`.

    STEP_TOKENS is split into as few micro-batches of at most `micro_batch_tokens` tokens as possible. Raises InputError
    if it is not an integer, or not a multiple of the window length.
    """
    changed = params.with_values({key: value for key, value in values.items() if key != STEP_TOKENS})
    if STEP_TOKENS not in values:
        return changed
    if type(step_tokens := values[STEP_TOKENS]) is not int:
        raise InputError(f"{STEP_TOKENS}: input should be a valid integer, got {step_tokens!r}")
    batch = _micro_batches(step_tokens, int(changed.values["windows"]["seq_len"]), micro_batch_tokens)
    return changed.with_values(dict(zip(BATCH_KEYS, batch, strict=True)))


def values_of(config: RunConfig, keys: list[str]) -> dict[str, Any]:
    """The values of `keys` in a run's parameters."""
    own = {section.section_name: section.model_dump(mode="json") for section in config.decisive}
    own["windows"]["step_tokens"] = config.windows.step_tokens
    return {key: own[key.split(".")[0]][key.split(".")[1]] for key in keys}


def as_choice(value: Any) -> Any:
    """Encode a list, such as optim.betas, as JSON, because Optuna's choices are scalars; other values are unchanged."""
    return json.dumps(value) if isinstance(value, list) else value


def from_choice(axis: list[Any], chosen: Any) -> Any:
    """The inverse of `as_choice`."""
    return next(value for value in axis if as_choice(value) == chosen)


def _micro_batches(step_tokens: int, length: int, micro_batch_tokens: int) -> tuple[int, int]:
    """The largest micro-batch, in windows, that divides a step evenly, and the number of micro-batches in a step."""
    windows, rest = divmod(step_tokens, length)
    if rest or not windows:
        raise InputError(f"{STEP_TOKENS}: {step_tokens} is not a whole number of windows of {length} tokens")
    batch = max(b for b in range(1, windows + 1) if windows % b == 0 and (b == 1 or b * length <= micro_batch_tokens))
    return batch, windows // batch
