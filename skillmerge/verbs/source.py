"""What a merge is made from: a recipe or a saved plan, as a plan that can be carried out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.kinds.skill_planes import check_zstandard
from skillmerge.errors import UsageError
from skillmerge.plans import saved as savedplan
from skillmerge.plans.heads import with_heads_read
from skillmerge.plans.opening import Access, planned
from skillmerge.plans.plan import Plan
from skillmerge.plans.saved import SavedPlan
from skillmerge.recipes.parse import load
from skillmerge.recipes.recipe import Recipe
from skillmerge.reporter import Reporter
from skillmerge.verbs.records import Checks


def name_of(recipe: str | os.PathLike[str] | Recipe) -> str:
    return recipe.document.name if isinstance(recipe, Recipe) else os.fspath(recipe)


def read_source(
    recipe: str | os.PathLike[str] | Recipe, coefficients: Mapping[str, float] | None
) -> Recipe | SavedPlan:
    """The recipe or the saved plan at a path. Raises UsageError, RecipeError."""
    if isinstance(recipe, Recipe):
        return recipe
    if not savedplan.looks_saved(recipe):
        return load(recipe, coefficients)
    if coefficients:
        raise UsageError("a saved plan has its coefficients", fix="leave `--set` out, or plan again with it")
    return savedplan.read(recipe)


@contextmanager
def planned_to_apply(
    source: Recipe | SavedPlan, access: Access, checks: Checks, reporter: Reporter
) -> Iterator[tuple[Plan, Mapping[str, Checkpoint]]]:
    """A plan that can be carried out, and its open models. Raises StalePlan for a saved plan that has changed."""
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
