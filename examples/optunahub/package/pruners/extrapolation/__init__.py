"""An Optuna pruner for studies that minimise what a training costs until it reaches a target loss.

This file needs only numpy and Optuna, so that it can be copied.
"""

from collections.abc import Sequence

import numpy as np
import optuna


class ExtrapolationPruner(optuna.pruners.BasePruner):  # type: ignore[misc]
    """Prune a trial if its curve, extrapolated along the best trial's, reaches the target too
    late.

    It is for studies that minimise a cost, such as steps, tokens or seconds, until a loss
    reaches a target. A loss may be flat for long and fall faster and faster at the end, for
    example while the learning rate decays to zero. Neither a straight line nor the usual
    parametric families (Domhan et al., 2015) predict that. But trainings on the same data have
    similar curves. So the forecast of a trial's cost is what it has spent so far, plus what the
    best trial spent from the same loss to the target.

    In ``trial.report(loss, step)``, ``step`` is what the trial has spent so far, in any unit
    that is the same for all trials. The loss should be smooth, such as the mean over an epoch. A
    trial that reaches the target reports its loss there, and the objective returns its cost. A
    trial that uses up its budget before raises ``TrialPruned``: a returned value means that the
    target was reached. A metric that rises towards its target, such as an accuracy, is reported
    with a minus sign.

    No trial is pruned before one has reached the target. From then on, a trial whose loss is NaN
    is pruned.

    Example:

        .. code-block:: python

            def objective(trial):
                lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
                for step, loss in enumerate(train(lr, max_steps=1000), start=1):
                    trial.report(loss, step)
                    if loss <= 0.1:
                        return step
                    if trial.should_prune():
                        break
                raise optuna.TrialPruned


            study = optuna.create_study(pruner=ExtrapolationPruner(tolerance=0.1))
            study.optimize(objective, n_trials=20)

    Args:
        tolerance:
            A trial is pruned if its forecast exceeds the best trial's cost by this share or more;
            at least 0. A higher tolerance keeps trials that catch up late, for example because
            their learning rate stays high for longer. No trial is pruned before it is behind the
            best one by this share of the whole cost.
    """

    def __init__(self, tolerance: float = 0.1) -> None:
        if not 0 <= tolerance < np.inf:
            raise ValueError(f"tolerance is {tolerance}, but must be a number of at least 0")
        self.tolerance = tolerance

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether the forecast of ``trial`` is too far behind the best trial.

        Raises ValueError if the study maximises its objective, RuntimeError if it has several.
        """
        if study.direction == optuna.study.StudyDirection.MAXIMIZE:
            raise ValueError(
                "ExtrapolationPruner needs a study with direction 'minimize', whose objective is "
                "the cost until a target is reached"
            )
        curve, best = curve_of(trial), best_trial(study)
        if not curve or best is None or not (best_curve := curve_of(best)):
            return False
        return forecast(curve, best_curve) >= (1 + self.tolerance) * best_curve[-1][0]


Curve = Sequence[tuple[float, float]]  # (spent, loss), ascending; the best one ends at the target


def best_trial(study: optuna.Study) -> optuna.trial.FrozenTrial | None:
    """A trial with the lowest value; None if no trial has reached the target.

    Of several, one with reports is preferred, then the first one. It does not read the trials that
    are running, which a database would send with all of their reports.
    """
    try:
        best = study.best_trial
    except ValueError:
        return None
    if best.intermediate_values:
        return best
    reached = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    lowest = [trial for trial in reached if trial.value == best.value]
    return min(lowest, key=lambda trial: (not trial.intermediate_values, trial.number))


def curve_of(trial: optuna.trial.FrozenTrial) -> Curve:
    """The points (spent, loss) that a trial has reported."""
    return sorted(trial.intermediate_values.items())


def forecast(curve: Curve, best: Curve) -> float:
    """What ``curve`` will have spent at the target if its loss falls like that of ``best``.

    Infinite if the last loss is NaN.
    """
    spent, loss = curve[-1]
    if np.isnan(loss):
        return np.inf
    best_spent, best_losses = np.array(best, dtype=float).T
    lowest = np.fmin.accumulate(best_losses)  # only the first time that a loss was reached counts
    return spent + float(best_spent[-1] - np.interp(-loss, -lowest, best_spent))
