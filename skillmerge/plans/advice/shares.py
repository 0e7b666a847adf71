"""The share of a model that the formula changes, and the share that rules take out of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.methods.terms import sole_model
from skillmerge.naming import unsliced
from skillmerge.recipes.formula.tree import ExpressionError, names_in
from skillmerge.recipes.recipe import Recipe
from skillmerge.recipes.schedules import matcher
from skillmerge.remarks import Remark, warning
from skillmerge.tensors import DTYPES, percent

MUCH = 0.1
"""A share of a model's parameters above which rules that take tensors out of the formula are no small matter."""


@dataclass(frozen=True, slots=True)
class Shares:
    """Numbers of parameters. merged: in tensors that the formula changes. taken: in those that it would change without
    `copy` and `ignore`, including ignored ones of other models. whole: the donor's."""

    merged: int
    taken: int
    whole: int

    @property
    def share(self) -> float:
        """The share of the donor's parameters that the formula changes."""
        return self.merged / max(self.whole, 1)

    def doubt(self, recipe: Recipe) -> Remark | None:
        """Return a warning where more than a tenth of what has a coefficient other than 0 is taken out of the
        formula."""
        if self.taken <= MUCH * (self.merged + self.taken):
            return None
        rules = [f"`{key}:`" for key in ("copy", "ignore") if getattr(recipe, key)]
        what = " and ".join(rules) + (" take " if len(rules) > 1 else " takes ")
        return warning(
            f"{what}{percent(self.taken / (self.merged + self.taken))} of the parameters that have a coefficient other "
            f"than 0 out of the formula, which changes {percent(self.share)} of the output",
            "if that is intended, add to the recipe `accept: [merged-share]`; a part that is to stay as it is can "
            "have a "
            "coefficient of 0 instead",
            name="merged-share",
            of_recipe=True,
        )


def shares_of(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], donor_name: str, copied: Collection[str],
    values: Mapping[str, tuple[float, ...]],
) -> Shares:  # fmt: skip
    """Return how much of a model the formula changes. values: the coefficients of the donor's tensors, or of each
    expert of them, and of those of other models that the output does without (`ignored_tensors`)."""
    donor, sizes = checkpoints[donor_name], ignored_tensors(recipe, checkpoints, donor_name)
    changes: dict[tuple[float, ...], bool] = {}
    merged = taken = whole = 0
    for name, row in values.items():
        if row not in changes:
            changes[row] = _changes(recipe, donor_name, row)
        whole_name = name if name in donor.tensors or name in sizes else unsliced(name)
        spec = donor.tensors.get(whole_name)
        count = spec.elements if spec is not None else sizes[name]
        if spec is not None and whole_name != name:
            count //= spec.shape[0]
        whole += count if spec is not None else 0
        if changes[row] and (spec is None or DTYPES[spec.dtype].is_float):
            out = spec is None or whole_name in copied
            merged, taken = merged + count * (not out), taken + count * out
    return Shares(merged, taken, whole)


def ignored_tensors(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], donor_name: str) -> dict[str, int]:
    """Return the tensors of the formula's models that `ignore` leaves out, and how many parameters each has."""
    found: dict[str, int] = {}
    if not recipe.ignore:
        return found
    pattern = matcher(recipe.ignore)
    for model in dict.fromkeys(name.name for name in names_in(recipe.expression) if name.is_model):
        for name, spec in checkpoints[model].tensors.items():
            if name not in checkpoints[donor_name].tensors and pattern.match(name) and DTYPES[spec.dtype].is_float:
                found[name] = max(spec.elements, found.get(name, 0))
    return found


def _changes(recipe: Recipe, donor_name: str, values: tuple[float, ...]) -> bool:
    """Return whether the expression with these coefficients is anything but the donor."""
    try:
        term = recipe.term(dict(zip(recipe.coefficients, values, strict=True)))
    except ExpressionError:  # of a tensor that is copied, for which it means nothing
        return True
    return term is not None and sole_model(term) != donor_name
