"""Stacks of layers: what they are made of, to the byte, through every command; and what is refused."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import (
    copy_with,
    numpy_of,
    put_family,
    random_tensors,
    read_checkpoint,
    run_cli,
    tensor_shapes,
    weights,
    write_checkpoint,
    write_family,
    write_recipe,
)
from hub_server import HubServer

import skillmerge
from skillmerge.checkpoints.views import stacked
from skillmerge.errors import InputError, RecipeError, StalePlan
from skillmerge.plans.stacks import build

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
Tensors = Mapping[str, torch.Tensor]


def part(model: str, layers: str | int | None = None) -> dict[str, Any]:
    return {"from": model, **({"layers": layers} if layers is not None else {})}


def stacked_tensors(first: Tensors, order: Sequence[tuple[Tensors, int]]) -> dict[str, torch.Tensor]:
    """What a stack holds, by text alone: the layers in their order, and the rest of the first model."""
    found = {name: tensor for name, tensor in first.items() if ".layers." not in name}
    for place, (tensors, number) in enumerate(order):
        begin = f"model.layers.{number}."
        found |= {
            f"model.layers.{place}.{name.removeprefix(begin)}": tensor
            for name, tensor in tensors.items()
            if name.startswith(begin)
        }
    return found


def assert_same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def model(folder: Path, name: str, layers: int, seed: int, shards: int = 2, **config: Any) -> Path:
    tensors = random_tensors(tensor_shapes(layers), seed=seed)
    return write_checkpoint(
        folder / name, tensors, shards=shards, config={**CONFIG, "num_hidden_layers": layers, **config}
    )


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Models `a` of 4 and `b` of 6 layers, and a recipe that writes a stack of them: 0-3 of one, 2-5 of the other."""
    model(tmp_path, "a", 4, 1)
    model(tmp_path, "b", 6, 2, shards=3)
    return recipe(tmp_path, [part("a", "0-3"), part("b", "2-5")])


def recipe(folder: Path, stack: Sequence[Any], merge: str = "deep", **keys: Any) -> Path:
    models = {"a": "a", "b": "b", "deep": {"stack": list(stack)}, **keys.pop("models", {})}
    return write_recipe(folder, merge, models=models, coefficients=keys.pop("coefficients", None), **keys)


def test_a_stack_is_its_layers_and_the_rest_of_the_first_model(two: Path) -> None:
    plan = skillmerge.plan(two)
    assert plan.ok
    assert plan.warnings == ()
    assert {tensor.action for tensor in plan.tensors.values()} == {"copy"}
    output = skillmerge.apply(two).output
    a, b = (read_checkpoint(two.parent / name) for name in "ab")
    order = [(a, 0), (a, 1), (a, 2), (a, 3), (b, 2), (b, 3), (b, 4), (b, 5)]
    assert_same(read_checkpoint(output), stacked_tensors(a, order))
    config = json.loads((output / "config.json").read_text())
    assert config == {**CONFIG, "num_hidden_layers": 8}
    assert [file.name for file in output.glob("*.safetensors*")] == ["model.safetensors"]
    assert skillmerge.verify(output).tensors == len(plan.tensors)


@pytest.mark.parametrize(
    ("stack", "order"),
    [
        ([part("a", "0-3"), part("a", "1-3")], "a0 a1 a2 a3 a1 a2 a3"),
        ([part("a")], "a0 a1 a2 a3"),
        ([part("a", "2-"), part("b", 0)], "a2 a3 b0"),
        ([part("b", ["5", "0-1"]), part("a", "0,3")], "b5 b0 b1 a0 a3"),
        ([part("a", 3), part("a", 2), part("a", 1)], "a3 a2 a1"),
        ([part("a", 1), part("a", 1), part("a", 1)], "a1 a1 a1"),
    ],
)
def test_layers_move_repeat_and_are_left_out(
    stack: list[Any], order: str, two: Path, edit: Callable[..., Path]
) -> None:
    models = {name: read_checkpoint(two.parent / name) for name in "ab"}
    output = skillmerge.apply(recipe(two.parent, stack)).output
    wanted = [(models[word[0]], int(word[1:])) for word in order.split()]
    assert_same(read_checkpoint(output), stacked_tensors(models[order[0]], wanted))
    assert json.loads((output / "config.json").read_text())["num_hidden_layers"] == len(wanted)


def test_a_skill_stacked_like_its_target(tmp_path: Path) -> None:
    """The use: a target that was upscaled, the skill's models in the base's depth, and lambda over its layers."""
    write_family(tmp_path, tensor_shapes(4), config={**CONFIG, "num_hidden_layers": 4})
    model(tmp_path, "target", 6, 7)
    parts = [part("{}", "0-2"), part("{}", "1-3")]
    models = {
        **{name: name for name in ("target", "rl", "sft")},
        **{f"deep_{name}": {"stack": json.loads(json.dumps(parts).replace("{}", name))} for name in ("rl", "sft")},
    }
    rules = [{"layers": "0-", "ramp": [0.0, 1.0]}]
    path = write_recipe(
        tmp_path, "target + lam * (deep_rl - deep_sft)", models=models,
        coefficients={"lam": {"default": 0.5, "rules": rules}},
    )  # fmt: skip
    plan = skillmerge.plan(path)
    assert plan.ok
    assert plan.warnings == ()
    assert plan.notes == ()
    read = {name: read_checkpoint(tmp_path / name) for name in ("target", "rl", "sft")}
    numbers = [0, 1, 2, 1, 2, 3]
    deep = {name: stacked_tensors(read[name], [(read[name], number) for number in numbers]) for name in ("rl", "sft")}
    models_of = {"target": read["target"], "deep_rl": deep["rl"], "deep_sft": deep["sft"]}
    found = numpy_of(skillmerge.apply(path).output)
    for name, tensor in read["target"].items():
        match = re.match(r"model\.layers\.(\d+)\.", name)
        lam = int(match[1]) / 5 if match else 0.5
        only = {key: {name: tensors[name]} for key, tensors in models_of.items()}
        wanted = oracle.merge("target + lam * (deep_rl - deep_sft)", only, {"lam": lam}, "target")[name]
        assert np.array_equal(found[name].astype(np.float64), wanted), name
        assert found[name].shape == tensor.shape


def test_every_command_reads_stacks(two: Path, edit: Callable[..., Path]) -> None:
    folder = two.parent
    formula = edit(two, merge="deep + 0.5 * (deep - other)", models={
        "a": "a", "b": "b", "deep": {"stack": [part("a"), part("b", "2-5")]}, 
        "other": {"stack": [part("b"), part("a", "0-1")]},
    })  # fmt: skip
    plan = skillmerge.plan(formula, save=folder / "plan.json")
    assert plan.ok
    output = skillmerge.apply(formula, threads=1).output
    same = weights(output)
    assert weights(skillmerge.apply(formula, folder / "threads", threads=3).output) == same
    assert weights(skillmerge.apply(folder / "plan.json", folder / "saved").output) == same
    assert weights(skillmerge.rebuild(output, folder / "again").output or folder) == same
    assert skillmerge.rebuild(output, check=True).tensors == len(plan.tensors)
    assert skillmerge.verify(output).tensors == len(plan.tensors)
    assert len(skillmerge.inspect(formula).tensors) == len(plan.tensors)
    hashed = skillmerge.apply(formula, folder / "hashed", hash_inputs=True)
    assert all(file.sha256 for item in hashed.manifest.inputs for file in item.files)
    assert skillmerge.rebuild(folder / "hashed", check=True).tensors == len(plan.tensors)
    skill = edit(formula, merge="deep - other", output={"path": "skill", "kind": "skill"})
    skillmerge.apply(skill)
    added = edit(formula, merge="deep + 0.5 * skill", output={"path": "added"}, models={
        "a": "a", "b": "b", "deep": {"stack": [part("a"), part("b", "2-5")]}, "skill": {"skill": "skill"},
    })  # fmt: skip
    assert_same(read_checkpoint(skillmerge.apply(added).output), read_checkpoint(output))


def test_tasks_make_the_same_shards(two: Path, edit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked, "SHARD", 4000)
    folder = two.parent
    plan = skillmerge.plan(two, save=folder / "plan.json")
    assert len(plan.shards) > 3
    for index in range(3):
        assert (
            run_cli(
                "shard", folder / "plan.json", "-o", folder / "tasks", "--index", str(index), "--of", "3"
            ).returncode
            == 0
        )
    done = run_cli("finish", folder / "plan.json", "-o", folder / "tasks")
    assert done.returncode == 0, done.stderr
    assert weights(folder / "tasks") == weights(skillmerge.apply(two).output)
    index = json.loads((folder / "merged" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == plan.tensors.keys()
    changed = random_tensors(tensor_shapes(6), seed=9)
    write_checkpoint(folder / "b", changed, shards=3, config={**CONFIG, "num_hidden_layers": 6})
    stale = run_cli("shard", folder / "plan.json", "-o", folder / "late", "--index", "0", "--of", "3")
    assert stale.returncode == 7, stale.stderr


def test_stacks_of_stacks_patches_and_renamed_models(two: Path, tmp_path: Path) -> None:
    a, b = (read_checkpoint(tmp_path / name) for name in "ab")
    nested = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in b.items()}
    for file in (tmp_path / "b").glob("*.safetensors*"):
        file.unlink()
    write_checkpoint(tmp_path / "b", nested, config={**CONFIG, "num_hidden_layers": 6})
    changed = copy_with(
        tmp_path / "a",
        tmp_path / "changed",
        **{"model.layers.1.mlp.up_proj.weight": a["model.layers.0.mlp.up_proj.weight"]},
    )
    skillmerge.extract(str(changed), str(tmp_path / "a"), tmp_path / "skill")
    skillmerge.export(tmp_path / "skill", tmp_path / "patch", onto=tmp_path / "a")
    models = {
        "b": {"path": "b", "rename": [{"from": "model.language_model.", "to": "model."}]},
        "patched": {"patch": "patch", "onto": "a"},
        "deep": {"stack": [part("twice", "1-6"), part("b", 5)]},
        "twice": {"stack": [part("patched"), part("patched")]},
    }
    output = skillmerge.apply(recipe(tmp_path, [], models=models)).output
    with_patch = read_checkpoint(changed)
    order = [(with_patch, number) for number in (1, 2, 3, 0, 1, 2)] + [(b, 5)]
    assert_same(read_checkpoint(output), stacked_tensors(with_patch, order))


def test_the_hub_and_a_killed_run_give_the_same_bytes(hub: HubServer, tmp_path: Path) -> None:
    put_family(hub, tmp_path)
    stack = [part("rl", "1-2"), part("sft", 1)]
    folder = {"rl": "rl", "sft": "sft", "target": "target", "deep": {"stack": stack}}
    far = {name: f"hf://acme/{name}" for name in ("rl", "sft", "target")} | {"deep": {"stack": stack}}
    wanted = weights(skillmerge.apply(write_recipe(tmp_path, "deep", models=folder, coefficients=None)).output)
    (tmp_path / "far").mkdir()
    path = write_recipe(tmp_path / "far", "deep", models=far, coefficients=None)
    assert weights(skillmerge.apply(path).output) == wanted


def test_plan_and_manifest_say_what_a_stack_is(two: Path) -> None:
    skillmerge.apply(two)
    manifest = json.loads((two.parent / "merged" / "skillmerge.manifest.json").read_text())
    for document in (skillmerge.plan(two).as_dict(), manifest):
        inputs = {item["name"]: item for item in document["inputs"]}
        assert list(inputs) == ["a", "b", "deep"]
        assert inputs["deep"]["uri"] == "stack of a 0-3, b 2-5"
        assert inputs["deep"]["stack"] == [{"from": "a", "layers": "0-3"}, {"from": "b", "layers": "2-5"}]
        assert inputs["deep"]["config_edits"] == [{"key": "num_hidden_layers", "old": 4, "new": 8}]
        assert not {"stack", "config_edits"} & (inputs["a"].keys() | inputs["b"].keys())
    shown = run_cli("plan", two, COLUMNS="80").stdout
    assert "stack of a 0-3, b 2-5" in shown
    assert "note: config.json of the output is that of `a`, but for `num_hidden_layers` (8 instead of 4)" in shown
    assert "writes the stack of a 0-3, b 2-5" in shown


def test_other_layers_are_another_plan(two: Path) -> None:
    before = skillmerge.plan(two, save=two.parent / "plan.json")
    after = skillmerge.plan(recipe(two.parent, [part("a", "0-3"), part("b", "1-4")]))
    assert before.weights_digest != after.weights_digest
    (two.parent / "model.json").touch()
    model(two.parent, "b", 6, 3, shards=3)
    with pytest.raises(StalePlan, match="b: rewritten since"):
        skillmerge.apply(two.parent / "plan.json")


def test_a_file_that_changes_under_a_stack_is_noticed(two: Path) -> None:
    from skillmerge.plans.opening import Access, planned

    with planned(two, None, Access(), lambda _: None) as (_, checkpoints):
        checkpoints["deep"].check_unchanged()
        model(two.parent, "b", 6, 3, shards=3)
        with pytest.raises(StalePlan):
            checkpoints["deep"].check_unchanged()


# ------------------------------------------------------------------------------------------------ compared


def test_depth_is_no_difference_and_rotary_positions_are(two: Path) -> None:
    model(two.parent, "b", 6, 2, shards=3, rope_theta=500_000.0)
    refused = run_cli("plan", two)
    assert refused.returncode == 4
    assert "stack `deep`: rope base: `b` has 500,000, `a` 10,000: " in refused.stdout
    assert "layers" not in refused.stdout.split("stack `deep`")[1].split("\n")[0]
    model(two.parent, "b", 6, 2, shards=3, model_type="mistral")
    refused = run_cli("plan", two)
    assert "stack `deep`: `b` is mistral, `a` llama: their layers may compute other things" in refused.stdout


def test_kinds_of_layers_may_differ_between_the_models(two: Path) -> None:
    near = {"sliding_window": 8, "max_position_embeddings": 64, "use_sliding_window": True, "model_type": "qwen2"}
    model(two.parent, "a", 4, 1, **near, layer_types=["full_attention"] * 4)
    model(two.parent, "b", 6, 2, shards=3, **near, layer_types=["sliding_attention"] * 6)
    plan = skillmerge.plan(two)
    assert plan.problems == ()
    assert plan.warnings == ()
    config = json.loads((skillmerge.apply(two).output / "config.json").read_text())
    assert config["layer_types"] == ["full_attention"] * 4 + ["sliding_attention"] * 4


def test_a_target_of_another_depth_is_a_problem(two: Path) -> None:
    plan = skillmerge.plan(recipe(two.parent, [part("a"), part("b")], "0.5 * deep + 0.5 * b"))
    assert [problem.name for problem in plan.problems][:1] == ["architecture"]


# ------------------------------------------------------------------------------------------------ refused

HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "itself": ({"deep": {"stack": [part("deep")]}}, "a stack cannot be made of itself: `deep` is made of `deep`"),
    "circle": (
        {"deep": {"stack": [part("a"), part("c")]}, "c": {"stack": [part("deep")]}},
        "a stack cannot be made of itself: `deep` is made of `c` is made of `deep`",
    ),
    "empty": ({"deep": {"stack": []}}, "`stack` is empty"),
    "2,000 entries": ({"deep": {"stack": [part("a")] * 2000}}, "`stack` has 2000 entries, and may have 1000"),
    "too many layers": (
        {"d": {"stack": [part("a")] * 1000}, "deep": {"stack": [part("d")] * 1000}},
        "the stacks have more than 4096 layers together",
    ),
    "past the last": ({"deep": {"stack": [part("a", "0-4")]}}, "layer 4 is past the last layer of `a`, which is 3"),
    "far past": ({"deep": {"stack": [part("a", "999999-")]}}, "layer 999999 is past the last layer of `a`"),
    "backwards": ({"deep": {"stack": [part("a", "3-1")]}}, "`3-1` runs backwards"),
    "no layers": ({"deep": {"stack": [part("a", "all")]}}, "`all` does not name layers"),
    "unknown model": ({"deep": {"stack": [part("aa")]}}, "`aa` is not a model of this recipe"),
    "no model": ({"deep": {"stack": [{"layers": 1}]}}, "missing key `from`"),
    "a text": ({"deep": {"stack": "a"}}, "`stack` must be a list, not the text 'a'"),
    "list of texts": ({"deep": {"stack": ["a"]}}, "must be a table, not the text 'a'"),
    "unknown key": ({"deep": {"stack": [{"from": "a", "layer": 1}]}}, "unknown key `layer`"),
    "renamed": ({"deep": {"stack": [part("a")], "rename": [{"from": "x", "to": "y"}]}}, "a stack has no `rename`"),
    "two things": ({"deep": {"stack": [part("a")], "path": "a"}}, "`deep` has more than one of `path`"),
    "a skill": ({"s": {"skill": "s"}, "deep": {"stack": [part("s")]}}, "`s` is a skill, which has no tensors to take"),
    "a patch onto it": ({"deep": {"patch": "p", "onto": "c"}, "c": {"stack": [part("a")]}}, "`c` is a stack itself"),
    "other widths": (
        {"deep": {"stack": [part("a"), part("wide", 1)]}, "wide": "wide"},
        "layer 1 of `wide` does not fit those of `a`: `input_layernorm.weight` is [32] against [16]",
    ),
    "other tensors": (
        {"deep": {"stack": [part("a"), part("biased", 2)]}, "biased": "biased"},
        "layer 2 of `biased` does not fit those of `a`: it has `mlp.up_proj.bias` besides",
    ),
    "fewer tensors": (
        {"deep": {"stack": [part("a"), part("bare", "0-3")]}, "bare": "bare"},
        "layer 3 of `bare` does not fit those of `a`: it lacks `input_layernorm.weight`",
    ),
    "no layers at all": ({"deep": {"stack": [part("flat")]}, "flat": "flat"}, "model `flat` has no layers"),
    "two rows of layers": (
        {"deep": {"stack": [part("both")]}, "both": "both"},
        "model `both` has layers in `decoder.layers` and in `model.layers`",
    ),
}


@pytest.fixture
def odd_models(two: Path) -> Path:
    folder, a = two.parent, read_checkpoint(two.parent / "a")
    config = {**CONFIG, "num_hidden_layers": 4}
    write_checkpoint(folder / "wide", random_tensors(tensor_shapes(4, hidden=32)), config=config)
    write_checkpoint(folder / "biased", {**a, "model.layers.2.mlp.up_proj.bias": torch.zeros(32)}, config=config)
    copy_with(folder / "a", folder / "bare", drop="model.layers.3.input_layernorm.weight")
    write_checkpoint(folder / "flat", {"model.embed_tokens.weight": a["model.embed_tokens.weight"]}, config=CONFIG)
    twice = {name.replace("model.layers", "decoder.layers"): tensor.clone() for name, tensor in a.items()}
    write_checkpoint(folder / "both", {**a, **twice}, config={**CONFIG, "num_hidden_layers": 4})
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_stacks_that_cannot_be_are_refused_at_their_place(name: str, odd_models: Path) -> None:
    models, message = HOSTILE[name]
    path = write_recipe(odd_models, "deep", models={"a": "a", "b": "b", **models}, coefficients=None)
    before, began = {*odd_models.rglob("*")}, time.process_time()
    refused = run_cli("apply", path)
    assert time.process_time() - began < 2
    assert refused.returncode in (2, 4), refused.stderr
    assert message in refused.stderr
    assert name != "a patch onto it" or "help: put it onto the models that it is made of" in refused.stderr
    assert re.search(rf"^error: {re.escape(str(path))}:\d+:\d+: ", refused.stderr), refused.stderr
    assert {*odd_models.rglob("*")} == before


def test_ten_thousand_entries_are_refused_quickly(two: Path) -> None:
    text = f"skillmerge: 1\nmodels: {{a: a, deep: {{stack: [{', '.join(['{from: a}'] * 10_000)}]}}}}\nmerge: deep\n"
    two.write_text(text)
    began = time.process_time()
    refused = run_cli("apply", two)
    assert time.process_time() - began < 2
    assert refused.returncode == 2
    assert "has too many parts" in refused.stderr


def test_long_chains_of_stacks_are_quick(two: Path) -> None:
    chain = {f"s{number}": {"stack": [part(f"s{number - 1}" if number else "a", 0)]} for number in range(500)}
    path = recipe(two.parent, [part("s499")], models=chain)
    began = time.process_time()
    assert skillmerge.plan(path).ok
    assert time.process_time() - began < 4
    circle = {**chain, "s0": {"stack": [part("s499")]}}
    with pytest.raises(RecipeError, match="a stack cannot be made of itself: `s499` is made of itself"):
        skillmerge.plan(recipe(two.parent, [part("s499")], models=circle))


def test_stacks_of_too_many_tensors_are_refused(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "MOST_TENSORS", 24)
    assert skillmerge.plan(recipe(two.parent, [part("a"), part("a")])).ok
    models = {"other": {"stack": [part("b", 0)]}}
    path = recipe(two.parent, [part("a"), part("a")], "0.5 * deep + 0.5 * other", models=models)
    with pytest.raises(RecipeError, match="the stacks have more than 24 tensors together"):
        skillmerge.plan(path)


def test_long_lists_of_layers_are_told_in_short(two: Path) -> None:
    plan = skillmerge.plan(recipe(two.parent, [part("a", [0, 1] * 40)])).as_dict()
    deep = next(item for item in plan["inputs"] if item["name"] == "deep")
    assert deep["uri"] == "stack of a 0,1,0,1,0…"
    assert deep["stack"] == [{"from": "a", "layers": "0-1"}] * 40


def test_a_missing_layer_is_named(two: Path) -> None:
    tensors = {name: it for name, it in read_checkpoint(two.parent / "a").items() if ".layers.1." not in name}
    for file in (two.parent / "a").glob("*.safetensors*"):
        file.unlink()
    write_checkpoint(two.parent / "a", tensors, config={**CONFIG, "num_hidden_layers": 4})
    with pytest.raises(InputError, match=r"model `a`: layer 1 of `model.layers` is missing"):
        skillmerge.plan(two)
