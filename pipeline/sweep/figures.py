"""Make the figures of a study: its learning curves, and those of Optuna."""

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
from optuna.trial import TrialState

from pipeline.report.style import BLUE, GREY, RED, counted, house_style, level, log_scale, save_png, short
from pipeline.sweep.pruner import best_trial, curve_of, forecast
from pipeline.sweep.study import SHARED
from pipeline.training.target import RULES

UNITS = {"tokens": "tokens", "steps": "steps", "train_s": "seconds of training"}


def draw_study(study: Study, folder: Path) -> None:
    """Write to `folder`/NAME.png all figures that can be made from the trials so far."""
    save_png(curves_figure(study), folder / "curves.png")
    valued = with_forecasts(study)
    params = {key for trial in valued.trials for key in trial.params}
    varied = sorted(key for key in params if len({trial.params.get(key) for trial in valued.trials}) > 1)
    objective = f"{UNITS[study.user_attrs[SHARED]['objective']]} to the target"
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
    """Plot the loss of all trials over what they spent; pruned trials are faint, the best one is highlighted."""
    figure, best, shared = Figure(), best_trial(study), study.user_attrs[SHARED]
    axes, trials = figure.subplots(), study.get_trials(deepcopy=False)
    for trial in sorted(trials, key=lambda trial: trial == best):
        if not (points := curve_of(trial)):
            continue
        complete = trial.state is TrialState.COMPLETE
        colour, alpha, width = (BLUE, 1.0, 1.2) if complete else (GREY, 0.35, 0.8)
        if trial == best:
            colour, width, name = RED, 2.4, f"trial {trial.number}"
            axes.annotate(name, points[-1], (0, -14), textcoords="offset points", color=RED, ha="center")
        axes.plot(*zip(*points, strict=True), color=colour, alpha=alpha, lw=width)
        axes.plot(*points[-1], "o" if complete else "x", color=colour, alpha=alpha, ms=4)
    if not axes.lines:
        axes.set_ylim(0.01, 15)
    log_scale(axes)
    target, rule = shared["params"]["target"]["loss"], RULES.get(shared["params"]["target"].get("rule", ""))
    held_out = rule is not None and rule.needs_held_out
    level(axes, target, f"target {target:g}\n({'held-out' if held_out else 'whole'} text)")
    unit = "ms of training" if shared["objective"] == "train_s" else shared["objective"]  # as in `report_step`
    measured = "loss of the held-out text" if held_out else "mean loss of the last epoch"
    axes.set(xlabel=unit, ylabel=f"{measured} (nats per token)")
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    states = [trial.state for trial in trials]
    reached, stopped = counted(states.count(TrialState.COMPLETE), "trial"), states.count(TrialState.PRUNED)
    axes.set_title(f"{reached} reached the target (blue, the best red), {stopped} did not (grey)")
    return figure


def with_forecasts(study: Study) -> Study:
    """Copy the finished trials into a study in memory, where the value of a pruned trial is its forecast."""
    valued = create_study()
    if (best := best_trial(study)) is None:
        return valued
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
        value, curve, best_curve = trial.value, curve_of(trial), curve_of(best)
        if trial.state is TrialState.PRUNED and curve:
            value = best.value * forecast(curve, best_curve) / best_curve[-1][0]
        if trial.state is TrialState.COMPLETE or curve:
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
