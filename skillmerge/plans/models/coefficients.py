"""The coefficients of a recipe for each tensor: its schedules over the names of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from skillmerge.checkpoints.model_config import ties_embeddings
from skillmerge.recipes.recipe import Recipe
from skillmerge.recipes.schedules import Rule, ScheduleError


def coefficients_of(recipe: Recipe, names: list[str], config: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Return each tensor's coefficients, in the order of the recipe. Raises RecipeError for rules without meaning."""
    columns = []
    for coefficient, schedule in recipe.coefficients.items():
        try:
            columns.append(schedule.resolve(names))
        except ScheduleError as error:
            path = ("coefficients", coefficient, "rules", error.rule)
            fix = _tied_advice(schedule.rules[error.rule], config) or error.fix
            raise recipe.error(path, str(error), fix) from error
    return {name: tuple(column[name] for column in columns) for name in names}


def kept_coefficients(recipe: Recipe, names: Iterable[str], config: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Return the coefficients of those tensors of a model that the output does not do without."""
    names = list(names)
    left_out = recipe.left_out(names)
    return coefficients_of(recipe, [name for name in names if name not in left_out], config)


def _tied_advice(rule: Rule, config: Mapping[str, Any]) -> str | None:
    """Return what to write for a rule about a head that is the embedding."""
    about_head = "head" in rule.modules or any("lm_head" in glob for glob in rule.tensors)
    if not about_head or not ties_embeddings(config):
        return None
    return "the head is the embedding here (`tie_word_embeddings`): write `modules: embedding`, or leave this rule out"
