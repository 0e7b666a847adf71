"""Compares the models of a stack: whether their layers compute alike, however many each has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.plans.compare.config import FILE, compare_texts
from skillmerge.plans.compare.config_values import architecture
from skillmerge.plans.compare.found import Compared
from skillmerge.plans.compare.roles import Roles
from skillmerge.plans.stacks.config import leveled
from skillmerge.recipes.recipe import Recipe


def compare_parts(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], names: Iterable[str]) -> list[Compared]:
    """Return how the models of each stack among `names` differ from its first, whose configuration the stack has."""
    found = []
    for name in names:
        parts = dict.fromkeys(entry.model for entry in recipe.entries[name].stack)
        configs = {part: checkpoints[part].config for part in parts if checkpoints[part].config}
        first = next(iter(parts), None)
        if first in configs and len(configs) > 1:
            found += [_of_stack(name, first, it) for it in _differences(configs, first)]
    return found


def leveled_parts(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], donor: str, roles: Roles
) -> dict[str, Mapping[str, object]]:
    """Return the configurations of the donor's own models, if it is a stack, without what sets them apart by depth.
    Of those that the formula itself names, depth matters."""
    parts = dict.fromkeys(entry.model for entry in recipe.entries[donor].stack)
    named = {part for part in parts if (role := roles.get(part)) is not None and (role.added or role.subtracted)}
    like = checkpoints[donor].config
    return {part: leveled(checkpoints[part].config, like) for part in parts if part not in named}


def _differences(configs: Mapping[str, Mapping[str, object]], first: str) -> list[Compared]:
    kinds = {part: architecture(config) or "unnamed" for part, config in configs.items()}
    other = [part for part, kind in kinds.items() if kind != kinds[first]]
    if other:
        told = " and ".join(f"`{part}` is {kinds[part]}" for part in other)
        message = f"{told}, the donor `{first}` {kinds[first]}: their layers may compute other things"
        advice = "\n".join(f"check the path of `{part}`" for part in other)
        return [Compared("architecture", "model_type", FILE, "problem", kinds, False, message, advice)]
    level = {part: leveled(config, configs[first]) for part, config in configs.items()}
    return list(compare_texts({**level, first: configs[first]}, first))


def _of_stack(name: str, first: str, found: Compared) -> Compared:
    """Return a difference in words that fit a stack, which has no donor."""
    told = found.message.replace(f"the donor `{first}`", f"`{first}`").replace("the donor's", f"that of `{first}`")
    return replace(found, message=f"stack `{name}`: {told}")
