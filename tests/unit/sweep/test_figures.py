"""figures: every figure of studies with much and with nothing in them."""

import pytest
from optuna import create_study
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial
from PIL import Image

from pipeline.sweep.figures import curves_figure, draw_study, with_forecasts
from pipeline.sweep.study import SHARED


@pytest.fixture
def study():
    study = create_study()
    study.set_user_attr(SHARED, {"objective": "tokens", "params": {"target": {"loss": 0.1}}})
    return study


def add(study, state, curve, lr=0.01, kind="linear"):
    trial = create_trial(
        state=state,
        value=float(max(curve)) if state is TrialState.COMPLETE else None,
        params={"optim.lr": lr, "optim.schedule": kind},
        distributions={
            "optim.lr": FloatDistribution(0.001, 0.1, log=True),
            "optim.schedule": CategoricalDistribution(["linear", "wsd"]),
        },
        intermediate_values=curve,
    )
    study.add_trial(trial)


def filled(study):
    add(study, TrialState.COMPLETE, {10_000: 5.0, 50_000: 0.1})
    add(study, TrialState.PRUNED, {10_000: 5.0, 20_000: 4.0}, lr=0.002)
    add(study, TrialState.COMPLETE, {10_000: 5.0, 60_000: 0.1}, lr=0.02)
    add(study, TrialState.COMPLETE, {10_000: 4.0, 40_000: 0.1}, lr=0.03, kind="wsd")
    add(study, TrialState.FAIL, {10_000: 5.0, 20_000: 4.0}, lr=0.09)
    return study


def test_every_figure_is_drawn_and_none_is_empty(study, tmp_path):
    draw_study(filled(study), tmp_path)
    names = {path.stem for path in tmp_path.glob("*.png")}
    assert names == {"curves", "history", "slices", "parallel", "importances", "contours"}
    for path in tmp_path.glob("*.png"):
        assert len(Image.open(path).convert("RGB").getcolors(1 << 24)) > 20


def test_a_study_without_trials_has_a_figure_that_says_so(study, tmp_path):
    draw_study(study, tmp_path)
    assert [path.stem for path in tmp_path.glob("*.png")] == ["curves"]
    assert "0 trials reached the target" in curves_figure(study).axes[0].get_title(loc="left")


def test_stopped_trials_are_faded_and_the_best_stands_out(study):
    lines = curves_figure(filled(study)).axes[0].lines
    curves = [line for line in lines if len(line.get_xdata()) == 2 and line.get_xdata()[0] == 10_000]
    assert [line.get_alpha() for line in curves].count(0.35) == 2  # the one pruned and the one failed
    assert max(curves, key=lambda line: line.get_linewidth()).get_xdata()[1] == 40_000


def test_a_trial_that_missed_the_target_has_its_forecast_as_its_value(study):
    assert with_forecasts(study).trials == []
    values = [trial.value for trial in with_forecasts(filled(study)).trials]
    assert values == pytest.approx([50_000, 20_000 + 30_000, 60_000, 40_000])  # at 4.0 the best still needed 30,000


def test_without_a_best_trial_there_is_no_forecast(study):
    add(study, TrialState.PRUNED, {10_000: 5.0})
    assert with_forecasts(study).trials == []
