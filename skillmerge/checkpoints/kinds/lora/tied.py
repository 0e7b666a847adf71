"""Heads that an adapter changes beside the embedding that they are tied to: one change, where a model stores one of the
two. What the adapter holds of both has to be the same, which is only known when it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from skillmerge.checkpoints.kinds.lora.config import LoraConfig
from skillmerge.checkpoints.kinds.lora.parts import Pair, Parts, Rows, Same
from skillmerge.tensors import StoredTensor

_MOST = 4
"""Heads that are looked at: more than any model has."""


def as_one(
    parts: Parts, config: LoraConfig, is_head: Callable[[str], bool], is_embedding: Callable[[str], bool]
) -> Parts:
    """Return the parts with those of heads as conditions of the embedding's, as far as the same can be done to both.

    is_head: whether a tensor that is changed is a head that the model does not store. is_embedding: whether it is an
    embedding.
    """
    pairs, rows = list(parts.pairs), list(parts.rows)
    replaced, same = dict(parts.replaced), dict(parts.same)
    for pair in [it for it in pairs if is_head(f"{it.module}.weight")][:_MOST]:
        alike = [it for it in pairs if is_embedding(f"{it.module}.weight") and _are_alike(it, pair, config)]
        if len(alike) == 1:
            both = Same(alike[0].b, pair.a, turned=True), Same(alike[0].a, pair.b, turned=True)
            joint = replace(alike[0], same=(*alike[0].same, *both), copies=(*alike[0].copies, *pair.copies))
            pairs = [joint if it is alike[0] else it for it in pairs if it is not pair]
    for head in [it for it in rows if is_head(f"{it.module}.weight")][:_MOST]:
        found = [it for it in rows if is_embedding(f"{it.module}.weight") and _are_rows_alike(it, head)]
        if len(found) == 1:
            copies = (*found[0].copies, *head.copies)
            joined = replace(found[0], same=(*found[0].same, Same(found[0].values, head.values)), copies=copies)
            rows = [joined if it is found[0] else it for it in rows if it is not head]
    for name in [it for it in replaced if is_head(it)][:_MOST]:
        names = [it for it, other in replaced.items() if is_embedding(it) and other.shape == replaced[name].shape]
        if len(names) == 1:
            one = Same(replaced[names[0]], replaced.pop(name))
            same[names[0]] = (*same.get(names[0], ()), one, *same.pop(name, ()))
    return Parts(tuple(pairs), tuple(rows), replaced, same)


def _are_alike(embedding: Pair, head: Pair, config: LoraConfig) -> bool:
    """Return whether the product of a head can be that of an embedding."""
    return (
        embedding.embedding
        and not head.embedding
        and not (embedding.magnitude or head.magnitude or head.bias)
        and (embedding.a.shape, embedding.b.shape) == (head.b.shape[::-1], head.a.shape[::-1])
        and config.scale(embedding.module) == config.scale(head.module)
    )


def _are_rows_alike(embedding: Rows, head: Rows) -> bool:
    return embedding.rows == head.rows and _shape(embedding.values) == _shape(head.values)


def _shape(spec: StoredTensor) -> tuple[str, tuple[int, ...]]:
    return spec.dtype, spec.shape
