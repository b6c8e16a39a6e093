"""extrapolation: how far a learning curve has come -> what it will have spent at the target.

A curve is what was spent (tokens, steps or seconds) and the mean loss over the last pass then, point by point. The loss
of a text that is being memorised stays level for most of a run and falls ever faster at its end, while rates fall to
zero: no straight line through its past, and none of the usual parametric families (Domhan et al. 2015), foresees that.
But runs on one text are alike. So a curve is read off against that of the best run so far: from its present loss on, it
is given what the best one still needed.
"""

import math
from collections.abc import Sequence

import numpy as np

Curve = Sequence[tuple[float, float]]  # (spent, loss in nats per token), what was spent rising


def forecast(curve: Curve, best: Curve) -> float:
    """What `curve` will have spent at the target if from now on it falls as `best`, which ended there, did."""
    spent, loss = curve[-1]
    return spent + best[-1][0] - _spent_at(loss, best)


def forecast_alone(curve: Curve, start_loss: float, target: float) -> float:
    """The same without another run: the logarithm of the loss goes on falling as it did from `start_loss` on."""
    spent, loss = curve[-1]
    fallen = math.log(start_loss / min(loss, start_loss * 0.999))
    return spent * max(1.0, math.log(start_loss / target) / fallen)


def _spent_at(loss: float, curve: Curve) -> float:
    """What `curve` had spent when it first was as low as `loss`, between its points along a straight line."""
    spent, losses = np.array(curve, dtype=float).T
    lowest = np.minimum.accumulate(losses)
    return float(np.interp(-loss, -lowest, spent))
