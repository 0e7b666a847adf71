"""Layers with tensors of their own, and models that lack layers: what a stack may do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import random_tensors, read_checkpoint, tensor_shapes, write_checkpoint, write_recipe

import skillmerge
from skillmerge.errors import InputError, RecipeError

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def model(folder: Path, *, layers: int = 4, drop: str = "", **said: Any) -> None:
    shapes = {name: shape for name, shape in tensor_shapes(layers).items() if not drop or drop not in name}
    write_checkpoint(folder / "a", random_tensors(shapes), config={**CONFIG, "num_hidden_layers": layers, **said})


def recipe(folder: Path, *ranges: str) -> Path:
    stack = [{"from": "a", "layers": layers} for layers in ranges]
    return write_recipe(folder, "deep", models={"a": "a", "deep": {"stack": stack}}, coefficients=None)


@pytest.mark.parametrize("ranges", [("0-3",), ("0-2", "1-3"), ("0", "2-3"), ("0,3,2,1",)])
def test_a_first_layer_without_a_norm_stays_the_first(ranges: tuple[str, ...], tmp_path: Path) -> None:
    model(tmp_path, drop="layers.0.input_layernorm")
    found = read_checkpoint(skillmerge.apply(recipe(tmp_path, *ranges)).output)
    assert [name for name in found if name == "model.layers.0.input_layernorm.weight"] == []
    assert "model.layers.1.input_layernorm.weight" in found


@pytest.mark.parametrize(("ranges", "entry"), [(("1-3",), 0), (("0-3", "0-3"), 1), (("1", "0", "2-3"), 0)])
def test_such_a_layer_in_another_place_is_refused(ranges: tuple[str, ...], entry: int, tmp_path: Path) -> None:
    """No runtime looks for a norm there, and leaves the one out that it would look for elsewhere."""
    model(tmp_path, drop="layers.0.input_layernorm")
    path = recipe(tmp_path, *ranges)
    with pytest.raises(RecipeError) as refused:
        skillmerge.plan(path)
    assert refused.value.what == (
        "layer 0 of `a` has other tensors than most (it lacks `input_layernorm.weight`), and config.json does not say "
        "why: no other layer can be layer 0, and it can be no other"
    )
    assert refused.value.fix == "take layer 0 once, as layer 0 of the stack"
    assert refused.value.place is not None
    lines = path.read_text().splitlines()
    assert f'"{ranges[entry]}"' in "".join(lines[refused.value.place.line : refused.value.place.line + 4])


def test_layers_that_config_tells_apart_may_move(tmp_path: Path) -> None:
    model(tmp_path, drop="layers.0.mlp", mlp_only_layers=[0])
    skillmerge.apply(recipe(tmp_path, "1-3", "0"))
    model(tmp_path, drop="layers.0.mlp", per_layer_config={"0": {"skip": ["mlp"]}})
    skillmerge.apply(recipe(tmp_path, "1-3", "0"), overwrite=True)


def test_the_usual_form_is_that_of_most_layers(tmp_path: Path) -> None:
    """Config.json says the same of layers 0 and 3, and which of the two is the odd one show the others."""
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    model(tmp_path, drop="layers.0.input_layernorm", layer_types=kinds)
    assert skillmerge.plan(recipe(tmp_path, "0-3", "1-3")).ok


def test_a_depth_that_is_not_said_matters_where_config_is_written(tmp_path: Path) -> None:
    for name, layers in (("rl", 3), ("sft", 3), ("target", 5)):
        write_checkpoint(tmp_path / name, random_tensors(tensor_shapes(layers)), config=CONFIG)
    parts = {name: [{"from": name}, {"from": name, "layers": "1-2"}] for name in ("rl", "sft")}
    models = {"rl": "rl", "sft": "sft", "target": "target", **{f"deep_{it}": {"stack": parts[it]} for it in parts}}
    plain = write_recipe(tmp_path, "target + 0.5 * (deep_rl - deep_sft)", models=models, coefficients=None)
    assert skillmerge.plan(plain).ok
    for merge in ("deep_rl", "onto + 0.5 * (deep_rl - deep_sft)"):
        onto = {"onto": {"stack": [{"from": "deep_rl"}]}}
        given = write_recipe(tmp_path, merge, models={**models, **onto}, coefficients=None)
        with pytest.raises(RecipeError, match="`rl` does not say how many layers there are, and the stack has 5"):
            skillmerge.plan(given)


def test_a_model_that_lacks_its_last_layers_is_no_part_of_a_stack(tmp_path: Path) -> None:
    model(tmp_path, num_hidden_layers=6)
    with pytest.raises(InputError, match=r"model `a`: layer 4 of `model\.layers` is missing"):
        skillmerge.plan(recipe(tmp_path, "0-3", "0-3"))
