"""The sections of params.yaml that a training run reads, checked together."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from pipeline.config.params import Params, Section, nearest
from pipeline.config.sections import (
    CheckpointConfig,
    ModelConfig,
    OptimConfig,
    SamplesConfig,
    TargetConfig,
    TrainConfig,
    WindowsConfig,
    steps_in,
)
from pipeline.model.published import INIT_FOLDER, with_hash
from pipeline.system.errors import InputError
from pipeline.system.files import sha256_json
from pipeline.training.optim import OPTIMIZERS, SCHEDULES
from pipeline.training.target import RULES


@dataclass(frozen=True)
class RunConfig:
    """The sections that a run reads."""

    model: ModelConfig
    windows: WindowsConfig
    optim: OptimConfig
    train: TrainConfig
    target: TargetConfig
    checkpoint: CheckpointConfig
    samples: SamplesConfig

    @classmethod
    def of(cls, params: Params) -> "RunConfig":
        """Check each section and the constraints between them. Raises one InputError that lists all faults."""
        params.check(*RUN_SECTIONS)
        config = cls(*(params.section(kind) for kind in RUN_SECTIONS))  # type: ignore[arg-type]
        if faults := config.contradictions():
            raise InputError(f"{params.path}: " + "; ".join(faults))
        return config

    def contradictions(self) -> list[str]:
        """Conflicts between sections that are valid by themselves."""
        batch, processes = self.windows.micro_batch_size, self.train.processes
        faults = []
        if (shares := sum(share for share in self._phases if isinstance(share, float))) > 1:
            faults.append(f"optim: {self._phase_words} are {shares:g} of the run")
        for key, name, known in (
            ("optim.name", self.optim.name, list(OPTIMIZERS)),
            ("optim.schedule", self.optim.schedule, list(SCHEDULES)),
            ("target.rule", self.target.rule, list(RULES)),
        ):
            if name not in known:
                faults.append(f"{key}: unknown value {name!r}{nearest(name, known)}")
        if self.windows.seq_len > self.model.block_size:
            faults.append(
                f"windows.seq_len {self.windows.seq_len} is longer than model.block_size {self.model.block_size}"
            )
        sharding = [name for name, optimiser in OPTIMIZERS.items() if optimiser.shards]
        if self.train.shard and self.optim.name in OPTIMIZERS and self.optim.name not in sharding:
            faults.append(f"train.shard: {self.optim.name} does not work on shards, choose {', '.join(sharding)}")
        if self.train.shard and self.train.compile is True:
            faults.append("train.shard and train.compile exclude each other: set train.compile to auto")
        if self.model.init and self.model.init.startswith("sha256:"):
            faults.append("model.init: a hash names no weights: set a folder in weights/, or hf://OWNER/NAME")
        if self.model.init and self.model.fold_vocab:
            faults.append(
                "model.fold_vocab would replace the published rows of all ids that the text lacks: set it to false"
            )
        if self.train.freeze and not self.model.init:
            faults.append(f"train.freeze {self.train.freeze} would keep random weights: set model.init, or freeze 0")
        if self.train.freeze >= self.model.n_layer:
            faults.append(
                f"train.freeze {self.train.freeze} leaves no block to train: model.n_layer is {self.model.n_layer}"
            )
        if batch % processes:
            faults.append(f"windows.micro_batch_size {batch} is not divisible by train.processes {processes}")
        return faults

    def require_length(self, n_tokens: int) -> None:
        """Raise InputError if a training text of `n_tokens` tokens makes the budget too short for the schedule."""
        optim, step_tokens = self.optim, self.windows.step_tokens
        if step_tokens > optim.max_tokens(n_tokens):
            raise InputError(
                f"optim.max_epochs {optim.max_epochs:g} of {n_tokens:,} tokens is less than one step of "
                f"{step_tokens:,} tokens"
            )
        total = optim.max_steps(self.windows, n_tokens)
        if (steps := sum(steps_in(phase, total) for phase in self._phases)) > total:
            raise InputError(f"optim: {self._phase_words} take {steps} steps, the run has {total}")

    @property
    def _phases(self) -> tuple[int | float, int | float]:
        """Lengths of the schedule's warm-up and of its decay after a plateau."""
        schedule = SCHEDULES.get(self.optim.schedule)
        return self.optim.warmup, self.optim.decay if schedule and schedule.has_plateau else 0

    @property
    def _phase_words(self) -> str:
        return "warmup {} and decay {}".format(*self._phases)

    def sized_for(self, n_vocab: int) -> "RunConfig":
        """The configuration for a tokenizer of `n_vocab` ids, which replace a model.vocab_size of null.

        Raises InputError if model.vocab_size is smaller.
        """
        size = self.model.vocab_size or n_vocab
        if size < n_vocab:
            raise InputError(f"model.vocab_size {size} is below the tokenizer's {n_vocab} ids: set it to null")
        return replace(self, model=self.model.updated(vocab_size=size))

    def with_weights(self, data: Path) -> "RunConfig":
        """The configuration with the hash of the weights in `data`/init as model.init, if it is not null.

        So the same weights are the same run, wherever they are. Raises InputError if they do not fit the shape.
        """
        return replace(self, model=with_hash(self.model, data / INIT_FOLDER)) if self.model.init else self

    @property
    def needs_held_out(self) -> str | None:
        """The parameter that needs a held-out text, as text for a message; None if no parameter does."""
        if RULES[self.target.rule].needs_held_out:
            return f"target.rule is {self.target.rule}"
        patience = self.target.early_stopping_patience
        return None if patience is None else f"target.early_stopping_patience is {patience}"

    def flops(self, n_tokens: int) -> float:
        """FLOPs of a run on a training text of `n_tokens` tokens, approximately: 6 for each parameter and token."""
        return 6.0 * self.model.n_params * self.optim.max_tokens(n_tokens)

    @property
    def digest(self) -> str:
        """A short hash of the parameters that affect the run's numbers."""
        return sha256_json([section.model_dump(mode="json") for section in self.decisive])[:8]

    def require_digest(self, digest: str) -> None:
        """Raise InputError if these are not the parameters with this `digest`, with which a job was submitted."""
        if self.digest != digest:
            raise InputError("params.yaml has changed since this job was submitted: submit it again")

    def origin(self, params: Params) -> dict[str, str]:
        """The study and trial from which `sweep apply` took the parameters; empty if they have changed since."""
        section = params.values.get("sweep")
        applied = section.get("applied") if isinstance(section, dict) else None
        study, trial, digest = str(applied).split("/") if str(applied).count("/") == 2 else ("", "", "")
        return {"study": study, "trial": trial} if digest == self.digest else {}

    @property
    def decisive(self) -> tuple[Section, ...]:
        """The sections that affect the run's numbers."""
        return self.model, self.windows, self.optim, self.train, self.target


RUN_SECTIONS: tuple[type[Section], ...] = tuple(field.type for field in fields(RunConfig))  # type: ignore[misc]
