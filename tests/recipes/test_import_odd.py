"""`import` of files that nobody writes on purpose, and of files written to do harm."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from test_import import BASE, PLAIN, adapter, data_of, family, imported, merge_of

import skillmerge
from skillmerge.errors import RecipeError


def filters(*rows: tuple[str, Any], default: Any = 0) -> list[dict[str, Any]]:
    return [*({"filter": text, "value": value} for text, value in rows), {"value": default}]


def test_weights_without_normalization_that_cancel_are_refused(tmp_path: Path) -> None:
    models = [{"model": f"./{name}", "parameters": {"weight": weight}} for name, weight in (("a", 1), ("b", -1))]
    with pytest.raises(RecipeError, match="factors add up to 0; mergekit scales"):
        imported(tmp_path, {"merge_method": "linear", "models": models, "parameters": {"normalize": False}})


@pytest.mark.parametrize("scale", [[1, 2], [1, 2, 1], [{"filter": "mlp", "value": [1, 0.5]}, {"value": 1}]])
def test_scale_that_is_1_at_the_first_layer_only_is_refused(scale: list[Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="`scale` has no counterpart"):
        imported(tmp_path, {"merge_method": "passthrough", "models": PLAIN[:1], "parameters": {"scale": scale}})


def test_negative_weight_of_some_layers_is_warned_of(tmp_path: Path) -> None:
    document = {"merge_method": "ties", **BASE, "models": PLAIN, "parameters": {"weight": [1, -1], "density": 0.5}}
    warnings = [remark.message for remark in imported(tmp_path, document).warnings]
    assert any("a negative weight turns the signs" in message for message in warnings)


def test_density_and_epsilon_are_compared_where_they_meet(tmp_path: Path) -> None:
    given: dict[str, Any] = {"merge_method": "della", **BASE, "models": PLAIN[:1]}
    apart = {"density": filters(("mlp", 0.9), default=0.5), "epsilon": filters(("mlp", 0.05), default=0.4), "weight": 1}
    assert merge_of(tmp_path, {**given, "parameters": apart}) == (
        "base + elect(drop(a - base, density=density, spread=epsilon, rescale=l1))"
    )
    for wrong in ({"density": [0.5, 1]}, {"density": 0.5, "epsilon": filters(("mlp", 0.5))}):
        with pytest.raises(RecipeError, match="leaves the range from 0 to 1"):
            imported(tmp_path, {**given, "parameters": {"weight": 1, **wrong}})
    with pytest.raises(RecipeError, match=r"`epsilon` is a number of at least 0, and this is -0\.1"):
        imported(tmp_path, {**given, "parameters": {"weight": 1, "density": 0.5, "epsilon": -0.1}})


def test_filters_outside_of_layers_have_no_rules_in_slices(tmp_path: Path) -> None:
    """Where nothing is known of the models' tensors: a rule that matches nothing would be a mistake."""
    sources = [{"model": name, "layer_range": [0, 3]} for name in ("./base", "./a")]
    t = filters(("embed_tokens", 0), ("lm_head", [0, 1]), ("self_attn", [0.2, 0.8]), default=0.5)
    document = {"merge_method": "slerp", **BASE, "slices": [{"sources": sources}], "parameters": {"t": t}}
    imported(tmp_path, document, output=tmp_path / "recipe.yaml")
    family(tmp_path, base=0, a=1e-3)
    assert skillmerge.plan(tmp_path / "recipe.yaml").problems == ()
    known = imported(tmp_path, document, output=tmp_path / "known.yaml")
    assert known.warnings == []
    assert skillmerge.plan(tmp_path / "known.yaml").problems == ()


def test_rule_of_a_slice_that_matches_nothing_in_it_is_left_out(tmp_path: Path) -> None:
    family(tmp_path, base=0, a=1e-3)
    slices = [
        {"sources": [{"model": name, "layer_range": ends} for name in ("./base", "./a")], "parameters": {"t": t}}
        for ends, t in (([0, 1], filters(("norm.weight", [0.1, 0.2]), ("layers.2", 0.3))), ([1, 3], 0.5))
    ]
    made = imported(tmp_path, {"merge_method": "slerp", **BASE, "slices": slices}, output=tmp_path / "recipe.yaml")
    assert made.remarks == ()
    assert skillmerge.plan(tmp_path / "recipe.yaml").problems == ()


def test_gradient_of_a_filter_goes_over_all_layers_though_few_have_such_tensors(tmp_path: Path) -> None:
    family(tmp_path, layers=5, base=0, a=1e-3)
    given: dict[str, Any] = {"merge_method": "task_arithmetic", **BASE, "models": PLAIN[:1]}
    document = {
        **given,
        "parameters": {"weight": filters(("layers.1.mlp", [1, 0]), ("layers.3", [0, 1, 3]), default=0.5)},
    }
    made = imported(tmp_path, document, output=tmp_path / "recipe.yaml")
    assert made.remarks == ()
    plan = skillmerge.plan(tmp_path / "recipe.yaml")
    found = {name: tensor.coefficients[0] for name, tensor in plan.tensors.items()}
    for name, value in found.items():
        wanted = 0.75 if "layers.1.mlp" in name else 2 if "layers.3" in name else 0.5
        assert value == wanted, name
    (tmp_path / "elsewhere").mkdir()
    (note,) = imported(tmp_path / "elsewhere", document).remarks
    assert note.message.startswith("a gradient with a filter goes over the layers that have such tensors")


def test_gradient_of_a_filter_goes_over_the_layers_of_a_stack(tmp_path: Path) -> None:
    """Its layers have other numbers than those of the models, and there may be more of them."""
    family(tmp_path, base=0, a=1e-3)
    weight = filters(("mlp", [1, 0]), ("layers.3", 0.25), default=0.5)
    slices = [
        {"sources": [{"model": name, "layer_range": ends} for name in ("./base", "./a")], "parameters": {"weight": it}}
        for ends, it in (([0, 2], 0.75), ([0, 3], weight))
    ]
    document = {"merge_method": "task_arithmetic", **BASE, "slices": slices}
    made = imported(tmp_path, document, output=tmp_path / "recipe.yaml")
    assert made.remarks == ()
    tensors = skillmerge.plan(tmp_path / "recipe.yaml").tensors
    found = [tensors[f"model.layers.{layer}.mlp.up_proj.weight"].coefficients for layer in range(5)]
    assert found == [(0.75,), (0.75,), (1.0,), (0.5,), (0.0,)]
    found = [tensors[f"model.layers.{layer}.self_attn.q_proj.weight"].coefficients for layer in range(5)]
    assert found == [(0.75,), (0.75,), (0.5,), (0.25,), (0.5,)]


def test_filter_of_the_last_slice_counts_behind_the_layers(tmp_path: Path) -> None:
    family(tmp_path, base=0, a=1e-3)
    slices = [
        {
            "sources": [{"model": name, "layer_range": ends} for name in ("./base", "./a")],
            "parameters": {"weight": weight},
        }
        for ends, weight in (([0, 1], 0.25), ([1, 3], filters(("a", [2, 1]), default=0.5)))
    ]
    imported(tmp_path, {"merge_method": "task_arithmetic", **BASE, "slices": slices}, output=tmp_path / "recipe.yaml")
    tensors = skillmerge.plan(tmp_path / "recipe.yaml").tensors
    assert [tensors[f"{name}.weight"].coefficients for name in ("lm_head", "model.norm")] == [(2.0,), (0.5,)]
    assert tensors["model.embed_tokens.weight"].coefficients == (0.25,)


@pytest.mark.parametrize("text", ["a\u2028b", "\ufeffmlp", "\x85", "\U000e0001", "a\\b\"c'", "{}", ": #", "*", "é"])
def test_filter_of_odd_characters_reads_back(text: str, tmp_path: Path) -> None:
    given = {
        "merge_method": "task_arithmetic",
        **BASE,
        "models": PLAIN[:1],
        "parameters": {"weight": filters((f"x{text}y", 1))},
    }
    (rule,) = data_of(imported(tmp_path, given))["coefficients"]["weight"]["rules"]
    assert rule["tensors"] == f"*x{text}y*".replace("x*y", "x[*]y")


def test_output_of_another_document_is_where_its_recipe_writes_it(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    documents = [
        "name: one\nmerge_method: passthrough\nmodels: [{model: ./a}]\n",
        "name: two\nmerge_method: linear\nmodels: [{model: one}, {model: ./a}]\nparameters: {weight: 1}\n",
    ]
    text = "---\n".join(documents)
    family(tmp_path, a=1e-3)
    for name in ("one", "two"):
        recipe = tmp_path / "recipes" / f"{name}.yaml"
        imported(tmp_path, text, document=name, output=recipe)
        skillmerge.apply(recipe)
    assert (tmp_path / "recipes" / "two" / "model.safetensors").is_file()


def test_an_adapter_goes_onto_the_output_of_another_document(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    text = "name: one\nmerge_method: passthrough\nmodels: [{model: ./a}]\n---\n"
    text += "name: two\nmerge_method: passthrough\nmodels: [{model: one+./lora}]\n"
    family(tmp_path, a=1e-3)
    adapter(tmp_path / "lora")
    made = imported(tmp_path, text, document="two", output=tmp_path / "recipes" / "two.yaml")
    assert data_of(made)["models"] == {"one": "./one", "lora": {"adapter": "../lora", "onto": "one"}}


@pytest.mark.parametrize("number", ["0x_", "0b_", "0x", "+0x_", "0b2"])
def test_word_that_is_nearly_a_number_is_refused(number: str, tmp_path: Path) -> None:
    text = f"merge_method: linear\nmodels: [{{model: ./a}}, {{model: ./b}}]\nparameters: {{weight: {number}}}\n"
    with pytest.raises(RecipeError, match="`weight` is not a number"):
        imported(tmp_path, text)


def test_number_too_large_for_a_float_is_noted_where_it_does_nothing(tmp_path: Path) -> None:
    text = (
        "merge_method: ties\nbase_model: ./base\ndtype: float32\nparameters: {weight: 1}\n"
        f"models: [{{model: ./a, parameters: {{lambda: 0x{'f' * 298}, normalize: true}}}}]\n"
    )
    first, second = imported(tmp_path, text).remarks
    assert first.message.startswith("`lambda` 6725968537")
    assert second.message.startswith("`normalize` under `models` does nothing in mergekit")


def test_harmful_files_take_little_time(tmp_path: Path) -> None:
    begin = time.thread_time()
    deep = "x"
    for _ in range(17):
        deep = f"{{modules: {deep}}}"
    many = ", ".join(f"{{filter: f{number}, value: .6}}" for number in range(1000))
    points = ", ".join((".6", ".5") * 1000)
    density = f"[{many}, {{value: [{points}]}}]"
    models = "models: [{model: ./a}, {model: ./b}]"
    for text in (
        f"merge_method: linear\nmodels: {deep.replace('x', '[' + '{model: x},' * 2500 + ']')}\n",
        f"merge_method: linear\n{models}\nparameters: {{weight: {density}}}\n",
        f"merge_method: della\nbase_model: ./c\n{models}\nparameters: {{weight: 1, density: {density}}}\n",
    ):
        with pytest.raises(RecipeError):
            imported(tmp_path, text)
    assert time.thread_time() - begin < 20
