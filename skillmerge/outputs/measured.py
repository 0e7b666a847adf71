"""Warnings about finished weights: nothing changed, rounding changed lambda, updates are implausibly large.

Read from the statistics of a manifest; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from skillmerge.engine.measures import update_size
from skillmerge.engine.measures.cells import DEVIATION, Cell, cells, kinds, rows_of, worst
from skillmerge.engine.measures.input_rounding import input_warning
from skillmerge.engine.measures.skill_statistics import SkillStatistics
from skillmerge.engine.rounding_statistics import Statistics
from skillmerge.errors import UsageError
from skillmerge.outputs.manifest import ManifestBody
from skillmerge.outputs.output import Outcome
from skillmerge.plans.compare.found import Compared
from skillmerge.recipes.parse import parse_recipe
from skillmerge.remarks import Remark, warning
from skillmerge.tensors import DTYPES

STRICT = "strict"
"""The name of the gate that `--strict` makes of warnings."""


def warnings_of(body: ManifestBody) -> list[Remark]:
    """Yield a warning for each way in which the output is not as requested, except those the recipe accepts."""
    accepted = {found.name for found in body.accepted}
    statistics = body.statistics
    found = _of_skill(statistics) if isinstance(statistics, SkillStatistics) else _of_model(body, statistics)
    return [remark for remark in found if remark.name is None or remark.name not in accepted]


def settled(body: ManifestBody, accept: Collection[str]) -> ManifestBody:
    """Return the body with the accepted warnings about the weights recorded."""
    found = [
        Compared(remark.name, "norm ratio", "weights", "warning", {}, accepted=True, message=remark.message)
        for remark in (warnings_of(body) if accept else ())
        if remark.name is not None and remark.name in accept
    ]
    return replace(body, accepted=(*body.accepted, *found)) if found else body


def strict_outcome(body: ManifestBody) -> Outcome:
    """Return the outcome of the gate that `--strict` makes of the warnings."""
    found = warnings_of(body)
    return Outcome(STRICT, "no warnings", float(len(found)), not found, "\n".join(remark.message for remark in found))


def _of_skill(statistics: SkillStatistics) -> Iterator[Remark]:
    if not statistics.all.changed:
        yield warning("this skill is empty: the two models have the same weights")
    if lost := statistics.all.relative_error:
        yield warning(f"this skill is rounded: {lost:.2g} of its norm was lost, so merges with it differ by that much")
    whole = statistics.all
    kinds = {kind: (group.norm, group.input_rounding) for kind, group in statistics.modules.items()}
    yield from input_warning(whole.input_rounding, whole.input_rounding_added, statistics.input_precisions, kinds)
    yield from update_size.size_warning(statistics.large, update_size.IN_EXTRACT)


def _of_model(body: ManifestBody, statistics: Statistics) -> Iterator[Remark]:
    donor = body.donor
    plain = all(tensor.action == "copy" and tensor.sources[0][0] == donor for tensor in body.tensors)
    if plain and donor in _made(body):
        return
    if plain or statistics.all.changed == 0:
        yield warning(
            f"the merge changed nothing: measured weights equal those of `{donor}`",
            "check the coefficients with `skillmerge plan`",
        )
        return
    yield from _rounding(body)
    ratios = ((it.name, it.shape, it.statistics.norm_ratio) for it in body.tensors if it.statistics is not None)
    yield from update_size.size_warning(update_size.too_large(ratios))


def _made(body: ManifestBody) -> Collection[str]:
    """Return the models that are made of others: to write one out is no merge."""
    try:
        entries = parse_recipe(body.recipe.text, "recipe.yaml", Path()).entries
        return [name for name, entry in entries.items() if entry.is_made]
    except UsageError:  # of a format that this version does not read
        return ()


def _rounding(body: ManifestBody) -> Iterator[Remark]:
    """Yield a warning about the layer and kind of module whose effective lambda is furthest off; if there is none,
    about the kind of module in all layers, whose small tensors may only together be significant."""
    rows = rows_of(body.tensors)
    for cells_of, what in ((cells, "cells"), (kinds, "kinds of module")):
        found = cells_of(rows)
        if (far := worst(found)) is None:
            continue
        off, measured = sum(cell.is_off for cell in found), sum(cell.is_measured for cell in found)
        count = f"; {off} of {measured} {what} are more than {DEVIATION:.0%} off" if measured > 1 else ""
        yield warning(
            f"{far.label}: effective lambda is {far.group.realised:.2f} of what was requested "
            f"({_dtypes(body, far)} rounding){count}",
            _fix(body),
        )
        return


def _dtypes(body: ManifestBody, cell: Cell) -> str:
    names = {str(DTYPES[tensor.dtype].torch_name) for tensor in body.tensors if tensor.name in cell.names}
    return " and ".join(sorted(names))


def _fix(body: ManifestBody) -> str | None:
    settings = ["`output.dtype: float32`"] if body.output.dtype != "float32" else []
    settings += ["`output.rounding: stochastic`"] if body.output.rounding != "stochastic" else []
    return f"set {' or '.join(settings)}" if settings else None
