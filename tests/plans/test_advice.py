"""Models whose names do not meet: what is the matter is told, and no rule that would leave little of the skill."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_tensors, read_checkpoint, run_cli, tensor_shapes, weights, write_checkpoint, write_family

import skillmerge
from skillmerge.errors import InputError
from skillmerge.plans.accounting import Problem, settlement
from skillmerge.plans.advice.names import rename_rules
from skillmerge.tensors import TensorSpec

Rename = Callable[[str], str]
Edit = Callable[..., Path]


def renamed(folder: Path, rename: Rename, **more: torch.Tensor) -> None:
    """Give the tensors of a checkpoint other names, and add some."""
    tensors = {rename(name): tensor for name, tensor in read_checkpoint(folder).items()} | more
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    write_checkpoint(folder, tensors)


def nested(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def told(recipe: Path) -> tuple[list[str], str]:
    """The messages of the problems, and what would settle them."""
    plan = skillmerge.plan(recipe)
    return [problem.message for problem in plan.problems], settlement(plan.recipe, plan.problems)


def test_names_that_differ_in_a_prefix_are_told_with_the_rename(family: Path, edit: Edit) -> None:
    """Pasted rules once copied all but one tensor, and the output was the target (unsloth-zoo#158)."""
    folder = family.parent
    wanted = weights(skillmerge.apply(family, folder / "plain").output)
    for model in ("rl", "sft"):
        renamed(folder / model, nested)
    messages, fix = told(family)
    assert messages == [
        f"model `{model}` has the tensors of the donor `target` under other names: "
        "`model.language_model.…` for `model.…`"
        for model in ("rl", "sft")
    ]
    rules = '[{from: "model.language_model.", to: "model."}]'
    assert fix == (
        "to read these under the donor's names, write in the recipe's `models:`\n"
        f"  rl: {{path: rl, rename: {rules}}}\n  sft: {{path: sft, rename: {rules}}}"
    )
    with pytest.raises(InputError, match="2 problems between the models"):
        skillmerge.apply(family)
    rename = [{"from": "model.language_model.", "to": "model."}]
    models = {"target": "target", **{name: {"path": name, "rename": rename} for name in ("rl", "sft")}}
    result = skillmerge.apply(edit(family, models=models))
    assert weights(result.output) == wanted
    assert skillmerge.plan(family).merged_share == 1


def test_rename_is_offered_in_the_words_of_the_recipe(family: Path, edit: Edit) -> None:
    for model in ("target", "sft"):
        renamed(family.parent / model, nested)
    (family.parent / "rl").rename(family.parent / "the rl")
    edit(family, models={"target": "target", "rl": {"path": "the rl"}, "sft": "sft"})
    _, fix = told(family)
    assert fix.endswith('\n  rl: {path: "the rl", rename: [{from: "model.", to: "model.language_model."}]}')
    edit(
        family,
        models={
            "target": "target",
            "rl": {"path": "the rl", "rename": [{"from": "model.", "to": "odd."}]},
            "sft": "sft",
        },
    )
    assert told(family)[1] == "change the `rename` of model `rl`"


def _gpt(name: str) -> str:
    return name.replace("model.layers.", "transformer.h.").replace("model.", "transformer.")


PREFIXES: dict[str, tuple[Rename, list[tuple[str, str]]]] = {
    "nested": (nested, [("model.language_model.", "model.")]),
    "before all": (lambda name: f"language_model.{name}", [("language_model.", "")]),
    "transformer": (lambda name: f"transformer.{name}", [("transformer.", "")]),
    "twice": (lambda name: f"model.{name}", [("model.", "")]),
    "peft": (lambda name: f"base_model.model.{name}", [("base_model.model.", "")]),
    "value head": (lambda name: f"pretrained_model.{name}", [("pretrained_model.", "")]),
    "bare": (
        lambda name: name.removeprefix("model."),
        [("embed_tokens.", "model.embed_tokens."), ("layers.", "model.layers."), ("norm.", "model.norm.")],
    ),
    "layers": (_gpt, [("transformer.h.", "model.layers."), ("transformer.", "model.")]),
    "tower": (lambda name: f"language_model.model.{name}", [("language_model.model.", "")]),
}


def specs(shapes: Mapping[str, tuple[int, ...]], rename: Rename = str) -> dict[str, TensorSpec]:
    return {rename(name): TensorSpec(rename(name), "BF16", shape, "file") for name, shape in shapes.items()}


@pytest.mark.parametrize("case", PREFIXES)
def test_prefixes_are_found(case: str) -> None:
    rename, wanted = PREFIXES[case]
    ours, donor = specs(tensor_shapes(), rename), specs(tensor_shapes())
    assert rename_rules(ours, donor) == wanted
    for name in tensor_shapes():  # what the rules make of the names is the names, whatever the rules
        new = next((new + rename(name)[len(old) :] for old, new in wanted if rename(name).startswith(old)), None)
        assert (new or rename(name)) == name
    assert rename_rules(donor, ours)


def test_prefixes_are_found_beside_what_only_one_model_has() -> None:
    """A vision tower with layers of its own, whose tensors end like those of the text model."""
    shapes = tensor_shapes()
    tower = {name.replace("model.", "model.vision."): (5, 5) for name in shapes if ".layers." in name}
    same = {name.replace("model.", "model.audio."): shape for name, shape in shapes.items() if ".layers.0." in name}
    ours = {**specs(shapes, nested), **specs(tower), **specs(same)}
    assert rename_rules(ours, specs(shapes)) == [("model.language_model.", "model.")]
    assert rename_rules(specs(shapes), ours) == [("model.", "model.language_model.")]


def test_names_that_have_little_in_common_are_not_renamed() -> None:
    shapes = tensor_shapes()
    assert rename_rules(specs(tensor_shapes(hidden=24), nested), specs(shapes)) == []
    assert (
        rename_rules(specs({f"x.{index}.y": shape for index, shape in enumerate(shapes.values())}), specs(shapes)) == []
    )
    assert rename_rules(specs(shapes), specs(shapes)) == []


def experts(packed: bool, prefix: str = "model.", hidden: int = 8, count: int = 4) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}embed_tokens.weight": (32, hidden)}
    for layer in range(2):
        at = f"{prefix}layers.{layer}.mlp"
        shapes[f"{at}.gate.weight"] = (count, hidden)
        if packed:
            shapes[f"{at}.experts.gate_up_proj"] = (count, 2 * hidden, hidden)
            shapes[f"{at}.experts.down_proj"] = (count, hidden, hidden)
            continue
        for expert in range(count):
            shapes |= {f"{at}.experts.{expert}.{part}_proj.weight": (hidden, hidden) for part in ("gate", "up", "down")}
    return shapes


ALIKE = (
    "save both with the same version of transformers: load each with `from_pretrained`, write it with "
    "`save_pretrained`, and name the new folders"
)


def with_experts(
    family: Path, change: Callable[[str, dict[str, Any]], object] = lambda model, shapes: None, prefix: str = "model."
) -> None:
    """The family with experts that only target packs."""
    for seed, model in enumerate(("target", "rl", "sft")):
        shapes = experts(model == "target", "model." if model == "target" else prefix)
        change(model, shapes)
        for file in (family.parent / model).iterdir():
            file.unlink()
        write_checkpoint(family.parent / model, random_tensors(shapes, seed=seed))


def test_experts_that_are_packed_in_only_one_model_are_read_as_the_donor_has_them(family: Path) -> None:
    """Every expert was left as the target's by other tools (vllm#36997, mergekit#692)."""
    with_experts(family)
    plan = skillmerge.plan(family)
    assert plan.problems == ()
    assert [note for note in plan.notes if "layout" in note] == [
        f"model `{model}` is read in the layout of `target`: experts packed" for model in ("rl", "sft")
    ]


def test_packed_experts_under_other_prefixes_are_renamed_first(family: Path, edit: Callable[..., Path]) -> None:
    with_experts(family, prefix="model.language_model.")
    messages, fix = told(family)
    assert messages == [
        f"model `{model}` has the tensors of the donor `target` under other names: `model.language_model.…` for "
        "`model.…`"
        for model in ("rl", "sft")
    ]
    assert '{path: rl, rename: [{from: "model.language_model.", to: "model."}]}' in fix
    rename = [{"from": "model.language_model.", "to": "model."}]
    models = {name: {"path": name, "rename": rename} for name in ("rl", "sft")}
    assert skillmerge.plan(edit(family, models={"target": "target", **models})).problems == ()


def test_experts_whose_shapes_fit_two_layouts_are_told(family: Path) -> None:
    """Square matrices without a gate: nothing says whether they are transposed."""
    at = "model.layers.0.mlp.experts"

    def without_gate(model: str, shapes: dict[str, Any]) -> None:
        shapes.clear()
        shapes["model.embed_tokens.weight"] = (32, 8)
        if model == "rl":
            shapes |= {f"{at}.up_proj": (4, 8, 8), f"{at}.down_proj": (4, 8, 8)}
        else:
            shapes |= {f"{at}.{expert}.{part}_proj.weight": (8, 8) for expert in range(4) for part in ("up", "down")}

    with_experts(family, without_gate)
    assert told(family) == (
        [
            f"model `rl`: `{at}.down_proj` [4, 8, 8] may hold its experts' matrices as they are or transposed: its "
            "shape fits both"
        ],
        "save both models with the same version of transformers",
    )


def test_other_names_are_told_before_what_they_leave_unclear(family: Path) -> None:
    """Experts without a gate, packed: only those of the other model tell how, and they are called otherwise."""

    def without_gate(model: str, shapes: dict[str, Any]) -> None:
        names = {"rl": "backbone", "target": "model", "sft": "model"}
        at = f"{names[model]}.layers.0.mlp.experts"
        shapes.clear()
        shapes |= {f"{names[model]}.embed_tokens.weight": (32, 8), f"{names[model]}.layers.0.norm.weight": (8,)}
        if model == "rl":
            shapes |= {f"{at}.up_proj": (4, 6, 8), f"{at}.down_proj": (4, 8, 6)}
        else:
            shapes |= {f"{at}.{expert}.up_proj.weight": (6, 8) for expert in range(4)}
            shapes |= {f"{at}.{expert}.down_proj.weight": (8, 6) for expert in range(4)}

    with_experts(family, without_gate)
    messages, fix = told(family)
    assert messages == [
        "model `rl` has the tensors of the donor `target` under other names: `backbone.…` for `model.…`"
    ]
    assert '{from: "backbone.", to: "model."}' in fix


PARTLY = {
    "an expert missing": (
        lambda shapes: [shapes.pop(name) for name in list(shapes) if ".1.mlp.experts.2." in name],
        "model `rl` has 3 experts in `model.layers.1.mlp.experts`, and the donor `target` has 4: it is without 2, "
        "counted from 0",
        "check that `rl` is the right model, and complete",
    ),
    "an expert more": (
        lambda shapes: shapes.update(
            {name.replace(".3.", ".4."): it for name, it in shapes.items() if ".experts.3." in name}
        ),
        "model `rl` has 5 experts in `model.layers.0.mlp.experts`, and the donor `target` has 4: it is with 4, "
        "counted from 0",
        "check that `rl` is the right model, and complete",
    ),
    "a matrix missing": (
        lambda shapes: shapes.pop("model.layers.1.mlp.experts.2.up_proj.weight"),
        "model `rl` stores `model.layers.1.mlp.experts.gate_up_proj` of the donor `target` in other tensors, and "
        "`model.layers.1.mlp.experts.2.up_proj.weight` is missing",
        "the checkpoint is incomplete: fetch or save it again",
    ),
    "another size": (
        lambda shapes: shapes.update({"model.layers.1.mlp.experts.2.up_proj.weight": (8, 9)}),
        "model `rl` stores `model.layers.1.mlp.experts.gate_up_proj` of the donor `target` in other tensors, in which "
        "`model.layers.1.mlp.experts.2.up_proj.weight` has shape [8, 9]; the donor's has [8, 8]",
        "check that `rl` is the right model; its sizes differ",
    ),
}


@pytest.mark.parametrize("what", PARTLY)
def test_experts_that_are_not_those_of_the_donor_are_told(family: Path, what: str) -> None:
    change, message, fix = PARTLY[what]
    with_experts(family, lambda model, shapes: change(shapes) if model == "rl" else None)
    assert told(family) == ([message], fix)


def test_experts_that_both_models_store_alike_are_counted(family: Path) -> None:
    def one_by_one(model: str, shapes: dict[str, Any]) -> None:
        count, at = 3 if model == "rl" else 4, "model.layers.0.mlp"
        shapes.clear()
        shapes |= {"model.embed_tokens.weight": (32, 8), f"{at}.gate.weight": (count, 8)}
        shapes |= {f"{at}.experts.{it}.{part}_proj.weight": (8, 8) for it in range(count) for part in ("up", "down")}

    with_experts(family, one_by_one)
    messages, _ = told(family)
    assert messages == [
        "model `rl` has 3 experts in `model.layers.0.mlp.experts`, and the donor `target` has 4: it is without 3, "
        "counted from 0",
        "1 tensor differs in shape between the donor `target` and model `rl`: `model.layers.0.mlp.gate.weight` [4, 8] "
        "against [3, 8]",
    ]


def test_matrices_packed_otherwise_are_told(family: Path) -> None:
    def fused(folder: Path) -> None:
        tensors = read_checkpoint(folder)
        for layer in range(3):
            up = tensors.pop(f"model.layers.{layer}.mlp.up_proj.weight")
            tensors[f"model.layers.{layer}.mlp.gate_proj.weight"], tensors[f"model.layers.{layer}.mlp.o.weight"] = (
                up.chunk(2)
            )
        renamed(folder, lambda name: name)
        write_checkpoint(folder, tensors)

    fused(family.parent / "rl")
    (message,), fix = told(family)
    assert message == (
        "model `rl` and the donor `target` store the same parameters, packed differently: "
        "`model.layers.0.mlp.gate_proj.weight` against `model.layers.0.mlp.up_proj.weight`"
    )
    assert fix == ALIKE


LEFT = {
    "base_layer": ("model.layers.0.self_attn.q_proj.base_layer.weight", "merge_and_unload"),
    "lora_A": ("model.layers.0.self_attn.q_proj.lora_A.default.weight", "merge_and_unload"),
    "modules_to_save": ("lm_head.modules_to_save.default.weight", "merge_and_unload"),
    "original_module": ("lm_head.original_module.weight", "merge_and_unload"),
    "parametrizations": ("model.layers.0.mlp.up_proj.parametrizations.weight.original0", "remove_parametrizations"),
    "flat": ("_flat_param", "FULL_STATE_DICT"),
}


@pytest.mark.parametrize("case", LEFT)
@pytest.mark.parametrize("beside", [True, False])
def test_what_training_leaves_is_told_with_its_cure(family: Path, case: str, beside: bool) -> None:
    """Small as it is: without it the skill, or a part of it, is gone (verl#4553, Soup#351)."""
    name, cure = LEFT[case]
    old = name.replace(".base_layer", "") if case == "base_layer" else "model.norm.weight"
    odd = {name: torch.zeros(2, 16, dtype=torch.bfloat16)}
    renamed(family.parent / "rl", (lambda it: it) if beside else lambda it: "other." + it if it == old else it, **odd)
    (first, *_), fix = told(family)
    assert first.startswith(f"model `rl` has `{name}`: ")
    assert cure in fix
    assert "ignore:" not in fix
    shown = run_cli("plan", family)
    assert shown.returncode == 4
    assert cure in shown.stdout


@pytest.mark.parametrize("share", [0.05, 0.09, 0.11, 0.5])
@pytest.mark.parametrize("lacking", ["rl", "target", "both"])
def test_rules_are_offered_for_less_than_a_tenth_of_the_parameters(family: Path, share: float, lacking: str) -> None:
    """Also where each model lacks little, but what any of them lacks is much."""
    folder, whole = family.parent, 1000
    size = int(share * whole / (2 if lacking == "both" else 1))
    parts = {"rl": size, "sft": size if lacking == "both" else 0}
    shapes = {"model.a.weight": (whole - sum(parts.values()),), "model.rl.weight": (parts["rl"],)}
    shapes |= {"model.sft.weight": (parts["sft"],)} if lacking == "both" else {}
    for model in ("target", "rl", "sft"):
        gone = {"rl": ["rl"], "target": ["target"], "both": ["rl", "sft"]}[lacking]
        without = f"model.{'rl' if model == 'target' else model}.weight" if model in gone else ""
        for file in (folder / model).iterdir():
            file.unlink()
        write_checkpoint(
            folder / model, random_tensors({name: shape for name, shape in shapes.items() if name != without})
        )
    _, fix = told(family)
    assert ("copy:" in fix or "ignore:" in fix) == (share < 0.1), fix


def test_much_that_only_one_model_has_is_described(family: Path) -> None:
    tower = random_tensors({f"visual.blocks.{index}.attn.weight": (32, 32) for index in range(2)})
    renamed(family.parent / "rl", lambda name: name, **tower)
    (message,), fix = told(family)
    assert message == (
        "model `rl` has 2 tensors that the donor `target` lacks, 37.6% of its parameters: "
        "visual.blocks.0.attn.weight, visual.blocks.1.attn.weight"
    )
    assert fix == (
        "check that it is the right model, and complete. If the output does not need those tensors, name them under "
        "`ignore`."
    )


def test_models_of_other_sizes_get_no_rules(family: Path) -> None:
    write_checkpoint(family.parent / "other", random_tensors(tensor_shapes(hidden=24)))
    document = json.loads(family.read_text())
    family.write_text(json.dumps(document | {"models": {**document["models"], "rl": "other"}}))
    messages, fix = told(family)
    assert len(messages) == 1
    assert fix == "check that `rl` is the right model; its sizes differ"


def test_problem_that_no_rule_settles_takes_the_others_rules_with_it(family: Path) -> None:
    recipe = skillmerge.plan(family).recipe
    small = Problem("missing", "lacks", copy=('  - {tensors: "a", from: target}',), rename=("  rl: {}",))
    assert "copy:" in settlement(recipe, [small])
    assert settlement(recipe, [small, Problem("architecture", "8 blocks against 12", final=True)]) == ""
    assert settlement(recipe, [small, Problem("architecture", "8 against 12", help="look", final=True)]) == "look"


def test_problems_as_data_have_no_empty_new_keys(tmp_path: Path) -> None:
    recipe = write_family(tmp_path)
    renamed(tmp_path / "rl", lambda name: "other" if name == "model.norm.weight" else name)
    (missing, extra) = skillmerge.plan(recipe).as_dict()["problems"]
    assert missing.keys() == extra.keys() == {"kind", "message", "tensors", "copy", "ignore"}
