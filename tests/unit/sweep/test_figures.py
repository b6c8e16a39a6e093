"""study_plots: every figure from studies with much and with nothing in them."""

from datetime import datetime, timedelta

import pytest
from optuna import create_study
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial
from PIL import Image

from pipeline.sweep.figures import best_figure, curves_figure, draw_study, with_forecasts

QUESTION = {"objective": "tokens", "params": {"target": {"loss": 0.1}}}
BEGAN = datetime(2026, 1, 1)


@pytest.fixture
def study():
    study = create_study()
    study.set_user_attr("question", QUESTION)
    return study


def add(study, state, value=None, forecast=None, lr=0.01, kind="linear", minutes=1.0):
    trial = create_trial(
        state=state,
        value=value,
        params={"optim.lr": lr, "optim.schedule": kind},
        distributions={
            "optim.lr": FloatDistribution(0.001, 0.1, log=True),
            "optim.schedule": CategoricalDistribution(["linear", "wsd"]),
        },
        user_attrs={} if forecast is None else {"forecast": forecast},
        intermediate_values={10_000: 5.0, 20_000: 2.0 + 10 * lr},
    )
    trial.datetime_start, trial.datetime_complete = BEGAN, BEGAN + timedelta(minutes=minutes)
    study.add_trial(trial)


def filled(study):
    add(study, TrialState.COMPLETE, 50_000.0, minutes=1)
    add(study, TrialState.PRUNED, forecast=90_000.0, lr=0.002, minutes=2)
    add(study, TrialState.COMPLETE, 60_000.0, lr=0.02, minutes=3)
    add(study, TrialState.COMPLETE, 40_000.0, lr=0.03, kind="wsd", minutes=4)
    add(study, TrialState.FAIL, lr=0.09)
    return study


def test_every_figure_is_drawn_and_none_is_empty(study, tmp_path):
    draw_study(filled(study), tmp_path)
    names = {path.stem for path in tmp_path.glob("*.png")}
    assert names == {"curves", "best", "history", "slices", "parallel", "importances", "contours"}
    for path in tmp_path.glob("*.png"):
        assert len(Image.open(path).convert("RGB").getcolors(1 << 24)) > 20


def test_a_study_without_trials_has_figures_that_say_so(study, tmp_path):
    draw_study(study, tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == {"curves", "best"}
    assert "No trial" in best_figure(study).axes[0].get_title(loc="left")


def test_stopped_trials_are_faded_and_the_best_stands_out(study):
    lines = curves_figure(filled(study)).axes[0].lines
    curves = [line for line in lines if len(line.get_xdata()) == 2 and line.get_xdata()[0] == 10_000]
    assert [line.get_alpha() for line in curves].count(0.35) == 2  # the one pruned and the one failed
    assert max(curves, key=lambda line: line.get_linewidth()).get_ydata()[1] == pytest.approx(2.3)


def test_the_best_so_far_only_falls(study):
    (_, steps) = best_figure(filled(study)).axes[0].lines
    assert list(steps.get_ydata()) == [50_000, 50_000, 40_000]
    assert list(steps.get_xdata()) == [1, 3, 4]


def test_a_trial_that_missed_the_target_stands_at_its_forecast(study):
    assert [trial.value for trial in with_forecasts(filled(study)).trials] == [50_000, 90_000, 60_000, 40_000]
