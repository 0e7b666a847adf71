"""What `inspect` looks at: which models make the update, what it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.kinds.skill import SKILL_FILE
from skillmerge.checkpoints.model_config import contradictions
from skillmerge.checkpoints.schemes import is_path, open_store, parse_place
from skillmerge.errors import UsageError
from skillmerge.methods.terms import Leaf, Scaled, Sum, Term, base_and_difference, expand_skills, model_of, weights
from skillmerge.plans.compare.models import compare_models
from skillmerge.plans.opening import Access, close_all, open_models
from skillmerge.plans.plan import Plan
from skillmerge.recipes.parse import recipe_of
from skillmerge.recipes.recipe import Recipe
from skillmerge.remarks import Remark, warning
from skillmerge.reporter import Reporter

BASE = "--base"
"""What the model of that option is called beside the models of a recipe, none of which can have this name."""


@dataclass(frozen=True, slots=True)
class Part:
    """One of several updates. update: v, as factors of models; pair, against: as of a `Subject`."""

    label: str
    update: Mapping[str, float]
    pair: tuple[str, str] | None
    against: str | None


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
    doubts: tuple[Remark, ...] = ()
    """How the models do not belong together."""
    by_tensor: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The update's factors of tensors, where coefficients make them differ."""
    parts: tuple[Part, ...] = ()
    """The updates that make up v, where there are several: each is seen by itself, and beside each other one."""
    told: str = ""
    """What v is, for people; by default its factors."""
    skills: frozenset[str] = frozenset()
    """Models that are planes of stored skills, whose numbers show nothing of the models before."""

    places: Mapping[str, str] = field(default_factory=dict)
    """Of models that a command named: their places."""

    def name_of(self, model: str) -> str:
        """A model as the person called it who named it."""
        return "base" if model == BASE else self.places.get(model) or model_of(model)

    def factors(self, tensor: str) -> Mapping[str, float]:
        return self.by_tensor.get(tensor, self.update)

    @property
    def models(self) -> list[str]:
        others = [self.against, self.target, self.reference, *(part.against for part in self.parts)]
        inside = [model for part in self.parts for model in part.update]
        return list(dict.fromkeys([*self.update, *inside, *(name for name in others if name)]))

    @property
    def numbers_of(self) -> list[str]:
        """Models of whose numbers the precision is looked at."""
        inside = [*self.update, *(model for part in self.parts for model in part.update)]
        return [model for model in dict.fromkeys(inside) if model_of(model) not in self.skills]


def refuse_model(path: Path) -> None:
    if path.is_dir() and not (path / SKILL_FILE).exists():
        raise UsageError(
            f"{path} is a folder, and not of a skill", fix="name two models, before and after; or a recipe; or skills"
        )


def is_skill(uri: str, access: Access) -> bool:
    """Whether a place holds a stored skill. Raises InputError, TemporaryError where a remote one cannot be listed."""
    if is_path(uri):
        return (Path(uri) / SKILL_FILE).is_file()
    try:
        place = parse_place(uri)
    except ValueError:
        return False  # opening it says what is wrong with it
    return place is not None and SKILL_FILE in open_store(place, download=access.download).list()


def subject_of_skills(places: Sequence[str], access: Access, reporter: Reporter) -> Subject:
    """One stored skill, or several: then each by itself, and all of them together."""
    if len(set(places)) < len(places):
        raise UsageError("the same skill is named twice", fix="name each skill once")
    names = [f"skill{index}" for index in range(1, len(places) + 1)] if len(places) > 1 else ["skill"]
    checkpoints = open_named(
        {name: {"skill": place} for name, place in zip(names, places, strict=True)}, access, reporter
    )
    updates = [weights(expand_skills(Leaf(name), {name})) for name in names]
    parts = tuple(Part(place, update, None, None) for place, update in zip(places, updates, strict=True))
    together = {model: factor for update in updates for model, factor in update.items()}
    title = f"skill{'s' if len(places) > 1 else ''} {' and '.join(places)}"
    return Subject(
        title, checkpoints, together, None, None, parts=parts if len(parts) > 1 else (),
        told=" + ".join(places) if len(parts) > 1 else "", skills=frozenset(names),
    )  # fmt: skip


def subject_of_models(before: str, after: str, access: Access, reporter: Reporter) -> Subject:
    """Two models, and how they do not belong together."""
    models = {"before": before, "after": after}
    recipe = recipe_of(models, "after - before", {"kind": "skill"}, "skillmerge inspect")
    checkpoints = open_models(recipe, access, reporter.note)
    try:
        difference = Sum(Leaf("after"), Leaf("before"), minus=True)
        terms = dict.fromkeys(checkpoints["after"].tensors, difference)
        compared = compare_models(recipe, checkpoints, "after", terms, lenient=True)
        shapes = {name: spec.shape for name, spec in checkpoints["after"].tensors.items()}
        held = [warning(f"`{after}`: {it}") for it in contradictions(checkpoints["after"].config, shapes)]
    except BaseException:
        close_all(checkpoints)
        raise
    for note in compared.notes:
        reporter.note(note)
    return Subject(
        f"from {before} to {after}", checkpoints, {"after": 1.0, "before": -1.0}, ("after", "before"), "before",
        "before", difference=difference, doubts=(*compared.warnings, *held), places=models,
    )  # fmt: skip


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
    seen: dict[str, Any] = {
        "by_tensor": by_tensor,
        "parts": _parts(plain, target, recipe),
        "skills": frozenset(recipe.skills),
    }
    if target is None:
        return Subject(title, checkpoints, update, pair, before, **seen)
    reference = BASE if BASE in checkpoints else before if before != target else None
    return Subject(
        title, checkpoints, update, pair if before else None, before or target, target, reference,
        difference, minus, plan, **seen,
    )  # fmt: skip


def _parts(term: Term | None, target: str | None, recipe: Recipe) -> tuple[Part, ...]:
    """The differences that a formula adds up, `(a - base)` and `(b - base)`, each without the number in front of it.

    None where it does not add up several. A formula without parentheses is read from the left: models belong together
    until they come to a difference.
    """
    found: dict[tuple[tuple[str, float], ...], Part] = {}
    together: dict[str, float] = {}
    leaves = list(_leaves(term)) if term is not None else []
    if target is not None:  # what they are added to: the target, or else the first whole model
        whole = [leaf for leaf in leaves if leaf[1] == 1]
        base = next((leaf for leaf in whole if leaf[0] == target), whole[0] if whole else None)
        if base is not None:
            leaves.remove(base)
    for model, factor in leaves:
        together[model] = together.get(model, 0.0) + factor
        if abs(sum(together.values())) > 1e-12:
            continue
        most = max(abs(factor) for factor in together.values())
        update = {model: factor / most for model, factor in together.items() if factor}
        if update:
            pair = _pair(update, recipe)
            before = _real(pair, recipe, 1)
            part = Part(told_update(update), update, pair if before else None, before or target)
            found.setdefault(tuple(sorted(update.items())), part)
        together = {}
    return tuple(found.values()) if len(found) > 1 and not together else ()


def _leaves(term: Term, by: float = 1.0) -> Iterator[tuple[str, float]]:
    """The models of a formula from left to right, each with the number in front of it."""
    if isinstance(term, Leaf):
        yield term.model, by
    elif isinstance(term, Scaled):
        yield from _leaves(term.inner, by / term.factor if term.divide else by * term.factor)
    else:
        yield from _leaves(term.left, by)
        yield from _leaves(term.right, -by if term.minus else by)


def told_update(factors: Mapping[str, float]) -> str:
    """`rl - sft`, of factors; a stored skill is one name."""
    parts = []
    shown = {model: factor for model, factor in factors.items() if factor and model_of(model) == model}
    for model, factor in sorted(shown.items(), key=lambda item: -item[1]):
        size = "" if abs(factor) == 1 else f"{abs(factor):g} * "
        parts.append(f"{'-' if factor < 0 else '+'} {size}{model}")
    return " ".join(parts).removeprefix("+ ")


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
    if pair is None or pair[index] not in recipe.models or pair[index] in recipe.skills:
        return None
    return pair[index]
