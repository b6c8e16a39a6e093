"""plots: a run's journals and reports -> figures, and the same series as tables for `dvc plots`.

Figures are pure functions of what the files say. All but `speed` are the same whenever the run is repeated.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pandas as pd
from matplotlib.figure import Figure

from pipeline.report.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    RED,
    SKY,
    count_steps,
    counted,
    draw_noisy,
    house_style,
    legend_above,
    level,
    line,
    log_scale,
    mark_below,
    plain_numbers,
    save_png,
    short,
)
from pipeline.system.files import read_json, write_text
from pipeline.tracking.journal import STEPS, TIMES, read_steps
from pipeline.tracking.run_record import read_metrics, read_run

PUBLISHED = {  # each run's colour and, in tokens and loss, the place of its name
    "seed-000": (SKY, 1_200_000, 3.2),
    "seed-001": (ORANGE, 80_000, 0.6),
    "seed-002": (GREEN, 8_500_000, 0.07),
    "seed-003": (PINK, 110_000, 13.0),
    "seed-004": (GREY, 3_400_000, 0.6),
}
PUBLISHED_NOTE = """\
Published runs: losses of single steps as printed, 124M parameters (seed-001: 6 layers,
384 wide), the whole of Tiny Shakespeare. seed-001's stand times 4, as it printed them divided by its 4 accumulated
batches; it passes 0.1 before it has read the text once, so on a few windows that it sees again and again. Of seed-002
only the last steps are known."""


@dataclass(frozen=True)
class RunReport:
    """All that the figures show."""

    steps: pd.DataFrame  # rows of steps.jsonl, by step
    times: pd.DataFrame  # rows of times.jsonl, by step
    run: dict[str, Any]  # models/run.json
    metrics: dict[str, Any]  # reports/metrics.json
    position_loss: list[float]  # reports/position_loss.json
    timing: dict[str, Any]  # reports/timing.json
    published: dict[str, pd.DataFrame]  # tokens and loss of other projects' runs, by name

    @classmethod
    def read(cls, models: Path, reports: Path, published: Path) -> Self:
        """Raises InputError where a file is missing, IntegrityError where one cannot be read."""
        return cls(
            steps=read_steps(models / STEPS),
            times=read_steps(models / TIMES),
            run=(run := read_run(models)),
            metrics=read_metrics(reports, run),
            position_loss=read_json(reports / "position_loss.json"),
            timing=read_json(reports / "timing.json"),
            published={path.stem: pd.read_csv(path) for path in sorted(published.glob("*.csv"))},
        )

    @property
    def mean_steps(self) -> int:
        """Steps in a running mean: those of the rule `average`, or a fiftieth of a shorter run."""
        average_steps: int = self.run["params"]["target"]["average_steps"]
        return max(1, min(average_steps, len(self.steps) // 50))


@house_style()
def loss_figure(report: RunReport) -> Figure:
    """Loss over steps, the checks on the whole text, the target, and where each of its rules was met."""
    results, steps = report.run["results"], report.steps
    figure = Figure()
    axes = figure.subplots()
    draw_noisy(axes, steps["step"], steps["loss"], report.mean_steps)
    checks = {"corpus_loss": ("whole training text", RED, "o"), "validation_loss": ("validation text", PINK, "s")}
    for column in steps.columns.intersection(list(checks)):
        name, colour, marker = checks[column]
        axes.plot(steps["step"], steps[column], marker, color=colour, markeredgecolor="white", label=name, zorder=3)
    log_scale(axes)
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"Loss {results['corpus_loss']:.3g} over the training text after {counted(len(steps), 'step')}")
    count_steps(axes, len(steps))
    legend_above(axes)
    met = [(at["steps"], f"{rule} rule met: step {at['steps']:,}, {short(at['tokens'])} tokens")
           for rule, at in results["to_target"].items() if at is not None]  # fmt: skip
    target = results["target_loss"]
    level(axes, target, f"target {target:g}" if met else f"target {target:g}\nnot reached")
    mark_below(axes, target, met)
    return figure


@house_style()
def training_figure(report: RunReport) -> Figure:
    """Gradient norm and learning rate over steps."""
    steps, optim = report.steps, report.run["params"]["optim"]
    figure = Figure(figsize=(8, 5.2))
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    draw_noisy(upper, steps["step"], steps["grad_norm"], report.mean_steps)
    log_scale(upper)
    upper.set(ylabel="L2 norm", title="Gradient norm before clipping")
    legend_above(upper)
    if optim["max_grad_norm"] is not None:
        level(upper, optim["max_grad_norm"], f"clip at {optim['clip']:g}")
    lower.plot(steps["step"], steps["lr"], **line(steps, BLUE))
    muon = f"; Muon's is {optim['muon_lr'] / optim['lr']:.3g} times as large" if optim["name"] == "muon" else ""
    lower.set(ylim=(0, steps["lr"].max() * 1.1), ylabel="learning rate", title=f"Learning rate of AdamW{muon}")
    count_steps(lower, len(steps))
    return figure


@house_style()
def speed_figure(report: RunReport) -> Figure:
    """Throughput and memory over steps: the one figure that shows times."""
    steps, times, timing = report.steps, report.times, report.timing
    figure = Figure(figsize=(8, 5.2))
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    tokens_per_s = steps["tokens"].diff().fillna(steps["tokens"]) / times["step_s"]
    draw_noisy(upper, steps["step"], tokens_per_s, report.mean_steps)
    share = f", {timing['mfu']:.0%} of the device's peak" if isinstance(timing["mfu"], float) else ""
    upper.set_title(f"{timing['tokens_per_s']:,.0f} tokens/s over {timing['train_s']:,.1f} s of training{share}")
    upper.set(ylim=(0, tokens_per_s.quantile(0.99) * 1.15), ylabel="tokens per second")
    plain_numbers(upper.yaxis)
    legend_above(upper)
    memory = times["memory_bytes"] / 2**30
    lower.plot(steps["step"], memory, **line(steps, GREEN))
    lower.set(ylim=(0, memory.max() * 1.15), ylabel="memory (GiB)")
    lower.set_title(f"{timing['peak_memory_bytes'] / 2**30:.2f} GiB of memory at most")
    count_steps(lower, len(steps))
    return figure


@house_style()
def published_figure(report: RunReport) -> Figure:
    """The run's mean loss over tokens against the losses that other projects printed."""
    run, steps = report.run, report.steps
    figure = Figure(figsize=(8, 5.2))
    axes = figure.subplots()
    for name, (colour, tokens, loss) in PUBLISHED.items():
        points = report.published[name]
        axes.plot(points["tokens"], points["loss"], **line(points, colour, 1.5))
        axes.annotate(name, (tokens, loss), color=colour, ha="center", va="center")
    mean = steps["loss"].rolling(report.mean_steps, min_periods=1).mean()
    axes.plot(steps["tokens"], mean, **line(steps, BLACK, 3))
    log_scale(axes)
    axes.set(xscale="log", xlabel="tokens seen", ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    level(axes, run["results"]["target_loss"], f"target {run['results']['target_loss']:g}")
    text = f"a text of {short(run['results']['train_tokens'])} tokens"
    axes.set_title(f"This run (black): {short(run['n_params'])} parameters, {text}")
    note = f"This run: mean of {counted(report.mean_steps, 'step')}. {PUBLISHED_NOTE}"
    figure.supxlabel(note, x=0.01, ha="left", fontsize=8.5, color=GREY)
    return figure


@house_style()
def position_figure(report: RunReport) -> Figure:
    """Mean loss at each position of the window: what the first tokens cost, which have little before them."""
    losses = pd.Series(report.position_loss)
    figure = Figure()
    axes = figure.subplots()
    axes.plot(losses.index + 1, losses, **line(losses, BLUE))
    level(axes, losses.mean(), f"mean {losses.mean():.3g}")
    log_scale(axes)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position in the window (tokens)", ylabel="loss (nats per token)")
    plain_numbers(axes.xaxis)
    axes.set_title(f"The first token of a window costs {losses.iloc[0]:.2g}, the last {losses.iloc[-1]:.2g}")
    return figure


@house_style()
def curve_figure(history: dict[str, list[list[float]]], target: float) -> Figure:
    """Loss over steps of a registered version, whose `history` has pairs of step and value under each name."""
    steps, checks = (pd.DataFrame(history.get(key, []), columns=["step", "loss"]) for key in ("loss", "corpus_loss"))
    figure = Figure(figsize=(6, 3.4))
    axes = figure.subplots()
    axes.plot(steps["step"], steps["loss"], **line(steps, SKY, 1), label="minibatch")
    axes.plot(checks["step"], checks["loss"], "o", color=RED, markeredgecolor="white", label="whole training text")
    log_scale(axes)
    axes.set_ylabel("loss (nats per token)")
    count_steps(axes, int(pd.concat([steps, checks])["step"].max()))
    legend_above(axes)
    level(axes, target, f"target {target:g}")
    return figure


FIGURES: dict[str, Callable[[RunReport], Figure]] = {
    "loss": loss_figure,
    "training": training_figure,
    "published": published_figure,
    "position_loss": position_figure,
    "speed": speed_figure,
}


def write_figures(report: RunReport, folder: Path) -> None:
    """Write each figure as NAME.png."""
    for name, figure in FIGURES.items():
        save_png(figure(report), folder / f"{name}.png")


def write_tables(report: RunReport, folder: Path) -> None:
    """Write what `dvc plots` draws, which reads no JSON lines: steps.csv, checks.csv, position_loss.csv."""
    steps = report.steps
    checks = [column for column in ("corpus_loss", "validation_loss") if column in steps]
    positions = pd.DataFrame({"loss": report.position_loss}).rename_axis("position")
    positions.index += 1
    for name, table in {
        "steps.csv": steps[["step", "tokens", "loss", "grad_norm", "lr"]].set_index("step"),
        "checks.csv": steps[["step", "tokens", *checks]].set_index("step").dropna(subset=checks, how="all"),
        "position_loss.csv": positions,
    }.items():
        write_text(folder / name, table.to_csv(float_format="%.6g", lineterminator="\n"))
