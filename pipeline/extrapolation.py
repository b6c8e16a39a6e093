"""extrapolation: how far a learning curve has come -> when, at the earliest, it can reach the target.

A curve is what was spent (tokens, steps or seconds) and the mean loss over the last pass then, point by point. The loss
of a text that is being memorised stays level for most of a run and falls ever faster at its end, while rates fall to
zero: no straight line through its past, and none of the usual parametric families (Domhan et al. 2015), foresees that.
But runs on one text are alike. So a curve is read off against that of the best run so far: from the same loss on, it is
given what the best one still needed, divided by an optimism.
"""

import math
from collections.abc import Sequence

import numpy as np

Curve = Sequence[tuple[float, float]]  # (spent, loss in nats per token), what was spent rising


def earliest_end(curve: Curve, best: Curve, optimism: float) -> float:
    """What `curve` will have spent at the target if, from now on, it falls `optimism` times as fast as `best` did.

    `best` is that of a run which ended at the target. At 1 this is the plain forecast.
    """
    spent, loss = curve[-1]
    return spent + (best[-1][0] - _spent_at(loss, best)) / optimism


def straight_end(curve: Curve, start_loss: float, target: float) -> float:
    """The forecast without another run: the logarithm of the loss goes on falling as it did from `start_loss` on."""
    spent, loss = curve[-1]
    fallen = math.log(start_loss / min(loss, start_loss * 0.999))
    return spent * max(1.0, math.log(start_loss / target) / fallen)


def _spent_at(loss: float, curve: Curve) -> float:
    """What `curve` had spent when it first was as low as `loss`, between its points along a straight line."""
    spent, losses = np.array(curve, dtype=float).T
    lowest = np.minimum.accumulate(losses)
    return float(np.interp(-loss, -lowest, spent))
