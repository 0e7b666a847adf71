"""Which tensor goes into which file, and where in it: the headers and offsets of every shard."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from skillmerge.checkpoints.checkpoint import SINGLE_FILE, Checkpoint, in_shards
from skillmerge.checkpoints.safetensors import MAX_NAME, build_header
from skillmerge.errors import InputError
from skillmerge.plans.plan import ShardPlan, TensorPlan
from skillmerge.recipes.recipe import Recipe
from skillmerge.tensors import DTYPES, UNIT, StoredTensor

_PART_NAME = 40
"""Characters that the parts of a tensor add to its name."""

SKILL_SHARD = 4_000_000_000
"""Bytes of dense tensors whose parts go into one file of a skill."""

_SKILL_HEADER = 6_000_000
"""Bytes of the header of one file of a skill. With another number, saved plans would have other files."""


def lay_out_skill(recipe: Recipe, tensors: Mapping[str, TensorPlan]) -> tuple[ShardPlan, ...]:
    """Return a skill's files: tensors in the donor's order, each file at most a shard in size if no element were zero.

    Their specs say where they would be then; where their parts are is known when they are made.
    """
    limit, filled, header = recipe.output.shard_size or SKILL_SHARD, 0, 0
    groups: list[list[TensorPlan]] = [[]]
    for plan in tensors.values():
        if plan.action == "same" or not DTYPES[plan.dtype].is_float:  # a coefficient of 0 leaves nothing of the latter
            continue
        if len(plan.name) > MAX_NAME - _PART_NAME:
            raise InputError(f"tensor `{plan.name[:80]}…` has a name too long for the parts of a skill")
        # Six parts a unit at most, each with its place and shape beside its name.
        entries = 6 * -(-math.prod(plan.shape) // UNIT) * (len(plan.name.encode()) + 160)
        if groups[-1] and (filled + _nbytes(plan) > limit or header + entries > _SKILL_HEADER):
            groups.append([])
            filled = header = 0
        groups[-1].append(plan)
        filled += _nbytes(plan)
        header += entries
    shards = []
    for number, group in enumerate(groups, 1):
        shards.append(skill_shard(f"skill-{number:05d}-of-{len(groups):05d}.safetensors", group))
    return tuple(shards)


def skill_shard(file: str, tensors: Iterable[TensorPlan]) -> ShardPlan:
    """Return one file of a skill."""
    specs: list[StoredTensor] = []
    end = 0
    for plan in tensors:
        specs.append(StoredTensor(plan.name, plan.dtype, plan.shape, file, end, end + _nbytes(plan)))
        end = specs[-1].end
    return ShardPlan(file, b"", tuple(specs))


def lay_out(recipe: Recipe, donor: Checkpoint, tensors: Mapping[str, TensorPlan]) -> tuple[ShardPlan, ...]:
    """Return the output's files: the donor's own layout, or shards of at most the requested size."""
    limit = recipe.output.shard_size
    shards = []
    for file, names in _as_donor(donor) if limit is None else _by_size(tensors, limit):
        shards.append(model_shard(file, (tensors[name] for name in names)))
    return tuple(shards)


def model_shard(file: str, tensors: Iterable[TensorPlan]) -> ShardPlan:
    """Return one file of a model."""
    return ShardPlan(file, *build_header(((it.name, it.dtype, it.shape) for it in tensors), file))


def _as_donor(donor: Checkpoint) -> list[tuple[str, list[str]]]:
    return [(name if donor.indexed else SINGLE_FILE, list(file.tensors)) for name, file in donor.files.items()]


def _by_size(tensors: Mapping[str, TensorPlan], limit: int) -> list[tuple[str, list[str]]]:
    return in_shards({name: _nbytes(plan) for name, plan in tensors.items()}, limit)


def _nbytes(plan: TensorPlan) -> int:
    return math.prod(plan.shape) * DTYPES[plan.dtype].bits // 8
