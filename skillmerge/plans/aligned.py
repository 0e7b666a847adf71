"""Models as the donor has them: in its layout of experts and projections. Each step is a view, one after the other."""

from __future__ import annotations

from collections.abc import Mapping

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.views.arranged import in_layout_of
from skillmerge.recipes.recipe import Recipe


def aligned(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """Return the models of a recipe, open under the names that they are read by, as the donor has its weights."""
    if recipe.donor is None:
        return dict(checkpoints)
    wanted = checkpoints[recipe.donor].tensors
    return {
        name: checkpoint if name == recipe.donor else in_layout_of(checkpoint, wanted)
        for name, checkpoint in checkpoints.items()
    }
