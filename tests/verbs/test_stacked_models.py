"""Stacks of layers in the commands that prove, publish, judge and search."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch
from adapter_models import write_adapter
from conftest import (
    copy_with,
    random_tensors,
    read_checkpoint,
    run_cli,
    tensor_shapes,
    weights,
    write_checkpoint,
    write_family,
    write_recipe,
)

import skillmerge
from skillmerge.checkpoints.views import stacked
from skillmerge.outputs.hub.card import write_card
from skillmerge.outputs.shard_file import ShardFile
from skillmerge.plans import budget
from skillmerge.plans.opening import Access, planned
from skillmerge.recipes.recipe import Push

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 4}
DEEP = {
    f"deep_{name}": {"stack": [{"from": name, "layers": "0-2"}, {"from": name}]} for name in ("target", "rl", "sft")
}
MERGE = "deep_target + lam * (deep_rl - deep_sft)"
Tensors = dict[str, torch.Tensor]
Edit = Callable[..., Path]


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A recipe over stacks of seven layers, whose models have four and a license."""
    write_family(tmp_path, tensor_shapes(4), config=CONFIG)
    for name in ("target", "rl", "sft"):
        (tmp_path / name / "README.md").write_text("---\nlicense: mit\n---\n")
    models = {**{name: name for name in ("target", "rl", "sft")}, **DEEP}
    return write_recipe(tmp_path, MERGE, models=models)


@pytest.mark.parametrize("tile", [1 << 16, 1 << 18])
def test_tiles_and_files_change_no_byte(tile: int, deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = read_checkpoint(skillmerge.apply(deep).output)
    monkeypatch.setattr(budget, "TILE_BYTES", tile)
    monkeypatch.setattr(stacked, "SHARD", 3000)
    many = skillmerge.apply(deep, deep.parent / "many")
    assert len(list(many.output.glob("*.safetensors"))) > 5
    found = read_checkpoint(many.output)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_an_interrupted_merge_of_stacks_is_resumed(deep: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked, "SHARD", 3000)
    wanted = weights(skillmerge.apply(deep, deep.parent / "whole").output)
    finish, count = ShardFile.finish, 0

    def stop(self: Any, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count > 3:
            raise KeyboardInterrupt
        return finish(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ShardFile, "finish", stop)
        with pytest.raises(BaseException):  # noqa: B017, PT011 - whichever the engine makes of an interrupt
            skillmerge.apply(deep, threads=1)
    assert (deep.parent / "merged.partial").exists()
    assert weights(skillmerge.apply(deep).output) == wanted


def test_cards_and_proofs_name_what_a_stack_is_made_of(deep: Path) -> None:
    made = skillmerge.apply(deep, hash_inputs=True)
    card = write_card(made.manifest, Push("acme/deep"), None)
    assert "A merge of 3 models by" in card
    assert "| `deep_target` (donor) | stack of target 0-2, target | - | mit |" in card
    attested = skillmerge.attest(made.output, bom_file=deep.parent / "bom.json")
    statement = json.loads(attested.attestation.read_text())
    bom = json.loads((deep.parent / "bom.json").read_text())
    text = json.dumps([statement, bom])
    assert "rl/model-00001-of-00002.safetensors" in text
    assert "deep_rl/" not in text


def opened(recipe: Path) -> stacked.Stacked:
    with planned(recipe, None, Access(), lambda _: None) as (_, checkpoints):
        found = checkpoints["deep"]
        assert isinstance(found, stacked.Stacked)
        return found


def test_files_of_a_stack_are_others_when_anything_of_it_is(deep: Path, edit: Edit) -> None:
    """Tasks compare these two, and not what a plan says of stacks."""
    parts = [{"from": "rl", "layers": 0}, {"from": "sft", "layers": 0}]
    given = edit(deep, merge="deep", coefficients=None, models={"rl": "rl", "sft": "sft", "deep": {"stack": parts}})
    [first] = opened(given).files.values()
    assert [it.described for it in opened(given).files.values()] == [first.described]
    edit(deep, models={"rl": "rl", "sft": "sft", "deep": {"stack": [*parts, *parts[:1]][1:]}})
    [turned] = opened(given).files.values()
    assert turned.described != first.described
    edit(deep, models={"rl": "rl", "sft": "sft", "deep": {"stack": parts}})
    tensors = {"model.norm.bias": torch.zeros(16), **read_checkpoint(deep.parent / "sft")}
    write_checkpoint(deep.parent / "sft", tensors, shards=2, config=CONFIG)
    [other] = opened(given).files.values()
    assert other.described != first.described
    assert other.version != first.version


def test_indexes_of_the_first_model_are_not_the_stacks(deep: Path, edit: Edit) -> None:
    index = {"weight_map": dict.fromkeys(read_checkpoint(deep.parent / "rl"), "pytorch_model.bin")}
    (deep.parent / "rl" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    stack = {"stack": [{"from": "rl", "layers": "0-2"}]}
    given = edit(deep, merge="deep", coefficients=None, models={"rl": "rl", "deep": stack})
    assert skillmerge.plan(given).warnings == ()
    assert not [name for name in opened(given).store.list() if "index" in name]


def test_gates_and_sweeps_take_stacks(deep: Path, edit: Edit) -> None:
    gated = edit(deep, gates={"norm_ratio": {"max": 10}, "changed": {"min": 0.001}})
    assert all(outcome.passed for outcome in skillmerge.apply(gated, deep.parent / "gated").gates)
    refused = run_cli("plan", edit(deep, gates={"perplexity": {"max": 2, "of": "deep_rl", "text": "x.txt"}}))
    assert refused.returncode == 2
    assert "`deep_rl` is not a whole model of this recipe" in refused.stderr
    sweep = edit(deep, gates=None)
    score = "sh -c 'echo 1.0'"
    made = run_cli("sweep", sweep, "--set", "lam=0.5,1.0", "--score", score, "-o", deep.parent / "sweep")
    assert made.returncode == 0, made.stderr


def test_plain_stacks_are_worth_writing(deep: Path, edit: Edit) -> None:
    """A frankenmerge changes no weight, and is no mistake."""
    alone = edit(deep, merge="deep_rl", coefficients=None, models={"rl": "rl", "deep_rl": DEEP["deep_rl"]})
    made = skillmerge.apply(alone, deep.parent / "alone")
    assert made.warnings == ()
    assert run_cli("plan", alone).stdout.count("writes the stack of rl 0-2, rl") == 1


def test_an_adapter_of_fewer_layers_than_the_stack_is_warned_of(deep: Path, edit: Edit) -> None:
    """One that was trained on a stack has its numbers; one of a model that the stack is made of has others."""
    write_adapter(deep.parent / "adapter", tensor_shapes(4))  # of layers 0 to 2
    for layers, warned in (("0-2", False), ("0-3", True)):
        models = {"rl": "rl", "v": {"adapter": "adapter"}, "deep": {"stack": [{"from": "rl", "layers": layers}]}}
        given = edit(deep, merge="deep + 0.5 * v", coefficients=None, models=models, accept=["update-size"])
        found = [it.message for it in skillmerge.plan(given).warnings]
        assert (["adapter `v` changes the first 3 of 4 layers of `deep`"] * warned) == [
            message.partition(",")[0] for message in found
        ]


def test_a_patch_of_the_models_is_a_patch_of_the_stack(deep: Path, edit: Edit) -> None:
    changed = {"model.layers.1.mlp.up_proj.weight": torch.zeros(32, 16, dtype=torch.bfloat16)}
    copy_with(deep.parent / "rl", deep.parent / "other", **changed)
    stack = [{"from": "other", "layers": "1-2"}, {"from": "other", "layers": 1}]
    alone = edit(deep, merge="deep", coefficients=None, models={"other": "other", "deep": {"stack": stack}})
    found = read_checkpoint(skillmerge.apply(alone, deep.parent / "alone").output)
    zeros = [name for name, tensor in found.items() if not tensor.any()]
    assert zeros == ["model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"]


@pytest.mark.parametrize(("first", "other"), [(layouts.split, layouts.packed), (layouts.packed, layouts.split)])
def test_models_that_store_experts_in_other_tensors_are_stacked(
    first: Callable[..., Tensors], other: Callable[..., Tensors], tmp_path: Path
) -> None:
    """Layers of a deeper model too, whose numbers the first one does not have."""
    for name, make, count in (("a", first, 2), ("b", other, 3), ("same", first, 3)):
        tensors = random_tensors({"model.embed_tokens.weight": (8, 6)}, seed=1)
        for layer in range(count):
            experts = layouts.experts(3, 4, 6, seed=10 * count + layer)
            tensors |= make(experts, at=f"model.layers.{layer}.mlp")
        write_checkpoint(tmp_path / name, tensors, config={**CONFIG, "num_hidden_layers": count, "num_experts": 3})
    found = {}
    for name in ("b", "same"):
        stack = [{"from": "a"}, {"from": name, "layers": "2,0"}]
        models = {"a": "a", name: name, "deep": {"stack": stack}}
        given = write_recipe(tmp_path, "deep", models=models, coefficients=None)
        found[name] = read_checkpoint(skillmerge.apply(given, tmp_path / f"of_{name}").output)
        notes = [note for note in skillmerge.plan(given).notes if "layout" in note]
        assert [note.partition(":")[0] for note in notes] == ["model `b` is read in the layout of `deep`"] * (
            name == "b"
        )
    assert found["b"].keys() == found["same"].keys()
    assert all(torch.equal(tensor, found["same"][name]) for name, tensor in found["b"].items())


def test_long_chains_of_stacks_in_turning_layouts_are_quick(tmp_path: Path) -> None:
    """Each stack is read in the other layout than the one that it is made of."""
    models: dict[str, Any] = {}
    for seed, (name, make) in enumerate((("packed", layouts.packed), ("split", layouts.split))):
        tensors = random_tensors({"model.embed_tokens.weight": (8, 6)}, seed=1)
        for layer in range(2):
            tensors |= make(layouts.experts(8, 4, 6, seed=10 * seed + layer), at=f"model.layers.{layer}.mlp")
        write_checkpoint(tmp_path / name, tensors, config={**CONFIG, "num_hidden_layers": 2, "num_experts": 8})
        models[name] = name
    beneath = "split"
    for number in range(12):
        first = ("packed", "split")[number % 2]
        models[f"s{number}"] = {"stack": [{"from": first, "layers": 0}, {"from": beneath, "layers": 1}]}
        beneath = f"s{number}"
    began = time.process_time()
    found = skillmerge.plan(write_recipe(tmp_path, beneath, models=models, coefficients=None))
    assert time.process_time() - began < 4
    assert found.ok
    output = read_checkpoint(skillmerge.apply(tmp_path / "recipe.yaml", tmp_path / "merged").output)
    for name, tensor in read_checkpoint(tmp_path / "split").items():
        assert not name.startswith("model.layers.1.") or torch.equal(output[name], tensor)
