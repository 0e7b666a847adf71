"""The plan of an output that is an adapter: one file of tensors that are sums of shares, and its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.kinds.lora.adapter import WEIGHTS
from skillmerge.checkpoints.kinds.lora.config import CONFIG_FILE, MAX_CONFIG_BYTES
from skillmerge.checkpoints.safetensors import MAX_HEADER_BYTES
from skillmerge.methods.linear import Program, compile_term
from skillmerge.methods.terms import Leaf, Sum, Term
from skillmerge.plans.adapters.joining import output_of
from skillmerge.plans.adapters.peft_config import config_file
from skillmerge.plans.layout import model_shard
from skillmerge.plans.mapping import Source
from skillmerge.plans.plan import TensorPlan
from skillmerge.recipes.recipe import Recipe
from skillmerge.tensors import format_bytes


def plan_adapter(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Any]:
    """Return tensors, shards, side files and notes of the plan. checkpoints: with the adapters as `joined` has them.

    Raises RecipeError for a formula that no adapter can hold.
    """
    output = output_of(recipe, checkpoints)
    programs: dict[tuple[str, ...], Program] = {}
    tensors: dict[str, TensorPlan] = {}
    for name, shape in output.tensors.items():
        models = tuple(output.parts[name])
        if models not in programs:
            programs[models] = sum_of(models)
        sources = tuple(Source(model, name) for model in models)
        tensors[name] = TensorPlan(
            name, "F32", shape, "join", sources, output.values[output.of[name]], programs[models]
        )
    base = checkpoints[output.base] if output.base is not None else None
    shard, config = model_shard(WEIGHTS, tensors.values()), config_file(recipe, output, base)
    for what, size, most in (
        (f"{WEIGHTS} would have a header", len(shard.header), MAX_HEADER_BYTES),
        (f"{CONFIG_FILE} would be a file", config.size, MAX_CONFIG_BYTES),
    ):
        if size > most:
            raise recipe.error(
                ("merge",),
                f"an adapter of {len(output.modules):,} modules is too large to be read again: {what} of "
                f"{format_bytes(size)}, and the most is {format_bytes(most)}",
                "leave tensors out with `ignore`, or leave `output.kind` out, which makes a model",
            )
    return {"tensors": tensors, "shards": (shard,), "side_files": (config,)}


def sum_of(models: tuple[str, ...]) -> Program:
    """Return the steps that add up the shares of these models."""
    leaves: list[Term] = [Leaf(model) for model in models]
    return compile_term(reduce(lambda left, right: Sum(left, right, minus=False), leaves))
