"""A recipe's stacks over its open models: each as a checkpoint beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from skillmerge.checkpoints.checkpoint import Checkpoint, Naming
from skillmerge.checkpoints.stores.edited import Edited
from skillmerge.checkpoints.views.arranged import in_layout_of
from skillmerge.checkpoints.views.stacked import Layers, Source, Stacked, layers_of
from skillmerge.methods.terms import model_of
from skillmerge.plans.stacks.config import check_depth, stacked_config
from skillmerge.plans.stacks.forms import check_forms
from skillmerge.plans.stacks.order import Layer, Order, Unsayable
from skillmerge.recipes.entries import Part
from skillmerge.recipes.recipe import Recipe

CONFIG = "config.json"
MOST_LAYERS = 4096
"""Most layers of a recipe's stacks together. No model has a tenth of them."""
MOST_TENSORS = 1_000_000
"""Most tensors of these layers, of which each takes a kilobyte or two of memory. No model has a fifth of them."""


def with_stacks(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """Return open models with the stacks of them that the recipe uses, in its order.

    Raises RecipeError for layers that there are not, that do not fit each other, or that no config.json can describe.
    """
    found = dict(checkpoints)
    used, left, tensors = set(recipe.used_models()), MOST_LAYERS, 0
    for name, entries in recipe.stacks.items():  # each behind those that it is made of
        if name in used and all(entry.model in found for entry in entries):
            parts = _parts({entry.model: found[entry.model] for entry in entries})
            chosen = _chosen(recipe, name, parts, left)
            tensors += sum(len(parts[layer.model].tensors[layer.number]) for layer in chosen)
            if tensors > MOST_TENSORS:
                message = f"the stacks have more than {MOST_TENSORS:,} tensors together"
                raise recipe.error(recipe.place_path(name), message, "leave layers out")
            found[name] = _stack(recipe, name, parts, chosen)
            left -= len(chosen)
    place = {name: number for number, name in enumerate(recipe.models)}
    return dict(sorted(found.items(), key=lambda item: place[model_of(item[0])]))


def _parts(models: Mapping[str, Checkpoint]) -> dict[str, Layers]:
    """Return the layers of a stack's models, in the layout of the first one."""
    (name, model), *others = models.items()
    first = layers_of(name, model)
    found = {name: first}
    for name, model in others:
        layers = layers_of(name, model)
        like = dict(first.checkpoint.tensors)
        for number in layers.tensors.keys() - first.tensors.keys():  # of a deeper model
            for rest, tensor in first.tensors[first.count - 1].items():
                deeper = f"{first.stack}.{number}.{rest}"
                like[deeper] = replace(like[tensor], name=deeper)
        arranged = in_layout_of(model, like)
        found[name] = layers if arranged is model else layers_of(name, arranged)
    return found


def _chosen(recipe: Recipe, name: str, parts: Mapping[str, Layers], left: int) -> list[Layer]:
    """Return the layers of a stack. Raises RecipeError for more than are `left` to all stacks."""
    chosen: list[Layer] = []
    for number, entry in enumerate(recipe.entries[name].stack):
        for each in _numbers(recipe, name, number, entry, parts[entry.model].count):
            chosen.append(Layer(number, entry.model, each))
            if len(chosen) > left:
                message = f"the stacks have more than {MOST_LAYERS} layers together"
                raise recipe.error((*recipe.place_path(name), number), message, "leave layers out")
    return chosen


def _stack(recipe: Recipe, name: str, parts: Mapping[str, Layers], chosen: Sequence[Layer]) -> Stacked:
    """Return the stack `name`. parts: its models, the first one first."""
    first, *_ = parts
    base = parts[first].checkpoint
    order = Order(chosen, {part: it.checkpoint.config for part, it in parts.items()},
                  {part: it.count for part, it in parts.items()}, first)  # fmt: skip
    config: Mapping[str, Any] = base.config
    edits: tuple[tuple[str, Any, Any], ...] = ()
    try:
        check_forms(order, parts)
        if name in _written(recipe):
            check_depth(order)
        if config:
            config, edits = stacked_config(order)
    except Unsayable as error:
        raise recipe.error((*recipe.place_path(name), error.entry), str(error), error.fix) from error
    store = Edited(
        base.store,
        {CONFIG: (json.dumps(config, indent=2) + "\n").encode()} if edits else {},
        lambda file: file.endswith(".index.json"),  # which speak of files that the stack does not have
    )
    naming = Naming(stack=tuple(_told(chosen)), edits=edits)
    return Stacked(name, recipe.models[name], base, _sources(parts, chosen), store, config, naming)


def _written(recipe: Recipe) -> list[str]:
    """Return the stacks whose config.json the output has: the donor, and those that it begins with."""
    found: list[str] = []
    name = recipe.donor
    while name is not None and recipe.entries[name].stack:
        found.append(name)
        name = recipe.entries[name].stack[0].model
    return found


def _numbers(recipe: Recipe, name: str, number: int, entry: Part, count: int) -> Iterator[int]:
    """Yield the layers that an entry asks for. Raises RecipeError for one that its model does not have."""
    for part in entry.layers:
        last = count - 1 if part.last is None else part.last
        if max(part.first, last) >= count:
            raise recipe.error(
                (*recipe.place_path(name), number, "layers"),
                f"layer {max(part.first, last)} is past the last layer of `{entry.model}`, which is {count - 1}",
                f"layers are counted from 0: `{entry.model}` has 0-{count - 1}",
            )
        yield from range(part.first, last + 1)


def _sources(parts: Mapping[str, Layers], chosen: Sequence[Layer]) -> dict[str, Source]:
    """Return the tensors of a stack: those outside the layers and behind them from the first model."""
    first, *_ = parts.values()
    inside = {name for layer in first.tensors.values() for name in layer.values()}
    found = {name: (first.checkpoint, name) for name in first.checkpoint.tensors if name not in inside}
    for place, layer in enumerate(chosen):
        part = parts[layer.model]
        found |= {
            f"{first.stack}.{place}.{rest}": (part.checkpoint, name)
            for rest, name in part.tensors[layer.number].items()
        }
    for number, tensors in first.tensors.items():  # heads for speculative decoding are numbered behind the layers
        if number >= first.count:
            place = number - first.count + len(chosen)
            found |= {f"{first.stack}.{place}.{rest}": (first.checkpoint, name) for rest, name in tensors.items()}
    return {name: _origin(*source) for name, source in found.items()}


def _origin(checkpoint: Checkpoint, name: str) -> Source:
    """Return where a tensor is, if need be in a stack's own parts: stacks of stacks are read in one step."""
    return checkpoint.sources[name] if isinstance(checkpoint, Stacked) else (checkpoint, name)


def _told(chosen: Sequence[Layer]) -> Iterator[tuple[str, str]]:
    """Yield models and ranges of their layers, as a recipe writes them."""
    for (model, _), group in groupby(enumerate(chosen), lambda it: (it[1].model, (it[1].entry, it[1].number - it[0]))):
        numbers = [layer.number for _, layer in group]
        yield model, f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"
