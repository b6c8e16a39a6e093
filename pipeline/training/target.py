"""target: the rules that say when the target loss is reached, each a pure function of the journal's rows.

batch: the first minibatch below it. average: the mean of the last `average_steps` minibatches. corpus: one pass over
the whole training text. validation: one pass over the held-out text. A run that meets none of them ends early where
`patience` looks at the held-out text in a row found no lower loss.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from pipeline.config.sections import TargetConfig
from pipeline.tracking.journal import StepRow

RULES = ("batch", "average", "corpus", "validation")


def is_met(rows: Sequence[StepRow], rule: str, config: TargetConfig) -> bool:
    """Whether the step of the last row meets `rule`."""
    if rule in ("corpus", "validation"):
        measured = rows[-1].get(f"{rule}_loss")
        return measured is not None and float(measured) < config.loss  # type: ignore[arg-type]
    if rule == "batch":
        return rows[-1]["loss"] < config.loss
    last = rows[-config.average_steps :]
    return len(last) == config.average_steps and _mean(last) < config.loss


def is_finished(rows: Sequence[StepRow], max_steps: int, config: TargetConfig) -> bool:
    """Whether the step of the last row met the run's rule, or spent its budget or its patience."""
    return rows[-1]["step"] >= max_steps or is_met(rows, config.rule, config) or is_out_of_patience(rows, config)


def first_met(rows: Sequence[StepRow], config: TargetConfig) -> dict[str, int | None]:
    """The first step at which each rule was met, None where it was not."""
    ends = [(rows[max(0, i - config.average_steps) : i], rows[i - 1]["step"]) for i in range(1, len(rows) + 1)]
    return {rule: next((step for last, step in ends if is_met(last, rule, config)), None) for rule in RULES}


def is_out_of_patience(rows: Sequence[StepRow], config: TargetConfig) -> bool:
    """Whether the last `patience` looks at the held-out text found no lower loss than those before them."""
    if config.early_stopping_patience is None:
        return False
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    before, last = losses[: -config.early_stopping_patience], losses[-config.early_stopping_patience :]
    return bool(before) and min(last) >= min(before)


def best_step(rows: Sequence[StepRow], config: TargetConfig) -> int | None:
    """The step whose look found the lowest loss, the first of equals; None before the first look.

    Under the rule `validation` that of the held-out text, under all others that of the training text.
    """
    key: Literal["corpus_loss", "validation_loss"]
    key = "validation_loss" if config.rule == "validation" else "corpus_loss"
    looks = [row for row in rows if key in row]
    return min(looks, key=lambda row: (row[key], row["step"]))["step"] if looks else None


def look_is_due(rows: Sequence[StepRow], steps_per_epoch: int, held_out: bool, config: TargetConfig) -> bool:
    """Whether to look at the text after the step of the last row, besides after the run's last step.

    `held_out`: whether there is a held-out text, which is then looked at after each pass at the latest.
    """
    step = rows[-1]["step"]
    if config.eval_interval is not None:
        return step % config.eval_interval == 0
    return (held_out and step % steps_per_epoch == 0) or check_is_worth_it(rows, steps_per_epoch, config)


def needs_corpus_loss(rows: Sequence[StepRow], config: TargetConfig) -> bool:
    """Whether the look after the step of the last row, its held-out loss known, needs a pass over the training text.

    Under the rule `validation` with looks at fixed steps that pass decides nothing: it is due where the model may be
    the one that is kept.
    """
    thrifty = config.rule == "validation" and config.eval_interval is not None
    return not thrifty or best_step(rows, config) == rows[-1]["step"]


def check_is_worth_it(rows: Sequence[StepRow], steps_per_epoch: int, config: TargetConfig) -> bool:
    """Whether a pass over the text to measure its loss is worth its cost after the step of the last row.

    The minibatches' running mean lags behind the corpus loss. So the first look comes when it is below three times the
    target; a look at loss c sets the next one to when the mean has fallen by the factor that c still has to fall,
    or after one pass at the latest.
    """
    span = min(config.average_steps, steps_per_epoch)
    if len(rows) < span:
        return False
    mean = _mean(rows[-span:])
    looks = [row for row in rows if "corpus_loss" in row]
    if not looks:
        return mean < 3 * config.loss
    last = looks[-1]
    mean_then = _mean(rows[max(0, last["step"] - span) : last["step"]])
    due = rows[-1]["step"] - last["step"] >= steps_per_epoch
    return due or mean * last["corpus_loss"] <= mean_then * config.loss


def _mean(rows: Sequence[StepRow]) -> float:
    return float(np.mean([row["loss"] for row in rows]))
