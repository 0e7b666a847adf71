"""Why a model shares little with the donor, and how to fix it, from names and shapes alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.errors import some
from skillmerge.methods.terms import model_of
from skillmerge.naming import layer_of, module_kind
from skillmerge.plans.advice.arrangement import Cause, parts_of
from skillmerge.plans.advice.names import rename_rules
from skillmerge.recipes.formula.tree import normalise_name
from skillmerge.recipes.recipe import Recipe
from skillmerge.tensors import TensorSpec, percent

_PLAIN = re.compile(r"[\w./~][\w./~@:+=-]*(?<!:)")
_PEFT = (
    "the adapter of peft that was trained in it is not merged",
    "merge it first, then name that folder: `model.merge_and_unload().save_pretrained(FOLDER)`",
)
_LEFT = {
    **dict.fromkeys(
        ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "base_layer",
         "modules_to_save", "original_module", "token_adapter"),
        _PEFT,
    ),
    "parametrizations": (
        "its weights are computed from others by torch.nn.utils.parametrize",
        "save it again after `torch.nn.utils.parametrize.remove_parametrizations(module, name)` for each of them",
    ),
    **dict.fromkeys(
        ("_flat_param", "flat_param"),
        (
            "FullyShardedDataParallel has flattened its tensors into one",
            "save it again from its full state dict (`StateDictType.FULL_STATE_DICT`)",
        ),
    ),
}  # fmt: skip
"""A part of a name -> what left it there, and what to do. The tensor is not the weight that its name stands for."""


def left_behind(model: str, checkpoint: Checkpoint, names: Iterable[str]) -> Cause | None:
    """Return what a library for training has left in a checkpoint that is no model's weight."""
    for name in names:
        part = next((part for part in name.split(".") if part in _LEFT), None)
        if part is not None:
            what, cure = _LEFT[part]
            return Cause(f"model `{model}` has `{name}`: {what}", cure)
    return None


def cause_of(
    recipe: Recipe, model: str, checkpoint: Checkpoint, donor_name: str, donor: Checkpoint,
    missing: Sequence[str], extra: Sequence[str],
) -> Cause:  # fmt: skip
    """Return why a model and the donor share so little. missing: what the model lacks; extra: what the donor lacks."""
    known = left_behind(model, checkpoint, extra) or left_behind(donor_name, donor, missing)
    if known is not None:
        return known
    rules = rename_rules(checkpoint.tensors, donor.tensors) or rename_rules(*parts_of(checkpoint, donor))
    if rules:
        message = f"model `{model}` has the tensors of the donor `{donor_name}` under other names: {_like(*rules[0])}"
        if recipe.entries[model_of(model)].renames:
            return Cause(message, f"change the `rename` of model `{model}`")
        if recipe.entries[model_of(model)].stack:
            return Cause(message, "give the models that it is made of a `rename`")
        return Cause(message, None, (_line(recipe, model_of(model), rules),))
    ours = {name: spec for name, spec in checkpoint.tensors.items() if name not in donor.tensors}
    theirs = {name: spec for name, spec in donor.tensors.items() if name not in checkpoint.tensors}
    if _by_layer(ours) and _by_layer(ours) == _by_layer(theirs):
        return _packed(model, ours, donor_name, theirs)
    return _unknown(recipe, model, checkpoint, donor_name, donor, missing, extra)


def share(names: Iterable[str], tensors: Mapping[str, TensorSpec]) -> float:
    """Return the share of all parameters that these tensors hold."""
    return sum(tensors[name].elements for name in names) / max(1, sum(spec.elements for spec in tensors.values()))


def _like(old: str, new: str) -> str:
    if not new:
        return f"they begin with `{old}`"
    return f"`{old}…` for `{new}…`" if old else f"they begin without `{new}`"


def _line(recipe: Recipe, model: str, rules: Sequence[tuple[str, str]]) -> str:
    """Return the model's line under `models`, with these rules."""
    written = next(name for name in recipe.document.data["models"] if normalise_name(name) == model)
    entry = recipe.document.data["models"][written]
    places = {"path": entry} if isinstance(entry, str) else entry
    where = ", ".join(f"{key}: {_scalar(str(value))}" for key, value in places.items())
    renames = ", ".join(f"{{from: {json.dumps(old)}, to: {json.dumps(new)}}}" for old, new in rules)
    return f"  {written}: {{{where}, rename: [{renames}]}}"


def _scalar(text: str) -> str:
    """Return text as YAML inside braces."""
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _by_layer(tensors: Mapping[str, TensorSpec]) -> dict[int, int]:
    """Return how many parameters each layer has."""
    found: dict[int, int] = {}
    for name, spec in tensors.items():
        if (layer := layer_of(name)) is not None:
            found[layer[1]] = found.get(layer[1], 0) + spec.elements
    return found


def _packed(model: str, ours: Mapping[str, TensorSpec], donor_name: str, theirs: Mapping[str, TensorSpec]) -> Cause:
    """Return the cause for two layouts of the same parameters."""
    experts = [[name for name in side if module_kind(name) == "expert"] for side in (ours, theirs)]
    mine, other = (names[0] for names in (experts if all(experts) else (list(ours), list(theirs))))
    shapes = [sorted(spec.shape for spec in side.values()) for side in (ours, theirs)]
    what = "the same experts, packed" if all(experts) else "the same parameters, packed"
    if shapes[0] == shapes[1]:
        what = "tensors of the same shapes, named"
    return Cause(
        f"model `{model}` and the donor `{donor_name}` store {what} differently: `{mine}` against `{other}`",
        "save both with the same version of transformers: load each with `from_pretrained`, write it with "
        "`save_pretrained`, and name the new folders",
    )


def _unknown(
    recipe: Recipe, model: str, checkpoint: Checkpoint, donor_name: str, donor: Checkpoint,
    missing: Sequence[str], extra: Sequence[str],
) -> Cause:  # fmt: skip
    if not any(name in donor.tensors for name in checkpoint.tensors):
        return Cause(
            f"`{model}` and the donor `{donor_name}` share no tensor names; check that they have the same architecture"
        )
    told, help = [], ["check that it is the right model, and complete."]
    ignored = "If the skill does not need those tensors, pass `--ignore GLOB` for each kind of name."
    if missing:
        much = percent(share(missing, donor.tensors))
        told.append(
            f"lacks {tensors_of(missing)} that the formula needs, {much} of the parameters: {some(list(missing))}"
        )
        help.append(
            ignored if recipe.of_command else "To leave these as they are in the donor, give them a coefficient of 0."
        )
    if extra:
        much = percent(share(extra, checkpoint.tensors))
        told.append(f"has {tensors_of(extra)} that the donor `{donor_name}` lacks, {much} of its parameters: "
                    f"{some(list(extra))}")  # fmt: skip
        help.append(
            ignored if recipe.of_command else "If the output does not need those tensors, name them under `ignore`."
        )
    return Cause(f"model `{model}` " + "; and it ".join(told), " ".join(dict.fromkeys(help)))


def tensors_of(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) != 1 else ''}"
