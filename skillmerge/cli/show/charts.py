"""Line charts as SVG, without scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from skillmerge.cli.show.figures import Figure, show
from skillmerge.cli.show.html import abbreviated, escaped
from skillmerge.plans.depth import number

# Curves.

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 270, 62, 14, 26, 40
_MARKS = 3
_APART = 44


def chart(
    title: str,
    along: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    unit: str,
    figure: Figure | None = None,
    above: tuple[str, Mapping[float, float]] = ("", {}),
) -> str:
    """Lines that are told apart by their dashes too, with a legend in words. above: a second axis' numbers."""
    points = [point for line in series.values() for point in line]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x0, x1 = min(xs), max(xs)
    ticks = _ticks(min(0.0, *ys), max(0.0, *ys))
    y0, y1 = ticks[0], ticks[-1]

    def place(x: float, y: float) -> str:
        across = _LEFT + (x - x0) / ((x1 - x0) or 1) * (_WIDTH - _LEFT - _RIGHT)
        up = _HEIGHT - _BOTTOM - (y - y0) / ((y1 - y0) or 1) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{across:.1f},{up:.1f}"

    parts = []
    for tick in ticks:
        _, up = place(x0, tick).split(",")
        parts.append(f'<path class="grid" style="stroke-width:1" d="M{_LEFT},{up}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{float(up) + 4:.1f}" text-anchor="end">{show(tick, unit)}</text>')
    for tick in _ticks(x0, x1) if x1 - x0 > 1 and along != "layer" else _layers(x0, x1):
        if x0 <= tick <= x1:
            across, _ = place(tick, y0).split(",")
            parts.append(f'<text x="{across}" y="{_HEIGHT - 22}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 5}" text-anchor="middle">{escaped(along)}</text>')
    free = -math.inf
    for x in sorted(above[1]):
        at = float(place(x, y0).split(",")[0])
        if at >= free:
            parts.append(f'<text x="{at}" y="12" text-anchor="middle">{number(above[1][x])}</text>')
            free = at + _APART
    legend = [f"above: {escaped(above[0])}"] if above[1] else []
    for index, (label, line) in enumerate(series.items()):
        dash = index % _MARKS
        parts.append(f'<path class="s{dash}" d="M{" ".join(place(x, y) for x, y in line)}"/>')
        sample = f'<svg class="sample" viewBox="0 0 30 8"><path class="s{dash}" d="M0,4H30"/></svg>'
        legend.append(f"{sample} {escaped(label)}")
    head = abbreviated(figure) if figure is not None else escaped(title)
    told = f"{title} over {along}: " + "; ".join(
        f"{label} from {show(line[0][1], unit)} to {show(line[-1][1], unit)}" for label, line in series.items()
    )
    return (
        f'<figure><h3>{head}</h3><div class="scroll" tabindex="0"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escaped(told)}">{"".join(parts)}</svg></div>'
        f"<figcaption>{' · '.join(legend)}</figcaption></figure>"
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers that hold low and high between them."""
    if high <= low:
        high = low + 1
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * by for by in (1, 2, 2.5, 5, 10) if (high - low) / (step * by) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _layers(low: float, high: float) -> list[float]:
    step = max(1, round((high - low) / 10))
    return [float(layer) for layer in range(int(low), int(high) + 1, step)]
