"""chart: points -> a figure of inline SVG, whose labels are HTML and keep their size at any width."""

import math
from collections.abc import Sequence
from html import escape

Points = Sequence[Sequence[float]]  # (x, y) each
MOST_DOTS = 150  # that show their numbers under the pointer


def line_chart(title: str, points: Points, unit: str = "", log: bool = False, goal: float | None = None,
               second: tuple[str, Points] | None = None) -> str:  # fmt: skip
    """A curve, with a dotted line at `goal` and rings at the points of `second` where given; "" without points.

    On a logarithmic axis, points that are not positive are left out.
    """
    others = second[1] if second else []
    points, others = _drawable(points, log), _drawable(others, log)
    if not points:
        return ""
    everything = [*points, *others]
    right = max(x for x, _ in everything)
    heights = [y for _, y in everything] + ([goal] if goal else [])
    low, high, ticks = _axis(min(heights), max(heights), log)

    def place(x: float, y: float) -> tuple[float, float]:
        """Percent from the left and from the top."""
        bottom, top, value = (math.log(v) if log else v for v in (low, high, y))
        return 100 * x / right, 100 * (1 - (value - bottom) / (top - bottom))

    svg = [f'<path class="grid" d="M0 {place(0, tick)[1]:.2f}H100"/>' for tick in ticks]
    svg += [_curve([place(*point) for point in points], "curve")]
    labels = [f'<span class="tick y" style="bottom:{100 - place(0, t)[1]:.2f}%">{_number(t)}</span>' for t in ticks]
    labels += [f'<span class="tick x" style="left:{100 * x / right:.2f}%">{_number(x)}</span>' for x in _steps(right)]
    if goal:
        svg.append(f'<path class="goal" d="M0 {place(0, goal)[1]:.2f}H100"/>')
        top = place(0, goal)[1]
        labels.append(f'<span class="tick goal-name" style="top:calc({top:.2f}% - 9px)">target {_number(goal)}</span>')
    labels += [_dot(*place(x, y), f"step {_number(x)}: {_number(y)} {unit}") for x, y in _thinned(points, MOST_DOTS)]
    labels += [
        _dot(*place(x, y), f"step {_number(x)}: {_number(y)}, {second[0]}", "dot ring")
        for x, y in _thinned(others, MOST_DOTS)
        if second
    ]
    legend = f" <span>{escape(unit)}{f'; ○ {escape(second[0])}' if second and others else ''}</span>"
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{legend}</figcaption>'
        f'<div class="plot" role="img" aria-label="{escape(title)} over the steps, at last {_number(points[-1][1])}">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{"".join(svg)}</svg>'
        f"{''.join(labels)}</div></figure>"
    )


def _drawable(points: Points, log: bool) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]


def _curve(places: list[tuple[float, float]], name: str) -> str:
    return f'<path class="{name}" d="M{"L".join(f"{x:.2f} {y:.2f}" for x, y in _thinned(places, 600))}"/>'


def _dot(x: float, y: float, words: str, name: str = "dot") -> str:
    return f'<i class="{name}" style="left:{x:.2f}%;top:{y:.2f}%" title="{escape(words)}"></i>'


def _thinned(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most so many of the points and the last one, evenly."""
    stride = -(-len(points) // most) or 1
    return points[::stride] + (points[-1:] if (len(points) - 1) % stride else [])


def _axis(low: float, high: float, log: bool) -> tuple[float, float, list[float]]:
    """Lower and upper end of the vertical axis, and its ticks."""
    if log:
        ticks = [m * 10.0**e for e in range(-9, 10) for m in (1, 2, 5)]
        low, high = low / 1.15, high * 1.15
        inside = [tick for tick in ticks if low <= tick <= high]
        return low, high, inside if len(inside) < 7 else [t for t in inside if f"{t:e}"[0] == "1"]
    high = high or 1.0
    return 0.0, high * 1.06, _steps(high * 1.06)


def _steps(high: float) -> list[float]:
    """Round numbers from 0 to `high`, four to six of them."""
    raw = high / 5
    size = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    step = next((m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw), size)
    return [n * step for n in range(int(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    """Three digits at most, large numbers in thousands."""
    if abs(value) >= 10_000:
        return f"{value / 1000:,.3g}k" if abs(value) < 1e6 else f"{value / 1e6:.3g}M"
    return f"{value:,.0f}" if value == int(value) else f"{value:.3g}"
