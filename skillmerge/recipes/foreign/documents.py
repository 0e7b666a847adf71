"""Documents that are not recipes: mergekit's configurations, and files of other tools, recognized by their keys.

One table of data, and the recipe that says the same where there is one. Knows parsed documents only.
"""

from __future__ import annotations

import shlex
from typing import Any

_STARTS = "start one: `skillmerge init recipe.yaml`"
_DOCUMENTS = (
    (("peft_type",), "the configuration of a PEFT adapter",
     "in a recipe's `models:` write `{adapter: FOLDER}`, or `{adapter: FOLDER, onto: MODEL}`"),
    (("model_type", "architectures"), "a model's config.json", f"name its folder as a model of a recipe; {_STARTS}"),
    (("weight_map",), "the index of a model's weights", f"name its folder as a model of a recipe; {_STARTS}"),
    (("base_model", "experts"), "a configuration of mergekit-moe",
     "skillmerge puts no mixture of experts together; it merges those that there are"),
    (("base_model", "datasets"), "a configuration of Axolotl", f"recipes name finished models; {_STARTS}"),
    (("model_name_or_path", "stage"), "a configuration of LLaMA-Factory", f"recipes name finished models; {_STARTS}"),
    (("model_name_or_path",), "a configuration of a trainer", f"recipes name finished models; {_STARTS}"),
    (("actor_rollout_ref",), "a configuration of verl", f"recipes name finished models; {_STARTS}"),
    (("lock_version",), "a lock, which belongs to a recipe", "name the recipe beside it"),
    (("manifest_version",), "the manifest of an output", "to build it again: `skillmerge rebuild FOLDER`"),
    (("skill_version",), "the description of a stored skill",
     "name its folder in a recipe: `models: {math: {skill: FOLDER}}`"),
    (("on", "jobs"), "a workflow of a code host", _STARTS),
    (("services",), "a Compose file", _STARTS),
    (("apiVersion", "kind"), "a Kubernetes object", _STARTS),
    (("tokenizer_class",), "a tokenizer's configuration", f"name its folder as a model of a recipe; {_STARTS}"),
)  # fmt: skip
"""Keys that a document has, all of them; what it is; what to do."""


def recognised(data: Any, name: str) -> tuple[str, str, str] | None:
    """Return what the document of that name is that is no recipe, the key that shows it, and what to do; None if
    unknown."""
    if not isinstance(data, dict) or "skillmerge" in data:
        return None
    if is_mergekit(data):
        key = next(key for key in ("merge_method", "slices", "models") if key in data)
        fix = f"translate it: `skillmerge import {shlex.quote(name)} -o recipe.yaml`"
        return "a configuration of mergekit, not a recipe", key, fix
    if set(data) == {"gates"}:
        return "a file of gates, not a recipe", "gates", "run it on an output: `skillmerge gate FOLDER --gates FILE`"
    for keys, what, fix in _DOCUMENTS:
        if all(key in data for key in keys):
            return f"{what}, not a recipe", keys[0], fix
    return None


def is_mergekit(data: Any) -> bool:
    """Return whether a document is a configuration of mergekit."""
    listed = isinstance(data, dict) and isinstance(data.get("models"), list)
    return isinstance(data, dict) and (
        "merge_method" in data
        or "slices" in data
        or (listed and any(isinstance(item, dict) and "model" in item for item in data["models"]))
    )
