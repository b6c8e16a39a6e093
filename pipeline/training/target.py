"""The target rules: from a run's records, decide when to evaluate, when to stop and which model to keep."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, overload

import numpy as np

from pipeline.config.sections import TargetConfig
from pipeline.tracking.journal import StepRecord

Records = Sequence[StepRecord]  # of a run, from step 1 to the current step


class Rule(NamedTuple):
    """An entry of RULES."""

    is_met: Callable[[Records, TargetConfig], bool]  # whether the last record meets the rule
    description: str  # for cards and the page
    needs_held_out: bool = False  # if so, the model of the lowest validation loss is kept


def _average_is_below(records: Records, config: TargetConfig) -> bool:
    last = records[-config.average_steps :]
    return len(last) == config.average_steps and _mean_loss(last) < config.loss


def _is_below(loss: float | None, config: TargetConfig) -> bool:
    return loss is not None and loss < config.loss


RULES: dict[str, Rule] = {
    "batch": Rule(
        lambda records, config: _is_below(records[-1].loss, config),
        description="one minibatch below the target",
    ),
    "average": Rule(
        _average_is_below,
        description="the mean of the last minibatches",
    ),
    "corpus": Rule(
        lambda records, config: _is_below(records[-1].corpus_loss, config),
        description="an evaluation on the whole training text",
    ),
    "validation": Rule(
        lambda records, config: _is_below(records[-1].validation_loss, config),
        description="an evaluation on the held-out text",
        needs_held_out=True,
    ),
}


def is_finished(records: Records, max_steps: int, config: TargetConfig) -> bool:
    """Whether the last step met the run's target rule, or used up its budget or its patience."""
    return (
        records[-1].step >= max_steps
        or RULES[config.rule].is_met(records, config)
        or is_out_of_patience(records, config)
    )


def first_met(records: Records, config: TargetConfig) -> dict[str, int | None]:
    """The first step at which each rule was met, or None."""
    parts = [_UpTo(records, n) for n in range(1, len(records) + 1)]
    return {
        name: next((part[-1].step for part in parts if rule.is_met(part, config)), None) for name, rule in RULES.items()
    }


class _UpTo(Sequence[StepRecord]):
    """A view of the first `n` records."""

    def __init__(self, records: Records, n: int) -> None:
        self.records, self.n = records, n

    def __len__(self) -> int:
        return self.n

    @overload
    def __getitem__(self, index: int) -> StepRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[StepRecord]: ...
    def __getitem__(self, index: int | slice) -> StepRecord | list[StepRecord]:
        found = range(self.n)[index]
        return self.records[found] if isinstance(found, int) else [self.records[i] for i in found]


def is_out_of_patience(records: Records, config: TargetConfig) -> bool:
    """Whether the last `early_stopping_patience` evaluations did not lower the minimum of the validation loss."""
    if (patience := config.early_stopping_patience) is None:
        return False
    losses = [record.validation_loss for record in records if record.validation_loss is not None]
    before, last = losses[:-patience], losses[-patience:]
    return bool(before) and min(last) >= min(before)


def best_step(records: Records, config: TargetConfig) -> int | None:
    """The step with the lowest evaluated loss, the first one if several are equal; None before the first evaluation.

    A rule that needs a held-out text compares validation losses; the other rules compare corpus losses.
    """
    name = "validation_loss" if RULES[config.rule].needs_held_out else "corpus_loss"
    losses = [(loss, record.step) for record in records if (loss := getattr(record, name)) is not None]
    return min(losses)[1] if losses else None


def evaluate_last(
    records: Records,
    max_steps: int,
    steps_per_epoch: int,
    config: TargetConfig,
    corpus: Callable[[], float | None],
    validation: Callable[[], float | None] | None,
) -> None:
    """Set the losses of the last record if an evaluation is due, as it is after the last step of a run.

    `corpus` and `validation` (None without a held-out text) measure them.
    """
    record = records[-1]
    if is_finished(records, max_steps, config) or evaluation_is_due(
        records, steps_per_epoch, validation is not None, config
    ):
        if validation is not None:
            record.validation_loss = validation()
        if is_finished(records, max_steps, config) or needs_corpus_loss(records, config):
            record.corpus_loss = corpus()


def evaluation_is_due(records: Records, steps_per_epoch: int, held_out: bool, config: TargetConfig) -> bool:
    """Whether an evaluation is due after the last record. (A run's last step is always evaluated.)

    With a held-out text (`held_out`), an evaluation is due at least once an epoch.
    """
    step = records[-1].step
    if config.eval_interval is not None:
        return step % config.eval_interval == 0
    return (held_out and step % steps_per_epoch == 0) or evaluation_pays(records, steps_per_epoch, config)


def needs_corpus_loss(records: Records, config: TargetConfig) -> bool:
    """Whether the current evaluation also needs the corpus loss; the validation loss is already in the last record.

    If the rule uses the validation loss and evaluations come at fixed steps, the corpus loss affects no decision. It is
    then measured only if the current model is the best so far.
    """
    decides = not RULES[config.rule].needs_held_out or config.eval_interval is None
    return decides or best_step(records, config) == records[-1].step


def evaluation_pays(records: Records, steps_per_epoch: int, config: TargetConfig) -> bool:
    """Whether measuring the corpus loss is worth its cost after the last record.

    The running mean m of the minibatches' losses lags behind the corpus loss c. The first evaluation is due when
    m < 3 * target. After an evaluation with c = c0 and m = m0, the next one is due when m / m0 <= target / c0, or after
    one epoch.
    """
    span = min(config.average_steps, steps_per_epoch)
    if len(records) < span:
        return False
    mean = _mean_loss(records[-span:])
    last = next((record for record in reversed(records) if record.corpus_loss is not None), None)
    if last is None or last.corpus_loss is None:
        return mean < 3 * config.loss
    mean_then = _mean_loss(records[max(0, last.step - span) : last.step])
    is_an_epoch_ago = records[-1].step - last.step >= steps_per_epoch
    return is_an_epoch_ago or mean * last.corpus_loss <= mean_then * config.loss


def _mean_loss(records: Records) -> float:
    return float(np.mean([record.loss for record in records]))
