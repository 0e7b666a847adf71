"""Slices whose layers move, repeat or are left out: the stacks of layers that they are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from skillmerge.naming import layer_of, module_kind
from skillmerge.recipes.mergekit.config import Config
from skillmerge.recipes.mergekit.notes import Refused

_MOST = 1000
"""Most parts of a stack in a recipe."""
_BEHIND = ("model.norm.*", "lm_head.*", "transformer.ln_f.*")
"""What stands behind the layers of nearly all language models: the final norm, and the head."""


@dataclass(frozen=True, slots=True)
class Stacks:
    """parts: name of a stack -> models of the recipe, and the first and the last layer that it takes of each. names:
    place -> the name of the stack that stands for the model. behind: the model that final norm and head are of, where
    that is not the first of the only stack; None otherwise."""

    parts: Mapping[str, tuple[tuple[str, int, int], ...]]
    names: Mapping[str, str]
    behind: str | None = None


def stacks_of(config: Config, names: Mapping[str, str]) -> Stacks | None:
    """Return the stacks of a document, or None if every layer stays in its place. names: of places. Raises Refused."""
    if not config.moves:
        return None
    if config.method == "passthrough":
        name = _free("stacked", names.values())
        found = [(model, *region.taken[model]) for region in config.regions for model in region.taken]
        first, last = found[0][0], found[-1][0]
        return Stacks({name: _joined(found, names)}, dict.fromkeys(names, name), names[last] if last != first else None)
    if config.base is not None and not config.listed:
        raise Refused(
            "the slices move layers, and which of the base they are merged with is not said", "base_model",
            fix="list the base in each slice, with a `layer_range`",
        )  # fmt: skip
    called = {place: _free(f"{name}_stacked", names.values()) for place, name in names.items()}
    parts = {
        called[model]: _joined(
            [(model, *region.taken[model]) for region in config.regions if model in region.taken], names
        )
        for model in config.models
    }
    return Stacks(parts, called)


def behind_layers(tensors: Iterable[str] | None) -> list[str]:
    """Return the names of final norm and head, as far as the tensors are known, or globs for them."""
    names = [name for name in tensors or () if layer_of(name) is None and module_kind(name) in ("norm", "head")]
    return names or list(_BEHIND)


def stacked(tensors: Iterable[str], stacks: Stacks) -> frozenset[str]:
    """Return the names of a stack's tensors. tensors: those of one of its models; the others are alike, but may be
    deeper, with further layers like the last one."""
    names: set[str] = set()
    layers: dict[str, dict[int, set[str]]] = {}
    for name in tensors:
        layer = layer_of(name)
        if layer is None:
            names.add(name)
        else:
            rest = name.removeprefix(f"{layer[0]}.").partition(".")[2]
            layers.setdefault(layer[0], {}).setdefault(layer[1], set()).add(rest)
    numbers = (number for _, first, last in next(iter(stacks.parts.values())) for number in range(first, last + 1))
    for place, number in enumerate(numbers):
        for stack, found in layers.items():
            names |= {f"{stack}.{place}.{rest}" for rest in found.get(min(number, max(found)), ())}
    return frozenset(names)


def _joined(found: Iterable[tuple[str, int, int]], names: Mapping[str, str]) -> tuple[tuple[str, int, int], ...]:
    """Return the parts of a stack; those that continue each other are one."""
    parts: list[tuple[str, int, int]] = []
    for model, first, last in found:
        if parts and parts[-1][0] == names[model] and parts[-1][2] + 1 == first:
            parts[-1] = (parts[-1][0], parts[-1][1], last)
        else:
            parts.append((names[model], first, last))
    if len(parts) > _MOST:
        raise Refused(f"there are {len(parts)} slices, and a stack has at most {_MOST} parts", "slices")
    return tuple(parts)


def _free(name: str, taken: Iterable[str]) -> str:
    names = {*taken}
    while name in names:
        name += "_"
    return name
