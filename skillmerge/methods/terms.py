"""The meaning of an expression for one tensor: leaves, scaled terms and sums, their weights and degree."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

_DEGREE_TOLERANCE = 1e-9
_MINUS = ":minus"


# The tree of one tensor: coefficients are numbers, terms that are exactly zero are gone.


@dataclass(frozen=True, slots=True)
class Leaf:
    model: str


@dataclass(frozen=True, slots=True)
class Scaled:
    """inner * factor, or inner / factor."""

    inner: Term
    factor: float
    divide: bool


@dataclass(frozen=True, slots=True)
class Sum:
    """left + right, or left - right."""

    left: Term
    right: Term
    minus: bool


Term = Leaf | Scaled | Sum


def minus_of(skill: str) -> str:
    """Return the name, beside the models of a recipe, of what is taken from the rest of a stored skill."""
    return f"{skill}{_MINUS}"


def model_of(name: str) -> str:
    """Return the model of a recipe that a name belongs to, which may be that of what is taken from a stored skill."""
    return name.removesuffix(_MINUS)


def expand_skills(term: Term | None, skills: Collection[str]) -> Term | None:
    """Return the tree with every stored skill as what it is, a difference of two models."""
    if isinstance(term, Leaf):
        return Sum(term, Leaf(minus_of(term.model)), minus=True) if term.model in skills else term
    if isinstance(term, Scaled):
        inner = expand_skills(term.inner, skills)
        return Scaled(inner, term.factor, term.divide) if inner is not None else None
    if isinstance(term, Sum):
        left, right = expand_skills(term.left, skills), expand_skills(term.right, skills)
        return Sum(left, right, term.minus) if left is not None and right is not None else None
    return None


def weights(term: Term | None, by: float = 1.0) -> dict[str, float]:
    """Return the factor that each model ends up with: lam * (rl - sft) + t -> {rl: lam, sft: -lam, t: 1}."""
    if term is None:
        return {}
    if isinstance(term, Leaf):
        return {term.model: by}
    if isinstance(term, Scaled):
        return weights(term.inner, by / term.factor if term.divide else by * term.factor)
    total = weights(term.left, by)
    for model, factor in weights(term.right, -by if term.minus else by).items():
        total[model] = total.get(model, 0.0) + factor
    return total


def sole_model(term: Term) -> str | None:
    """Return the model that is all of the term, with factor 1, once what cancels is gone."""
    left = {model: factor for model, factor in weights(term).items() if factor != 0}
    return next(iter(left)) if list(left.values()) == [1.0] else None


def models_of(term: Term) -> list[str]:
    """Return the models that the term needs: one where all else cancels, otherwise all that it names."""
    sole = sole_model(term)
    return [sole] if sole else list(weights(term))


def is_zero(term: Term | None) -> bool:
    """Return whether all of the term cancels."""
    return not any(weights(term).values())


def degree(term: Term | None) -> float:
    """1 for a model, 0 for a difference; near misses of rounding (0.1 + 0.2 + 0.7) are taken as meant.

    Infinite where the factors are too large to be added up.
    """
    try:
        exact = math.fsum(weights(term).values())
        return round(exact) if abs(exact - round(exact)) <= _DEGREE_TOLERANCE else exact
    except (OverflowError, ValueError):
        return math.inf


def base_and_difference(term: Term) -> tuple[str, Term, bool] | None:
    """(model, difference without its factor, whether it is subtracted), where that is what the term is."""
    if not isinstance(term, Sum):
        return None
    for base, rest, minus in ((term.left, term.right, term.minus), (term.right, term.left, False)):
        if isinstance(base, Leaf) and degree(rest) == 0 and not (base is term.right and term.minus):
            return base.model, rest.inner if isinstance(rest, Scaled) else rest, minus
    return None
