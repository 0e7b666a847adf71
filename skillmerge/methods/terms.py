"""The meaning of an expression for one tensor: leaves, scaled terms, sums and calls, their weights and degree."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from skillmerge.methods.method import Method, Numbers

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


@dataclass(frozen=True, slots=True)
class Call:
    """A method on operands, those of keywords last. arguments: its other keywords. ordinal: which of the calls with
    random numbers it is, from 0. position: in the text. left: which of the operands that are written are not zero."""

    method: Method
    operands: tuple[Term, ...]
    arguments: tuple[tuple[str, Any], ...]
    ordinal: int = 0
    position: int = field(default=0, compare=False)
    left: tuple[int, ...] = field(default=(), compare=False)

    @property
    def readings(self) -> int:
        """How often its operands are read before its arithmetic."""
        return self.method.readings(**dict(self.arguments))

    @property
    def by_model(self) -> bool:
        """Whether it takes the whole model as one, and not each matrix by itself."""
        return self.readings > 0 and dict(self.arguments).get("scope") == "model"

    @property
    def doubts(self) -> Iterator[str]:
        """What is allowed in its arguments and hardly meant."""
        for name, values in self.arguments:
            kind = self.method.keywords[name]
            if isinstance(kind, Numbers) and kind.negative and min(values) < 0:
                yield f"negative `{name}` in `{self.method}`: one {kind.negative}"


Term = Leaf | Scaled | Sum | Call


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
    if isinstance(term, Call):
        operands = (expand_skills(operand, skills) for operand in term.operands)
        return replace(term, operands=tuple(operand for operand in operands if operand is not None))
    return None


def _parts(term: Term | None) -> tuple[Term, ...]:
    """Return what a term is made of, in the order of the text."""
    if isinstance(term, Scaled):
        return (term.inner,)
    if isinstance(term, Sum):
        return term.left, term.right
    return term.operands if isinstance(term, Call) else ()


def calls(term: Term | None) -> Iterator[Call]:
    """Yield every call, inner ones first."""
    for part in _parts(term):
        yield from calls(part)
    if isinstance(term, Call):
        yield term


def has_calls(term: Term | None) -> bool:
    return any(True for _ in calls(term))


def leaves(term: Term | None) -> Iterator[str]:
    """Yield the model of every leaf, in the order of the text."""
    if isinstance(term, Leaf):
        yield term.model
    for part in _parts(term):
        yield from leaves(part)


def weights(term: Term | None, by: float = 1.0) -> dict[str, float]:
    """Return the factor that each model ends up with: lam * (rl - sft) + t -> {rl: lam, sft: -lam, t: 1}.

    What calls are made of has no factor, and is left out.
    """
    if term is None or isinstance(term, Call):
        return {}
    if isinstance(term, Leaf):
        return {term.model: by}
    if isinstance(term, Scaled):
        return weights(term.inner, by / term.factor if term.divide else by * term.factor)
    total = weights(term.left, by)
    for model, factor in weights(term.right, -by if term.minus else by).items():
        total[model] = total.get(model, 0.0) + factor
    return total


def spread(term: Term | None, by: float = 1.0) -> dict[str, float]:
    """Return the factor of each model as `weights` does, with every call as the mean of its operands: signs are
    right, sizes are not."""
    if isinstance(term, Scaled):
        return spread(term.inner, by / term.factor if term.divide else by * term.factor)
    if isinstance(term, Sum):
        parts = [spread(term.left, by), spread(term.right, -by if term.minus else by)]
    elif isinstance(term, Call):
        parts = [spread(operand, by / len(term.operands)) for operand in term.operands]
    else:
        return weights(term, by)
    total: dict[str, float] = {}
    for part in parts:
        for model, factor in part.items():
            total[model] = total.get(model, 0.0) + factor
    return total


def sole_model(term: Term) -> str | None:
    """Return the model that is all of the term, with factor 1, once what cancels is gone."""
    if has_calls(term):
        return None
    left = {model: factor for model, factor in weights(term).items() if factor != 0}
    return next(iter(left)) if list(left.values()) == [1.0] else None


def models_of(term: Term) -> list[str]:
    """Return the models that the term needs: one where all else cancels, otherwise all that it names."""
    sole = sole_model(term)
    return [sole] if sole else list(dict.fromkeys(leaves(term)))


def is_zero(term: Term | None) -> bool:
    """Return whether all of the term cancels."""
    return not has_calls(term) and not any(weights(term).values())


def degree(term: Term | None) -> float:
    """1 for a model, 0 for a difference; near misses of rounding (0.1 + 0.2 + 0.7) are taken as meant.

    Infinite where the factors are too large to be added up.
    """
    try:
        exact = math.fsum(_degrees(term, 1.0))
        return round(exact) if abs(exact - round(exact)) <= _DEGREE_TOLERANCE else exact
    except (OverflowError, ValueError):
        return math.inf


def _degrees(term: Term | None, by: float) -> Iterator[float]:
    """Yield what adds up to the degree: the factors of models, and of calls whose results are models."""
    yield from weights(term, by).values()
    for call, factor in outer_calls(term, by):
        if not call.method.differences:
            yield factor * degree(call.operands[0])


def outer_calls(term: Term | None, by: float) -> Iterator[tuple[Call, float]]:
    """Yield the calls that are in no other call, with their factors."""
    if isinstance(term, Call):
        yield term, by
    elif isinstance(term, Scaled):
        yield from outer_calls(term.inner, by / term.factor if term.divide else by * term.factor)
    elif isinstance(term, Sum):
        yield from outer_calls(term.left, by)
        yield from outer_calls(term.right, -by if term.minus else by)


def base_and_difference(term: Term) -> tuple[str, Term, bool] | None:
    """(model, difference without its factor, whether it is subtracted), where that is what the term is."""
    if not isinstance(term, Sum):
        return None
    for base, rest, minus in ((term.left, term.right, term.minus), (term.right, term.left, False)):
        if isinstance(base, Leaf) and degree(rest) == 0 and not (base is term.right and term.minus):
            return base.model, rest.inner if isinstance(rest, Scaled) else rest, minus
    return None
