"""`adapter_config.json` of an output that is an adapter: what PEFT needs to load it, the same for the same recipe."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from typing import Any

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.kinds.lora.adapter import WEIGHTS, Adapter
from skillmerge.checkpoints.kinds.lora.config import CONFIG_FILE, MAX_CONFIG_BYTES
from skillmerge.checkpoints.place import PlaceError, on_hub
from skillmerge.checkpoints.schemes import is_path
from skillmerge.checkpoints.store import read_json_object
from skillmerge.plans.adapters.joining import Module, Output
from skillmerge.plans.side_files import SideFile
from skillmerge.recipes.recipe import Recipe


def config_file(recipe: Recipe, output: Output, base: Checkpoint | None) -> SideFile:
    """Return the configuration. base: the model that the recipe puts the adapters onto, if it names one.

    Raises RecipeError for adapters of which some store matrices transposed, and some do not.
    """
    said = [_said(adapter) for adapter in output.adapters.values()]
    named, revision = _base(recipe, output, said, base)
    counts = Counter(module.rank for module in output.modules)
    rank = max(counts, key=lambda it: (counts[it], it))
    ranks = _patterns(output.modules, rank)
    document: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": _common(said, "task_type"),
        "base_model_name_or_path": named,
        "revision": revision,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "lora_dropout": 0.0,
        "bias": "none",
        **({"lora_bias": True} if output.biases else {}),
        "fan_in_fan_out": _transposed(recipe, output),
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": sorted(module.target for module in output.modules if not module.parameter),
    }
    if parameters := sorted(module.target for module in output.modules if module.parameter):
        document["target_parameters"] = parameters
    return SideFile.of(CONFIG_FILE, (json.dumps(document, indent=2) + "\n").encode())


def _said(adapter: Adapter) -> dict[str, Any]:
    return read_json_object(adapter.store, adapter.file.replace(WEIGHTS, CONFIG_FILE), MAX_CONFIG_BYTES)


def _common(said: list[dict[str, Any]], key: str) -> str | None:
    """Return what all adapters say, None if they say different things."""
    values = {value for it in said if isinstance(value := it.get(key), str)}
    return next(iter(values)) if len(values) == 1 else None


def _base(
    recipe: Recipe, output: Output, said: list[dict[str, Any]], base: Checkpoint | None
) -> tuple[str | None, str | None]:
    """Return the model that the adapter names as its base, and its revision: the recipe's, where it is another one on
    the Hub; else the one that the adapters name; else the recipe's folder."""
    names = {adapter.lora.base.rstrip("/") for adapter in output.adapters.values() if adapter.lora.base}
    named = base is not None and output.base is not None and not recipe.entries[output.base].stack
    uri = base.uri if base is not None and named else ""
    with suppress(PlaceError):
        location = on_hub(uri)
        if base is not None and location is not None and not location.subfolder and names != {location.repository}:
            return location.repository, base.at.revision or location.revision or None
    if len(names) == 1:
        return next(iter(names)), _common(said, "revision")
    return (uri, None) if uri and is_path(uri) else (None, None)


def _patterns(modules: list[Module], rank: int) -> dict[str, int]:
    """Return the ranks that are not `rank`, by module.

    PEFT takes the first key that a module's name is, or ends with after a dot. Longer keys come first, and a module
    whose name ends with a key of another one has its own.
    """
    found = {module.target: module.rank for module in modules}
    keys = {name for name, it in found.items() if it != rank}
    for name in found:
        parts = name.split(".")
        if any(".".join(parts[start:]) in keys for start in range(1, len(parts))):
            keys.add(name)
    return {name: found[name] for name in sorted(keys, key=lambda name: (-len(name), name))}


def _transposed(recipe: Recipe, output: Output) -> bool:
    """Return `fan_in_fan_out`, which only square matrices depend on: the shape of any other tells which way it is."""
    plain = [it for it in output.modules if not it.parameter and not it.product.pair.embedding]
    squares = {it.product.transposed: it for it in plain if it.product.rows == it.product.columns}
    if len(squares) > 1:
        names = " and ".join(f"`{it.tensor}`" for it in squares.values())
        raise recipe.error(
            ("merge",), f"only one of {names} is stored transposed, and an adapter says it of all (`fan_in_fan_out`)",
            "leave one of them out with `ignore`, or leave `output.kind` out, which makes a model",
        )  # fmt: skip
    return next(iter(squares)) if squares else any(it.product.transposed for it in plain)
