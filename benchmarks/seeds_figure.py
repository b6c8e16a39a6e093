"""Table and figures that compare our runs with the published ones.

    python -m benchmarks.seeds_figure

plots the run of models/ together with the published curves into docs/pictures/published.png. `benchmarks.seeds` calls
the other functions, for benchmarks/results/seeds.json.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.report.figures import RunReport
from pipeline.report.style import (
    BLACK,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    RED,
    SKY,
    house_style,
    level,
    line,
    log_scale,
    plain_numbers,
    save_png,
    short,
)
from pipeline.system.entrypoint import run_stage
from pipeline.system.words import counted

ROOT = Path(__file__).parent.parent
HERE = Path(__file__).parent / "published"
PUBLISHED = {  # colour of each run, and the position of its label: tokens, loss
    "seed-000": (SKY, 1_200_000, 3.2),
    "seed-001": (ORANGE, 80_000, 0.6),
    "seed-002": (GREEN, 8_500_000, 0.07),
    "seed-003": (PINK, 110_000, 13.0),
    "seed-004": (GREY, 3_400_000, 0.6),
}
PUBLISHED_NOTE = """\
Published runs: losses of single steps as printed, 124M parameters (seed-001: 6 layers,
384 wide), the whole of Tiny Shakespeare. seed-001 printed losses divided by its 4 accumulated batches; here they are
multiplied by 4. It reaches 0.1 before the end of its first epoch, because it repeats a few windows. Of seed-002 only
the last steps are known."""
SHAPES = {
    "seed-000": "124M, 16 x 128, constant rate",
    "seed-001": "6 x 384, 8 x 128 x 4, validation",
    "seed-002": "124M, 16 x 128, bf16, cosine",
    "seed-003": "124M, 2 x 1,024 x 16, bf16",
    "seed-004": "124M, 16 x 128, one cycle",
}
NOTE = """\
Coloured: published losses of single steps as printed (seed-001: times 4, as it printed them divided by 4); dotted:
held-out text. Thin black: our first steps, one line for each seed. Thick black: a whole run of ours; dotted red:
held-out text. Last panel: loss of each seed of ours minus the published loss, in the colours of the systems."""


def published(name: str) -> pd.DataFrame:
    """The published points of a system; `step` counts from 1, like ours."""
    points = pd.read_csv(HERE / f"{name}.csv")
    return points.assign(step=points["step"] + 1)


def compared(name: str, first_steps: dict[str, Any]) -> pd.DataFrame:
    """The published loss and ours by seed, for each published step.

    `excess`: the published loss minus the mean of ours. `spread`: the largest minus the smallest of ours; NaN for one
    seed.
    """
    points = published(name).set_index("step")
    ours = pd.DataFrame({f"seed {seed}": pd.Series(run["loss"]) for seed, run in first_steps.items()})
    ours.index += 1
    table = points[["loss"]].rename(columns={"loss": "published"}).join(ours, how="inner")
    seeds = table[ours.columns]
    spread = (seeds.max(axis=1) - seeds.min(axis=1)).where(seeds.count(axis=1) > 1)
    return table.assign(excess=table["published"] - seeds.mean(axis=1), spread=spread)


def print_table(results: dict[str, Any]) -> None:
    """Print our losses beside the published ones, and the results of whole runs."""
    for name in sorted(results):
        kinds = results[name]
        if "first_steps" in kinds and (HERE / f"{name}.csv").is_file():
            table = compared(name, kinds["first_steps"])
            print(f"\n{name}: {len(table)} published points among the first steps")
            if len(table):
                print(table.to_string(float_format=lambda value: f"{value:.3f}"))
        for seed, run in kinds.get("whole", {}).items():
            losses = ", ".join(f"{rule} {loss:.4g}" for rule, loss in run["losses"].items())
            print(f"\n{name}, seed {seed}, to its rule {run['rule']}: {run['steps']:,} steps, {run['tokens']:,} tokens,"
                  f" {run['train_s']:,.0f} s on {run['machine']}; losses at the end: {losses}")  # fmt: skip


@house_style()
def published_figure(report: RunReport) -> Figure:
    """The run's mean loss over tokens, with the losses that the published projects printed."""
    run, steps = report.run, report.steps
    figure = Figure(figsize=(8, 5.2))
    axes = figure.subplots()
    for name, (colour, tokens, loss) in PUBLISHED.items():
        points = published(name)
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
def draw(results: dict[str, Any], path: Path) -> None:
    """Plot one panel for each system, and one with the differences in the first steps."""
    figure = Figure(figsize=(8, 8.6))
    axes = figure.subplots(3, 2)
    for panel, name in zip(axes.flat, SHAPES, strict=False):
        _panel(panel, name, results)
    _differences(axes.flat[5], results)
    figure.supxlabel(NOTE, x=0.01, ha="left", fontsize=8.5, color=GREY)
    save_png(figure, path)


def _panel(axes: Axes, name: str, results: dict[str, Any]) -> None:
    """Plot a system's published points and ours; a whole run may be a variant, such as NAME-folded."""
    colour, points = PUBLISHED[name][0], published(name)
    axes.plot(points["step"], points["loss"], color=colour, lw=1, marker=".", ms=5, label="published")
    if "val_loss" in points:
        axes.plot(points["step"], points["val_loss"], color=colour, lw=1, ls=":", marker=".", ms=4)
    for run in results.get(name, {}).get("first_steps", {}).values():
        axes.plot(range(1, len(run["loss"]) + 1), run["loss"], color=BLACK, lw=0.8)
    wholes = [kinds["whole"] for key, kinds in results.items() if key.startswith(name) and "whole" in kinds]
    for run in (run for whole in wholes for run in whole.values()):
        axes.plot(*zip(*run["curve"], strict=True), color=BLACK, lw=2)
        if "validation_loss" in run:
            axes.plot(*zip(*run["validation_loss"], strict=True), color=RED, lw=1, ls=":", marker=".", ms=4)
    axes.axhline(0.1, color=BLACK, lw=0.8, ls="--")
    log_scale(axes)
    low = min(0.06, points["loss"].min() * 0.8)
    axes.set(xscale="log", xlim=(0.9, 1.5 * points["step"].max()), ylim=(low, 15))
    plain_numbers(axes.xaxis)
    axes.set_title(f"{name}: {SHAPES[name]}", fontsize=9.5)
    axes.set(xlabel="step", ylabel="nats per token")


def _differences(axes: Axes, results: dict[str, Any]) -> None:
    for name in (name for name in SHAPES if name != "seed-001"):  # it soon repeated a few windows only
        table = compared(name, results.get(name, {}).get("first_steps", {}))
        for column in (column for column in table if column.startswith("seed ")):
            difference = (table[column] - table["published"]).dropna()
            axes.plot(difference.index, difference, color=PUBLISHED[name][0], lw=0.8, marker=".", ms=5)
    axes.axhline(0, color=BLACK, lw=1, ls="--")
    limit = max(0.05, *(abs(np.array(axes.get_ylim()))))
    axes.set(ylim=(-limit, limit), xlabel="step", ylabel="nats per token")
    axes.set_title("Ours minus published, without seed-001", fontsize=9.5)


def main() -> None:
    report = RunReport.read(ROOT / "models", ROOT / "reports")
    save_png(published_figure(report), ROOT / "docs" / "pictures" / "published.png")


if __name__ == "__main__":
    run_stage(main)
