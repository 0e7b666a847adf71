"""Packed tensors whose experts have coefficients of their own: planned as slices of one output tensor.

A rule with `experts` gives a number to each expert. Where experts are one by one, tensors have it; a packed tensor has
one for each index of its first axis, and is a tensor for each expert here (`naming.sliced`) until that is known.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import groupby

from skillmerge.checkpoints.views.relations import experts_in
from skillmerge.errors import InputError
from skillmerge.methods.terms import Scaled, Sum, Term
from skillmerge.naming import sliced, unsliced
from skillmerge.recipes.recipe import Recipe
from skillmerge.tensors import DTYPES, TensorSpec

Row = tuple[float, ...]

Run = tuple[int, int, Row, Term | None]
"""Experts with the same coefficients: the first, the one behind the last, these, and the term."""

_APART = 0.6180339887498949
"""Factors of terms that are added up only to know their models: nothing cancels."""


def named_by_expert(recipe: Recipe, tensors: Mapping[str, TensorSpec], names: Iterable[str]) -> list[str]:
    """Return names of tensors, those of packed ones once for each expert, if rules of the recipe tell experts apart."""
    told = any(rule.experts for schedule in recipe.coefficients.values() for rule in schedule.rules)
    return list(_named(tensors, names)) if told else list(names)


def _named(tensors: Mapping[str, TensorSpec], names: Iterable[str]) -> Iterator[str]:
    for name in names:
        spec = tensors.get(name)
        count = experts_in(name, spec.shape) if spec is not None and DTYPES[spec.dtype].is_float else 0
        if count:
            slices = [sliced(name, expert) for expert in range(count)]
            if taken := [it for it in slices if it in tensors]:
                raise InputError(
                    f"tensor `{taken[0]}` is called what rules with `experts` call a part of `{name}`",
                    fix="leave these rules out",
                )
            yield from slices
        else:
            yield name


def by_tensor(
    values: Mapping[str, Row], names: Collection[str], copied: Collection[str]
) -> tuple[dict[str, Row], dict[str, tuple[Row, ...]]]:
    """Return the coefficients of whole tensors; and of packed ones whose experts differ, those of each expert.

    values: by names of `named_by_expert`. names: of whole tensors. copied: those that no coefficient counts for.
    """
    rows: dict[str, Row] = {}
    experts: dict[str, list[Row]] = {}
    for name, row in values.items():
        if name in names:
            rows[name] = row
        else:
            whole = unsliced(name)
            rows.setdefault(whole, row)
            experts.setdefault(whole, []).append(row)
    apart = {name: tuple(found) for name, found in experts.items() if name not in copied and len({*found}) > 1}
    return rows, apart


def runs(rows: Sequence[Row], terms: Mapping[Row, Term | None]) -> Iterator[Run]:
    """Yield the runs of experts that share coefficients. rows: of each expert."""
    first = 0
    for row, group in groupby(rows):
        last = first + len(list(group))
        yield first, last, row, terms[row]
        first = last


def all_of_them(terms: Iterable[Term | None]) -> Term | None:
    """Return a term with the models of several, of which only these count."""
    distinct = list({id(term): term for term in terms if term is not None}.values())
    if not distinct:
        return None
    scaled = (Scaled(term, _APART**index, divide=False) for index, term in enumerate(distinct[1:], 1))
    return reduce(lambda left, right: Sum(left, right, False), scaled, distinct[0])
