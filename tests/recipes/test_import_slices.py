"""`import` of slices and of models with adapters: layers that stay in their places, stacks, adapters onto models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_checkpoint
from safetensors.torch import save_file
from test_import import BASE, data_of, family, imported, merge_of

import skillmerge
from skillmerge.errors import RecipeError


def test_layers_come_from_a_local_config_or_the_option(tmp_path: Path) -> None:
    slices = [{"sources": [{"model": "./a", "layer_range": [0, 2]}]}]
    document = {"merge_method": "passthrough", "slices": slices}
    assert "taken to be the last; check with `--layers`" in imported(tmp_path, document).warnings[0].message
    assert imported(tmp_path, document, layers=2).remarks == ()
    assert data_of(imported(tmp_path, document, layers=3))["models"]["stacked"] == {"stack": [part("a", "0-1")]}
    with pytest.raises(RecipeError, match="layer 1 is past the last layer, which is 0"):
        imported(tmp_path, document, layers=1)
    family(tmp_path, a=0)
    assert data_of(imported(tmp_path, document))["merge"] == "stacked"


def test_layers_of_several_models_in_their_places_are_passed_through(tmp_path: Path) -> None:
    family(tmp_path, a=1e-2, b=1e-2)
    slices = [
        {"sources": [{"model": model, "layer_range": ends}]} for model, ends in (("./a", [0, 1]), ("./b", [1, 3]))
    ]
    made = imported(tmp_path, {"merge_method": "passthrough", "slices": slices}, output=tmp_path / "recipe.yaml")
    assert data_of(made)["merge"] == "layers_of_a * a + layers_of_b * b"
    skillmerge.apply(tmp_path / "recipe.yaml")
    a, b, merged = (read_checkpoint(tmp_path / name) for name in ("a", "b", "merged"))
    for name, tensor in merged.items():
        from_a = name.startswith(("model.layers.0.", "model.embed"))
        assert torch.equal(tensor, (a if from_a else b)[name]), name


def part(model: str, layers: str | int) -> dict[str, Any]:
    return {"from": model, "layers": layers}


def sliced(*ranges: tuple[str, int, int]) -> list[dict[str, Any]]:
    return [{"sources": [{"model": f"./{model}", "layer_range": [first, end]}]} for model, first, end in ranges]


@pytest.mark.parametrize(
    ("slices", "stack", "order"),
    [
        (sliced(("a", 0, 2), ("a", 1, 3)), [part("a", "0-1"), part("a", "1-2")], "a0 a1 a1 a2"),
        (sliced(("a", 1, 2)), [part("a", 1)], "a1"),
        (sliced(("a", 0, 1), ("a", 1, 2), ("b", 0, 3)), [part("a", "0-1"), part("b", "0-2")], "a0 a1 b0 b1 b2"),
        (sliced(("b", 2, 3), ("a", 2, 3), ("a", 0, 2)), [part("b", 2), part("a", 2), part("a", "0-1")], "b2 a2 a0 a1"),
    ],
)
def test_layers_that_move_repeat_or_are_left_out_are_stacks(
    slices: list[Any], stack: list[Any], order: str, tmp_path: Path
) -> None:
    family(tmp_path, a=1e-2, b=1e-2)
    made = imported(tmp_path, {"merge_method": "passthrough", "slices": slices}, output=tmp_path / "recipe.yaml")
    assert made.remarks == ()
    assert data_of(made)["models"]["stacked"] == {"stack": stack}
    assert data_of(made)["merge"] == "stacked"
    plan = skillmerge.plan(tmp_path / "recipe.yaml")
    assert plan.problems == ()
    assert plan.warnings == ()
    assert skillmerge.lint(tmp_path / "recipe.yaml").findings == ()
    merged = read_checkpoint(skillmerge.apply(tmp_path / "recipe.yaml").output)
    models, words = {name: read_checkpoint(tmp_path / name) for name in "ab"}, order.split()
    assert len(merged) == 3 * len(words) + 3
    assert torch.equal(merged["model.embed_tokens.weight"], models[words[0][0]]["model.embed_tokens.weight"])
    for name in ("model.norm.weight", "lm_head.weight"):
        assert torch.equal(merged[name], models[words[-1][0]][name])
    for place, word in enumerate(words):
        for rest in ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight"):
            source = models[word[0]][f"model.layers.{word[1]}.{rest}"]
            assert torch.equal(merged[f"model.layers.{place}.{rest}"], source), (word, rest)


def test_other_methods_merge_a_stack_of_each_model(tmp_path: Path) -> None:
    family(tmp_path, base=0, a=1e-2)
    ranges = (([0, 2], [1, 3]), ([1, 3], [0, 2]))
    slices = [
        {
            "sources": [
                {"model": f"./{name}", "layer_range": ends} for name, ends in zip(("base", "a"), each, strict=True)
            ]
        }
        for each in ranges
    ]
    document = {"merge_method": "task_arithmetic", **BASE, "slices": slices, "parameters": {"weight": [0, 1]}}
    made = imported(tmp_path, document, output=tmp_path / "recipe.yaml")
    data = data_of(made)
    assert data["merge"] == "base_stacked + weight * (a_stacked - base_stacked)"
    assert data["models"] == {
        "base": "./base", "a": "./a",
        "base_stacked": {"stack": [part("base", "0-1"), part("base", "1-2")]},
        "a_stacked": {"stack": [part("a", "1-2"), part("a", "0-1")]},
    }  # fmt: skip
    assert data["coefficients"]["weight"]["rules"] == [
        {"layers": "0-1", "ramp": [0, 1]}, {"layers": "2-3", "ramp": [0, 1]},
    ]  # fmt: skip
    assert skillmerge.plan(tmp_path / "recipe.yaml").problems == ()
    alone = [{"sources": [{"model": "./a", "layer_range": [1, 3]}]}]
    with pytest.raises(RecipeError, match="which of the base they are merged with is not said"):
        imported(tmp_path, {**document, "slices": alone})


def adapter(folder: Path, layers: int = 3) -> dict[str, torch.Tensor]:
    """An adapter of rank 2 and scale 3 in `folder`, and what it adds to each matrix."""
    folder.mkdir()
    tensors, added = {}, {}
    for layer in range(layers):
        name = f"model.layers.{layer}.self_attn.q_proj"
        a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(layer)) for shape in ((2, 16), (16, 2)))
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        added[f"{name}.weight"] = 3 * b.double() @ a.double()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return added


@pytest.mark.parametrize(
    "written",
    ["./a+./lora", {"model": "./a", "lora": "./lora"}, {"model": {"path": "./a"}, "lora": {"path": "./lora"}}],
)
def test_a_model_with_an_adapter_becomes_an_adapter_onto_it(written: Any, tmp_path: Path) -> None:
    family(tmp_path, base=0, a=1e-2)
    added = adapter(tmp_path / "lora")
    document = {
        "merge_method": "task_arithmetic",
        **BASE,
        "models": [{"model": written}],
        "parameters": {"weight": 0.5},
    }
    made = imported(tmp_path, document, output=tmp_path / "recipe.yaml")
    assert data_of(made)["models"] == {"base": "./base", "a": "./a", "lora": {"adapter": "./lora", "onto": "a"}}
    assert data_of(made)["merge"] == "base + 0.5 * (lora - base)"
    assert [remark.message.partition(",")[0] for remark in made.warnings] == ["mergekit merges an adapter first"]
    assert skillmerge.lint(tmp_path / "recipe.yaml").findings == ()
    merged = read_checkpoint(skillmerge.apply(tmp_path / "recipe.yaml").output)
    base, a = (read_checkpoint(tmp_path / name) for name in ("base", "a"))
    for name, tensor in merged.items():
        wanted = base[name].double() + 0.5 * (a[name].double() + added.get(name, 0) - base[name].double())
        assert torch.allclose(tensor.double(), wanted, rtol=0, atol=1e-6), name


@pytest.mark.parametrize(
    ("written", "words"),
    [("./a+", "lacks an adapter behind the plus"), ("+./lora", "lacks a model before the plus"),
     ("./a+./x+./y", "has more than one adapter")],
)  # fmt: skip
def test_a_plus_needs_a_model_and_an_adapter(written: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=words) as refused:
        imported(tmp_path, {"merge_method": "passthrough", "models": [{"model": written}]})
    assert refused.value.fix is not None


def test_slices_may_have_adapters(tmp_path: Path) -> None:
    family(tmp_path, a=1e-2)
    added = adapter(tmp_path / "lora")
    slices = sliced(("a+./lora", 0, 2), ("a", 0, 2))
    made = imported(tmp_path, {"merge_method": "passthrough", "slices": slices}, output=tmp_path / "recipe.yaml")
    assert data_of(made)["models"]["stacked"] == {"stack": [part("lora", "0-1"), part("a", "0-1")]}
    merged = read_checkpoint(skillmerge.apply(tmp_path / "recipe.yaml").output)
    a, name = read_checkpoint(tmp_path / "a"), "model.layers.{}.self_attn.q_proj.weight"
    for place, (number, with_adapter) in enumerate([(0, 1), (1, 1), (0, 0), (1, 0)]):
        wanted = a[name.format(number)].double() + with_adapter * added[name.format(number)]
        assert torch.equal(merged[name.format(place)], wanted.float())


def test_a_stack_has_the_tokenizer_of_its_first_slice(tmp_path: Path) -> None:
    document = {"merge_method": "passthrough", "slices": sliced(("a", 0, 2), ("b", 1, 3))}
    assert "like" not in data_of(imported(tmp_path, {**document, "tokenizer_source": "./a"}))["output"]
    with pytest.raises(RecipeError, match="the tokenizer is not that of the first slice") as refused:
        imported(tmp_path, {**document, "tokenizer_source": "./b"})
    assert "tokenizer_source" in str(refused.value.excerpt)


def test_slices_may_name_the_base_if_all_name_the_same(tmp_path: Path) -> None:
    def slices(*bases: str | None) -> dict[str, Any]:
        found = []
        for index, base in enumerate(bases):
            sources = [{"model": name, "layer_range": [index, index + 1]} for name in ("./a", "./b")]
            found.append({"sources": sources, **({"base_model": base} if base else {})})
        return {"merge_method": "slerp", "slices": found, "parameters": {"t": 0.5}}

    assert merge_of(tmp_path, slices("./b", "./b"), layers=2) == "slerp(b, a, t=0.5)"
    with pytest.raises(RecipeError, match=r"this slice has the base `\./a`, and others have `\./b`"):
        imported(tmp_path, slices("./b", "./a"), layers=2)
    with pytest.raises(RecipeError, match="some slices have a `base_model`, and others have none"):
        imported(tmp_path, slices("./b", None), layers=2)


@pytest.mark.parametrize(
    ("slices", "words"),
    [
        ([{"sources": [{"model": "./a", "layer_range": [-1, 3]}]}], "a layer has a number from 0 on"),
        ([{"sources": [{"model": "./a", "layer_range": [0, 3]}, {"model": "./b", "layer_range": [0, 2]}]}],
         "the sources of this slice have different numbers of layers"),
        ([{"sources": [{"model": "./a"}]}], "`layer_range` is two numbers"),
        ([{"sources": []}], "this slice has no sources"),
        ([{"sources": [{"model": "./a", "layer_range": [0, 0]}]}], "this slice has no layers"),
    ],
)  # fmt: skip
def test_slices_that_are_none_are_refused(slices: list[Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        imported(tmp_path, {"merge_method": "passthrough", "slices": slices}, layers=3)
    assert words in refused.value.what
    assert refused.value.place is not None


def one_of_two(zero: Any = 0) -> list[dict[str, Any]]:
    """Slices as in model cards: a second model with a weight of 0, so that mergekit matches rows by token."""
    slices = sliced(("a", 0, 1), ("b", 0, 3))
    other = {"model": "./b", "layer_range": [0, 1], "parameters": {"weight": zero}}
    return [{"sources": [*slices[0]["sources"], other]}, slices[1]]


def test_a_linear_merge_of_one_model_each_is_a_stack(tmp_path: Path) -> None:
    family(tmp_path, a=1e-2, b=1e-2)
    document = {"merge_method": "linear", "slices": one_of_two(), "parameters": {"weight": 1}}
    assert data_of(imported(tmp_path, {**document, "base_model": "./a"}))["merge"] == "stacked"
    made = imported(tmp_path, document, output=tmp_path / "recipe.yaml")
    assert [remark.message for remark in made.remarks] == [
        "in each slice one model counts, which is passed through (line 3)"
    ]
    assert data_of(made)["models"]["stacked"] == {"stack": [part("a", 0), part("b", "0-2")]}
    merged = read_checkpoint(skillmerge.apply(tmp_path / "recipe.yaml").output)
    a, b = (read_checkpoint(tmp_path / name) for name in "ab")
    for name, tensor in (("model.embed_tokens", a), ("model.layers.0.mlp.up_proj", a), ("lm_head", b)):
        assert torch.equal(merged[f"{name}.weight"], tensor[f"{name}.weight"])
    assert torch.equal(merged["model.layers.3.mlp.up_proj.weight"], b["model.layers.2.mlp.up_proj.weight"])


@pytest.mark.parametrize(
    ("zero", "parameters"), [(0.1, {"weight": 1}), ([0, 1], {"weight": 1}), (0, {"weight": 2, "normalize": False})]
)
def test_other_linear_merges_of_unlike_slices_are_refused(
    zero: Any, parameters: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="this slice merges other models than the first"):
        imported(tmp_path, {"merge_method": "linear", "slices": one_of_two(zero), "parameters": parameters})


@pytest.mark.parametrize("slices", [sliced(("a", 0, 2), ("c", 2, 5)), sliced(("c", 0, 2), ("a", 2, 3))])
def test_models_of_other_depths_are_stacked_though_no_layer_moves(slices: list[Any], tmp_path: Path) -> None:
    family(tmp_path, a=1e-2)
    family(tmp_path, layers=5, c=1e-2)
    made = imported(tmp_path, {"merge_method": "passthrough", "slices": slices}, output=tmp_path / "recipe.yaml")
    assert data_of(made)["merge"] == "stacked"
    merged = read_checkpoint(skillmerge.apply(tmp_path / "recipe.yaml").output)
    [(first, _), (last, (begin, end))] = [(it["sources"][0]["model"], it["sources"][0]["layer_range"]) for it in slices]
    assert len(merged) == 3 * end + 3
    for name, model in (("layers.1.mlp.up_proj", first), (f"layers.{begin}.mlp.up_proj", last), ("norm", last)):
        assert torch.equal(merged[f"model.{name}.weight"], read_checkpoint(tmp_path / model)[f"model.{name}.weight"])
    past = sliced(("c", 0, 2), ("a", 2, 5))
    with pytest.raises(RecipeError, match="layer 4 is past the last layer, which is 2") as refused:
        imported(tmp_path, {"merge_method": "passthrough", "slices": past})
    assert refused.value.fix == "write at most 3 as the second number"


def test_a_model_that_is_not_here_may_be_deeper_than_one_that_is(tmp_path: Path) -> None:
    family(tmp_path, a=1e-2)
    for deep, uri in (("org/deep", "hf://org/deep"), ("up", "./up")):
        further = {"sources": [{"model": deep, "layer_range": [3, 7]}]}
        documents = [
            {"name": "up", "merge_method": "passthrough", "slices": sliced(("a", 0, 3), ("a", 0, 3))},
            {"merge_method": "passthrough", "slices": [*sliced(("a", 0, 3)), further]},
        ]
        made = imported(tmp_path, "\n---\n".join(map(json.dumps, documents)), document="2")
        name = deep.rpartition("/")[2]
        models = data_of(made)["models"]
        assert models == {"a": "./a", name: uri, "stacked": {"stack": [part("a", "0-2"), part(name, "3-6")]}}


def test_filters_reach_the_further_layers_of_a_deeper_model(tmp_path: Path) -> None:
    family(tmp_path, base=0)
    family(tmp_path, layers=6, c=1e-2)
    slices = [
        {
            "sources": [
                {"model": "./c", "layer_range": [first, first + 3]},
                {"model": "./base", "layer_range": [0, 3]},
            ],
            "parameters": {"t": [{"filter": "mlp", "value": value}, {"value": 0.5}]},
        }
        for first, value in ((0, 0.3), (3, 0.7))
    ]
    made = imported(tmp_path, {"merge_method": "slerp", **BASE, "slices": slices})
    rules = data_of(made)["coefficients"]["t"]["rules"]
    assert [(it["layers"], it["value"]) for it in rules if "tensors" in it] == [("0-2", 0.3), ("3-5", 0.7)]


def test_a_head_that_the_first_slice_lacks_is_missed(tmp_path: Path) -> None:
    family(tmp_path, a=1e-2, b=1e-2)
    tensors = {name: it for name, it in read_checkpoint(tmp_path / "a").items() if name != "lm_head.weight"}
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    for first, last, warned in (("a", "b", True), ("b", "a", False), ("b", "b", False)):
        made = imported(tmp_path, {"merge_method": "passthrough", "slices": sliced((first, 0, 2), (last, 0, 2))})
        assert [remark.message.partition(",")[0] for remark in made.warnings] == [
            "the output has no `lm_head.weight`"
        ] * warned


def test_coefficients_are_called_otherwise_than_the_models_of_a_stack(tmp_path: Path) -> None:
    family(tmp_path, base=0, t=1e-2)
    slices = [{"sources": [{"model": f"./{name}", "layer_range": [1, 3]} for name in ("base", "t")]}]
    document = {"merge_method": "slerp", **BASE, "slices": slices, "parameters": {"t": [0, 1]}}
    made = imported(tmp_path, document, output=tmp_path / "recipe.yaml")
    assert data_of(made)["merge"] == "slerp(base_stacked, t_stacked, t=t_)"
    assert skillmerge.plan(tmp_path / "recipe.yaml").problems == ()


def test_mixtures_of_experts_are_not_put_together(tmp_path: Path) -> None:
    document = {"gate_mode": "hidden", "base_model": "./a", "experts": [{"source_model": "./b"}]}
    with pytest.raises(RecipeError, match="is a configuration of mergekit-moe, not a recipe") as refused:
        imported(tmp_path, document)
    assert refused.value.fix == "skillmerge puts no mixture of experts together; it merges those that there are"
