"""The dtype of every output tensor: `output.dtype` or its own, and warnings about precision that this loses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.errors import some
from skillmerge.recipes.recipe import Recipe
from skillmerge.recipes.schedules import matcher, near_pattern
from skillmerge.remarks import Remark, warning
from skillmerge.tensors import DTYPES, OUTPUT_DTYPES, TensorSpec


def output_specs(recipe: Recipe, donor: Checkpoint, exact: Iterable[str]) -> dict[str, TensorSpec]:
    """Return the donor's tensors, in the output's dtypes. exact: those that keep theirs.

    Raises RecipeError for a rule of `keep_dtype` that matches nothing.
    """
    wanted = OUTPUT_DTYPES.get(recipe.output.dtype)
    kept = {*exact}
    for index, glob in enumerate(recipe.output.keep_dtype):
        pattern = matcher([glob])
        found = [name for name in donor.tensors if pattern.match(name)]
        if not found:
            fix = near_pattern(glob, donor.tensors)
            fix = fix or f"globs match whole names, such as {next(iter(donor.tensors), 'a.weight')}; use * for any part"
            raise recipe.error(("output", "keep_dtype", index), f"`{glob}` matches no tensor of the donor", fix)
        kept.update(found)
    stored = stored_specs(donor)
    return {
        name: replace(spec, dtype=wanted) if wanted and DTYPES[spec.dtype].is_float and name not in kept else spec
        for name, spec in stored.items()
    }


def stored_specs(donor: Checkpoint) -> dict[str, TensorSpec]:
    """Return a model's tensors in the dtypes that it stores them in, which those that are computed do not have."""
    return {
        name: spec if (dtype := donor.written_dtype(name)) == spec.dtype else replace(spec, dtype=dtype)
        for name, spec in donor.tensors.items()
    }


def levelled(recipe: Recipe, donor: Checkpoint, wanted: Mapping[str, TensorSpec]) -> list[Remark]:
    """Return a warning where `output.dtype` rounds tensors that the donor keeps wider than most of its weights."""
    sizes: dict[str, int] = {}
    stored = stored_specs(donor)
    for spec in stored.values():
        if DTYPES[spec.dtype].is_float:
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.elements
    most = max(sizes, key=lambda dtype: sizes[dtype], default="")
    names = [
        name
        for name, spec in stored.items()
        if spec.dtype != most and DTYPES[wanted[name].dtype].itemsize < DTYPES[spec.dtype].itemsize
    ]
    if not names or recipe.makes_skill:
        return []
    globs = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))
    kept = ", ".join(f'"{glob}"' for glob in (*recipe.output.keep_dtype, *globs))
    wide = sorted({stored[name].dtype for name in names})
    return [
        warning(
            f"`output.dtype: {recipe.output.dtype}` rounds {len(names)} tensor{'s' if len(names) > 1 else ''} that the "
            f"donor keeps in {' and '.join(wide)} beside its {most}: {some(names, 4)}",
            f"to keep them as they are, add to `output:`\n  keep_dtype: [{kept}]",
            of_recipe=True,
        )
    ]
