"""Models as the donor has them: in its layout of experts and projections. Each step is a view, one after the other."""

from __future__ import annotations

from collections.abc import Mapping

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.kinds.lora.adapter import Adapter
from skillmerge.checkpoints.views.arranged import in_layout_of
from skillmerge.recipes.recipe import Recipe


def aligned(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """Return the models of a recipe, open under the names that they are read by, as the donor has its weights; as they
    are where it is not among them. Adapters that are differences are of no model yet, and stay as they are."""
    donor = checkpoints.get(recipe.donor or "")
    if donor is None or isinstance(donor, Adapter):
        return dict(checkpoints)
    own = {name for name, it in checkpoints.items() if it is donor or isinstance(it, Adapter)}
    return {name: it if name in own else in_layout_of(it, donor.tensors) for name, it in checkpoints.items()}
