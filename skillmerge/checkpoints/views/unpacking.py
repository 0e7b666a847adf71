"""Pairs of an adapter for which a model has no tensor of their own: packed experts where it has them one by one, and
the other way round; projections that it has fused.

Their products are named and shaped here as the adapter has them. `arranged` then reads them in the model's layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from skillmerge.checkpoints.kinds.lora.adapter import Adapter
from skillmerge.checkpoints.kinds.lora.parts import Pair
from skillmerge.checkpoints.views.fitting import Model, Product, ambiguous, no_module, twice
from skillmerge.checkpoints.views.relations import is_packed, layouts
from skillmerge.checkpoints.views.renamed import replaced
from skillmerge.tensors import TensorSpec

Products = dict[str, tuple[TensorSpec, Product | None]]
"""By name: float64 tensors, and what they are; None for zeros."""

_MOST_PACKED = 1024
"""Pairs without a tensor that are looked at, where they may be for packed experts: a few for each layer."""

_TO_LAYER = re.compile(r".*?\.\d+\.")


def products_of(adapter: Adapter, pairs: Sequence[Pair], model: Model, rename: Sequence[tuple[str, str]]) -> Products:
    """Return the products of pairs as tensors in the adapter's layout, with zeros for parts of the model's tensors that
    no pair is for. Raises InputError for a pair that fits nothing, or more than one tensor."""
    found: Products = {}
    owners: dict[str, Pair] = {}
    packed = [it for it in adapter.lora.parameters if is_packed(f"experts.{it}")]
    if packed and len(pairs) > _MOST_PACKED:
        raise no_module(adapter, pairs[0], model, rename)
    layers: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in model.tensors.items():
        layers.setdefault(_layer(name), {})[name] = spec
    for pair in pairs:
        name, product = _parameter(adapter, pair, packed, model, layers, rename) or _matrix(adapter, pair, rename)
        if (owner := owners.setdefault(name, pair)) is not pair:
            raise twice(adapter, owner.a.name, pair.a.name, name)
        shape = (product.rows, product.columns)
        spec = TensorSpec(name, "F64", shape if product.experts == 1 else (product.experts, *shape), adapter.file)
        found[name] = spec, product
    return found | _zeros(found, model, adapter.file)


def _matrix(adapter: Adapter, pair: Pair, rename: Sequence[tuple[str, str]]) -> tuple[str, Product]:
    rows, columns, scale = pair.b.shape[0], pair.a.shape[1], adapter.lora.scale(pair.module)
    return replaced(f"{pair.module}.weight", rename), Product(pair, scale, 1, rows, columns, False)


def _layer(name: str) -> str:
    """Return how the names of a layer's tensors begin."""
    found = _TO_LAYER.match(name)
    return found[0] if found is not None else ""


def _parameter(
    adapter: Adapter,
    pair: Pair,
    packed: Sequence[str],
    model: Model,
    layers: Mapping[str, dict[str, TensorSpec]],
    rename: Sequence[tuple[str, str]],
) -> tuple[str, Product] | None:
    """Return the one parameter of `target_parameters`, packed as transformers has it in memory, whose parts the model
    has in the same shapes; None if the pair is for a matrix. packed: what these are called in modules. layers: the
    model's tensors by layer."""
    found: list[tuple[str, Product]] = []
    for named in (f"{pair.module}.{it}" for it in packed):
        name, rank = replaced(named, rename), adapter.lora.rank(named)
        near = layers.get(_layer(name), {})
        experts, left = divmod(pair.a.shape[0], rank)
        inputs, outputs = pair.a.shape[1], pair.b.shape[0]
        # Older versions of PEFT took a parameter of [experts, outputs, inputs] for one of [experts, inputs, outputs].
        for transposed, sides in ((False, (outputs, inputs)), (True, (inputs, outputs))):
            spec = TensorSpec(name, "F64", (experts, *sides), adapter.file)
            fits = not left and _is_upright(spec, near)
            if fits is None:
                raise ambiguous(adapter, pair, [name])
            if fits:
                found.append((name, Product(pair, adapter.lora.scale(named), experts, *sides, transposed)))
    if len(found) > 1:
        raise ambiguous(adapter, pair, [name for name, _ in found])
    if not found and pair.a.shape[0] != adapter.lora.rank(pair.module):
        raise no_module(adapter, pair, model, rename)
    return found[0] if found else None


def _is_upright(spec: TensorSpec, near: dict[str, TensorSpec]) -> bool | None:
    """Return whether the model has the parts of a packed parameter, with the rows that they have there; None where a
    square one could be either."""
    stored, asked = layouts({spec.name: spec}, near)
    if stored.unclear and spec.shape[1] == spec.shape[2]:
        return None
    parts = stored.holds.get(spec.name, [])
    windows = [(stored.parts[part], asked.parts.get(part)) for part in parts]
    return bool(parts) and all(it is not None and it.shape == own.shape and own.is_run for own, it in windows)


def _zeros(found: Products, model: Model, file: str) -> Products:
    """Return zeros for the parts of tensors that are changed only in part."""
    stored, asked = layouts({name: spec for name, (spec, _) in found.items()}, model.tensors)
    missing = [
        part
        for parts in asked.holds.values()
        if any(part in stored.parts for part in parts)
        for part in parts
        if part not in stored.parts
    ]
    return {part: (TensorSpec(part, "F64", asked.parts[part].shape, file), None) for part in missing}
