"""A recipe or a saved plan -> a plan that can be applied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.kinds.skill_planes import check_zstandard
from skillmerge.errors import UsageError
from skillmerge.plans import saved as savedplan
from skillmerge.plans.advice.heads import with_heads_read
from skillmerge.plans.opening import Access, planned
from skillmerge.plans.plan import Plan
from skillmerge.plans.saved import SavedPlan
from skillmerge.recipes.parse import load, parse_recipe
from skillmerge.recipes.recipe import Recipe
from skillmerge.recipes.source import SAVED_PLAN, STANDARD_INPUT, RecipeSource, name_of, standard_input
from skillmerge.reporter import Reporter
from skillmerge.verbs.records import Checks


def source_name(recipe: RecipeSource | Recipe) -> str:
    return recipe.document.name if isinstance(recipe, Recipe) else name_of(recipe)


def read_source(recipe: RecipeSource | Recipe, coefficients: Mapping[str, float] | None) -> Recipe | SavedPlan:
    """Return the recipe, or the saved plan, at a path or on standard input. Raises UsageError, RecipeError."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return load(recipe, coefficients)
    piped = standard_input() if recipe == STANDARD_INPUT else None
    if piped is not None and not piped.startswith(SAVED_PLAN):
        return parse_recipe(piped, STANDARD_INPUT, Path(), coefficients)
    if piped is None and not savedplan.looks_saved(recipe):
        return load(recipe, coefficients)
    if coefficients:
        raise UsageError(
            "a saved plan already fixes its coefficients", fix="leave `--set` out, or plan again with `--set`"
        )
    return savedplan.read(recipe) if piped is None else savedplan.parse(piped, Path(STANDARD_INPUT))


@contextmanager
def planned_to_apply(
    source: Recipe | SavedPlan, access: Access, checks: Checks, reporter: Reporter
) -> Iterator[tuple[Plan, Mapping[str, Checkpoint]]]:
    """Yield a plan that can be applied, and its open models. Raises StalePlan for a saved plan that has changed."""
    saved = source if isinstance(source, SavedPlan) else None
    if saved is not None:
        access = replace(access, commits=saved.commits)
    recipe = source.recipe if isinstance(source, SavedPlan) else source
    made_before = checks.expected is not None or (saved is not None and "compared" not in saved.document)
    with planned(recipe, None, access, reporter.note, lenient=made_before) as (plan, checkpoints):
        plan.refuse_problems()
        if saved is not None:
            saved.check(plan)
        plan = with_heads_read(plan, checkpoints)
        if checks.strict:
            plan.refuse_warnings()
        for remark in plan.warnings:
            reporter.warn(remark.message, remark.fix)
        for note in plan.notes:
            reporter.note(note)
        if plan.recipe.output.compression != "none":
            check_zstandard()
        yield plan, checkpoints
