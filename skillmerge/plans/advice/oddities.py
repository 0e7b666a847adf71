"""Notes on what a recipe and its models may be, and hardly ever are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.views.by_token import ByToken
from skillmerge.recipes.recipe import Recipe


def oddities(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], donor: Checkpoint) -> Iterable[str]:
    """Yield notes on what is allowed but probably unintended."""
    if donor.naming.rename and not recipe.makes_skill:
        name = next(name for name, checkpoint in checkpoints.items() if checkpoint is donor)
        yield f"the output has the names that `{name}` is renamed to, but config.json is unchanged: check that they fit"
    if not donor.config and not recipe.makes_skill:
        yield "the donor has no config.json: no runtime can load the output"
    for name, onto in recipe.patches.items():
        if name in checkpoints and not checkpoints[name].is_checked:
            yield f"patch `{name}` does not say which model it is for: check that it is for `{onto}`"
    if recipe.by_token and not isinstance(donor, ByToken):
        yield "`vocabulary: by-token` changes nothing: the formula reads no other model's embedding or head"
    for name, value in recipe.overrides.items():
        if recipe.rules_overridden.get(name):
            yield f"--set {name}={value:g} replaces the whole `{name}` schedule, including its rules"
