"""Line charts as SVG, without scripts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from skillmerge.cli.show.figures import Figure, show
from skillmerge.cli.show.report.html import abbreviated, escaped
from skillmerge.plans.depth import number

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 520, 250, 62, 14, 26, 40
_MARKS = 3
_APART = 44


@dataclass(frozen=True, slots=True)
class _Scale:
    """Where numbers are on the paper."""

    x0: float
    x1: float
    y0: float
    y1: float

    def across(self, x: float) -> str:
        return f"{_LEFT + (x - self.x0) / ((self.x1 - self.x0) or 1) * (_WIDTH - _LEFT - _RIGHT):.1f}"

    def up(self, y: float) -> str:
        return f"{_HEIGHT - _BOTTOM - (y - self.y0) / ((self.y1 - self.y0) or 1) * (_HEIGHT - _TOP - _BOTTOM):.1f}"

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        return "M" + " ".join(f"{self.across(x)},{self.up(y)}" for x, y in points)


def chart(
    title: str,
    along: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    unit: str,
    figure: Figure | None = None,
    above: tuple[str, Mapping[float, float]] = ("", {}),
) -> str:
    """Return lines that differ in their dashes too, with a legend in words. above: numbers of a second axis."""
    xs, ys = ([point[axis] for line in series.values() for point in line] for axis in (0, 1))
    ticks = _ticks(min(0.0, *ys), max(0.0, *ys))
    scale = _Scale(min(xs), max(xs), ticks[0], ticks[-1])
    parts = [*_axes(scale, ticks, along, unit), *_above(scale, above[1])]
    legend = [f"above: {escaped(above[0])}"] if above[1] else []
    for index, (label, line) in enumerate(series.items()):
        dash = index % _MARKS
        parts.append(f'<path class="s{dash}" d="{scale.path(line)}"/>')
        sample = f'<svg class="sample" viewBox="0 0 30 8"><path class="s{dash}" d="M0,4H30"/></svg>'
        legend.append(f"{sample} {escaped(label)}")
    head = abbreviated(figure) if figure is not None else escaped(title)
    told = f"{title} over {along}: " + "; ".join(
        f"{label} from {show(line[0][1], unit)} to {show(line[-1][1], unit)}" for label, line in series.items()
    )
    return (
        f'<figure><h3>{head}</h3><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escaped(told)}">{"".join(parts)}</svg>'
        f"<figcaption>{' · '.join(legend)}</figcaption></figure>"
    )


def _axes(scale: _Scale, ticks: Sequence[float], along: str, unit: str) -> Iterator[str]:
    for tick in ticks:
        up = scale.up(tick)
        yield f'<path class="grid" style="stroke-width:1" d="M{_LEFT},{up}H{_WIDTH - _RIGHT}"/>'
        yield f'<text x="{_LEFT - 6}" y="{float(up) + 4:.1f}" text-anchor="end">{show(tick, unit)}</text>'
    x0, x1 = scale.x0, scale.x1
    for tick in _layers(x0, x1) if along == "layer" else _ticks(x0, x1):
        if x0 <= tick <= x1:
            yield f'<text x="{scale.across(tick)}" y="{_HEIGHT - 22}" text-anchor="middle">{number(tick)}</text>'
    yield f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 5}" text-anchor="middle">{escaped(along)}</text>'


def _above(scale: _Scale, numbers: Mapping[float, float]) -> Iterator[str]:
    """Numbers above the lines, as many as there is room for."""
    free = -math.inf
    for x in sorted(numbers):
        at = float(scale.across(x))
        if at >= free:
            yield f'<text x="{at}" y="12" text-anchor="middle">{number(numbers[x])}</text>'
            free = at + _APART


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
