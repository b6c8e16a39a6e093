"""What a run reached by its target rule, for its name and its description."""

from collections.abc import Mapping
from typing import Any

from pipeline.config.sections import TargetConfig
from pipeline.tracking.descriptions import Result
from pipeline.training.target import RULES, Records, best_step


def result_of(records: Records, target: Mapping[str, Any]) -> Result | None:
    """What a finished run reached by its target rule: the loss of the model that is kept, or that of its last steps.

    `records`: all of them; `target`: the section of its parameters. None if the rule is unknown or its loss was not
    measured.
    """
    if not records or (rule := RULES.get(target.get("rule", ""))) is None:
        return None
    config = TargetConfig.model_construct(**target)  # it was validated when the run started
    if rule.minibatch_loss is not None:
        at, loss = records[-1], rule.minibatch_loss(records, config)
    elif (best := best_step(records, config)) is not None:
        at, loss = records[best - 1], getattr(records[best - 1], rule.loss)
    else:
        return None
    return Result(loss, at.step, at.tokens, rule.is_met(records, config))
