"""An inspection in sentences: how large an update is, where it is, how it relates to another, what rounding loses.

Every figure is one of the inspection's; docs/metrics.md defines each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from skillmerge.cli.show.figures import show
from skillmerge.plans.depth import number
from skillmerge.tensors import format_count

if TYPE_CHECKING:
    from skillmerge.study.inspect import Inspection

_HALF = 0.5
_CHANCE = 3.0
"""Standard deviations from chance below which a cosine counts as chance."""


def sentences(found: Inspection) -> list[str]:
    """Return the headlines: size, place, relation to the second update, rounding. What is not known is left out."""
    if not found.total.get("norm"):
        return ["The models do not differ."]
    return [*_size(found.total), *_place(found), *_relation(found), *_rounding(found)]


def _size(total: Mapping[str, Any]) -> Iterator[str]:
    changed = f"{show(total['changed'], 'share')} of {format_count(total['elements'])} elements changed"
    if total["norm_ratio"] is None:
        yield f"{changed}; the update's norm is {number(total['norm'])}."
    else:
        yield f"{changed}; the update's norm is {_percent(total['norm_ratio'])} of the weights' norm."


def _place(found: Inspection) -> Iterator[str]:
    energies = {kind: row["energy"] for kind, row in found.modules.items() if row.get("energy")}
    if not energies:
        return
    largest = max(energies, key=energies.__getitem__)
    told = f"{show(energies[largest], 'share')} of its energy is in {largest} tensors"
    stacks: dict[str, dict[int, float]] = {}
    for label, row in found.layers.items():
        stack, _, layer = label.rpartition(" ")
        if layer.isdecimal() and row.get("energy"):
            stacks.setdefault(stack, {})[int(layer)] = row["energy"]
    if len(stacks) == 1 and len(next(iter(stacks.values()))) > 2:
        ((stack, layers),) = stacks.items()
        if span := _shortest(layers):
            where = f"layer {span[0]}" if span[0] == span[1] else f"layers {span[0]} to {span[1]}"
            told += f"; {where} of {stack} hold{'s' if span[0] == span[1] else ''} half of it"
    yield f"{told}."


def _shortest(layers: Mapping[int, float]) -> tuple[int, int] | None:
    """Return the shortest run of layers that holds half of the update's energy; the later one of two."""
    places = sorted(layers)
    runs = (
        (last - first, -first, (places[first], places[last]))
        for first in range(len(places))
        for last in range(first, len(places))
        if sum(layers[place] for place in places[first : last + 1]) >= _HALF
    )
    best = min(runs, default=None)
    return best[2] if best is not None else None


def _relation(found: Inspection) -> Iterator[str]:
    cosine, deviations = found.total.get("cosine"), found.total.get("cosine_z_signs")
    if found.second is None or cosine is None:
        return
    told = f"Its cosine with the target's own update, {found.second}, is {number(cosine)}"
    if deviations is None:
        yield f"{told}."
    elif abs(deviations) < _CHANCE:
        yield f"{told}: no more than chance gives ({deviations:.1f} standard deviations)."
    else:
        way = "the same way" if cosine > 0 else "opposite ways"
        yield f"{told}: they pull {way} ({abs(deviations):.0f} standard deviations from chance)."


def _rounding(found: Inspection) -> Iterator[str]:
    if found.forecast is None:
        return
    planned = found.forecast["as_planned"]
    if planned is not None and planned.all.realised_lambda is not None:
        whole = planned.all
        asked = show(whole.asked_lambda, "number")
        yield (
            f"Merged as the recipe says, the effective lambda is {show(whole.realised_lambda, 'number')} where "
            f"{asked} is requested, and rounding loses {show(whole.vanished, 'share')} of the update's elements."
        )
        return
    if (point := _at_one(found.forecast["curves"].get("bfloat16", {}).get("all", ()))) is not None:
        yield (
            f"Added to bfloat16 weights at lambda 1, the effective lambda is {show(point['realised'], 'number')}, and "
            f"rounding loses {show(point['vanished'], 'share')} of the update's elements."
        )


def _at_one(points: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return next((point for point in points if point["lambda"] == 1 and point["realised"] is not None), None)


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%"
