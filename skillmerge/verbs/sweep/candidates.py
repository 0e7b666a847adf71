"""The candidates of a sweep: numbers of a recipe, named by their position, and the values to try.

    lam=0:2:0.25            0, 0.25, ..., 2           a grid
    lam=0.5,1,2             these
    lam=0:2                 anything between, for a search
    lam.rules.0.ramp.1=…    a part of a schedule: an end of a ramp, a rule's value, the default

A candidate is the recipe's own text with its numbers replaced, comments included.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from skillmerge.errors import RecipeError, UsageError, did_you_mean
from skillmerge.recipes.formula.arguments import name_number
from skillmerge.recipes.formula.tree import normalise_name
from skillmerge.recipes.parse import parse_recipe
from skillmerge.recipes.recipe import Recipe, add_coefficient
from skillmerge.recipes.yamltext import Path

MAX_CANDIDATES = 10_000

Values = Mapping[str, float]
"""A number for each axis, by the axis' name."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One number of the recipe: `values` of a grid, or `low` and `high` (and `step`, or None) of a search."""

    name: str
    values: tuple[float, ...]
    low: float
    high: float
    step: float | None

    def has_at_its_edge(self, value: float) -> bool:
        """Return whether a value is the first or last of three or more; 0 leaves the update out and is no edge."""
        ends = {min(self.values), max(self.values)} if self.values else {self.low, self.high}
        return value in ends and value != 0 and len(self.values) not in (1, 2)


def parse_axis(text: str) -> Axis:
    """`lam=0:2:0.25`, `lam=0.5,1`, `lam=0:2`. Raises ValueError."""
    name, equals, written = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise ValueError(f"`{text}` is not NAME=VALUES, such as lam=0:2:0.25")
    parts = written.split(":") if ":" in written else written.split(",")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        raise ValueError(f"`{written}` is neither START:STOP:STEP nor numbers with commas between") from None
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"`{written}` has a number that is not finite")
    if ":" not in written:
        return Axis(name, tuple(dict.fromkeys(numbers)), min(numbers), max(numbers), None)
    if len(numbers) > 3 or numbers[1] < numbers[0] or (len(numbers) == 3 and numbers[2] <= 0):
        raise ValueError(f"`{written}` is not START:STOP or START:STOP:STEP with START <= STOP and STEP > 0")
    low, high = numbers[:2]
    if len(numbers) == 2:
        return Axis(name, (), low, high, None)
    step = numbers[2]
    count = math.floor((high - low) / step + 1e-9)
    if count >= MAX_CANDIDATES:
        raise ValueError(f"`{written}` are more than {MAX_CANDIDATES} values")
    # As a person would write them: 0.3, not 0.30000000000000004.
    return Axis(name, tuple(float(f"{low + index * step:.12g}") for index in range(count + 1)), low, high, step)


def grid(axes: Sequence[Axis]) -> Iterator[Values]:
    """Yield every combination, the last axis fastest. Raises UsageError for an axis without values, or far too many."""
    for axis in axes:
        if not axis.values:
            raise UsageError(
                f"--set {axis.name}={axis.low:g}:{axis.high:g} is a range",
                fix=f"give a step ({axis.name}={axis.low:g}:{axis.high:g}:0.25), or --search tpe",
            )
    count = math.prod(len(axis.values) for axis in axes)
    if count > MAX_CANDIDATES:
        raise UsageError(f"{count} candidates are too many", fix="use larger steps, or --search tpe --trials N")
    for row in itertools.product(*(axis.values for axis in axes)):
        yield dict(zip((axis.name for axis in axes), row, strict=True))


def with_values(recipe: Recipe, values: Values) -> Recipe:
    """Return the recipe with other numbers and without its gates, which are for published models.

    Raises UsageError for a name that is not one of its numbers, or a number that is tied to others.
    """
    document, text, data = recipe.document, recipe.document.text, copy.deepcopy(recipe.document.data)
    changes = []
    for name, value in values.items():
        path = path_of(recipe, name)
        place = document.values[path]
        changes.append((document.offset(place), place.width, f"{value:.12g}"))
        table = data
        for key in path[:-1]:
            table = table[key]
        table[path[-1]] = float(f"{value:.12g}")
    for start, width, number in sorted(changes, reverse=True):
        text = text[:start] + number + text[start + width :]
    try:
        candidate = parse_recipe(text, document.name, recipe.folder)
        same = candidate.document.data == data
    except RecipeError:
        same = False
    if not same:
        raise UsageError(
            f"{document.name}: {', '.join(values)} cannot be changed in the text",
            fix="write the numbers out: anchors (&) and aliases (*) tie them to others",
        )
    return replace(candidate, gates=())


def path_of(recipe: Recipe, name: str) -> Path:
    """Return the position of an axis in the document: `lam.rules.0.value`. Raises UsageError if no number is."""
    table = recipe.document.data.get("coefficients") or {}
    numbers = {".".join(map(str, path)): path for path in _numbers(table)}
    first, dot, rest = name.partition(".")
    for shown, path in numbers.items():
        if normalise_name(str(path[0])) == normalise_name(first) and shown.partition(".")[2] == rest:
            return ("coefficients", *path)
    inside = [shown for shown in numbers if not dot and shown.startswith(f"{name}.")]
    fix = f"name one of its numbers: {', '.join(inside)}" if inside else did_you_mean(name, list(numbers))
    what = "is a schedule, not a number" if inside else "is not a number of the recipe's coefficients"
    known = f"known names: {', '.join(numbers)}" if numbers else add_coefficient(first)
    fix = fix or name_number(first, recipe.expression) or known
    raise UsageError(f"`--set {name}`: `{name}` {what}", fix=fix)


def _numbers(value: object, path: Path = ()) -> Iterator[Path]:
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        if path[-2:-1] != ("layers",) and path[-1:] != ("layers",):
            yield path
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, (*path, str(key)))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _numbers(inner, (*path, index))
