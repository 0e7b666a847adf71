"""Headlines: a figure and a sentence each, of a plan, a merge, an inspection or a sweep.

Every figure in them is one of the result's; docs/metrics.md defines those of an inspection.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from skillmerge.cli.show import listings
from skillmerge.cli.show.figures import show
from skillmerge.engine.measures.skill_statistics import SkillGroup
from skillmerge.plans.depth import number
from skillmerge.tensors import format_bytes, format_count, percent

if TYPE_CHECKING:
    from skillmerge.engine.rounding_statistics import Group
    from skillmerge.outputs.manifest import ManifestBody
    from skillmerge.plans.plan import Plan
    from skillmerge.study.inspect import Inspection
    from skillmerge.verbs.sweep.sweep import Sweep

_HALF = 0.5
_CHANCE, _FAR = 3.0, 4.0
"""Standard deviations from chance below which a cosine counts as chance: of the whole, and of one kind of module."""


class Headline(NamedTuple):
    """What comes first: a figure, what it is called, and the sentence around it."""

    figure: str
    label: str
    sentence: str


# Plans and merges.


def of_plan(plan: Plan) -> list[Headline]:
    """Return how much is merged, what is read and written, and what needs attention."""
    read, written = format_bytes(plan.bytes_read), listings.written(plan)
    models, shards = _counted(len(plan.inputs), "model"), _counted(len(plan.shards), "shard")
    again = f" Its methods read {format_bytes(plan.bytes_again)} before." if plan.bytes_again else ""
    size = Headline(read, "read", f"Reads {read} from {models} and writes {written} in {shards}.{again}")
    return [_merged(plan), size, _attention(plan)]


def _merged(plan: Plan) -> Headline:
    if plan.merged_share is None:
        count = len(plan.tensors)
        return Headline(f"{count:,}", "tensors", f"Stores the difference of {_counted(count, 'tensor')}.")
    if (told := listings.patched(plan)) is not None:
        return Headline("patch", "applied", told.capitalize() + ".")
    whole = format_count(sum(math.prod(tensor.shape) for tensor in plan.tensors.values()))
    share = percent(plan.merged_share)
    rest = "" if plan.merged_share == 1 else " The rest is copied."
    return Headline(share, "merged", f"The formula changes {share} of {whole} parameters.{rest}")


def _attention(plan: Plan) -> Headline:
    if plan.problems:
        count = len(plan.problems)
        stop = f"{_counted(count, 'problem')} between the models must be settled before this can be merged."
        return Headline(str(count), "problem" if count == 1 else "problems", stop)
    count = len(plan.warnings)
    told = f"{_counted(count, 'warning')} need{'s' if count == 1 else ''} attention." if count else "Ready to merge."
    return Headline(str(count), "warning" if count == 1 else "warnings", told)


def of_merge(manifest: ManifestBody) -> list[Headline]:
    """Return the effective lambda, what rounding lost, and how much changed; of a skill, what is stored."""
    whole = manifest.statistics.all
    if isinstance(whole, SkillGroup):
        return list(_of_skill(whole))
    return [*_of_rounding(whole), _changed(whole, manifest)]


def _of_rounding(whole: Group) -> Iterator[Headline]:
    if (lambdas := whole.lambdas) is not None:
        requested, effective = (show(value, "number") for value in lambdas)
        told = f"The recipe requests λ = {requested}; after rounding the output has {effective}."
        yield Headline(effective, "effective λ", told)
    if whole.vanished is not None:
        share = show(whole.vanished, "share")
        yield Headline(share, "lost", f"Rounding lost {share} of the update's elements: the weight stayed as it was.")


def _changed(whole: Group, manifest: ManifestBody) -> Headline:
    if whole.changed is None:
        size = format_bytes(manifest.size)
        return Headline(size, "written", f"Wrote {size}; the effect of rounding was not measured.")
    share = show(whole.changed, "share")
    return Headline(share, "changed", f"{share} of the merged elements differ from those of `{manifest.donor}`.")


def _of_skill(whole: SkillGroup) -> Iterator[Headline]:
    share = show(whole.changed, "share")
    yield Headline(share, "changed", f"{share} of {format_count(whole.elements)} elements changed.")
    yield Headline(number(whole.norm), "norm", f"The update's norm is {number(whole.norm)}.")
    size, dense = format_bytes(whole.bytes), format_bytes(whole.dense_bytes)
    yield Headline(size, "stored", f"Stored in {size}; as whole tensors it would take {dense}.")


def of_sweep(sweep: Sweep) -> list[Headline]:
    """Return the best candidate, its score, and how many others could be as good."""
    best = listings.values_of(sweep.best.values)
    score = listings.scored(sweep.best.scores[sweep.by])
    way = "lowest" if sweep.minimise else "highest"
    near = [sweep.within_noise(trial) for trial in sweep.scored if trial is not sweep.best]
    tried = _counted(len(sweep.trials), "candidate")
    found = [
        Headline(best, "best", f"The best of {tried} is {best}."),
        Headline(score, sweep.by, f"Its {sweep.by} is {score}, the {way}."),
    ]
    if None in near:
        told = "The scores have no error estimates. Pass `--repeats` to measure their noise."
        return [*found, Headline("–", "within noise", told)]
    count = sum(map(bool, near))
    told = f"{_counted(count, 'other candidate')} could be as good: the difference is within the noise (95%)."
    if (smallest := sweep.smallest) is not None and smallest is not sweep.best:
        told += f" The smallest is {listings.values_of(smallest.values)}."
    return [*found, Headline(str(count), "within noise", told)]


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' if count != 1 else ''}"


# Inspections.


def sentences(found: Inspection) -> list[str]:
    """Return the sentences of the headlines."""
    return [headline.sentence for headline in of_inspection(found)]


def of_inspection(found: Inspection) -> list[Headline]:
    """Return size, place, relation to the second update, rounding. What is not known is left out."""
    if not found.total.get("norm"):
        return [Headline("0", "changed", "The models do not differ.")]
    return [*_size(found.total), *_place(found), *_relation(found), *_rounding(found)]


def _size(total: Mapping[str, Any]) -> Iterator[Headline]:
    share = show(total["changed"], "share")
    changed = f"{share} of {format_count(total['elements'])} elements changed"
    if total["norm_ratio"] is None:
        yield Headline(share, "changed", f"{changed}; the update's norm is {number(total['norm'])}.")
    else:
        told = f"{changed}; the update's norm is {_percent(total['norm_ratio'])} of the weights' norm."
        yield Headline(share, "changed", told)


def _place(found: Inspection) -> Iterator[Headline]:
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
    yield Headline(show(energies[largest], "share"), f"in {largest}", f"{told}.")


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


def _relation(found: Inspection) -> Iterator[Headline]:
    cosine, deviations = found.total.get("cosine"), found.total.get("cosine_z_signs")
    if found.second is None or cosine is None:
        return
    told = f"Its cosine with the target's own update, {found.second}, is {number(cosine)}"
    if deviations is None:
        told += "."
    elif abs(deviations) < _CHANCE:
        told += f": no more than chance gives (sign-flip z {deviations:.1f}){_exception(found)}."
    else:
        way = "the same way" if cosine > 0 else "opposite ways"
        told += f": they pull {way} (sign-flip z {deviations:.0f})."
    if (ratio := found.total.get("updates_ratio")) is not None:
        told += f" It is {number(ratio)} times as long as that update."
    yield Headline(number(cosine), "cosine", told)


def _exception(found: Inspection) -> str:
    """The kind of module whose updates are furthest from chance, where the whole is not."""
    known = [(abs(row["cosine_z_signs"]), kind) for kind, row in found.modules.items() if row.get("cosine_z_signs")]
    far, kind = max(known, default=(0.0, ""))
    return f"; of {kind} tensors it is {number(found.modules[kind]['cosine'])} (z {far:.0f})" if far > _FAR else ""


def _rounding(found: Inspection) -> Iterator[Headline]:
    if found.forecast is None:
        return
    planned = found.forecast["as_planned"]
    if planned is not None and planned.all.realised_lambda is not None:
        whole = planned.all
        asked = show(whole.asked_lambda, "number")
        effective = show(whole.realised_lambda, "number")
        told = (
            f"Merged as the recipe says, the effective lambda is {effective} where {asked} is requested, and rounding "
            f"loses {show(whole.vanished, 'share')} of the update's elements."
        )
        yield Headline(effective, "effective λ", told)
        return
    if (point := _at_one(found.forecast["curves"].get("bfloat16", {}).get("all", ()))) is not None:
        effective = show(point["realised"], "number")
        told = (
            f"Added to bfloat16 weights at lambda 1, the effective lambda is {effective}, and rounding loses "
            f"{show(point['vanished'], 'share')} of the update's elements."
        )
        yield Headline(effective, "effective λ", told)


def _at_one(points: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return next((point for point in points if point["lambda"] == 1 and point["realised"] is not None), None)


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%"
