"""`import`, row by row: what each part of a mergekit configuration becomes, is noted as, or is refused for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_tensors, read_checkpoint, tensor_shapes, write_checkpoint

import skillmerge
from skillmerge.errors import RecipeError, UsageError
from skillmerge.recipes import yamltext
from skillmerge.recipes.mergekit.importing import Imported

TWO = [{"model": "./a", "parameters": {"weight": 0.5}}, {"model": "./b", "parameters": {"weight": 0.25}}]
PLAIN = [{"model": "./a"}, {"model": "./b"}]


def imported(folder: Path, text: str | dict[str, Any], **options: Any) -> Imported:
    file = folder / "mergekit.yml"
    file.write_text(text if isinstance(text, str) else json.dumps({"dtype": "float32", **text}, indent=1))
    return skillmerge.import_recipe(file, **options)


def data_of(made: Imported) -> dict[str, Any]:
    return yamltext.read(made.text, "recipe.yaml").data  # type: ignore[no-any-return]


def merge_of(folder: Path, document: dict[str, Any], **options: Any) -> str:
    merge: str = data_of(imported(folder, document, **options))["merge"]
    return " ".join(merge.split()).replace("( ", "(")


def family(folder: Path, layers: int = 3, **models: float) -> None:
    """Models in float32 around one base; of each, the scale of its update."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers}
    base = random_tensors(tensor_shapes(layers), torch.float32)
    for seed, (name, scale) in enumerate(models.items()):
        update = random_tensors(tensor_shapes(layers), torch.float32, seed + 1, scale)
        write_checkpoint(folder / name, {key: tensor + update[key] for key, tensor in base.items()}, config=config)


# ------------------------------------------------------------------------------------------------ methods

ROWS = yamltext.read(Path(__file__).with_name("import_rows.yaml").read_text(), "import_rows.yaml").data
METHODS = [(row["given"], row["merge"]) for row in ROWS["methods"]]


@pytest.mark.parametrize(("document", "merge"), METHODS, ids=[given["merge_method"] for given, _ in METHODS])
def test_method_becomes(document: dict[str, Any], merge: str, tmp_path: Path) -> None:
    assert merge_of(tmp_path, document) == merge
    family(tmp_path, a=1e-3, b=1e-3, base=0)
    recipe = tmp_path / "recipe.yaml"
    skillmerge.import_recipe(tmp_path / "mergekit.yml", recipe)
    assert skillmerge.lint(recipe).findings == ()
    assert skillmerge.plan(recipe).ok


def test_every_method_is_tried() -> None:
    from skillmerge.recipes.mergekit.methods import METHODS as known

    assert {given["merge_method"] for given, _ in METHODS} == set(known)


# ------------------------------------------------------------------------------------------------ refusals

BASE: dict[str, Any] = {"base_model": "./base"}


@pytest.mark.parametrize("row", ROWS["refused"], ids=[row["says"][:40] for row in ROWS["refused"]])
def test_what_no_recipe_says_is_refused_at_its_place(row: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        imported(tmp_path, row["given"])
    assert row["says"] in refused.value.what
    assert refused.value.place is not None
    assert refused.value.excerpt in refused.value.message
    assert refused.value.exit_status == 2


# ------------------------------------------------------------------------------------------------ parameters


def rules_of(folder: Path, weight: Any, **document: Any) -> Any:
    """The coefficient of a weight, as the recipe has it."""
    given = {"merge_method": "task_arithmetic", **BASE, "models": [{"model": "./a", "parameters": {"weight": weight}}]}
    coefficients = data_of(imported(folder, {**given, **document}))["coefficients"]
    return coefficients["weight"]


def test_filters_are_turned_around_and_the_last_one_is_the_default(tmp_path: Path) -> None:
    filters = [
        {"filter": "self_attn", "value": 1},
        {"filter": "attn", "value": 2},
        {"value": 3},
        {"filter": "x", "value": 4},
    ]
    assert rules_of(tmp_path, filters) == {
        "default": 3, "rules": [{"tensors": "*attn*", "value": 2}, {"tensors": "*self_attn*", "value": 1}],
    }  # fmt: skip


def test_what_no_filter_matches_goes_to_the_next_level(tmp_path: Path) -> None:
    found = rules_of(
        tmp_path,
        [{"filter": "mlp", "value": 1}],
        parameters={"weight": [{"filter": "q_", "value": 2}, {"filter": "*", "value": 3}]},
    )
    assert found == {"default": 3, "rules": [{"tensors": "*q_*", "value": 2}, {"tensors": "*mlp*", "value": 1}]}


def test_filter_is_a_text_not_a_pattern(tmp_path: Path) -> None:
    found = rules_of(tmp_path, [{"filter": "a*[b]", "value": 1}, {"value": 0}])
    assert found["rules"] == [{"tensors": "*a[*][[]b]*", "value": 1}]


def test_gradient_is_a_ramp_and_outside_of_layers_its_first_point(tmp_path: Path) -> None:
    assert rules_of(tmp_path, [0.1, 0.9, 0.5]) == {"default": 0.1, "rules": [{"layers": "0-", "ramp": [0.1, 0.9, 0.5]}]}
    found = rules_of(tmp_path, [{"filter": "weight", "value": [1, 2]}, {"value": 0}])
    assert found["rules"] == [{"tensors": "*weight*", "value": 1}, {"tensors": "*weight*", "ramp": [1, 2]}]


def test_gradient_of_equal_points_is_a_number(tmp_path: Path) -> None:
    document = {"merge_method": "task_arithmetic", **BASE, "models": PLAIN[:1], "parameters": {"weight": [0.5, 0.5]}}
    assert merge_of(tmp_path, document) == "base + 0.5 * (a - base)"


def test_gradients_begin_anew_in_each_slice_and_one_layer_takes_the_last_point(tmp_path: Path) -> None:
    sources = [
        [{"model": name, "layer_range": ends} for name in ("./base", "./a")] for ends in ([0, 1], [1, 3], [3, 6])
    ]
    weights = [[1, 2], [3, 4], [5, 6]]
    slices = [
        {"sources": each, "parameters": {"weight": weight}} for each, weight in zip(sources, weights, strict=True)
    ]
    document = {"merge_method": "task_arithmetic", **BASE, "slices": slices}
    found = data_of(imported(tmp_path, document, layers=6))["coefficients"]["weight"]
    assert found == {
        "default": 1,
        "rules": [
            {"modules": ["norm", "head"], "value": 5},
            {"layers": 0, "value": 2}, {"layers": "1-2", "ramp": [3, 4]}, {"layers": "3-5", "ramp": [5, 6]},
        ],
    }  # fmt: skip


def test_nearer_levels_win(tmp_path: Path) -> None:
    source = {"model": "./a", "layer_range": [0, 3], "parameters": {"weight": 1}}
    inner = {"sources": [source, {"model": "./b", "layer_range": [0, 3]}], "parameters": {"weight": 2, "lambda": 3}}
    document = {"merge_method": "task_arithmetic", **BASE, "slices": [inner], "parameters": {"weight": 4, "lambda": 5}}
    assert merge_of(tmp_path, document, layers=3) == "base + 3 * ((a - base) + 2 * (b - base))"
    module = {"default": {"models": PLAIN, "parameters": {"weight": 6}}}
    document = {"merge_method": "task_arithmetic", **BASE, "modules": module, "parameters": {"weight": 4}}
    assert merge_of(tmp_path, document) == "base + 6 * (a - base) + 6 * (b - base)"


def test_weights_that_vary_divide_by_their_sum(tmp_path: Path) -> None:
    models = [{"model": "./a", "parameters": {"weight": [0, 1]}}, {"model": "./b", "parameters": {"weight": 1}}]
    assert merge_of(tmp_path, {"merge_method": "linear", "models": models}) == "(weight_a * a + b) / (weight_a + 1)"
    both = [{"model": "./a", "parameters": {"weight": [0, 1]}}, {"model": "./b", "parameters": {"weight": [1, 0]}}]
    document = {"merge_method": "linear", "models": both, "parameters": {"normalize": False}}
    assert merge_of(tmp_path, document) == "weight_a * a + weight_b * b"
    both[1]["parameters"] = {"weight": [1, 0.5]}  # type: ignore[assignment]
    with pytest.raises(RecipeError, match=r"factors add up to 1\.03125; mergekit"):
        imported(tmp_path, document)


def test_one_schedule_of_all_models_is_one_coefficient(tmp_path: Path) -> None:
    document = {
        "merge_method": "ties",
        **BASE,
        "models": PLAIN,
        "parameters": {"weight": [1, 2], "density": [0.2, 0.8]},
    }
    assert merge_of(tmp_path, document) == "base + ties(a - base, b - base, density=density, weights=weight)"


def test_several_modules_are_the_tensors_that_are_called_so(tmp_path: Path) -> None:
    modules = {
        name: {"models": PLAIN[:1], "parameters": {"weight": weight}}
        for name, weight in (("text", 1), ("vision", [2, 3]))
    }
    made = imported(tmp_path, {"merge_method": "task_arithmetic", **BASE, "modules": modules})
    assert data_of(made)["coefficients"]["weight"]["rules"] == [
        {"tensors": "*vision*", "value": 2}, {"tensors": "*vision*", "ramp": [2, 3]},
    ]  # fmt: skip
    assert "each module is taken to be the tensors whose names contain its name" in made.warnings[0].message


def test_filters_that_match_no_tensor_are_left_out_where_the_tensors_are_known(tmp_path: Path) -> None:
    filters = [{"filter": "lm_head", "value": 1}, {"filter": "rotary", "value": 2}, {"filter": "mlp", "value": 3}]
    document: dict[str, Any] = {"merge_method": "task_arithmetic", **BASE, "models": PLAIN[:1]}
    document["parameters"] = {"weight": [*filters, *filters[:1], {"value": 0}]}
    rules = data_of(imported(tmp_path, document))["coefficients"]["weight"]["rules"]
    assert [rule["tensors"] for rule in rules] == ["*mlp*", "*rotary*", "*lm_head*"]
    family(tmp_path, base=0, a=1e-3)
    made = imported(tmp_path, document, output=tmp_path / "recipe.yaml")
    assert [rule["tensors"] for rule in data_of(made)["coefficients"]["weight"]["rules"]] == ["*mlp*", "*lm_head*"]
    assert made.remarks[0].message.startswith("a filter matches no tensor, and is left out: `rotary` (line ")
    assert skillmerge.plan(tmp_path / "recipe.yaml").ok
    document["parameters"] = {"weight": [filters[1], {"value": 0.5}]}
    assert data_of(imported(tmp_path, document))["coefficients"] == {"weight": 0.5}


def test_coefficients_that_the_expression_does_not_have_are_left_out(tmp_path: Path) -> None:
    document = {"merge_method": "linear", "models": PLAIN[:1], "parameters": {"weight": [1, 2]}}
    assert "coefficients" not in data_of(imported(tmp_path, document))


def test_long_expressions_have_an_addend_or_an_operand_on_each_line(tmp_path: Path) -> None:
    models = [{"model": f"./model-of-a-long-name-{number}"} for number in "abcd"]
    document = {"merge_method": "ties", **BASE, "models": models, "parameters": {"weight": 1, "density": 0.5}}
    operands = "".join(f"    model_of_a_long_name_{number} - base,\n" for number in "abcd")
    text = imported(tmp_path, document).text
    assert f"merge: >-\n  base + ties(\n{operands}    density=0.5)\noutput:" in text
    document |= {"merge_method": "dare_linear"}
    drop = "+ drop(model_of_a_long_name_{} - base, density=0.5, rescale=l1)"
    addends = "".join(f"  {drop.format(number)}\n" for number in "abcd")
    assert f"merge: >-\n  base\n{addends}output:" in imported(tmp_path, document).text


def test_comments_cannot_be_ended_by_what_they_quote(tmp_path: Path) -> None:
    made = imported(tmp_path, {"merge_method": "passthrough", "models": PLAIN[:1], "a\nmerge: b\u2028c": 1})
    assert data_of(made)["merge"] == "a"
    assert "merge: b c` means nothing to mergekit" in made.text


# ------------------------------------------------------------------------------------------------ output, notes


@pytest.mark.parametrize(
    ("method", "given", "dtype", "words"),
    [
        ("task_arithmetic", {"dtype": "bfloat16"}, "bfloat16", "warning: mergekit computes in bfloat16;"),
        ("task_arithmetic", {"dtype": "torch.float16"}, "float16", "warning: mergekit computes in float16;"),
        ("task_arithmetic", {"dtype": "float32", "out_dtype": "bfloat16"}, "bfloat16", ""),
        (
            "task_arithmetic",
            {"dtype": "bfloat16", "out_dtype": "float32"},
            "float32",
            "warning: mergekit computes",
        ),
        ("task_arithmetic", {"dtype": None}, None, "warning: mergekit computes in the dtype of the models;"),
        ("slerp", {"dtype": "bfloat16"}, "bfloat16", "note: mergekit and skillmerge compute this method in float32;"),
        ("passthrough", {"dtype": "bfloat16", "base_model": None}, "bfloat16", ""),
    ],
)
def test_dtype(method: str, given: dict[str, Any], dtype: str | None, words: str, tmp_path: Path) -> None:
    document = {"merge_method": method, **BASE, "models": PLAIN[:1], **given}
    document |= {
        "parameters": {"weight": 1} if method == "task_arithmetic" else {"t": 0.5} if method == "slerp" else {}
    }
    made = imported(tmp_path, {key: value for key, value in document.items() if value is not None or key == "dtype"})
    assert data_of(made)["output"].get("dtype") == dtype
    assert [f"{remark.level}: {remark.message}"[: len(words)] for remark in made.remarks] == ([words] if words else [])


@pytest.mark.parametrize("row", ROWS["noted"], ids=[row["says"][:40] or "nothing" for row in ROWS["noted"]])
def test_what_does_nothing_is_noted(row: dict[str, Any], tmp_path: Path) -> None:
    made = imported(tmp_path, row["given"])
    found = [remark.message.partition(" (line ")[0] for remark in made.remarks]
    assert found == ([row["says"]] if row["says"] else []), made.text
    assert made.warnings == []


def test_donor_is_mergekits(tmp_path: Path) -> None:
    assert "like" not in data_of(imported(tmp_path, {"merge_method": "karcher", "models": PLAIN}))["output"]
    for given in (BASE, {"tokenizer_source": "./b"}, {"base_model": "./b", "tokenizer_source": "base"}):
        made = imported(tmp_path, {"merge_method": "karcher", "models": PLAIN, **given})
        assert data_of(made)["output"]["like"] == ("base" if given is BASE else "b")


def test_negative_weights_in_an_election_are_warned_of(tmp_path: Path) -> None:
    made = imported(tmp_path, {"merge_method": "ties", **BASE, "models": PLAIN[:1], "parameters": {"weight": -1}})
    assert "a negative weight turns the signs of its update around" in made.warnings[0].message


# ------------------------------------------------------------------------------------------------ files


def test_yaml_is_read_as_mergekit_reads_it(tmp_path: Path) -> None:
    text = """\
merge_method: ties
base_model: ./base
defaults: &all {weight: 1e-1, density: 0.5}
models:
  - model: ./a
    parameters:
      <<: *all
      density: 0.25
  - model: ./b
    parameters: *all
parameters: {normalize: no, rescale: on}
merge_method: ties
dtype: float32
"""
    made = imported(tmp_path, text)
    assert " ".join(data_of(made)["merge"].split()).replace("( ", "(") == (
        "base + elect(trim(a - base, density=0.25, rescale=l1), trim(b - base, density=0.5, rescale=l1), "
        "weights=0.1, normalize=no)"
    )
    assert "`merge_method` is written twice, with the same value (line 12)" in made.as_dict()["notes"]
    with pytest.raises(RecipeError, match="12:1: duplicate key `merge_method` with another value"):
        imported(tmp_path, text.replace("merge_method: ties\ndtype", "merge_method: sce\ndtype"))


@pytest.mark.parametrize(
    ("written", "place"),
    [
        ("org/name", "hf://org/name"), ("org/name@v1", "hf://org/name@v1"), ("./x", "../x"), ("x/y/z", "../x/y/z"),
        ("/abs/x", "/abs/x"), ("there/x", "../there/x"), ({"model": {"path": "org/n", "revision": "r"}}, "hf://org/n@r"),
        ("C:\\m\\x", "C:\\m\\x"), ("a: b #c", "../a: b #c"), ("null", "../null"), ("模型/二/三", "../模型/二/三"),
    ],
)  # fmt: skip
def test_place_of_a_model(written: Any, place: str, tmp_path: Path) -> None:
    (tmp_path / "there" / "x").mkdir(parents=True)
    (tmp_path / "inner").mkdir()
    document = {"merge_method": "passthrough", "models": [{"model": written}]}
    made = imported(tmp_path, document, output=tmp_path / "inner" / "recipe.yaml")
    assert [*data_of(made)["models"].values()] == [place]


def test_names_are_short_and_unlike() -> None:
    from skillmerge.recipes.mergekit.writing import names_of

    places = {
        "hf://mistralai/Mistral-7B-v0.1": "Mistral", "hf://Qwen/Qwen2.5-7B-Instruct@v1": "Qwen2_5_Instruct",
        "./runs/7B/": "m7B", "C:\\models\\Nemo-12B": "Nemo", "./ties": "ties_2", "./null": "mnull", "./模型": "model",
        "./a/step-1": "step_1", "./b/step-1": "step_1_2", "hf://a/Llama-8B": "Llama_8B",
        "hf://a/Llama-70B": "Llama_70B",
    }  # fmt: skip
    assert names_of(places) == places


def test_output_is_not_replaced_unless_that_is_asked_for(tmp_path: Path) -> None:
    document = {"merge_method": "passthrough", "models": PLAIN[:1]}
    path = tmp_path / "recipe.yaml"
    path.write_text("mine")
    with pytest.raises(UsageError, match="already exists"):
        imported(tmp_path, document, output=path)
    assert path.read_text() == "mine"
    made = imported(tmp_path, document, output=path, overwrite=True)
    assert path.read_text() == made.text
    with pytest.raises(UsageError, match="is not a folder"):
        imported(tmp_path, document, output=tmp_path / "none" / "r.yaml")


def test_warnings_fail_where_it_is_strict_and_nothing_is_written(tmp_path: Path) -> None:
    document = {"merge_method": "ties", **BASE, "models": PLAIN[:1], "parameters": {"weight": 1}, "dtype": "bfloat16"}
    made = imported(tmp_path, document, output=tmp_path / "r.yaml", strict=True)
    assert not made.ok
    assert made.output is None
    assert not (tmp_path / "r.yaml").exists()
    assert imported(tmp_path, {**document, "dtype": "float32"}, output=tmp_path / "r.yaml", strict=True).ok


def test_document_is_chosen_by_name_or_number(tmp_path: Path) -> None:
    text = "".join(f"---\nmerge_method: passthrough\nmodels: [{{model: ./{name}}}]\n" for name in "ab")
    assert data_of(imported(tmp_path, text, document="2"))["merge"] == "b"
    with pytest.raises(UsageError, match="has no document `3`"):
        imported(tmp_path, text, document="3")
    with pytest.raises(RecipeError, match=r"there are 2 merges in this file: 1, 2"):
        imported(tmp_path, text)


@pytest.mark.parametrize("text", ["skillmerge: 1\nmodels: {a: ./a}\nmerge: a\noutput: {path: out}\n"])
def test_recipe_is_not_imported(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a recipe already"):
        imported(tmp_path, text)


def test_imported_recipe_computes_what_mergekit_does(tmp_path: Path) -> None:
    """Task arithmetic with a gradient, by formula."""
    family(tmp_path, base=0, a=1e-2, b=1e-2)
    models = [
        {"model": "./a", "parameters": {"weight": [0.2, 1, 0.4]}},
        {"model": "./b", "parameters": {"weight": -0.5}},
    ]
    imported(tmp_path, {"merge_method": "task_arithmetic", **BASE, "models": models}, output=tmp_path / "recipe.yaml")
    skillmerge.apply(tmp_path / "recipe.yaml")
    base, a, b, made = (read_checkpoint(tmp_path / name) for name in ("base", "a", "b", "merged"))
    for name, tensor in made.items():
        weight = (0.2, 1, 0.4)[int(name.split(".")[2])] if ".layers." in name else 0.2
        wanted = base[name].double() + weight * (a[name].double() - base[name]) - 0.5 * (b[name].double() - base[name])
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-6, atol=1e-8)
