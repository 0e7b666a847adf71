"""What the adapters of an inspection are: rank, scale and size by kind of module. Known from headers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from skillmerge.checkpoints.checkpoint import Checkpoint, View
from skillmerge.checkpoints.views.adapted import Adapted, AdapterPlane
from skillmerge.naming import MODULE_KINDS, module_kind


@dataclass(frozen=True, slots=True)
class AdapterRow:
    """One kind of module. matrices: how many an adapter changes, each expert by itself. ranks, scales: the smallest
    and the largest. share: of the kind's parameters that are in these matrices."""

    module: str
    matrices: int
    ranks: tuple[int, int]
    scales: tuple[float, float]
    share: float


def adapters_of(checkpoints: Mapping[str, Checkpoint]) -> dict[str, list[AdapterRow]]:
    """Return the rows of those models that are adapters, by the names that plans call them by."""
    return {name: rows for name, checkpoint in checkpoints.items() if (rows := _rows(checkpoint))}


def _rows(checkpoint: Checkpoint) -> list[AdapterRow]:
    """Return the rows of an adapter, whether it is a difference or on a model; none for anything else."""
    while isinstance(checkpoint, View):
        checkpoint = checkpoint.beneath
    if not isinstance(checkpoint, Adapted | AdapterPlane):
        return []
    whole: dict[str, int] = {}
    for name, spec in checkpoint.tensors.items():
        whole[module_kind(name)] = whole.get(module_kind(name), 0) + spec.elements
    rows = []
    for kind in (*MODULE_KINDS, "other"):
        found = [
            (name, change.product)
            for name, change in checkpoint.changes.items()
            if change.product is not None and module_kind(name) == kind
        ]
        if not found:
            continue
        ranks = [product.rank for _, product in found]
        scales = [product.scale for _, product in found]
        rows.append(
            AdapterRow(
                kind,
                sum(product.experts for _, product in found),
                (min(ranks), max(ranks)),
                (min(scales), max(scales)),
                sum(math.prod(checkpoint.tensors[name].shape) for name, _ in found) / whole[kind],
            )
        )
    return rows
