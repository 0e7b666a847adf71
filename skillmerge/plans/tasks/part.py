"""Some shards of a saved plan as a plan of their own, which computes the same bytes.

Everything is taken from the saved plan; of the models only the files that these shards read are opened. What the whole
output needs (side files, ties, gates, other models' tensors) is the business of who finishes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.errors import InputError, UsageError
from skillmerge.methods.linear import Program, compile_term
from skillmerge.methods.terms import model_of
from skillmerge.plans.adapters.planning import sum_of
from skillmerge.plans.layout import model_shard, skill_shard
from skillmerge.plans.mapping import Source
from skillmerge.plans.opening import Access, close_all
from skillmerge.plans.plan import Plan, ShardPlan, TensorPlan
from skillmerge.plans.planner import inputs_of
from skillmerge.plans.saved import SavedPlan, damage
from skillmerge.plans.tasks.opening import open_parts

_FORMULA = ("merge", "cut", "compute")
"""Actions that compute the recipe's expression."""

_SUMS = ("cast", "join")
"""Actions that add up their sources, of which there may be one."""


@contextmanager
def part_of(
    saved: SavedPlan, digests: tuple[str, str], shards: Sequence[str], access: Access
) -> Iterator[tuple[Plan, Mapping[str, Checkpoint]]]:
    """Yield the plan of some shards, and its models as far as it reads them, open while the context lasts.

    digests: those of `SavedPlan.digests`. Raises StalePlan where the plan does not hold any more, UsageError where it
    is damaged; RecipeError, InputError, TemporaryError.
    """
    with damage(saved.path):
        by_shard = _tensors(saved, shards)
        planned = tuple(_shard(saved, file, tensors) for file, tensors in by_shard.items())
        tensors = {it.name: it for group in by_shard.values() for it in group}
        needed: dict[str, set[str]] = {}
        for tensor in tensors.values():
            for model, source in tensor.sources:
                needed.setdefault(model, set()).add(source)
    checkpoints = open_parts(saved, needed, shards, access)
    models = [name for name in checkpoints if name == model_of(name)]
    try:
        yield (
            Plan(
                recipe=saved.recipe,
                donor=saved.document["donor"],
                coefficients=tuple(saved.recipe.coefficients),
                tensors=tensors,
                shards=planned,
                side_files=(),
                ties=(),
                problems=(),
                notes=(),
                weights_digest=digests[0],
                digest=digests[1],
                **{**inputs_of(models, checkpoints, tensors), "versions": saved.document["versions"]},
            ),
            checkpoints,
        )
    finally:
        close_all(checkpoints)


def refuse_problems(saved: SavedPlan) -> None:
    """Raise InputError if the plan has problems, which its recipe has to settle first."""
    with damage(saved.path):
        problems = [problem["message"] for problem in saved.document.get("problems", ())]
    if count := len(problems):
        raise InputError(
            f"{saved.path} has {count} problem{'s' if count > 1 else ''} between the models:\n" + "\n".join(problems),
            fix=f"settle them in the recipe, then plan again: {saved.recipe.command('plan')}",
        )


def _tensors(saved: SavedPlan, shards: Sequence[str]) -> dict[str, list[TensorPlan]]:
    """Return the tensors of each shard, in the order of their bytes."""
    programs: dict[Any, Program | None] = {}  # thousands of tensors share a few
    found: dict[str, list[TensorPlan]] = {shard: [] for shard in shards}
    for row in saved.document["tensors"]:
        if row["file"] in found:
            found[row["file"]].append(_tensor(saved, row, programs))
    return found


def _tensor(saved: SavedPlan, row: Mapping[str, Any], programs: dict[Any, Program | None]) -> TensorPlan:
    sources = tuple(Source(model, tensor) for model, tensor in row["sources"])
    if row.get("slices"):
        whole = TensorPlan(row["name"], row["dtype"], tuple(row["shape"]), row["action"], sources)
        return replace(whole, slices=tuple(_slice(saved, row, it, programs) for it in row["slices"]))
    values = tuple(row["coefficients"])
    program = None
    if row["action"] in _FORMULA or row["action"] in _SUMS:
        key: Any = ("formula", *values) if row["action"] in _FORMULA else ("sum", *(source.model for source in sources))
        if key not in programs:
            programs[key] = _program(saved, key)
        program = programs[key]
        if program is None or program.models != tuple(source.model for source in sources):
            raise ValueError(f"tensor `{row['name']}` has other sources than its formula")
    if program is not None and (call := next((call for call in program.calls if call.by_model), None)):
        raise UsageError(
            f"`{call.method}` with scope=model has to read the whole model, and a task reads its share only",
            fix="write scope=matrix in the recipe, or merge on one machine: `skillmerge apply`",
        )
    return TensorPlan(row["name"], row["dtype"], tuple(row["shape"]), row["action"], sources, values, program)


def _slice(
    saved: SavedPlan, row: Mapping[str, Any], piece: Mapping[str, Any], programs: dict[Any, Program | None]
) -> TensorPlan:
    """Return what happens to a run of experts of a packed tensor."""
    first, last = piece["experts"]
    if not 0 <= first <= last < row["shape"][0]:
        raise ValueError(f"tensor `{row['name']}` has no experts {first}-{last}")
    key = ("formula", *piece["coefficients"])
    if key not in programs:
        programs[key] = _program(saved, key)
    program = programs[key]
    own = [
        source
        for model in (program.models if program is not None else ())
        for source in row["sources"]
        if source[0] == model
    ]
    found = _tensor(saved, {**row, **piece, "sources": own, "slices": None}, programs)
    return replace(found, experts=(first, last + 1))


def _program(saved: SavedPlan, key: tuple[Any, ...]) -> Program | None:
    """Return the steps of the formula with these coefficients, or those that add up models."""
    what, *values = key
    if what == "sum":
        return sum_of(tuple(values))
    term = saved.recipe.term(dict(zip(saved.recipe.coefficients, values, strict=True)))
    return compile_term(term) if term is not None else None


def _shard(saved: SavedPlan, file: str, tensors: Sequence[TensorPlan]) -> ShardPlan:
    shard = (skill_shard if saved.recipe.makes_skill else model_shard)(file, tensors)
    if shard.size != saved.sizes[file]:
        raise ValueError(f"shard {file} has another size than its tensors")
    return shard
