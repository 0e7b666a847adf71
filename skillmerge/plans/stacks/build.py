"""A recipe's stacks over its open models: each as a checkpoint beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from skillmerge.checkpoints.checkpoint import INDEX_FILE, Checkpoint, Naming
from skillmerge.checkpoints.stores.edited import Edited
from skillmerge.checkpoints.views.stacked import Layers, Source, Stacked, layers_of
from skillmerge.errors import InputError, RecipeError, some
from skillmerge.methods.terms import model_of
from skillmerge.plans.stacks.config import Layer, Order, Unsayable, stacked_config
from skillmerge.recipes.recipe import Recipe, StackEntry

CONFIG = "config.json"
MOST_LAYERS = 4096
"""Most layers of a recipe's stacks together. No model has a tenth of them."""

_FORM = frozenset[tuple[str, tuple[int, ...]]]
"""What a layer's tensors are called, and their shapes."""


def with_stacks(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """Return open models with the stacks of them that the recipe uses, in its order.

    Raises RecipeError for layers that there are not, that do not fit each other, or that no config.json can describe.
    """
    found, left = dict(checkpoints), MOST_LAYERS
    used = set(recipe.used_models())
    for name, entries in recipe.stacks.items():  # each behind those that it is made of
        if name in used and all(entry.model in found for entry in entries):
            found[name], count = _stack(recipe, name, entries, found, left)
            left -= count
    place = {name: number for number, name in enumerate(recipe.models)}
    return dict(sorted(found.items(), key=lambda item: place[model_of(item[0])]))


def _stack(
    recipe: Recipe, name: str, entries: Sequence[StackEntry], models: Mapping[str, Checkpoint], left: int
) -> tuple[Stacked, int]:
    layers = {entry.model: layers_of(entry.model, models[entry.model]) for entry in entries}
    chosen: list[Layer] = []
    for number, entry in enumerate(entries):
        for each in _numbers(recipe, name, number, entry, layers[entry.model].count):
            chosen.append(Layer(number, entry.model, each))
            if len(chosen) > left:
                fix = "leave layers out"
                raise recipe.error(_path(name, number), f"the stacks have more than {MOST_LAYERS} layers together", fix)
    first = entries[0].model
    _check_forms(recipe, name, chosen, layers, models)
    config, edits = models[first].config, ()
    if config:
        order = Order(
            chosen, {model: models[model].config for model in layers}, {each: it.count for each, it in layers.items()}, first
        )
        try:
            config, edits = stacked_config(order)
        except Unsayable as error:
            raise recipe.error(_path(name, error.entry), str(error), error.fix) from error
    store = Edited(
        models[first].store,
        {CONFIG: (json.dumps(config, indent=2) + "\n").encode()} if edits else {},
        lambda file: file.endswith(".index.json"),  # which speak of files that the stack does not have
    )
    naming = Naming(stack=tuple(_told(chosen)), edits=edits)
    sources = _sources(chosen, layers, models)
    return Stacked(name, recipe.models[name], models[first], sources, store, config, naming), len(chosen)


def _path(name: str, entry: int, *keys: str) -> tuple[str | int, ...]:
    return ("models", name, "stack", entry, *keys)


def _numbers(recipe: Recipe, name: str, number: int, entry: StackEntry, count: int) -> Iterator[int]:
    """Yield the layers that an entry asks for. Raises RecipeError for one that its model does not have."""
    for part in entry.layers:
        last = count - 1 if part.last is None else part.last
        if max(part.first, last) >= count:
            raise recipe.error(
                _path(name, number, "layers"),
                f"layer {max(part.first, last)} is past the last layer of `{entry.model}`, which is {count - 1}",
                f"layers are counted from 0: `{entry.model}` has 0-{count - 1}",
            )
        yield from range(part.first, last + 1)


def _sources(
    chosen: Sequence[Layer], layers: Mapping[str, Layers], models: Mapping[str, Checkpoint]
) -> dict[str, Source]:
    """Return the tensors of a stack: those outside the layers and behind them from the first model."""
    first = chosen[0].model
    whole, base = layers[first], models[first]
    inside = {name for number, layer in whole.tensors.items() for name in layer.values()}
    found = {name: (base, name) for name in base.tensors if name not in inside}
    for place, layer in enumerate(chosen):
        for rest, name in layers[layer.model].tensors[layer.number].items():
            found[f"{whole.stack}.{place}.{rest}"] = (models[layer.model], name)
    for number, layer in whole.tensors.items():  # heads for speculative decoding are numbered behind the layers
        if number >= whole.count:
            for rest, name in layer.items():
                found[f"{whole.stack}.{number - whole.count + len(chosen)}.{rest}"] = (base, name)
    return {name: _origin(*source) for name, source in found.items()}


def _origin(checkpoint: Checkpoint, name: str) -> Source:
    """Return where a tensor is, if need be in a stack's own parts: stacks of stacks are read in one step."""
    return checkpoint.sources[name] if isinstance(checkpoint, Stacked) else (checkpoint, name)


def _check_forms(
    recipe: Recipe,
    name: str,
    chosen: Sequence[Layer],
    layers: Mapping[str, Layers],
    models: Mapping[str, Checkpoint],
) -> None:
    """Raise RecipeError where a layer has other tensors than every layer of the first model, or other shapes."""
    first = chosen[0].model
    forms = {_form(layers[first], number, models[first]) for number in layers[first].tensors}
    checked: set[tuple[str, int]] = set()
    for layer in chosen:
        if layer.model == first or (layer.model, layer.number) in checked:
            continue
        checked.add((layer.model, layer.number))
        form = _form(layers[layer.model], layer.number, models[layer.model])
        if form not in forms:
            near = max(forms, key=lambda other: len(other & form))
            raise recipe.error(
                _path(name, layer.entry),
                f"layer {layer.number} of `{layer.model}` does not fit those of `{first}`: {_misfit(form, near)}",
                "stack models of one architecture and width",
            )


def _form(layers: Layers, number: int, checkpoint: Checkpoint) -> _FORM:
    return frozenset((rest, checkpoint.tensors[name].shape) for rest, name in layers.tensors[number].items())


def _misfit(form: _FORM, near: _FORM) -> str:
    ours, theirs = dict(form), dict(near)
    for rest in sorted(ours.keys() & theirs.keys()):
        if ours[rest] != theirs[rest]:
            return f"`{rest}` is {list(ours[rest])} against {list(theirs[rest])}"
    lacks, has = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
    what = f"it lacks {some([f'`{rest}`' for rest in lacks], 3)}" if lacks else ""
    return what or f"it has {some([f'`{rest}`' for rest in has], 3)} besides"


def _told(chosen: Sequence[Layer]) -> Iterator[tuple[str, str]]:
    """Yield models and ranges of their layers, as a recipe writes them."""
    for (model, _), group in groupby(enumerate(chosen), lambda it: (it[1].model, (it[1].entry, it[1].number - it[0]))):
        numbers = [layer.number for _, layer in group]
        yield model, f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"
