"""Make the figures of a study: its learning curves, and those of Optuna."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import optuna.visualization.matplotlib as optuna_plots
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna import create_study, create_trial
from optuna.study import Study
from optuna.trial import TrialState

from pipeline.report.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    RED,
    SKY,
    house_style,
    legend_above,
    level,
    log_scale,
    save_png,
    short,
)
from pipeline.sweep.pruner import best_trial, curve_of, forecast
from pipeline.sweep.statistics import SeedGroup, Spread
from pipeline.sweep.study import SHARED
from pipeline.system.words import counted
from pipeline.training.target import RULES

UNITS = {"tokens": "tokens", "steps": "steps", "train_s": "seconds of training"}
NARROW = 5  # below this ratio, an axis has few of the ticks of `log_scale`
SERIES = (BLUE, RED, GREEN, ORANGE, PINK, SKY, GREY, BLACK)  # colours of the groups


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
    _losses(axes, shared)
    states = [trial.state for trial in trials]
    reached, stopped = counted(states.count(TrialState.COMPLETE), "trial"), states.count(TrialState.PRUNED)
    axes.set_title(f"{reached} reached the target (blue, the best red), {stopped} did not (grey)")
    return figure


@house_style()
def seeds_figure(groups: Sequence[SeedGroup], shared: dict[str, Any]) -> Figure:
    """Plot the loss of every run over what it spent, in a colour for each group, and the mean at the target.

    The shade is one standard deviation on each side of the mean. A run that missed the target ends in a cross.
    """
    figure, colours, marks = Figure(), {}, ""
    axes, objective = figure.subplots(), shared["objective"]
    scale = 1000 if objective == "train_s" else 1  # reports are in ms
    for place, group in enumerate(groups):
        colour = colours[group.name] = SERIES[place % len(SERIES)]
        for trial in group.trials:
            if points := curve_of(trial):
                reached = trial.state is TrialState.COMPLETE
                axes.plot(*zip(*points, strict=True), color=colour, lw=1.2 if reached else 0.8, alpha=0.7)
                axes.plot(*points[-1], "o" if reached else "x", color=colour, ms=4 if reached else 6)
        if costs := group.costs(objective):
            spread = Spread.of([scale * cost for cost in costs])
            axes.axvline(spread.mean, color=colour, lw=1, ls=":")
            marks = marks or " (dotted: mean)"
            if spread.sd:
                marks = " (dotted: mean; shaded: ± deviation)"
                axes.axvspan(spread.mean - spread.sd, spread.mean + spread.sd, color=colour, alpha=0.1, lw=0)
    _losses(axes, shared)
    n_runs, n_missed = (sum(map(count, groups)) for count in (lambda c: len(c.trials), lambda c: c.n_missed))
    axes.set_title(f"{n_runs - n_missed} of {counted(n_runs, 'run')} reached the target{marks}")
    for name, colour in colours.items() if len(groups) > 1 else ():
        axes.plot([], [], color=colour, label=name)
    if len(groups) > 1:
        legend_above(axes)
    return figure


def _losses(axes: Axes, shared: dict[str, Any]) -> None:
    """Scale and name the axes of learning curves, and mark the target.

    A curve is the loss of minibatches, and may end above a target for the loss of the whole text.
    """
    if not axes.lines:
        axes.set_ylim(0.01, 15)
    target, rule = shared["params"]["target"]["loss"], RULES.get(shared["params"]["target"].get("rule", ""))
    held_out = rule is not None and rule.needs_held_out
    text = f"{'held-out' if held_out else 'whole'} text"
    level(axes, target, f"target {target:g}\n({text})")
    log_scale(axes)
    low, high = axes.get_ylim()
    if high < NARROW * low:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    unit = "ms of training" if shared["objective"] == "train_s" else shared["objective"]  # as in `report_step`
    measured = "loss of the held-out text" if held_out else "minibatch loss, mean of an epoch"
    axes.set(xlabel=f"{unit} (dot: the loss of the {text} reached the target)", ylabel=f"{measured} (nats per token)")
    axes.xaxis.set_major_formatter(lambda value, _: short(value))


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
