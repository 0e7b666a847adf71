"""The coefficients of a recipe for each tensor: its schedules over the names of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skillmerge.checkpoints.model_config import ties_embeddings
from skillmerge.plans.models.experts import Row, named_by_expert
from skillmerge.recipes.recipe import Recipe
from skillmerge.recipes.schedules import Rule, ScheduleError
from skillmerge.tensors import TensorSpec


def coefficients_of(recipe: Recipe, names: list[str], config: Mapping[str, Any]) -> dict[str, Row]:
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


def kept_coefficients(
    recipe: Recipe, tensors: Mapping[str, TensorSpec], config: Mapping[str, Any]
) -> tuple[dict[str, Row], dict[str, None]]:
    """Return the coefficients of those tensors of a model that the output does not do without, by `named_by_expert`;
    and the names of these tensors."""
    left_out = recipe.left_out(tensors)
    names = {name: None for name in tensors if name not in left_out}
    return coefficients_of(recipe, named_by_expert(recipe, tensors, names), config), names


def _tied_advice(rule: Rule, config: Mapping[str, Any]) -> str | None:
    """Return what to write for a rule about a head that is the embedding."""
    about_head = "head" in rule.modules or any("lm_head" in glob for glob in rule.tensors)
    if not about_head or not ties_embeddings(config):
        return None
    return "the head is the embedding here (`tie_word_embeddings`): write `modules: embedding`, or leave this rule out"
