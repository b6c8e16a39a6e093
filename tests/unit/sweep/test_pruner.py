"""Pruner: the forecast of a curve along the best one, and Optuna studies that use it."""

import re
from pathlib import Path

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sweep import pruner
from pipeline.sweep.pruner import ExtrapolationPruner, forecast
from tests.studies import add

# Mean losses of the epochs of a run like the recipe `laptop`'s: flat at first, falling faster towards the end.
LOSSES = [10.8, 5.4, 4.1, 3.6, 2.9, 1.9, 0.95, 0.3]
BEST = [(34.0 * i, loss) for i, loss in enumerate(LOSSES)]
END = BEST[-1][0]
BUMPY = [(0.0, 10.0), (10.0, 4.0), (20.0, 5.0), (30.0, 1.0)]


@pytest.mark.parametrize(
    ("curve", "best", "expected"),
    [
        *(([point], BEST, END) for point in BEST),  # the best curve ends where it ended
        ([(100, 4.75)], BEST, 100 + END - 51),  # halfway between its points at 34 and 68
        ([(50, 9.0), (100, 4.1)], BEST, 100 + END - 68),  # only the last report counts
        ([(50, 0.2)], BEST, 50),  # already lower than the best curve's end
        ([(5, 4.5)], BUMPY, 5 + 30 - 10 * 5.5 / 6),  # above the bump, which does not count
        ([(5, 3.0)], BUMPY, 5 + 30 - (20 + 10 / 3)),  # below it: the best fell from 4 to 1 between 20 and 30
    ],
)
def test_a_forecast_follows_the_best_curve_from_the_same_loss_on(curve, best, expected):
    assert forecast(curve, best) == pytest.approx(expected)


@settings(max_examples=20)
@given(speed=st.floats(0.25, 3.0), at=st.floats(0.05, 0.95))
def test_a_forecast_is_behind_the_best_by_what_the_trial_is_behind_now(speed, at):
    spent, loss = at * END / speed, float(np.interp(at * END, *zip(*BEST, strict=True)))
    assert forecast([(spent, loss)], BEST) == pytest.approx(END + spent - at * END)


@pytest.mark.parametrize(("loss", "is_pruned"), [(3.0, False), (3.6, False), (3.8, True), (9.0, True)])
def test_a_trial_is_pruned_when_its_forecast_is_too_far_behind_the_best(loss, is_pruned):
    study = optuna.create_study(pruner=ExtrapolationPruner(tolerance=0.05))
    first = study.ask()
    first.report(9.9, 10**9)
    assert not first.should_prune()  # no trial has reached the target
    add(study, value=100.0, curve={0: 10.0, 50: 3.0, 100: 0.1})
    trial = study.ask()
    assert not trial.should_prune()  # it has no report yet
    trial.report(loss, 50)  # the best had 3.6 at 45.7 and 3.8 at 44.3, and the tolerance is 5
    assert trial.should_prune() is is_pruned


def test_the_pruner_can_be_used_without_the_rest_of_this_project():
    assert not re.search("^ *(from|import) (pipeline|torch)", Path(pruner.__file__).read_text(), re.MULTILINE)
