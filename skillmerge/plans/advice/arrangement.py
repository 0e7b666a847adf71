"""Why experts and projections that two models store in other tensors cannot be read as the donor has them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.views.relations import EXPERT, Layout, common_name, layouts, whole_layouts
from skillmerge.errors import some
from skillmerge.naming import layer_of
from skillmerge.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class Cause:
    """A cause why tensors have no partner. help: what to do, or None; rename: the model's line for the recipe."""

    message: str
    help: str | None = None
    rename: tuple[str, ...] = ()


def unlike(
    model: str, checkpoint: Checkpoint, donor_name: str, donor: Checkpoint, missing: Sequence[str]
) -> Cause | None:
    """Return why a model that holds parts of the donor's tensors does not hold them all, or not as they should be.
    missing: what it lacks."""
    layers = {layer_of(name) for name in missing}
    ours, theirs = whole_layouts(_within(layers, checkpoint.tensors), _within(layers, donor.tensors))
    lacking = (EXPERT.fullmatch(part) for name in missing for part in theirs.holds.get(name, ()))
    for at in dict.fromkeys(it[1] for it in lacking if it is not None):
        if ours.experts.get(at, theirs.experts[at]) != theirs.experts[at]:
            return _other_experts(model, at, ours.experts[at], donor_name, theirs.experts[at])
    stored, asked = layouts(checkpoint.tensors, donor.tensors)
    for name, parts in asked.holds.items():
        held = [part for part in parts if part in stored.parts]
        if not held or name in checkpoint.tensors:
            continue
        what = f"model `{model}` stores `{name}` of the donor `{donor_name}` in other tensors"
        if missing := [f"`{part}`" for part in parts if part not in stored.parts]:
            verb = "are" if len(missing) > 1 else "is"
            return Cause(
                f"{what}, and {some(missing)} {verb} missing",
                "the checkpoint is incomplete: fetch or save it again",
            )
        for part in held:
            sizes = [list(side.parts[part].shape) for side in (stored, asked)]
            if sizes[0] != sizes[1]:
                return Cause(
                    f"{what}, in which `{part}` has shape {sizes[0]}; the donor's has {sizes[1]}",
                    f"check that `{model}` is the right model; its sizes differ",
                )
    return _unclear(model, stored, asked, checkpoint.tensors) or _unclear(donor_name, asked, stored, donor.tensors)


def parts_of(checkpoint: Checkpoint, donor: Checkpoint) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """Return the parts of two models as tensors, by names that do not depend on how they are packed."""
    found = []
    for layout in whole_layouts(checkpoint.tensors, donor.tensors):
        found.append({name: TensorSpec(name, "F32", window.shape, "") for name, window in layout.parts.items()})
    return found[0], found[1]


def _within(layers: Collection[tuple[str, int] | None], tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    return {name: spec for name, spec in tensors.items() if layer_of(name) in layers}


def _other_experts(model: str, at: str, ours: Collection[int], donor_name: str, theirs: Collection[int]) -> Cause:
    missing, more = sorted(set(theirs) - set(ours)), sorted(set(ours) - set(theirs))
    counts = f"{len(ours)} experts in `{at}`, and the donor `{donor_name}` has {len(theirs)}"
    which = [
        f"{verb} {some([str(it) for it in found])}" for verb, found in (("without", missing), ("with", more)) if found
    ]
    return Cause(
        f"model `{model}` has {counts}: it is {' and '.join(which)}, counted from 0",
        f"check that `{model}` is the right model, and complete",
    )


def _unclear(model: str, layout: Layout, other: Layout, tensors: Mapping[str, TensorSpec]) -> Cause | None:
    """Return what is unclear of packed experts that the other model has too."""
    at = {name: common_name(name).rpartition(".")[0] for name in (*layout.unclear, *other.unclear)}
    known = {*other.experts, *(at[name] for name in other.unclear)}
    name = next((name for name in layout.unclear if at[name] in known), None)
    if name is None:
        return None
    return Cause(
        f"model `{model}`: `{name}` {list(tensors[name].shape)} may hold its experts' matrices as they are or "
        "transposed: its shape fits both",
        "save both models with the same version of transformers",
    )
