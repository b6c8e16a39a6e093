"""Make the figures of a run's report from its journal and reports.

Repeating a run gives the same figures, except `speed`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.report import style
from pipeline.system.files import read_json
from pipeline.system.words import counted
from pipeline.tracking.journal import EVALUATED_LOSSES, STEPS, TIMES, read_steps
from pipeline.tracking.run_record import read_run
from pipeline.training.target import RULES

LOSS = "loss (nats per token)"  # the label of an axis

CHECKS = {  # loss -> its name, colour and marker in the figure of the losses; others are black
    "sliding_loss": ("anywhere", style.RED, "o"),
    "corpus_loss": ("fixed windows", style.ORANGE, "D"),
    "validation_loss": ("held out", style.PINK, "s"),
    "loss_estimate": ("estimate", style.GREY, "o"),
}


@dataclass(frozen=True)
class RunReport:
    """The data of the figures."""

    steps: pd.DataFrame  # steps.jsonl
    times: pd.DataFrame  # times.jsonl
    run: dict[str, Any]  # models/run.json
    position_loss: list[float]  # reports/position_loss.json
    timing: dict[str, Any]  # reports/timing.json

    @classmethod
    def read(cls, models: Path, reports: Path) -> Self:
        """Raises InputError if a file is missing, IntegrityError if one cannot be read."""
        return cls(
            steps=read_steps(models / STEPS),
            times=read_steps(models / TIMES),
            run=read_run(models),
            position_loss=read_json(reports / "position_loss.json"),
            timing=read_json(reports / "timing.json"),
        )

    @property
    def mean_steps(self) -> int:
        """Steps in the running mean: those of the rule `average`, or 1/50 of a shorter run."""
        average_steps: int = self.run["params"]["target"]["average_steps"]
        return max(1, min(average_steps, len(self.steps) // 50))

    @property
    def loss_unit(self) -> str:
        """The label of an axis of losses, with the bits per byte of the text that the target rule evaluates."""
        results = self.run["results"]
        if not (bits := results.get("bits_per_byte")):  # earlier runs do not have it
            return LOSS
        return f"loss (nats per token; 1 is {bits / results['loss']:.3g} bits per byte)"


@style.house_style()
def loss_figure(report: RunReport) -> Figure:
    """Loss over steps, evaluations, the target, and the step at which each rule was met.

    The loss of a held-out text is a curve, with its lowest point marked, so that overfitting shows.
    """
    results, steps = report.run["results"], report.steps
    figure = Figure()
    axes = figure.subplots()
    style.draw_noisy(axes, steps["step"], steps["loss"], report.mean_steps)
    for column in steps.columns.intersection([*EVALUATED_LOSSES, "loss_estimate"]):
        name, colour, marker = CHECKS.get(column, (column.replace("_", " "), style.BLACK, "^"))
        found = steps[column].dropna()
        curve = "-" if column == "validation_loss" else ""
        axes.plot(found.index, found, f"{marker}{curve}", color=colour, markeredgecolor="white", label=name, zorder=3)
    style.log_scale(axes)
    axes.set_ylabel(report.loss_unit)
    bits = f"{bits:.3g} bits per byte, " if (bits := results.get("bits_per_byte")) else ""
    n, best = len(steps), results.get("model_step", len(steps))
    after = counted(n, "step") if best == n else f"{best:,} of {n:,} steps"
    axes.set_title(f"Loss {results['loss']:.3g} ({bits}{results['rule']} rule) after {after}")
    style.count_steps(axes, len(steps))
    style.legend_above(axes)
    target = results["target_loss"]
    met = {rule: at for rule, at in results["to_target"].items() if at is not None}
    style.level(axes, target, f"target {target:g}" if results["rule"] in met else f"target {target:g}\nnot reached")

    axes.plot([at["steps"] for at in met.values()], [target] * len(met), "|", color=style.BLACK, ms=14)
    notes = [f"{rule} rule met: step {at['steps']:,}, {style.short(at['tokens'])} tokens" for rule, at in met.items()]
    figure.supxlabel("\n".join(notes + _overfitting(axes, report)), x=0.01, ha="left", fontsize=10)
    return figure


def _overfitting(axes: Axes, report: RunReport) -> list[str]:
    """Mark the lowest loss of the held-out text; return what it says about the run, and what early stopping saved."""
    steps, results = report.steps, report.run["results"]
    held_out = steps["validation_loss"].dropna() if "validation_loss" in steps else pd.Series(dtype=float)
    if held_out.empty:
        return []
    evaluated, losses = held_out.index.to_numpy(), held_out.to_numpy()
    best, last = int(evaluated[losses.argmin()]), int(evaluated[-1])
    axes.axvline(best, color=style.PINK, lw=1, ls=":")
    side = "right" if best > len(steps) / 2 else "left"  # inside of the axes
    axes.annotate(f" step {best:,}: {held_out[best]:.3f} ", (best, held_out[best]), (0, -16),
                  textcoords="offset points", color=style.PINK, ha=side, fontsize=10)  # fmt: skip
    later = f"; {held_out[last]:.4f} at step {last:,}" if last != best else ", the last one"
    notes = [f"lowest held-out loss {held_out[best]:.4f} at step {best:,}{later}"]
    saved = results.get("max_steps", len(steps)) - len(steps)  # an early run has no max_steps
    if saved and results["to_target"].get(results["rule"]) is None:
        notes.append(f"early stopping saved {saved:,} of {results['max_steps']:,} steps")
    return notes


@style.house_style()
def training_figure(report: RunReport) -> Figure:
    """Gradient norm and learning rate over steps."""
    steps, optim = report.steps, report.run["params"]["optim"]
    figure = Figure(figsize=(8, 5.2))
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    style.draw_noisy(upper, steps["step"], steps["grad_norm"], report.mean_steps)
    style.log_scale(upper)
    upper.set(ylabel="L2 norm", title="Gradient norm before clipping")
    style.legend_above(upper)
    if (max_norm := optim.get("max_grad_norm")) is not None:
        style.level(upper, max_norm, f"clip at {max_norm:g}")
    lower.plot(steps["step"], steps["lr"], **style.line(steps, style.BLUE))
    muon = f"; Muon's is {optim['muon_lr'] / optim['lr']:.3g} times as large" if optim.get("name") == "muon" else ""
    lower.set(ylim=(0, steps["lr"].max() * 1.1), ylabel="learning rate", title=f"Learning rate of AdamW{muon}")
    style.count_steps(lower, len(steps))
    return figure


@style.house_style()
def speed_figure(report: RunReport) -> Figure:
    """Throughput and memory over steps."""
    steps, times, timing = report.steps, report.times, report.timing
    figure = Figure(figsize=(8, 5.2))
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    tokens_per_s = steps["tokens"].diff().fillna(steps["tokens"]) / times["step_s"]
    style.draw_noisy(upper, steps["step"], tokens_per_s, report.mean_steps)
    share = f", {timing['mfu']:.0%} of the device's peak" if isinstance(timing["mfu"], float) else ""
    upper.set_title(f"{timing['tokens_per_s']:,.0f} tokens/s over {timing['train_s']:,.1f} s of training{share}")
    upper.set(ylim=(0, tokens_per_s.quantile(0.99) * 1.15), ylabel="tokens per second")
    style.plain_numbers(upper.yaxis)
    style.legend_above(upper)
    memory = times["memory_bytes"] / 2**30
    lower.plot(steps["step"], memory, **style.line(steps, style.GREEN))
    lower.set(ylim=(0, memory.max() * 1.15), ylabel="memory (GiB)")
    lower.set_title(f"{timing['peak_memory_bytes'] / 2**30:.2f} GiB of memory at most")
    style.count_steps(lower, len(steps))
    return figure


@style.house_style()
def position_figure(report: RunReport) -> Figure:
    """Mean loss at each position of the window: the first tokens have little context."""
    losses = pd.Series(report.position_loss)  # of the training text
    held_out = RULES[report.run["results"]["rule"]].needs_held_out
    figure = Figure()
    axes = figure.subplots()
    axes.plot(losses.index + 1, losses, **style.line(losses, style.BLUE))
    style.level(axes, losses.mean(), f"mean {losses.mean():.3g}")
    style.log_scale(axes)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position in the window (tokens)", ylabel=LOSS if held_out else report.loss_unit)
    style.plain_numbers(axes.xaxis)
    axes.set_title(f"The first token of a window costs {losses.iloc[0]:.2g}, the last {losses.iloc[-1]:.2g}")
    return figure


@style.house_style()
def curve_figure(history: dict[str, list[list[float]]], target: float) -> Figure:
    """Loss over steps of a registered version; `history` has pairs (step, value) by metric."""
    evaluated = next((key for key in ("sliding_loss", "corpus_loss") if history.get(key)), "corpus_loss")
    steps, checks, held_out = (
        pd.DataFrame(history.get(key, []), columns=["step", "loss"]) for key in ("loss", evaluated, "validation_loss")
    )
    figure = Figure(figsize=(6, 3.4))
    axes = figure.subplots()
    axes.plot(steps["step"], steps["loss"], **style.line(steps, style.SKY, 1), label="minibatch")
    axes.plot(
        checks["step"], checks["loss"], "o", color=style.RED, markeredgecolor="white", label="whole training text"
    )
    if len(held_out):
        axes.plot(held_out["step"], held_out["loss"], **style.line(held_out, style.PINK), label="held-out text")
    style.log_scale(axes)
    axes.set_ylabel(LOSS)
    style.count_steps(axes, int(pd.concat([steps, checks])["step"].max()))
    style.legend_above(axes)
    style.level(axes, target, f"target {target:g}")
    return figure


FIGURES: dict[str, Callable[[RunReport], Figure]] = {
    "loss": loss_figure,
    "training": training_figure,
    "position_loss": position_figure,
    "speed": speed_figure,
}


def write_figures(report: RunReport, folder: Path) -> None:
    for number, (name, figure) in enumerate(FIGURES.items(), 1):
        print(f"figure {number} of {len(FIGURES)}: {folder / name}.png")
        style.save_png(figure(report), folder / f"{name}.png")
