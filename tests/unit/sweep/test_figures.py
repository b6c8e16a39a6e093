"""Figures of a study: which ones are drawn, and what they show."""

import pytest
from optuna.trial import TrialState

from pipeline.sweep.figures import curves_figure, draw_study, with_forecasts
from pipeline.sweep.study import SHARED
from tests.studies import add, fill


def test_a_study_without_trials_has_one_figure_that_says_so(study, tmp_path):
    draw_study(study, tmp_path)
    assert [path.stem for path in tmp_path.glob("*.png")] == ["curves"]
    assert "0 trials reached the target" in curves_figure(study).axes[0].get_title(loc="left")


def test_pruned_trials_are_faint_and_the_best_is_highlighted(study):
    lines = curves_figure(fill(study)).axes[0].lines
    curves = [line for line in lines if len(line.get_xdata()) == 2 and line.get_xdata()[0] == 10_000]
    assert [line.get_alpha() for line in curves].count(0.35) == 2  # the pruned trial and the failed one
    assert max(curves, key=lambda line: line.get_linewidth()).get_xdata()[1] == 40_000


@pytest.mark.parametrize(("rule", "text", "loss"), [
    ("sliding", "whole", "minibatch loss, mean of an epoch"), ("validation", "held-out", "loss of the held-out text")
])  # fmt: skip
def test_the_curves_say_which_loss_they_are(study, rule, text, loss):
    shared = study.user_attrs[SHARED]
    shared["params"]["target"]["rule"] = rule
    study.set_user_attr(SHARED, shared)
    axes = curves_figure(fill(study)).axes[0]
    assert any(f"({text} text)" in note.get_text() for note in axes.texts)
    assert axes.get_ylabel() == f"{loss} (nats per token)"
    assert axes.get_xlabel() == f"tokens (dot: the loss of the {text} text reached the target)"


@pytest.mark.parametrize("losses", [(6.1, 5.4), (10.0, 5.5), (9.0, 0.1)])
def test_an_axis_of_losses_has_several_numbers(study, losses):
    shared = study.user_attrs[SHARED]
    shared["params"]["target"]["loss"] = losses[1]
    study.set_user_attr(SHARED, shared)
    add(study, value=2.0, curve=dict(enumerate(losses, start=1)))
    axes = curves_figure(study).axes[0]
    low, high = axes.get_ylim()
    assert len([tick for tick in axes.yaxis.get_majorticklocs() if low < tick < high]) >= 3


def test_the_value_of_a_pruned_trial_is_its_forecast(study):
    values = [trial.value for trial in with_forecasts(fill(study)).trials]
    assert values == pytest.approx([50_000, 20_000 + 30_000, 60_000, 40_000])  # from 4.0 on the best needed 30,000


def test_without_a_best_trial_there_is_no_forecast(study):
    add(study, TrialState.PRUNED, curve={10_000: 5.0})
    assert with_forecasts(study).trials == []
