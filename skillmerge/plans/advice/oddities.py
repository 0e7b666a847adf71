"""Notes on what a recipe and its models may be, and hardly ever are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from skillmerge.checkpoints.checkpoint import Checkpoint, View
from skillmerge.checkpoints.kinds.lora.parts import PREFIX
from skillmerge.checkpoints.model_config import layers_in
from skillmerge.checkpoints.views.adapted import Adapted, AdapterPlane
from skillmerge.checkpoints.views.by_token import ByToken
from skillmerge.checkpoints.views.renamed import WRAPPERS
from skillmerge.errors import some
from skillmerge.methods.terms import model_of
from skillmerge.naming import layer_of
from skillmerge.recipes.recipe import Recipe
from skillmerge.remarks import Remark, warning


def oddities(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], donor: Checkpoint) -> Iterable[str]:
    """Yield notes on what is allowed but probably unintended."""
    if donor.naming.rename and not recipe.makes_skill:
        name = next(name for name, checkpoint in checkpoints.items() if checkpoint is donor)
        yield f"the output has the names that `{name}` is renamed to, but config.json is unchanged: check that they fit"
    if not donor.config and not recipe.makes_skill:
        yield "the donor has no config.json: no runtime can load the output"
    if donor.naming.stack and not recipe.makes_skill:
        yield from _of_stack(donor)
    for name, onto in recipe.patches.items():
        if name in checkpoints and not checkpoints[name].is_checked:
            yield f"patch `{name}` does not say which model it is for: check that it is for `{onto}`"
    if recipe.by_token and not isinstance(donor, ByToken):
        yield "`vocabulary: by-token` changes nothing: the formula reads no other model's embedding or head"
    for name, value in recipe.overrides.items():
        if recipe.rules_overridden.get(name):
            yield f"--set {name}={value:g} replaces the whole `{name}` schedule, including its rules"
    yield from _read_otherwise(recipe.donor, checkpoints)


def _read_otherwise(donor: str | None, checkpoints: Mapping[str, Checkpoint]) -> Iterator[str]:
    """Yield notes on what training libraries added to tensor names, which is removed, and on models that store the
    donor's tensors in another layout."""
    for name, naming in ((name, it.naming) for name, it in checkpoints.items() if name == model_of(name)):
        if naming.unwrapped:
            parts = " and ".join(f"`{part}.` ({WRAPPERS.get(part, part)})" for part in naming.unwrapped)
            yield f"model `{name}` is read without {parts} in the names of its tensors"
        if naming.layout:
            yield f"model `{name}` is read in the layout of `{donor}`: {', '.join(naming.layout)}"


def unlike_bases(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> Iterator[Remark]:
    """Yield a warning where adapters of one formula say that they were trained on different models: then they do not
    start from the same weights, and their difference may be no skill."""
    groups: dict[str | None, dict[str, str]] = {}
    for name in recipe.adapters:
        base = checkpoints[name].trained_on if name in checkpoints else None
        if base is not None:
            groups.setdefault(recipe.entries[name].onto, {}).setdefault(base.rstrip("/"), name)
    for bases in groups.values():
        if len(bases) > 1:
            (first, one), (second, other), *_ = bases.items()
            yield warning(
                f"adapter `{one}` says that it was trained on `{first}`, and `{other}` on `{second}`",
                "if RL continued the SFT adapter, its skill is the difference of the two; if it started from the "
                "merged SFT model, its skill is its adapter alone",
                name="adapter-base",
            )


def shallow_adapters(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> Iterator[Remark]:
    """Yield a warning for each adapter that changes the first layers of a model alone, as one of a model with fewer
    layers does. Nothing else shows that: an adapter does not say how many layers its model has. With
    `layers_to_transform` it is meant."""
    for name, checkpoint in checkpoints.items():
        while isinstance(checkpoint, View):
            checkpoint = checkpoint.beneath
        if name != model_of(name) or not isinstance(checkpoint, Adapted | AdapterPlane):
            continue
        if checkpoint.adapter.lora.chosen:
            continue
        of_model, said = recipe.entries[name].onto or recipe.donor, layers_in(checkpoint.config)
        changed = _layers(checkpoint.changes)
        for stack, found in _layers(checkpoint.tensors).items():
            count = len(found) if said is None else said  # layers behind the last one predict further tokens
            first = changed.get(stack, set())
            if len(first) < count <= len(found) and first == set(range(len(first))) and first:
                yield warning(
                    f"adapter `{name}` changes the first {len(first)} of {count} layers of `{of_model}`, "
                    "as if it was trained on a model with fewer layers",
                    "name a model with as many layers; for a stack, put the adapter `onto:` its own model, and stack "
                    "that model with the adapter and without it",
                    name="architecture",
                )


def ramps_over_adapters(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> Iterator[Remark]:
    """Yield a warning where a ramp goes over layers that only adapters show, and these are not all of a model's."""
    ramps = [name for name, schedule in recipe.coefficients.items() if any(rule.ramp for rule in schedule.rules)]
    if not ramps or {recipe.entries[name].kind for name in recipe.used_models()} != {"adapter"}:
        return
    tensors = (name for checkpoint in checkpoints.values() for name in checkpoint.own.tensors)
    for stack, found in _layers(name.removeprefix(PREFIX) for name in tensors).items():
        if found != set(range(len(found))):
            shown = some([str(it) for it in sorted(found)], 4)
            yield warning(
                f"the ramp of `{ramps[0]}` goes over layers {shown} of `{stack}` alone, which the adapters change: "
                "no model in the recipe shows how many there are",
                "to have it over all layers of the model, give the adapters `onto:` that model",
            )


def _layers(tensors: Iterable[str]) -> dict[str, set[int]]:
    """Return the numbers of the layers of each stack that tensors are in."""
    found: dict[str, set[int]] = {}
    for layer in filter(None, map(layer_of, tensors)):
        found.setdefault(layer[0], set()).add(layer[1])
    return found


def _of_stack(donor: Checkpoint) -> Iterator[str]:
    """Yield what the output's configuration says of its layers."""
    first = donor.naming.stack[0][0]
    if donor.naming.edits:
        edits = [f"`{key}`{_instead(old, new)}" for key, old, new in donor.naming.edits]
        yield f"config.json of the output is that of `{first}`, but for {', '.join(edits)}"
    elif donor.config and layers_in(donor.config) is None:
        yield f"config.json of `{first}` does not say how many layers there are: check that the output loads"


def _instead(old: Any, new: Any) -> str:
    return "" if isinstance(new, list | str) else f" ({new} instead of {old})"
