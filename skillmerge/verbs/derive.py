"""The verb derive: compute a recipe's coefficients from the weights, and write the recipe with these numbers.

    match     scale each layer's and kind's update to the norm of the target's own update, times the recipe's
              coefficient: lam * ||k|| / ||v||
    project   remove what the update shares with the target's own: v - (<v, k> / <k, k>) k

v is the recipe's update and k the target's own, `target - base`. `inspect` measures the numbers once, and they become
rules of an ordinary recipe. No evaluation is needed. No benefit over a single number is published for this use.
"""

from __future__ import annotations

import copy
import glob
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillmerge.brief import brief, drawn
from skillmerge.durable import disk_errors, write_whole
from skillmerge.engine.runner import check_words
from skillmerge.errors import UsageError
from skillmerge.methods.terms import weights
from skillmerge.naming import MODULE_KINDS
from skillmerge.recipes.formula.bind import bind
from skillmerge.recipes.formula.tree import normalise_name
from skillmerge.recipes.parse import load, parse_recipe
from skillmerge.recipes.recipe import Recipe
from skillmerge.recipes.source import STANDARD_INPUT, RecipeSource
from skillmerge.recipes.yamltext import dump
from skillmerge.reporter import Reporter
from skillmerge.study.inspect import Inspection, inspect

CHOICES = ("match", "project")
_OFF = "off"
_BASE = "base"


@dataclass(frozen=True, slots=True)
class Derived:
    """A recipe that was written. numbers: of each layer and kind. removed, chance: for `project`, the share of the
    update's energy that is removed, and the share expected by chance."""

    output: Path
    choice: str
    numbers: Mapping[str, float]
    removed: float | None = None
    chance: float | None = None

    __repr__ = brief
    _repr_html_ = drawn

    def as_dict(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "choice": self.choice,
            "numbers": dict(self.numbers),
            "removed": self.removed,
            "chance": self.chance,
        }


def derive(
    recipe: RecipeSource,
    choice: str,
    output: str | os.PathLike[str],
    *,
    base: str,
    threads: int | None = None,
    follow_links: bool = False,
    locked: bool = False,
    hub: str = "stream",
    reporter: Reporter | None = None,
) -> Derived:
    """Write the recipe that `choice` makes of a recipe with one coefficient before its whole update.

    base: the model that the target was trained from. output: a file beside the recipe, so that relative paths hold.
    Raises UsageError, and what `inspect` raises.
    """
    check_words(threads=threads, hub=hub)
    if choice not in CHOICES:
        raise UsageError(f"choice {choice!r}: {', '.join(CHOICES)}")
    parsed = load(recipe)
    written, name = _only_coefficient(parsed)
    target = _place_beside(parsed.document.name, parsed.folder, output)
    same = parsed.document.data if recipe == STANDARD_INPUT else recipe  # a pipe can be read once
    found = inspect(
        same, base=base, stats="off", threads=threads, follow_links=follow_links, locked=locked, hub=hub,
        reporter=reporter,
    )  # fmt: skip
    numbers = _numbers(choice, found)
    data = copy.deepcopy(parsed.document.data)
    removed, chance = None, None
    if choice == "match":
        value = float(data["coefficients"][written])
        data["coefficients"][written] = _schedule({label: value * by for label, by in numbers.items()}, value)
    else:
        assert found.plan is not None
        _refuse_names(parsed)
        data["models"][_BASE] = os.path.relpath(base, parsed.folder) if "://" not in base else base
        data["coefficients"][_OFF] = _schedule(numbers, 0.0)
        data["merge"] = f"{data['merge']} - {name} * {_OFF} * ({found.plan.donor} - {_BASE})"
        removed, chance = _removed(found)
    text = "".join(f"# {line}\n" for line in _comment(choice, parsed, base, removed, chance)) + dump(data)
    parse_recipe(text, str(target), parsed.folder)
    with disk_errors(target):
        write_whole(target, text.encode())
    return Derived(target, choice, numbers, removed, chance)


def _place_beside(recipe: str, folder: Path, output: str | os.PathLike[str]) -> Path:
    """Return the path to write to. Raises UsageError if something is there, or where relative paths would mean other
    places."""
    target = Path(output)
    if target.exists():
        raise UsageError(f"{target} already exists", fix="choose another file with `--output`")
    if target.absolute().parent != folder.absolute():
        raise UsageError(
            f"{target} is not beside {recipe}",
            fix="choose a file beside the recipe: relative paths start at its folder",
        )
    return target


def _refuse_names(recipe: Recipe) -> None:
    """Raise UsageError if the recipe has a name that the derived one needs."""
    if _OFF in (*recipe.models, *recipe.coefficients) or _BASE in recipe.models:
        raise UsageError(f"the recipe uses a reserved name: `{_OFF}` or `{_BASE}`", fix="rename it")


def _only_coefficient(recipe: Recipe) -> tuple[str, str]:
    """Return the name of the one coefficient, as it is written and as it is meant.

    Raises UsageError if it is not one plain number before the whole update.
    """
    table = recipe.document.data.get("coefficients") or {}
    if len(table) != 1:
        raise UsageError(
            f"{recipe.document.name}: has {len(table)} coefficients; `derive` needs exactly one",
            fix="write `merge: target + lam * (rl - sft)`, with a number for `lam`",
        )
    (written,) = table
    if not isinstance(table[written], int | float):
        raise UsageError(
            f"{recipe.document.name}: `{written}` is already a schedule, which `derive` would replace",
            fix="make it a number",
        )
    name = normalise_name(written)
    if not _is_plain(recipe, name):
        raise UsageError(
            f"{recipe.document.name}: `{name}` multiplies an update that contains numbers", fix="remove the numbers"
        )
    return written, name


def _is_plain(recipe: Recipe, name: str) -> bool:
    """Return whether the coefficient multiplies the update as `inspect` measures it: models with factors of 1."""
    one, two = (weights(bind(recipe.expression, {name: value})) for value in (1.0, 2.0))
    factors = {model: two.get(model, 0.0) - one.get(model, 0.0) for model in {*one, *two}}
    return all(abs(factor) in (0.0, 1.0) for factor in factors.values())


def _numbers(choice: str, found: Inspection) -> dict[str, float]:
    """Compute the coefficient of each layer and kind of module."""
    return {
        label: number
        for label, row in found.cells.items()
        if label.rpartition(" ")[2] in MODULE_KINDS and (number := _number(choice, row)) is not None
    }


def _number(choice: str, row: Mapping[str, Any]) -> float | None:
    """Compute the coefficient of one layer's modules of one kind."""
    if not row["norm"] or not row.get("other_norm"):
        return None
    ratio = float(row["other_norm"] / row["norm"])
    return ratio if choice == "match" else float(row["cosine"]) / ratio


def _schedule(numbers: Mapping[str, float], default: float) -> dict[str, Any]:
    """Return rules for cells `model.layers 3 attention` and `outside blocks norm`; the latter first, as the last rule
    wins."""
    rules: list[dict[str, Any]] = []
    for label, value in sorted(numbers.items(), key=lambda item: not item[0].startswith("outside")):
        place, _, kind = label.rpartition(" ")
        rule: dict[str, Any] = {"modules": kind, "value": float(f"{value:.6g}")}
        if not place.startswith("outside"):
            stack, _, layer = place.rpartition(" ")
            rule = {"tensors": f"{glob.escape(stack)}.{layer}.*", **rule}
        rules.append(rule)
    return {"default": default, "rules": rules}


def _removed(found: Inspection) -> tuple[float | None, float | None]:
    """Return the share of the update's energy that projecting takes, cell by cell, and what it would take by chance."""
    energy = taken = chance = 0.0
    for row in found.cells.values():
        if row["norm"] and row.get("cosine") is not None:
            energy += row["norm"] ** 2
            taken += (row["norm"] * row["cosine"]) ** 2
            chance += row["norm"] ** 2 / row["elements"]
    return (taken / energy, chance / energy) if energy else (None, None)


def _comment(choice: str, recipe: Recipe, base: str, removed: float | None, chance: float | None) -> list[str]:
    said = f"Derived by `skillmerge derive --choice {choice}` from {recipe.document.name}, base {base}."
    if choice == "match":
        return [
            said,
            "By layer and kind of module: coefficient * ||k|| / ||v||, with k = target - base and v the update.",
            "The update then has the norm of the target's own. No benefit over a single number is published for "
            "this use.",
        ]
    share = f"{removed:.3%} (by chance {chance:.3%})" if removed is not None else "nothing"
    return [
        said,
        "By layer and kind of module: v - (<v, k> / <k, k>) k, with k = target - base and v the update.",
        f"That removes {share} of the update's energy. No benefit is published for this use.",
    ]
