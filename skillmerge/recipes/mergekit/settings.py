"""A parameter of mergekit in all parts of a model -> one number, or a default and rules.

A setting is a number, a gradient over the layers, or filters with either of them: the first that matches counts, and
if none does, the next level. Ours are rules of which the last that matches counts, so that they are turned around.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from skillmerge.recipes.mergekit.config import Level, Region
from skillmerge.recipes.mergekit.notes import Refused
from skillmerge.recipes.yamltext import Path

_IN_LAYERS = re.compile(r"attn|attention|mlp|layernorm|_proj|expert|gate|layers\.|block")
"""What names of tensors in layers have, and no others."""
_OUTSIDE = re.compile(r"embed_tokens|lm_head|wte|wpe|embed_out|model\.norm|ln_f")
"""What names of tensors in layers do not have."""
_AT_END = re.compile(r"norm|head|weight|bias")
"""What names of tensors behind the layers can have."""
_ENDS = ("model.norm.weight", "lm_head.weight")
"""Names that most models have behind the layers."""
_MOST_WORK = 10_000_000
"""Comparisons of names and filters, so that no file takes more than some seconds."""
Points = tuple[float, ...]
"""A number, or those of a gradient."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What counts for the tensors whose names contain `text`; None for all. path: where it is written, if it is."""

    text: str | None
    points: Points
    path: Path = ()

    def at(self, t: float) -> float:
        """Return the number at a relative depth."""
        place = t * (len(self.points) - 1)
        before = min(int(place), len(self.points) - 1)
        after = min(before + 1, len(self.points) - 1)
        return self.points[before] + (self.points[after] - self.points[before]) * (place - before)


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of a recipe. points: its value, or those of its ramp."""

    points: Points
    layers: str = ""
    tensors: str = ""
    modules: str = ""


@dataclass(frozen=True, slots=True)
class Varying:
    """A number that depends on the tensor. path: where it comes from."""

    default: float
    rules: tuple[Rule, ...]
    path: Path = ()


@dataclass(frozen=True, slots=True)
class Cell:
    """A kind of tensors: their part of the model, their relative depth, and a text in their names."""

    region: int
    t: float
    text: str


def choices(levels: Sequence[Level], key: str, default: Any, number: Callable[..., float]) -> tuple[Choice, ...]:
    """Return what counts for a parameter, the nearest first; the last is for all. default: None if there is none.

    number: the number that a written scalar means, at a path. Raises Refused.
    """
    found: list[Choice] = []
    for level in levels:
        if key not in level.table:
            continue
        path = (*level.path, key)
        for choice in _of_setting(level.table[key], path, number):
            if choice.text is None or all(choice.text != nearer.text for nearer in found):
                found.append(choice)
            if choice.text is None:
                return tuple(found)
    if default is None:
        raise Refused(
            f"there is no `{key}`" + (" for tensors that no filter matches" if found else ""),
            *(found[-1].path if found else ()),
            fix="add it, such as " + (f"`- value: 1` behind the filters of `{key}`" if found else f"`{key}: 1`"),
        )
    return (*found, Choice(None, (float(default),)))


def _of_setting(setting: Any, path: Path, number: Callable[..., float]) -> Iterator[Choice]:
    items = setting if isinstance(setting, list) else [setting]
    if not any(isinstance(item, dict) for item in items):
        if items:
            yield Choice(None, _points(setting, path, number), path)
        return
    for index, item in enumerate(items):
        here = (*path, index) if isinstance(setting, list) else path
        if not isinstance(item, dict) or "value" not in item:
            raise Refused("a filter is a table with `filter` and `value`", *here)
        text = item.get("filter")
        if text is not None and not isinstance(text, str):
            raise Refused("`filter` is not a text", *here, "filter")
        yield Choice(None if text in (None, "", "*") else text, _points(item["value"], (*here, "value"), number), here)


def _points(value: Any, path: Path, number: Callable[..., float]) -> Points:
    if not isinstance(value, list):
        return (number(value, *path),)
    if not value:
        raise Refused("this gradient has no points", *path)
    points = tuple(number(point, *path, index) for index, point in enumerate(value))
    return points[:1] if len(set(points)) == 1 else points


def cells(regions: Sequence[Region], settings: Sequence[Sequence[Sequence[Choice]]]) -> Iterator[Cell]:
    """Yield all kinds of tensors that the settings tell apart. settings: of each parameter, those of each region.

    Raises Refused if there are too many.
    """
    texts = {choice.text or "" for setting in settings for part in setting for choice in part}
    points = {len(choice.points) for setting in settings for part in setting for choice in part}
    depths = {index / 16 for index in range(17)} | {
        index / (count - 1) for count in points if count > 1 for index in range(count)
    }
    rows = sorted(depths) if max(points, default=1) > 1 else [0.0]
    if (len(texts) + 1) * len(rows) * sum(len(part) for setting in settings for part in setting) > _MOST_WORK:
        raise Refused("there are too many filters and gradients", fix="write fewer of them")
    for region in range(len(regions)):
        for text in sorted({"", *texts}):
            for t in rows:
                yield Cell(region, t, text)


def value_in(setting: Sequence[Sequence[Choice]], cell: Cell) -> float:
    """Return the number that a parameter has there."""
    part = setting[cell.region]
    return next(choice for choice in part if choice.text is None or choice.text in cell.text).at(cell.t)


def varying(regions: Sequence[Region], setting: Sequence[tuple[Choice, ...]]) -> float | Varying:
    """Return a parameter over the model. setting: what counts in each region, as `choices` returns it.

    Outside of layers mergekit takes the first point of a gradient: that of the first slice for what is before the
    layers, and that of the last slice for what is behind them.
    """
    path = next((choice.path for part in setting for choice in part if choice.path), ())
    path = path[: path.index("parameters") + 2] if path else ()
    told = [[(choice.text, choice.points) for choice in part] for part in setting]
    default = setting[0][-1].points[0]
    graded = any(len(points) > 1 for part in told for _, points in part)
    if regions[0].module:
        rules = [
            rule for region, part in zip(regions, setting, strict=True) for rule in _of_module(region.module, part)
        ]
    elif (len(regions) == 1 and regions[0].layers is None) or (all(part == told[0] for part in told) and not graded):
        rules = list(_everywhere(setting[0]))
    else:
        rules = list(_of_slices(regions, setting))
    while rules and rules[0].points == (default,):
        del rules[0]
    if all(rule.points == (default,) for rule in rules):
        return default
    return Varying(default, tuple(rules), path)


def glob(*texts: str) -> str:
    """Return the glob of names that contain the texts, one behind the other."""
    return "*" + "*".join(re.sub(r"([*?[])", r"[\1]", text) for text in texts) + "*"


def _everywhere(part: Sequence[Choice]) -> Iterator[Rule]:
    *filters, last = part
    if len(last.points) > 1:
        yield Rule(last.points, layers="0-")
    for choice in reversed(filters):
        assert choice.text is not None
        if len(choice.points) > 1 and not _IN_LAYERS.search(choice.text):
            yield Rule(choice.points[:1], tensors=glob(choice.text))
        if len(choice.points) == 1 or not _OUTSIDE.search(choice.text):
            yield Rule(choice.points, tensors=glob(choice.text))


def _of_module(module: str, part: Sequence[Choice]) -> Iterator[Rule]:
    *filters, last = part
    for choice in (last, *reversed(filters)):
        tensors = glob(module) if choice.text is None else glob(module, choice.text)
        if len(choice.points) > 1:
            yield Rule(choice.points[:1], tensors=tensors)
        yield Rule(choice.points, tensors=tensors)


def _of_slices(regions: Sequence[Region], setting: Sequence[Sequence[Choice]]) -> Iterator[Rule]:
    before, behind = setting[0], setting[-1]
    for choice in reversed(before[:-1]):
        if not _IN_LAYERS.search(str(choice.text)):
            yield Rule(choice.points[:1], tensors=glob(str(choice.text)))
    if _first_points(before) != _first_points(behind):
        yield Rule(behind[-1].points[:1], modules="[norm, head]")
        for choice in reversed(behind[:-1]):
            text = str(choice.text)
            at_end = _AT_END.search(text) or any(text in name for name in _ENDS)
            if at_end and not _IN_LAYERS.search(text):
                yield Rule(choice.points[:1], tensors=glob(str(choice.text)), modules="[norm, head]")
    for region, part in zip(regions, setting, strict=True):
        assert region.layers is not None
        first, last = region.layers
        layers = f"{first}-{last}" if first < last else f"{first}"
        for choice in reversed(part):
            if choice.text is None or not _OUTSIDE.search(choice.text):
                points = choice.points if first < last else choice.points[-1:]
                yield Rule(points, layers=layers, tensors=glob(choice.text) if choice.text is not None else "")


def _first_points(part: Sequence[Choice]) -> list[tuple[str | None, float]]:
    return [(choice.text, choice.points[0]) for choice in part]


def is_close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=0, abs_tol=1e-9)
