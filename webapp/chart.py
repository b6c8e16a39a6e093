"""Draw a curve as inline SVG, with labels in HTML that keep their size at any width."""

import math
from collections.abc import Sequence
from html import escape

Points = Sequence[Sequence[float]]  # (x, y) each
MAX_DOTS = 150  # points that show their numbers under the pointer


def line_chart(title: str, points: Points, unit: str = "", log: bool = False, goal: float | None = None,
               second: tuple[str, Points] | None = None) -> str:  # fmt: skip
    """A curve over the steps; "" without points. A logarithmic axis leaves out what is not positive.

    `goal`: where a dotted line goes; `second`: name and points of what is drawn as rings.
    """
    name, rings = second or ("", [])
    drawn, ringed = ([(x, y) for x, y in each if math.isfinite(y) and (y > 0 or not log)] for each in (points, rings))
    if not drawn:
        return ""
    right = max(x for x, _ in drawn + ringed)
    heights = [y for _, y in drawn + ringed] + ([goal] if goal else [])
    low, high, ticks = _axis(min(heights), max(heights), log)

    def top(y: float) -> float:
        """Percent from the top."""
        bottom, upper, value = (math.log(v) if log else v for v in (low, high, y))
        return 100 * (1 - (value - bottom) / (upper - bottom))

    def dot(x: float, y: float, kind: str, words: str) -> str:
        place = f"left:{100 * x / right:.2f}%;top:{top(y):.2f}%"
        return f'<i class="dot {kind}" style="{place}" title="step {_number(x)}: {_number(y)} {escape(words)}"></i>'

    curve = "L".join(f"{100 * x / right:.2f} {top(y):.2f}" for x, y in _thinned(drawn, 600))
    svg = "".join(f'<path class="grid" d="M0 {top(tick):.2f}H100"/>' for tick in ticks)
    svg += f'<path class="curve" d="M{curve}"/>'
    labels = [f'<span class="tick y" style="top:{top(tick):.2f}%">{_number(tick)}</span>' for tick in ticks]
    labels += [f'<span class="tick x" style="left:{100 * x / right:.2f}%">{_number(x)}</span>' for x in _steps(right)]
    if goal:
        svg += f'<path class="goal" d="M0 {top(goal):.2f}H100"/>'
        labels.append(f'<span class="tick goal-name" style="top:{top(goal):.2f}%">target {_number(goal)}</span>')
    labels += [dot(x, y, "", unit) for x, y in _thinned(drawn, MAX_DOTS)]
    labels += [dot(x, y, "ring", name) for x, y in _thinned(ringed, MAX_DOTS)]
    legend = f"{unit}; ○ {name}" if ringed else unit
    return (
        f'<figure class="chart"><figcaption>{escape(title)} <span>{escape(legend)}</span></figcaption>'
        f'<div class="plot" role="img" aria-label="{escape(title)} over the steps, at last {_number(drawn[-1][1])}">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{svg}</svg>'
        f"{''.join(labels)}</div></figure>"
    )


def _thinned(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` of the points, evenly, and the last one."""
    stride = -(-len(points) // most) or 1
    return points[::-stride][::-1]


def _axis(low: float, high: float, log: bool) -> tuple[float, float, list[float]]:
    """Lower and upper end of the vertical axis, and its ticks."""
    if not log:
        high = 1.06 * (high or 1.0)
        return 0.0, high, _steps(high)
    low, high = low / 1.15, high * 1.15
    ticks = [m * 10.0**e for e in range(-9, 10) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    return low, high, ticks if len(ticks) < 7 else [tick for tick in ticks if f"{tick:e}"[0] == "1"]


def _steps(high: float) -> list[float]:
    """Four to six round numbers from 0 to `high`."""
    size = 10.0 ** math.floor(math.log10(high / 5))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= high / 5)
    return [n * step for n in range(int(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    """Three digits at most, large numbers in thousands."""
    if abs(value) >= 10_000:
        return f"{value / 1000:,.3g}k" if abs(value) < 1e6 else f"{value / 1e6:.3g}M"
    return f"{value:,.0f}" if value == int(value) else f"{value:.3g}"
