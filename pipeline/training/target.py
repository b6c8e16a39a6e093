"""The target rules: from a run's records, decide when to evaluate, when to stop and which model to keep."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple, overload

import numpy as np

from pipeline.config.sections import TargetConfig
from pipeline.tracking.journal import EVALUATED_LOSSES, StepRecord

Records = Sequence[StepRecord]  # of a run, from step 1 to the current step


class Rule(NamedTuple):
    """An entry of RULES."""

    is_met: Callable[[Records, TargetConfig], bool]  # whether the last record meets the rule
    description: str  # for cards and the page
    loss: str  # the loss that evaluations compare: a field of StepRecord; the model with the lowest is kept
    makes_champion: bool = False  # whether a model that met the rule may become champion
    minibatch_loss: Callable[[Records, TargetConfig], float] | None = None  # what `is_met` compares instead of `loss`

    @property
    def needs_held_out(self) -> bool:
        return self.loss == "validation_loss"


def _average_is_below(records: Records, config: TargetConfig) -> bool:
    return len(records) >= config.average_steps and _average_loss(records, config) < config.loss


def _average_loss(records: Records, config: TargetConfig) -> float:
    return _mean_loss(records[-config.average_steps :])


def _last_loss(records: Records, _config: TargetConfig) -> float:
    return records[-1].loss


def _is_below(loss: float | None, config: TargetConfig) -> bool:
    return loss is not None and loss < config.loss


RULES: dict[str, Rule] = {
    "batch": Rule(
        lambda records, config: _is_below(records[-1].loss, config),
        description="one minibatch below the target",
        loss="corpus_loss",
        minibatch_loss=_last_loss,
    ),
    "average": Rule(
        _average_is_below,
        description="the mean of the last minibatches",
        loss="corpus_loss",
        minibatch_loss=_average_loss,
    ),
    "corpus": Rule(
        lambda records, config: _is_below(records[-1].corpus_loss, config),
        description="the whole training text, in fixed windows",
        loss="corpus_loss",
    ),
    "sliding": Rule(
        lambda records, config: _is_below(records[-1].sliding_loss, config),
        description="the whole training text, each token after at least half a window",
        loss="sliding_loss",
        makes_champion=True,
    ),
    "validation": Rule(
        lambda records, config: _is_below(records[-1].validation_loss, config),
        description="the held-out text, in fixed windows",
        loss="validation_loss",
        makes_champion=True,
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

    Each rule compares losses of its own kind, over the whole text.
    """
    name = RULES[config.rule].loss
    losses = [(loss, record.step) for record in records if (loss := getattr(record, name)) is not None]
    return min(losses)[1] if losses else None


def evaluation_is_due(records: Records, steps_per_epoch: int, held_out: bool, config: TargetConfig) -> bool:
    """Whether an evaluation is due after the last record. (A run's last step is always evaluated.)

    With a held-out text (`held_out`), an evaluation is due at least once an epoch.
    """
    step = records[-1].step
    if config.eval_interval is not None:
        return step % config.eval_interval == 0
    return (held_out and step % steps_per_epoch == 0) or evaluation_pays(records, steps_per_epoch, config)


def without_end(
    records: Records, max_steps: int, steps_per_epoch: int, held_out: bool, config: TargetConfig
) -> StepRecord:
    """The last record of a run, as a run of `max_steps` has it: without what is measured only after the last step."""
    *before, last = records
    if is_finished(records, max_steps, config):
        return last
    nothing: dict[str, Any] = dict.fromkeys([*EVALUATED_LOSSES, "loss_estimate"])
    bare = replace(last, **nothing)
    if not evaluation_is_due([*before, bare], steps_per_epoch, held_out, config):
        return bare
    name = RULES[config.rule].loss if last.loss_estimate is None else "loss_estimate"
    return replace(bare, **{"validation_loss": last.validation_loss, name: getattr(last, name)})


def evaluation_pays(records: Records, steps_per_epoch: int, config: TargetConfig) -> bool:
    """Whether the target may have been reached since the last evaluation.

    The first evaluation is due when the mean training loss of the last steps is below three times the target, or below
    an eighth of the run's first loss; the second one half an epoch later. Then the logarithm of the loss is forecast to
    fall as between the last two evaluations. The next one is due after two thirds of the steps to the target, at the
    earliest after a quarter of an epoch, and at the latest after two epochs, or after one if the loss does not fall.
    """
    known = list(islice(evaluations(reversed(records), config), 2))[::-1]
    if not known:
        span = min(config.average_steps, steps_per_epoch)
        return len(records) >= span and _mean_loss(records[-span:]) < max(3 * config.loss, records[0].loss / 8)
    steps = steps_per_epoch / 2
    if len(known) > 1:
        (step_before, loss_before), (step, loss) = known
        falls = math.log(loss_before / loss) / (step - step_before) if loss > 0 else 0.0  # per step
        steps = steps_per_epoch
        if falls > 0:
            to_target = max(0.0, math.log(loss / config.loss)) / falls
            steps = min(max(to_target * 2 / 3, steps_per_epoch / 4), 2 * steps_per_epoch)
    return records[-1].step - known[-1][0] >= steps


def evaluations(records: Iterable[StepRecord], config: TargetConfig) -> Iterator[tuple[int, float]]:
    """Step and loss of each evaluation among `records`, of the rule's kind, estimates included."""
    name = RULES[config.rule].loss
    losses = ((r.step, r.loss_estimate if (loss := getattr(r, name)) is None else loss) for r in records)
    return ((step, loss) for step, loss in losses if loss is not None)


def _mean_loss(records: Records) -> float:
    return float(np.mean([record.loss for record in records]))
