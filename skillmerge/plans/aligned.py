"""Models as the donor has them: in its layout of experts and projections. Each step is a view, one after the other."""

from __future__ import annotations

from collections.abc import Mapping

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.kinds.lora.adapter import Adapter
from skillmerge.checkpoints.views.arranged import in_layout_of
from skillmerge.recipes.recipe import Recipe


def aligned(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """Return the models of a recipe, open under the names that they are read by, as the donor has its weights."""
    donor = checkpoints.get(recipe.donor or "")
    if donor is None or isinstance(donor, Adapter):
        return dict(checkpoints)
    return {
        # The difference of an adapter is made in the donor's layout later.
        name: it if it is donor or isinstance(it, Adapter) else in_layout_of(it, donor.tensors)
        for name, it in checkpoints.items()
    }
