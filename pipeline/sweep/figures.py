"""study_plots: a study -> its figures.

Optuna draws what is common to all studies. There, trials that did not reach the target stand at their forecast.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import optuna.visualization.matplotlib as optuna_plots
from matplotlib.figure import Figure
from optuna import create_study, create_trial
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from pipeline.report.style import (
    BLUE,
    GREY,
    RED,
    counted,
    house_style,
    level,
    log_scale,
    plain_numbers,
    save_png,
    short,
)
from pipeline.sweep.study import best_trial

UNITS = {"tokens": "tokens", "steps": "steps", "train_s": "seconds of training"}


def draw_study(study: Study, folder: Path) -> None:
    """Write each figure that the trials so far allow as NAME.png."""
    for name, figure in {"curves": curves_figure, "best": best_figure}.items():
        save_png(figure(study), folder / f"{name}.png")
    valued = with_forecasts(study)
    varied = [key for key in _searched(valued) if len({trial.params[key] for trial in valued.trials}) > 1]
    objective = f"{_objective(study)} to the target"
    figures: dict[str, Callable[[], Any]] = {
        "history": lambda: optuna_plots.plot_optimization_history(valued, target_name=objective),
        "slices": lambda: optuna_plots.plot_slice(valued, varied, target_name=objective),
        "parallel": lambda: optuna_plots.plot_parallel_coordinate(valued, varied, target_name=objective),
    }
    if len(varied) > 1:
        figures["importances"] = lambda: optuna_plots.plot_param_importances(valued, target_name=objective)
        figures["contours"] = lambda: optuna_plots.plot_contour(valued, varied, target_name=objective)
    for name, draw in figures.items() if len(valued.trials) > 2 and varied else ():
        save_png(_drawn_by_optuna(draw), folder / f"{name}.png")


@house_style()
def curves_figure(study: Study) -> Figure:
    """Loss over tokens of all trials; those that were stopped are faded, the best one stands out."""
    figure, best = Figure(), best_trial(study)
    axes = figure.subplots()
    for trial in sorted(study.get_trials(deepcopy=False), key=lambda trial: trial == best):
        if not (points := sorted(trial.intermediate_values.items())):
            continue
        colour, alpha, width = (BLUE, 1.0, 1.2) if trial.state is TrialState.COMPLETE else (GREY, 0.35, 0.8)
        if trial == best:
            colour, width = RED, 2.4
            axes.annotate(
                f"trial {trial.number}", points[-1], (0, -14), textcoords="offset points", color=RED, ha="center"
            )
        axes.plot(*zip(*points, strict=True), color=colour, alpha=alpha, lw=width)
        axes.plot(*points[-1], "o" if trial.state is TrialState.COMPLETE else "x", color=colour, alpha=alpha, ms=4)
    if not axes.lines:
        axes.set_ylim(0.01, 15)
    log_scale(axes)
    target = study.user_attrs["question"]["params"]["target"]["loss"]
    level(axes, target, f"target {target:g}\n(whole text)")
    axes.set(xlabel="tokens", ylabel="mean loss of the last pass (nats per token)")
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    reached, stopped = states.count(TrialState.COMPLETE), states.count(TrialState.PRUNED)
    axes.set_title(f"{counted(reached, 'trial')} reached the target (blue, the best red), {stopped} did not (grey)")
    return figure


@house_style()
def best_figure(study: Study) -> Figure:
    """What the best trial so far had needed, over the time that the study had been at work."""
    figure = Figure()
    axes = figure.subplots()
    reached = sorted(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)), key=_ended_s)
    if reached:
        started = min(t.datetime_start.timestamp() for t in study.get_trials(deepcopy=False) if t.datetime_start)
        minutes = [(_ended_s(trial) - started) / 60 for trial in reached]
        values = [trial.value or 0.0 for trial in reached]
        axes.plot(minutes, values, "o", color=BLUE, ms=5)
        axes.step(minutes, np.minimum.accumulate(values), where="post", color=RED, lw=2)
        axes.set_title(f"From {short(values[0])} to {short(min(values))} {_objective(study)}")
    else:
        axes.set_title("No trial has reached the target")
    axes.set(xlabel="minutes since the study began", ylabel=f"{_objective(study)} to the target")
    plain_numbers(axes.yaxis)
    return figure


def with_forecasts(study: Study) -> Study:
    """A study in memory in which a trial that missed the target has its forecast as its value."""
    valued = create_study()
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
        value = trial.value if trial.state is TrialState.COMPLETE else trial.user_attrs.get("forecast")
        if value is not None:
            valued.add_trial(create_trial(params=trial.params, distributions=trial.distributions, value=value))
    return valued


def _drawn_by_optuna(draw: Callable[[], Any]) -> Figure:
    plt.close("all")
    with warnings.catch_warnings(), plt.style.context("default"):
        warnings.simplefilter("ignore")
        drawn = draw()
        axes = drawn.flat[0] if isinstance(drawn, np.ndarray) else drawn
        figure: Figure = axes.figure
        if isinstance(drawn, np.ndarray):  # a row of panels, or a square of them
            size = 3.2 * len(drawn)
            figure.set_size_inches(max(8.0, size), size if drawn.ndim == 2 else 4.5)
        else:
            figure.tight_layout()
    return figure


def _searched(study: Study) -> list[str]:
    return sorted({key for trial in study.trials for key in trial.params})


def _objective(study: Study) -> str:
    return UNITS[study.user_attrs["question"]["objective"]]


def _ended_s(trial: FrozenTrial) -> float:
    return trial.datetime_complete.timestamp() if trial.datetime_complete else 0.0
