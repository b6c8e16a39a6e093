"""The target rules, and from a run's records: whether it is finished, when to evaluate it, which model is kept."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, overload

import numpy as np

from pipeline.config.sections import TargetConfig
from pipeline.tracking.journal import StepRecord

Records = Sequence[StepRecord]  # of a run, up to some step


class Rule(NamedTuple):
    """An entry of RULES."""

    is_met: Callable[[Records, TargetConfig], bool]  # by the last of all records so far
    description: str  # for cards and the page
    needs_held_out: bool = False  # such a rule also keeps the model of the lowest validation loss


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
        description="one pass over the whole training text",
    ),
    "validation": Rule(
        lambda records, config: _is_below(records[-1].validation_loss, config),
        description="one pass over the text that was held out",
        needs_held_out=True,
    ),
}


def is_finished(records: Records, max_steps: int, config: TargetConfig) -> bool:
    """Whether the step of the last record met the run's rule, or spent its budget or its patience."""
    return (
        records[-1].step >= max_steps
        or RULES[config.rule].is_met(records, config)
        or is_out_of_patience(records, config)
    )


def first_met(records: Records, config: TargetConfig) -> dict[str, int | None]:
    """The first step at which each rule was met, None where it was not."""
    parts = [_UpTo(records, n) for n in range(1, len(records) + 1)]
    return {
        name: next((part[-1].step for part in parts if rule.is_met(part, config)), None) for name, rule in RULES.items()
    }


class _UpTo(Sequence[StepRecord]):
    """The first `n` records, without copying them."""

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
    """Whether the last `early_stopping_patience` evaluations found no lower validation loss than those before them."""
    if (patience := config.early_stopping_patience) is None:
        return False
    losses = [record.validation_loss for record in records if record.validation_loss is not None]
    before, last = losses[:-patience], losses[-patience:]
    return bool(before) and min(last) >= min(before)


def best_step(records: Records, config: TargetConfig) -> int | None:
    """The step whose evaluation found the lowest loss, the first of equals; None before the first evaluation.

    Under a rule that needs a held-out text it is the validation loss, under the others the corpus loss.
    """
    name = "validation_loss" if RULES[config.rule].needs_held_out else "corpus_loss"
    losses = [(loss, record.step) for record in records if (loss := getattr(record, name)) is not None]
    return min(losses)[1] if losses else None


def evaluation_is_due(records: Records, steps_per_epoch: int, held_out: bool, config: TargetConfig) -> bool:
    """Whether an evaluation is due after the step of the last record; a run's last step is always evaluated.

    `held_out`: whether there is a held-out text, whose loss is then measured once an epoch at least.
    """
    step = records[-1].step
    if config.eval_interval is not None:
        return step % config.eval_interval == 0
    return (held_out and step % steps_per_epoch == 0) or evaluation_pays(records, steps_per_epoch, config)


def needs_corpus_loss(records: Records, config: TargetConfig) -> bool:
    """Whether the evaluation after the last record, its validation loss known, also needs the corpus loss.

    Where the model is kept by its validation loss and evaluations come at fixed steps, the corpus loss decides nothing:
    it is measured only where this model may be the one that is kept.
    """
    decides = not RULES[config.rule].needs_held_out or config.eval_interval is None
    return decides or best_step(records, config) == records[-1].step


def evaluation_pays(records: Records, steps_per_epoch: int, config: TargetConfig) -> bool:
    """Whether measuring the corpus loss is worth its cost after the step of the last record.

    The minibatches' running mean lags behind the corpus loss. So the first evaluation is due when it is below three
    times the target. One that finds the loss c sets the next to when the mean has fallen by the factor that c still has
    to fall, or to one epoch later at the latest.
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
