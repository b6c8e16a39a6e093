"""space: the section `sweep` of params.yaml -> which values a trial may take, checked, and what a trial then trains.

A range is `{low, high, log, step}`, of whole numbers where both ends are; a choice is a list. The space has the shape
of params.yaml itself. One key of it stands for two: of `windows.step_tokens`, the batch in tokens, windows.micro_batch_size and
windows.gradient_accumulation_steps are made.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pipeline.config.params import Params, Section, nearest
from pipeline.system.errors import InputError
from pipeline.tracking.mlflow_store import has_password
from pipeline.training.config import RUN_SECTIONS, RunConfig

STEP_TOKENS, BATCH_KEYS = "windows.step_tokens", ("windows.micro_batch_size", "windows.gradient_accumulation_steps")
NOT_SEARCHED = ("target", "checkpoint", "samples")  # what is asked for, and what decides nothing


class Range(BaseModel):
    """Numbers from `low` to `high`, both included; `log`: evenly over their logarithm; `step`: between neighbours."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low {self.low} should be below high {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("a logarithmic range takes no step, and begins above 0")
        return self

    @property
    def ends(self) -> list[Any]:
        return [self.low, self.high]

    @property
    def whole(self) -> bool:
        """Whether it is one of whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int) and isinstance(self.step, int | None)


def _as_axis(given: Any) -> Any:
    """A range or a list of choices, with the faults of what is neither in words."""
    if isinstance(given, dict):
        try:
            return Range.model_validate(given)
        except ValidationError as error:
            faults = [(fault["loc"], fault["msg"].removeprefix("Value error, ")) for fault in error.errors()]
            words = (" ".join([*map(str, where), what[0].lower() + what[1:]]) for where, what in faults)
            raise ValueError(", ".join(words)) from None
    if not isinstance(given, list) or not given:
        raise ValueError("should be {low: ..., high: ...} or a list of choices")
    choices = [float(value) if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", str(value)) else value for value in given]
    if twice := [value for i, value in enumerate(choices) if value in choices[:i]]:
        raise ValueError(f"has {twice[0]} twice")
    return choices  # YAML's own floats need a point: 1e-2 alone is a word to it


def _no_fingerprint(name: str) -> str:
    """Return a study's name, which is that of its folder, beside those of runs."""
    if re.fullmatch("[0-9a-f]{16}", name):
        raise ValueError("a run's fingerprint looks like this: choose another name")
    return name


Axis = Annotated[Range | list[Any], BeforeValidator(_as_axis)]


class SweepConfig(Section):
    """A study: what is searched, for what, how long, and by how many."""

    section_name: ClassVar[str] = "sweep"

    study: Annotated[str, AfterValidator(_no_fingerprint)] = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="name; another one begins another study"
    )
    storage: str = Field(pattern=r"^(sqlite|postgresql)", description="SQLAlchemy URL of the study's database")
    objective: Literal["tokens", "steps", "train_s"] = Field(description="tokens, steps or train_s to the target")
    space: dict[str, dict[str, Axis]] = Field(
        min_length=1, description="YAML, such as {optim: {lr: {low: 1e-3, high: 1e-2, log: true}}}; replaces the whole"
    )
    micro_batch_tokens: int = Field(ge=1, description="most tokens in a forward pass of windows.step_tokens")
    trials: int = Field(ge=1, description="how many settings to try, those of earlier calls included")
    budget_s: float | None = Field(gt=0, description="seconds after which this call ends; null: no limit")
    patience: int | None = Field(ge=1, description="trials without a better one after which it ends; null: no limit")
    workers: int = Field(ge=1, le=1024, description="processes, among which the cores are divided")
    sampler: Literal["tpe", "random"] = Field(description="tpe or random")
    pruner: Literal["extrapolation", "none"] = Field(description="extrapolation or none")
    pruner_tolerance: float = Field(
        ge=0, description="share by which a trial may be forecast behind the best and still go on"
    )
    heartbeat_timeout_s: float = Field(
        ge=2, description="seconds without a sign of life after which another worker takes a trial"
    )
    seed: int = Field(ge=0, lt=2**31, description="of the sampler")
    applied: str | None = Field(description="what `sweep apply` wrote: study/trial/digest of the settings")

    @model_validator(mode="after")
    def _keeps_no_secret(self) -> Self:
        if has_password(self.storage):
            raise ValueError(
                "storage holds a password, which git and every run would keep: leave it out, "
                "PostgreSQL's clients read it from ~/.pgpass or PGPASSWORD"
            )
        return self

    @property
    def axes(self) -> dict[str, Range | list[Any]]:
        """What is searched, by dotted key."""
        return {f"{section}.{key}": axis for section, keys in self.space.items() for key, axis in keys.items()}


def overridden(params: Params, given: dict[str, Any]) -> Params:
    """`params` with what was given on the command line in place of the section's own values."""
    own = params.values.get(SweepConfig.section_name)
    changed = {key: value for key, value in given.items() if key in SweepConfig.model_fields}
    if not changed or not isinstance(own, dict):
        return params
    return Params(
        {**params.values, SweepConfig.section_name: {**own, **changed}}, Path(f"{params.path} with the command line")
    )


def check_space(sweep: SweepConfig, params: Params) -> None:
    """Raise one InputError that names every key of the space that cannot be searched, and every value not allowed.

    Not allowed is also a value that, by itself, contradicts what params.yaml sets elsewhere.
    """
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
    """`params` with `values`, by dotted key, in place of its own.

    STEP_TOKENS becomes as few forward passes as hold it, each of at most `micro_batch_tokens` tokens. Raises InputError
    where it is not a whole number of windows.
    """
    changed = {section: dict(own) if isinstance(own, dict) else own for section, own in params.values.items()}
    for key, value in values.items():
        if key != STEP_TOKENS:
            section, name = key.split(".")
            changed[section][name] = value
    if STEP_TOKENS in values:
        windows = changed["windows"]
        windows["micro_batch_size"], windows["gradient_accumulation_steps"] = _forward_passes(
            int(values[STEP_TOKENS]), int(windows["seq_len"]), micro_batch_tokens
        )
    return Params(changed, params.path)


def values_of(config: RunConfig, keys: list[str]) -> dict[str, Any]:
    """The values that a run has for `keys`."""
    own = {section.section_name: section.model_dump(mode="json") for section in config.decisive}
    own["windows"]["step_tokens"] = config.windows.step_tokens
    return {key: own[key.split(".")[0]][key.split(".")[1]] for key in keys}


def as_choice(value: Any) -> Any:
    """A list, such as optim.betas, as the text that Optuna takes for a choice; all else as it is."""
    return json.dumps(value) if isinstance(value, list) else value


def from_choice(axis: list[Any], chosen: Any) -> Any:
    return next(value for value in axis if as_choice(value) == chosen)


def rounded(value: float) -> float:
    """`value` in three significant digits: what a person would write, and no learning rate needs more."""
    return float(f"{value:.3g}")


def _forward_passes(step_tokens: int, length: int, micro_batch_tokens: int) -> tuple[int, int]:
    """The largest batch of at most `micro_batch_tokens` that divides a step into equal passes, and their number."""
    windows, rest = divmod(step_tokens, length)
    if rest or not windows:
        raise InputError(f"{STEP_TOKENS}: {step_tokens} is not a whole number of windows of {length} tokens")
    batch = max(b for b in range(1, windows + 1) if windows % b == 0 and (b == 1 or b * length <= micro_batch_tokens))
    return batch, windows // batch
