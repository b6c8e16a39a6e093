"""target: the rules that say when the target loss is reached, each a pure function of the journal's rows.

batch: the first minibatch below it. average: the mean of the last `average_steps` minibatches. corpus: one pass over
the whole training text. validation: one pass over the held-out text.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.config import Section
from pipeline.journal import StepRow

RULES = ("batch", "average", "corpus", "validation")


class TargetConfig(Section):
    section_name: ClassVar[str] = "target"

    loss: float = Field(gt=0)
    rule: Literal["batch", "average", "corpus", "validation"]
    average_steps: int = Field(ge=1)


def is_met(rows: Sequence[StepRow], rule: str, config: TargetConfig) -> bool:
    """Whether the step of the last row meets `rule`."""
    if rule in ("corpus", "validation"):
        measured = rows[-1].get(f"{rule}_loss")
        return measured is not None and float(measured) < config.loss  # type: ignore[arg-type]
    if rule == "batch":
        return rows[-1]["loss"] < config.loss
    last = rows[-config.average_steps :]
    return len(last) == config.average_steps and _mean(last) < config.loss


def first_met(rows: Sequence[StepRow], config: TargetConfig) -> dict[str, int | None]:
    """The first step at which each rule was met, None where it was not."""
    ends = [(rows[max(0, i - config.average_steps) : i], rows[i - 1]["step"]) for i in range(1, len(rows) + 1)]
    return {rule: next((step for last, step in ends if is_met(last, rule, config)), None) for rule in RULES}


def check_is_worth_it(rows: Sequence[StepRow], steps_per_pass: int, config: TargetConfig) -> bool:
    """Whether a pass over the text to measure its loss is worth its cost after the step of the last row.

    The minibatches' running mean lags behind the corpus loss. So the first look comes when it is below three times the
    target; a look at loss c sets the next one to when the mean has fallen by the factor that c still has to fall,
    or after one pass at the latest.
    """
    span = min(config.average_steps, steps_per_pass)
    if len(rows) < span:
        return False
    mean = _mean(rows[-span:])
    looks = [row for row in rows if "corpus_loss" in row]
    if not looks:
        return mean < 3 * config.loss
    last = looks[-1]
    mean_then = _mean(rows[max(0, last["step"] - span) : last["step"]])
    due = rows[-1]["step"] - last["step"] >= steps_per_pass
    return due or mean * last["corpus_loss"] <= mean_then * config.loss


def _mean(rows: Sequence[StepRow]) -> float:
    return float(np.mean([row["loss"] for row in rows]))
