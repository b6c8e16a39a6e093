"""Prune a trial when its learning curve, extrapolated along the best trial's, reaches the target too late."""

from collections.abc import Sequence

import numpy as np
from optuna.pruners import BasePruner
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

Curve = Sequence[tuple[float, float]]  # (spent, loss) in ascending order; the best curve ends at the target


class ExtrapolationPruner(BasePruner):  # type: ignore[misc]
    """Pruner for studies that minimise what a training run spends (tokens, steps, ms) until it reaches a target loss.

    The loss of a memorising run is flat at first and falls faster and faster towards the end, while the learning rate
    decays to zero. Neither a straight line nor the usual parametric families (Domhan et al. 2015) predict that. But
    runs on the same data have similar curves. So the forecast assumes that, from its current loss to the target, a
    trial needs as much as the best trial needed from the same loss.

    A trial reports a smooth loss, such as the mean over the last epoch; the step of a report is what the trial has
    spent so far. Its value is what it has spent at the target. No trial is pruned before one has reached the target.

    Args:
        tolerance: a trial is pruned when its forecast exceeds the best trial's value by at least this share. It keeps
            trials that catch up late because their learning rate stays high for longer. benchmarks/LOG.md has
            measurements.

    Example:
        def objective(trial):
            for step, loss in enumerate(train(lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True)), start=1):
                trial.report(loss, step)
                if loss < 0.1:
                    return step
                if trial.should_prune():
                    break
            raise optuna.TrialPruned  # it was pruned, or has used up its budget

        optuna.create_study(pruner=ExtrapolationPruner(tolerance=0.02)).optimize(objective, n_trials=20)
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the forecast of `trial` is too far behind the best trial."""
        curve, best = curve_of(trial), best_trial(study)
        if not curve or best is None or not (best_curve := curve_of(best)):
            return False
        return forecast(curve, best_curve) >= (1 + self.tolerance) * best_curve[-1][0]


def best_trial(study: Study) -> FrozenTrial | None:
    """The trial with the lowest value, the first one if several are equal; None if no trial has reached the target."""
    reached = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return min(reached, key=lambda trial: (trial.value, trial.number), default=None)


def curve_of(trial: FrozenTrial) -> Curve:
    """The points (spent, loss) that a trial has reported."""
    return sorted(trial.intermediate_values.items())


def forecast(curve: Curve, best: Curve) -> float:
    """What `curve` will have spent at the target, if its loss falls from now on like that of `best`."""
    spent, loss = curve[-1]
    best_spent, best_losses = np.array(best, dtype=float).T
    lowest = np.minimum.accumulate(best_losses)  # monotonic: only the first time that a loss was reached counts
    return spent + float(best_spent[-1] - np.interp(-loss, -lowest, best_spent))
