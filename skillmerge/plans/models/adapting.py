"""A recipe's adapters: put onto their models, or as differences with the tensors of the donor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from skillmerge.checkpoints.checkpoint import Checkpoint, named
from skillmerge.checkpoints.kinds.lora.adapter import Adapter
from skillmerge.checkpoints.views.adapted import difference, onto
from skillmerge.checkpoints.views.fitting import Model, own_tensors
from skillmerge.checkpoints.views.renamed import replaced
from skillmerge.plans.adapters.joining import joined
from skillmerge.plans.compare.roles import token_matrices
from skillmerge.recipes.recipe import Recipe
from skillmerge.tensors import TensorSpec

_GROWN = "add to the recipe `vocabulary: by-token`, and the tokenizer that it was trained with to its folder"


def put_onto(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """Return the checkpoints with each adapter that is put onto a model as that model. Those that are differences stay
    as they are, and all do for an output that is an adapter. Raises InputError for an adapter of another model."""
    found = dict(checkpoints)
    if recipe.makes_adapter:
        return found

    def put(name: str) -> Checkpoint:
        checkpoint, entry = found[name], recipe.entries.get(name)
        if isinstance(checkpoint, Adapter) and entry is not None and entry.onto is not None:
            found[name] = onto(checkpoint, put(entry.onto), entry.renames)
        return found[name]

    for name in checkpoints:
        put(name)
    return found


def as_differences(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], shape: Model | None = None
) -> dict[str, Checkpoint]:
    """Return the checkpoints with the remaining adapters as the differences that they are; for an output that is an
    adapter, as their shares of it.

    They have the tensors of `shape`, by default those of the donor; where that is an adapter too, those that the
    adapters themselves describe. Raises InputError for an adapter that does not fit, or is no difference.
    """
    if recipe.makes_adapter:
        return joined(recipe, checkpoints)
    left = {name: it for name, it in checkpoints.items() if isinstance(it, Adapter)}
    if not left:
        return dict(checkpoints)
    donor = checkpoints.get(recipe.donor or "")
    if shape is not None:
        model = shape
    elif donor is None or isinstance(donor, Adapter):
        tensors: dict[str, TensorSpec] = {}
        for name, adapter in left.items():
            tensors |= own_tensors(adapter, recipe.entries[name].renames)
        model = Model("another adapter", tensors, {})
    else:
        model = Model(donor.place, donor.tensors, donor.config, _GROWN)
    found: dict[str, Checkpoint] = {}
    for name, checkpoint in checkpoints.items():
        if isinstance(checkpoint, Adapter):
            renames = recipe.entries[name].renames
            fitted = _with_rows_of(checkpoint, model, renames) if recipe.by_token else model
            found |= named(name, difference(checkpoint, fitted, renames))
        else:
            found[name] = checkpoint
    return found


def _with_rows_of(adapter: Adapter, model: Model, rename: Sequence[tuple[str, str]]) -> Model:
    """Return a model with as many tokens as an adapter was trained with: its rows are matched by token later."""
    tensors = dict(model.tensors)
    matrices = token_matrices(tensors.values(), model.config)
    for pair in adapter.parts.pairs:
        name = replaced(f"{pair.module}.weight", rename)
        if name in matrices:
            rows = pair.a.shape[1] if pair.embedding or adapter.lora.transposed else pair.b.shape[0]
            tensors[name] = replace(tensors[name], shape=(rows, *tensors[name].shape[1:]))
    return replace(model, tensors=tensors)
