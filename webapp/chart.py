"""Draw line charts as inline SVG; the labels are HTML, so that their size is the same at any width."""

import math
from collections.abc import Sequence
from html import escape

Points = Sequence[Sequence[float]]  # (step, value) each
MAX_POINTS = 600  # of a curve


def line_chart(title: str, unit: str, points: Points, second: Points = (), log: bool = False,
               goal: float | None = None) -> str:  # fmt: skip
    """One or two curves over the steps, with a dotted line at `goal`; "" if there are no points.

    A logarithmic axis leaves out values that are not positive.
    """
    curves = [[(x, y) for x, y in each if math.isfinite(y) and (y > 0 or not log)] for each in (points, second)]
    everything = curves[0] + curves[1]
    if not curves[0]:
        return ""
    right = max(x for x, _ in everything)
    heights = [y for _, y in everything] + ([goal] if goal else [])
    low, high, ticks = _axis(min(heights), max(heights), log)

    def top(y: float) -> float:
        """Percent from the top."""
        bottom, upper, value = (math.log(v) if log else v for v in (low, high, y))
        return 100 * (1 - (value - bottom) / (upper - bottom))

    svg = [f'<path d="M0 {top(tick):.2f}H100"/>' for tick in ticks]
    labels = [f'<span class="tick y" style="top:{top(tick):.2f}%">{_number(tick)}</span>' for tick in ticks]
    labels += [
        f'<span class="tick x" style="left:{100 * x / right:.2f}%">{_number(x)}</span>'
        for x in _steps(0, right, whole=True)
    ]
    for name, curve in zip(("curve", "curve second"), curves, strict=True):
        stride = -(-len(curve) // MAX_POINTS) or 1
        path = "L".join(f"{100 * x / right:.2f} {top(y):.2f}" for x, y in curve[::-stride])  # with the last point
        svg.append(f'<path class="{name}" d="M{path}h0"/>' if curve else "")  # h0: a single point is a dot
    if goal:
        svg.append(f'<path class="goal" d="M0 {top(goal):.2f}H100"/>')
        labels.append(f'<span class="tick goal-name" style="top:{top(goal):.2f}%">target {_number(goal)}</span>')
    return (
        f'<figure class="chart"><figcaption>{escape(title)} <span>{escape(unit)}</span></figcaption>'
        f'<div class="plot" role="img" aria-label="{escape(title)}, final value {_number(curves[0][-1][1])}">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none">{"".join(svg)}</svg>{"".join(labels)}</div></figure>'
    )


def _axis(low: float, high: float, log: bool) -> tuple[float, float, list[float]]:
    """Lower and upper end of the vertical axis, and its ticks."""
    if not log:
        high = 1.06 * (high or 1.0)
        return 0.0, high, _steps(0, high)
    low, high = low / 1.15, high * 1.15
    ticks = [m * 10.0**e for e in range(-9, 10) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    if len(ticks) < 2:
        return low, high, _steps(low, high)
    return low, high, ticks if len(ticks) < 7 else [tick for tick in ticks if f"{tick:e}"[0] == "1"]


def _steps(low: float, high: float, whole: bool = False) -> list[float]:
    """Round numbers from `low` to `high`, six at most; `whole`: only whole ones."""
    least = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(least))
    sizes = (m * size for m in (1, 2, 2.5, 5, 10) if m * size >= least)
    step = next(each for each in sizes if not whole or each.is_integer())
    return [n * step for n in range(math.ceil(low / step - 1e-9), int(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    """Three digits at most, large numbers in thousands or millions."""
    rounded = float(f"{value:.3g}")
    if rounded >= 10_000:
        return f"{rounded / 1000:.3g}k" if rounded < 1e6 else f"{rounded / 1e6:.3g}M"
    return f"{rounded:,g}"
