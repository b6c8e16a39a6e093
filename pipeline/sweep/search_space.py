"""Check the search space of params.yaml's section `sweep`, and put a trial's values into the parameters.

An axis is `{low, high, log, step}`, of whole numbers where both ends are, or a list of choices. The space has the shape
of params.yaml. Its key `windows.step_tokens`, the batch in tokens, sets windows.micro_batch_size and
windows.gradient_accumulation_steps.
"""

import json
from pathlib import Path
from typing import Any

from pipeline.config.params import Params, nearest
from pipeline.config.sections import SweepConfig
from pipeline.system.errors import InputError
from pipeline.training.config import RUN_SECTIONS, RunConfig

STEP_TOKENS, BATCH_KEYS = "windows.step_tokens", ("windows.micro_batch_size", "windows.gradient_accumulation_steps")
NOT_SEARCHED = ("target", "checkpoint", "samples")  # the task itself, and what does not change the result


def overridden(params: Params, given: dict[str, Any]) -> Params:
    """`params` with the section's values replaced by those given on the command line."""
    own = params.values.get(SweepConfig.section_name)
    changed = {key: value for key, value in given.items() if key in SweepConfig.model_fields}
    if not changed or not isinstance(own, dict):
        return params
    return Params(
        {**params.values, SweepConfig.section_name: {**own, **changed}}, Path(f"{params.path} with the command line")
    )


def check_space(sweep: SweepConfig, params: Params) -> None:
    """Raise one InputError that names each key that cannot be searched, and each value that is not allowed."""
    sections = {kind.section_name: kind for kind in RUN_SECTIONS if kind.section_name not in NOT_SEARCHED}
    known = [f"{name}.{key}" for name, kind in sections.items() for key in kind.model_fields] + [STEP_TOKENS]
    faults = []
    for key, axis in sweep.axes.items():
        if key not in known:
            why = "cannot be searched" if key.split(".")[0] in NOT_SEARCHED else f"unknown key{nearest(key, known)}"
            faults.append(f"sweep.space.{key}: {why}")
            continue
        for value in axis if isinstance(axis, list) else axis.ends:
            try:
                RunConfig.of(with_values(params, {key: value}, sweep.micro_batch_tokens))
            except InputError as error:
                faults.append(f"sweep.space.{str(error).removeprefix(f'{params.path}: ')}")
    if faults:
        raise InputError(f"{params.path}: " + "; ".join(faults))


def with_values(params: Params, values: dict[str, Any], micro_batch_tokens: int) -> Params:
    """`params` with `values`, by dotted key, replaced.

    STEP_TOKENS becomes as few micro-batches as possible, of at most `micro_batch_tokens` tokens each. Raises InputError
    where it is not a whole number of windows.
    """
    changed = {section: dict(own) if isinstance(own, dict) else own for section, own in params.values.items()}
    for key, value in values.items():
        if key != STEP_TOKENS:
            section, name = key.split(".")
            changed[section][name] = value
    if STEP_TOKENS in values:
        windows = changed["windows"]
        windows["micro_batch_size"], windows["gradient_accumulation_steps"] = _micro_batches(
            int(values[STEP_TOKENS]), int(windows["seq_len"]), micro_batch_tokens
        )
    return Params(changed, params.path)


def values_of(config: RunConfig, keys: list[str]) -> dict[str, Any]:
    """The values that a run has for `keys`."""
    own = {section.section_name: section.model_dump(mode="json") for section in config.decisive}
    own["windows"]["step_tokens"] = config.windows.step_tokens
    return {key: own[key.split(".")[0]][key.split(".")[1]] for key in keys}


def as_choice(value: Any) -> Any:
    """A list, such as optim.betas, as JSON, since Optuna's choices are scalars; anything else unchanged."""
    return json.dumps(value) if isinstance(value, list) else value


def from_choice(axis: list[Any], chosen: Any) -> Any:
    return next(value for value in axis if as_choice(value) == chosen)


def _micro_batches(step_tokens: int, length: int, micro_batch_tokens: int) -> tuple[int, int]:
    """The largest micro-batch, in windows, that divides a step evenly, and how many of them a step takes."""
    windows, rest = divmod(step_tokens, length)
    if rest or not windows:
        raise InputError(f"{STEP_TOKENS}: {step_tokens} is not a whole number of windows of {length} tokens")
    batch = max(b for b in range(1, windows + 1) if windows % b == 0 and (b == 1 or b * length <= micro_batch_tokens))
    return batch, windows // batch
