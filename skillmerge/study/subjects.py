"""The subjects of `inspect`: which models make up the update, and what it is compared with."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.model_config import contradictions
from skillmerge.errors import UsageError, some
from skillmerge.methods.terms import (
    Leaf,
    Scaled,
    Sum,
    Term,
    base_and_difference,
    degree,
    expand_skills,
    model_of,
    weights,
)
from skillmerge.plans.accounting import Problem, settlement
from skillmerge.plans.advice.causes import cause_of, share
from skillmerge.plans.advice.names import rename_rules
from skillmerge.plans.advice.shares import MUCH
from skillmerge.plans.compare.models import compare_models
from skillmerge.plans.mapping import find_source
from skillmerge.plans.opening import Access, close_all, open_models
from skillmerge.plans.plan import Plan
from skillmerge.recipes.parse import recipe_of
from skillmerge.recipes.recipe import Recipe
from skillmerge.remarks import Remark, warning
from skillmerge.reporter import Reporter
from skillmerge.study.places import is_adapter
from skillmerge.tensors import percent

_SKILL = {"kind": "skill"}
BASE = "--base"
"""The name of the option's model beside those of a recipe, which cannot have this name."""


@dataclass(frozen=True, slots=True)
class Part:
    """One of several updates. update: v, as factors of models; pair, against: see `Subject`."""

    label: str
    update: Mapping[str, float]
    pair: tuple[str, str] | None
    against: str | None


@dataclass(frozen=True, slots=True)
class Subject:
    """The subject of an inspection. update: v, as factors of models. pair: (after, before), where v is their
    difference, or where that is subtracted and v is before - after. against: the model whose weights v is compared
    with. target, reference: k is their difference. difference: v as a term that is added to `target` (or subtracted),
    for the forecast."""

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
    """Reasons why the models may not belong together."""
    by_tensor: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The update's factors for each tensor, if coefficients make them differ."""
    parts: tuple[Part, ...] = ()
    """The updates that make up v, if there are several: each is measured alone and beside every other."""
    told: str = ""
    """The update for people [default: its factors]."""
    skills: frozenset[str] = frozenset()
    """Models that are planes of stored skills; their numbers say nothing about the original models."""

    places: Mapping[str, str] = field(default_factory=dict)
    """Places of models that a command named."""

    def name_of(self, model: str) -> str:
        """Return a model's name as the user wrote it."""
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
        """Models whose numbers are checked for their precision."""
        inside = [*self.update, *(model for part in self.parts for model in part.update)]
        return [model for model in dict.fromkeys(inside) if model_of(model) not in self.skills]


def subject_of_skills(places: Sequence[str], access: Access, reporter: Reporter) -> Subject:
    """Return the subject for stored skills. Several are measured one by one and together."""
    if len(set(places)) < len(places):
        raise UsageError("the same skill is named twice", fix="pass each skill once")
    names = [f"skill{index}" for index in range(1, len(places) + 1)] if len(places) > 1 else ["skill"]
    kinds = ["adapter" if is_adapter(place, access) else "skill" for place in places]
    written = {name: {kind: place} for name, kind, place in zip(names, kinds, places, strict=True)}
    checkpoints = open_named(written, access, reporter)
    updates = [weights(expand_skills(Leaf(name), {name})) for name in names]
    parts = tuple(Part(place, update, None, None) for place, update in zip(places, updates, strict=True))
    together = {model: factor for update in updates for model, factor in update.items()}
    noun = "adapter" if {*kinds} == {"adapter"} else "skill"
    title = f"{noun}{'s' if len(places) > 1 else ''} {' and '.join(places)}"
    return Subject(
        title, checkpoints, together, None, None, parts=parts if len(parts) > 1 else (),
        told=" + ".join(places) if len(parts) > 1 else "", skills=frozenset(names),
        places={name: place for name, kind, place in zip(names, kinds, places, strict=True) if kind == "adapter"},
    )  # fmt: skip


def subject_of_models(before: str, after: str, access: Access, reporter: Reporter, vocabulary: str) -> Subject:
    """Return the subject for two models, with reasons why they may not belong together."""
    models = {"before": before, "after": after}
    onto = {"after": {"adapter": after, "onto": "before"}} if is_adapter(after, access) else {}
    words = {**models, **onto}
    recipe = recipe_of(words, "after - before", _SKILL, "skillmerge inspect", vocabulary=vocabulary)
    checkpoints = open_models(recipe, access, reporter.note)
    try:
        difference = Sum(Leaf("after"), Leaf("before"), minus=True)
        terms = dict.fromkeys(checkpoints["after"].tensors, difference)
        compared = compare_models(recipe, checkpoints, "after", terms, lenient=True)
        shapes = {name: spec.shape for name, spec in checkpoints["after"].tensors.items()}
        held = [
            *(warning(f"`{after}`: {it}") for it in contradictions(checkpoints["after"].config, shapes)),
            *_left_out(recipe, checkpoints),
        ]
    except BaseException:
        close_all(checkpoints)
        raise
    for note in compared.notes:
        reporter.note(note)
    return Subject(
        f"from {before} to {after}", checkpoints, {"after": 1.0, "before": -1.0}, ("after", "before"), "before",
        "before", difference=difference, doubts=(*compared.warnings, *held), places=models,
    )  # fmt: skip


def _left_out(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> Iterator[Remark]:
    """Yield a warning if much of two models has no partner: the figures then say little about the update."""
    after, before = checkpoints["after"], checkpoints["before"]
    missing = [name for name, spec in after.tensors.items() if find_source(spec, "before", before) is None]
    extra = [name for name, spec in before.tensors.items() if find_source(spec, "after", after) is None]
    reshaped = [
        name
        for name, spec in after.tensors.items()
        if name in before.tensors and before.tensors[name].shape != spec.shape
    ]
    out = max(share([*missing, *reshaped], after.tensors), share([*extra, *reshaped], before.tensors))
    if out < MUCH:
        return
    what = f"{percent(out)} of the parameters are not compared, and the figures say nothing about them"
    if rename_rules(before.tensors, after.tensors):
        cause = cause_of(recipe, "before", before, "after", after, missing, extra)
        help = settlement(recipe, [Problem("names", cause.message, rename=cause.rename)])
        yield Remark("warning", f"{what}: {recipe.in_words(cause.message)}", help)
        return
    reasons = (
        (missing, "only `after` has"), (extra, "only `before` has"), (reshaped, "of other shapes are")
    )  # fmt: skip
    told = "; ".join(f"{reason} {some(names)}" for names, reason in reasons if names)
    yield Remark("warning", f"{what}: {recipe.in_words(told)}", "check that both are the right models, and complete")


def open_named(models: Mapping[str, Any], access: Access, reporter: Reporter) -> dict[str, Checkpoint]:
    recipe = recipe_of(models, " + ".join(models), {"path": "nowhere"}, "skillmerge inspect")
    return open_models(recipe, access, reporter.note)


def subject_of_recipe(plan: Plan, checkpoints: Mapping[str, Checkpoint]) -> Subject:
    """Return the updates of a merge. A single coefficient before the whole difference is left out, as its norms say
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
        for name, _, row in (row for tensor in plan.tensors.values() for row in tensor.rows):
            if row:
                by_tensor[name] = _update(recipe.term(dict(zip(plan.coefficients, row, strict=True))), target)
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
        what = f"is `{target}` itself" if target else "is always zero"
        raise recipe.error(("merge",), f"the expression {what}: there is no update to inspect")
    pair = _whole_pair(update, _differences(plain, target) or [])
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
    """Return the differences that a formula adds up, `(a - base)` and `(b - base)`, each without the number in front of
    it.

    None if it does not add up several.
    """
    written = _differences(term, target)
    roots = _roots(written, recipe)
    found: dict[tuple[tuple[str, float], ...], Part] = {}
    for difference in written or ():
        update = difference.update
        pair = _pair(update, difference.before(roots))
        before = _real(pair, recipe, 1)
        part = Part(told_update(update), update, pair if before else None, before or target)
        found.setdefault(tuple(sorted(update.items())), part)
    return tuple(found.values()) if len(found) > 1 else ()


@dataclass(frozen=True, slots=True)
class _Difference:
    """Models of a formula that come to a difference, in their order, with the numbers in front of them; turned: it
    stands in parentheses that a minus, or a negative number, turns around."""

    factors: Mapping[str, float]
    turned: bool

    @property
    def is_added(self) -> bool:
        return next(factor for factor in self.factors.values() if factor) > 0

    @property
    def update(self) -> dict[str, float]:
        """The factors, scaled so that the largest is 1."""
        most = max(abs(factor) for factor in self.factors.values())
        return {model: factor / most for model, factor in self.factors.items() if factor}

    def before(self, roots: Collection[str]) -> str | None:
        """Of a difference of two models the one that the other was trained from, as far as the text says it.

        `a - b` is b. `- (c - d)` is d, and `- c + d` is c, but a model that an added update is cut from (roots) is what
        this one is cut from too: in `(a - base) - (base - c)` that is base.
        """
        update = self.update
        if sorted(update.values()) != [-1.0, 1.0]:
            return None
        added, subtracted = sorted(update, key=lambda model: -update[model])
        known = [model for model in (added, subtracted) if model in roots]
        if self.is_added:
            return subtracted
        return known[0] if len(known) == 1 else added if self.turned else subtracted


def _whole_pair(update: Mapping[str, float], written: Sequence[_Difference]) -> tuple[str, str] | None:
    """(after, before) of all of an update. `(a - base) - (c - base)` has none, as neither a nor c was extracted from
    the other."""
    if len({tuple(sorted(it.update.items())) for it in written}) == 1:
        return _pair(update, written[0].before(()))
    return _pair(update) if all(it.is_added for it in written) else None


def _roots(written: Sequence[_Difference] | None, recipe: Recipe) -> set[str]:
    """Return the models of the updates that a formula adds exactly as written."""
    added = (it.before(()) for it in written or () if it.is_added)
    return {model for model in added if model is not None and model_of(model) not in recipe.skills}


def _differences(term: Term | None, target: str | None) -> list[_Difference] | None:
    """Return the differences that are added to the target, or None if something else is left.

    A formula without parentheses is read from the left: models belong together until they come to a difference.
    """
    leaves = list(_leaves(term)) if term is not None else []
    if target is not None:  # what they are added to: the target, or else the first whole model
        whole = [leaf for leaf in leaves if leaf[1] == 1]
        base = next((leaf for leaf in whole if leaf[0] == target), whole[0] if whole else None)
        if base is not None:
            leaves.remove(base)
    found: list[_Difference] = []
    together: dict[str, float] = {}
    for model, factor, turned in leaves:
        together[model] = together.get(model, 0.0) + factor
        if abs(sum(together.values())) > 1e-12:
            continue
        if any(together.values()):
            found.append(_Difference(together, turned))
        together = {}
    return found if not together else None


def _leaves(term: Term, by: float = 1.0, turned: bool = False) -> Iterator[tuple[str, float, bool]]:
    """Yield the models of a formula from left to right, each with the number in front of it, and whether the difference
    that it stands in is turned around."""
    if degree(term) == 0:
        turned = by < 0
    if isinstance(term, Leaf):
        yield term.model, by, turned
    elif isinstance(term, Scaled):
        yield from _leaves(term.inner, by / term.factor if term.divide else by * term.factor, turned)
    elif isinstance(term, Sum):
        yield from _leaves(term.left, by, turned)
        yield from _leaves(term.right, -by if term.minus else by, turned)


def told_update(factors: Mapping[str, float]) -> str:
    """`rl - sft`, of factors; a stored skill is one name."""
    parts = []
    shown = {model: factor for model, factor in factors.items() if factor and model_of(model) == model}
    for model, factor in sorted(shown.items(), key=lambda item: -item[1]):
        size = "" if abs(factor) == 1 else f"{abs(factor):g} * "
        parts.append(f"{'-' if factor < 0 else '+'} {size}{model}")
    return " ".join(parts).removeprefix("+ ")


def _split(term: Term | None, plan: Plan) -> tuple[str | None, Term | None, bool]:
    """Return the model that an update is added to (None for a skill), the update as a term where it stands as one, and
    whether it is subtracted."""
    if plan.makes_skill:
        return None, None, False
    found = base_and_difference(term) if term is not None else None
    if isinstance(term, Sum) and not isinstance(term.left, Leaf) and weights(term).get(plan.donor) == 1:
        found = found if found is not None and found[0] == plan.donor else None  # `target - sft + rl`
    return found if found is not None else (plan.donor, None, False)


def _update(term: Term | None, target: str | None) -> dict[str, float]:
    """Return what a term adds to `target`, as factors of models."""
    factors = weights(term)
    if target is not None:
        factors = {**factors, target: factors.get(target, 0.0) - 1}
    return {model: factor for model, factor in factors.items() if factor}


def _is_scaled(recipe: Recipe, target: str | None) -> bool:
    """Return whether coefficients only scale the update as a whole: it keeps its direction whatever they are."""
    plain = _update(recipe.term(dict.fromkeys(recipe.coefficients, 1.0)), target)
    values = {name: 2.0 + 0.37 * index for index, name in enumerate(recipe.coefficients)}
    other = _update(recipe.term(values), target)
    if not plain or plain.keys() != other.keys():
        return False
    by = {other[model] / factor for model, factor in plain.items()}
    return max(by) - min(by) <= 1e-12 * max(map(abs, by))


def _pair(update: Mapping[str, float], before: str | None = None) -> tuple[str, str] | None:
    """(after, before), where the update is the plain difference of two models, either way round."""
    ordered = sorted(update, key=lambda model: -update[model])
    if [update[model] for model in ordered] != [1.0, -1.0]:
        return None
    return (ordered[1], ordered[0]) if ordered[0] == before else (ordered[0], ordered[1])


def _real(pair: tuple[str, str] | None, recipe: Recipe, index: int) -> str | None:
    """Return a model of the pair, where it is one and not a plane of a skill."""
    if pair is None or pair[index] not in recipe.models or pair[index] in recipe.skills:
        return None
    return pair[index]
