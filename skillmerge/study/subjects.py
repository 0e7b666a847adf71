"""What `inspect` looks at: which models make the update, what it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.kinds.skill import SKILL_FILE
from skillmerge.errors import UsageError
from skillmerge.methods.terms import Term, base_and_difference, weights
from skillmerge.plans.opening import Access, open_models
from skillmerge.plans.plan import Plan
from skillmerge.recipes.parse import recipe_of
from skillmerge.recipes.recipe import Recipe
from skillmerge.reporter import Reporter

BASE = "--base"
"""What the model of that option is called beside the models of a recipe, none of which can have this name."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is inspected. update: v, as factors of models. pair: (after, before), where v is their difference.
    against: the model whose weights v is compared with. target, reference: k is their difference.
    difference: v as a term that is added to `target` (or subtracted), for the forecast."""

    title: str
    checkpoints: Mapping[str, Checkpoint]
    update: Mapping[str, float]
    pair: tuple[str, str] | None
    against: str | None
    target: str | None = None
    reference: str | None = None
    difference: Term | None = None
    minus: bool = False
    plan: Plan | None = None
    by_tensor: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The update's factors of tensors, where coefficients make them differ."""

    def factors(self, tensor: str) -> Mapping[str, float]:
        return self.by_tensor.get(tensor, self.update)

    @property
    def models(self) -> list[str]:
        others = [self.against, self.target, self.reference]
        return list(dict.fromkeys([*self.update, *(name for name in others if name)]))


def refuse_model(path: Path) -> None:
    if path.is_dir() and not (path / SKILL_FILE).exists():
        raise UsageError(
            f"{path} is a folder, and not of a skill", fix="name two models, before and after; or a recipe; or a skill"
        )


def open_named(models: Mapping[str, Any], access: Access, reporter: Reporter) -> dict[str, Checkpoint]:
    recipe = recipe_of(models, " + ".join(models), {"path": "nowhere"}, "skillmerge inspect")
    return open_models(recipe, access, reporter.note)


def subject_of_recipe(plan: Plan, checkpoints: Mapping[str, Checkpoint]) -> Subject:
    """The updates of a merge. A single coefficient before the whole difference is left out, as its norms say
    nothing of the skill; any other coefficients are part of what the update is."""
    recipe = plan.recipe
    title = f"{recipe.document.name}: {recipe.document.data['merge']}"
    plain = recipe.term(dict.fromkeys(recipe.coefficients, 1.0))
    target, difference, minus = _split(plain, plan)
    by_tensor: dict[str, Mapping[str, float]] = {}
    alike = True
    if _is_scaled(recipe, target):
        update = weights(difference, -1.0 if minus else 1.0) if difference is not None else _update(plain, target)
    else:
        term = recipe.term({name: schedule.default for name, schedule in recipe.coefficients.items()})
        target, difference, minus = _split(term, plan)
        for name, row in plan.tensors.items():
            if row.coefficients:
                values = dict(zip(plan.coefficients, row.coefficients, strict=True))
                by_tensor[name] = _update(recipe.term(values), target)
        alike = len({tuple(factors.items()) for factors in by_tensor.values()}) <= 1
        update = dict(next(iter(by_tensor.values()), {})) if alike else _update(term, target)
        if not alike:  # every model that any tensor needs is read
            update = {**{model: 0.0 for factors in by_tensor.values() for model in factors}, **update}
            difference = None
        else:
            by_tensor = {}
    if alike:
        update = {model: factor for model, factor in update.items() if factor}
    if not update:
        what = f"is `{target}` itself" if target else "comes to nothing"
        raise recipe.error(("merge",), f"the expression {what}: there is no update to inspect")
    pair = _pair(update, recipe)
    before = _real(pair, recipe, 1)
    if target is None:
        return Subject(title, checkpoints, update, pair, before, by_tensor=by_tensor)
    reference = BASE if BASE in checkpoints else before if before != target else None
    return Subject(
        title, checkpoints, update, pair if before else None, before or target, target, reference,
        difference, minus, plan, by_tensor,
    )  # fmt: skip


def _split(term: Term | None, plan: Plan) -> tuple[str | None, Term | None, bool]:
    """The model that an update is added to (None for a skill), the update as a term where it stands as one, and
    whether it is subtracted."""
    if plan.makes_skill:
        return None, None, False
    found = base_and_difference(term) if term is not None else None
    return found if found is not None else (plan.donor, None, False)


def _update(term: Term | None, target: str | None) -> dict[str, float]:
    """What a term adds to `target`, as factors of models."""
    factors = weights(term)
    if target is not None:
        factors = {**factors, target: factors.get(target, 0.0) - 1}
    return {model: factor for model, factor in factors.items() if factor}


def _is_scaled(recipe: Recipe, target: str | None) -> bool:
    """Whether coefficients only scale the update as a whole: it keeps its direction whatever they are."""
    plain = _update(recipe.term(dict.fromkeys(recipe.coefficients, 1.0)), target)
    values = {name: 2.0 + 0.37 * index for index, name in enumerate(recipe.coefficients)}
    other = _update(recipe.term(values), target)
    if not plain or plain.keys() != other.keys():
        return False
    by = {other[model] / factor for model, factor in plain.items()}
    return max(by) - min(by) <= 1e-12 * max(map(abs, by))


def _pair(update: Mapping[str, float], recipe: Recipe) -> tuple[str, str] | None:
    """(after, before), where the update is the plain difference of two models."""
    ordered = sorted(update.items(), key=lambda item: -item[1])
    return (ordered[0][0], ordered[1][0]) if [factor for _, factor in ordered] == [1.0, -1.0] else None


def _real(pair: tuple[str, str] | None, recipe: Recipe, index: int) -> str | None:
    """A model of the pair, where it is one and not a plane of a skill."""
    return pair[index] if pair is not None and pair[index] in recipe.models else None
