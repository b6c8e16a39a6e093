"""Prune a trial when its learning curve, extrapolated along the best trial's, cannot reach the target any sooner."""

from collections.abc import Sequence

import numpy as np
from optuna.pruners import BasePruner
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

Curve = Sequence[tuple[float, float]]  # (spent, loss), what was spent rising; it ends where the target was reached


class ExtrapolationPruner(BasePruner):  # type: ignore[misc]
    """Pruner for studies that minimise what a training run spends (tokens, steps, ms) until it reaches a target loss.

    A memorising run's loss is level at first and falls ever faster at its end, while learning rates fall to zero. No
    straight line and none of the usual parametric families (Domhan et al. 2015) predicts that. But runs on the same
    data are alike, so a trial is expected to need from its present loss on what the best trial still needed from there.

    The trial reports a smooth loss, such as the mean over the last epoch, at what it has spent so far as the step; its
    value is what it has spent at the target. Nothing is pruned before a first trial has reached the target.

    Args:
        tolerance: a trial is pruned when its forecast is worse than the best trial's cost by at least this share. It
            allows for trials that catch up late, because their learning rate stays high for longer. benchmarks/LOG.md
            has what it costs and what it saves.

    Example:
        def objective(trial):
            for step, loss in enumerate(train(lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True)), start=1):
                trial.report(loss, step)
                if loss < 0.1:
                    return step
                if trial.should_prune():
                    break
            raise optuna.TrialPruned  # it is stopped, or has spent its budget

        optuna.create_study(pruner=ExtrapolationPruner(tolerance=0.02)).optimize(objective, n_trials=20)
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the last report of `trial` is too far behind the best trial."""
        curve, best = curve_of(trial), best_trial(study)
        if not curve or best is None or not (best_curve := curve_of(best)):
            return False
        return forecast(curve, best_curve) >= (1 + self.tolerance) * best_curve[-1][0]


def best_trial(study: Study) -> FrozenTrial | None:
    """The trial that reached the target at the lowest cost, the first of equals; None before there is one."""
    reached = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return min(reached, key=lambda trial: (trial.value, trial.number), default=None)


def curve_of(trial: FrozenTrial) -> Curve:
    """The losses that a trial has reported, over what it had spent then."""
    return sorted(trial.intermediate_values.items())


def forecast(curve: Curve, best: Curve) -> float:
    """What `curve` will have spent at the target if its loss falls from now on as that of `best` did."""
    spent, loss = curve[-1]
    best_spent, best_losses = np.array(best, dtype=float).T
    lowest = np.minimum.accumulate(best_losses)  # the first time that the best was as low counts
    return spent + float(best_spent[-1] - np.interp(-loss, -lowest, best_spent))
