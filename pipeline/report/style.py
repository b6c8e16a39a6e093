"""Set the style of all figures, save them as PNG files, and plot their common parts.

A figure's bytes are the same on every host. The palette is Okabe and Ito's, which suits colour-blind readers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.style
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from pipeline.system.files import atomic_file

BLACK, GREY, SKY, BLUE = "#000000", "#767676", "#56B4E9", "#0072B2"
GREEN, ORANGE, RED, PINK = "#009E73", "#E69F00", "#D55E00", "#CC79A7"
STYLE = {
    "figure.dpi": 110,  # 880 pixels wide, as a README shows it
    "figure.figsize": (8.0, 4.5),
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#E5E5E5",
}


@contextmanager
def house_style() -> Iterator[None]:
    """Apply STYLE and ignore the user's matplotlibrc; also a decorator."""
    with matplotlib.style.context(["default", STYLE]):
        yield


@house_style()
def save_png(figure: Figure, path: Path) -> None:
    """Write a figure atomically, without metadata that changes its bytes."""
    with atomic_file(path) as unfinished:
        figure.savefig(
            unfinished, format="png", dpi="figure", metadata={"Software": None}, pil_kwargs={"optimize": True}
        )


def line(points: "pd.Series[Any] | pd.DataFrame", colour: str, width: float = 2) -> dict[str, Any]:
    """Arguments of `plot` for a series; fewer than five points get markers."""
    return {"color": colour, "lw": width, "marker": "." if len(points) < 5 else None}


def level(axes: Axes, y: float, text: str) -> None:
    """Draw a dashed line at `y` with a label in the right margin."""
    axes.axhline(y, color=BLACK, lw=1, ls="--")
    axes.annotate(text, (1, y), (4, 0), axes.get_yaxis_transform(), "offset points", va="center", fontsize=10)


def draw_noisy(axes: Axes, x: "pd.Series[int]", y: "pd.Series[float]", over: int) -> None:
    """Draw a series, and its running mean over `over` steps if that is more than one."""
    axes.plot(x, y, **(line(y, SKY, 0.8) if over > 1 else line(y, BLUE)), label="each step")
    if over > 1:
        axes.plot(x, y.rolling(over, min_periods=1).mean(), **line(y, BLUE), label=f"mean of {over} steps")


def count_steps(axes: Axes, last: int) -> None:
    """Scale the x axis to whole steps up to `last`."""
    axes.set(xlabel="step", xlim=(0, last * 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain_numbers(axes.xaxis)


def plain_numbers(axis: Axis) -> None:
    """Write the axis' numbers without exponents: 0.1 and 1,000."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))


class LogTicks(LogLocator):
    """Ticks at 1, 2 and 5 of each decade; on an axis with fewer than two of these, at linear steps."""

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        ticks = super().tick_values(vmin, vmax)
        return ticks if sum(vmin <= tick <= vmax for tick in ticks) > 1 else AutoLocator().tick_values(vmin, vmax)


def log_scale(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers at the ticks of LogTicks."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogTicks(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    plain_numbers(axes.yaxis)


def legend_above(axes: Axes) -> None:
    """Put the legend above the axes, with each name in the colour of its curve."""
    axes.set_title(axes.get_title(loc="left"), pad=24)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=6, frameon=False, labelcolor="linecolor",
                borderpad=0, handlelength=1.2, columnspacing=1.5, fontsize=10)  # fmt: skip


def short(count: float) -> str:
    """A large number in three digits: 304k, 16.1M."""
    rounded = float(f"{count:.3g}")
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if rounded >= unit:
            return f"{rounded / unit:.3g}{name}"
    return f"{count:g}"
