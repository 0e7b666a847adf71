"""Documents of other tools, handed to a command as a recipe: what is said of each, whole."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_tensors, read_checkpoint, run_cli, tensor_shapes, write_checkpoint, write_family

import skillmerge
from skillmerge.recipes import yamltext
from skillmerge.recipes.foreign import mergekit
from skillmerge.recipes.formula.parser import parse

GATES = "run it on an output: `skillmerge gate FOLDER --gates FILE`"
START = "start one: `skillmerge init recipe.yaml`"
RAMP = (
    "write a coefficient with `rules`, such as `coefficients: {lam: {default: 0, rules: [{layers: 0-, ramp: [0, 1]}]}}`"
)
NO = "`linear`, `task_arithmetic` and `passthrough` of one model have counterparts"
SAME = "the recipe that says the same, which `skillmerge init recipe.yaml --from merge.yml` writes:\n"
ANOTHER = "merge with mergekit, as the plain sum of the models or updates is another merge"
MERGEKIT = {
    "base_model: ./base\nmodels:\n  - model: ./rl\n    parameters: {weight: 0.7}\n  - model: ./sft\n"
    "    parameters: {weight: -0.7}\nmerge_method: task_arithmetic\ndtype: bfloat16\n": (
        7, "merge_method",
        SAME + "skillmerge: 1\nmodels:\n  base: ./base\n  rl: ./rl\n  sft: ./sft\n"
        "merge: base + 0.7 * (rl - base) + -0.7 * (sft - base)\noutput: {path: ./merged, dtype: bfloat16}",
    ),
    "merge_method: linear\nmodels:\n  - model: Qwen/Qwen2.5-7B\n    parameters: {weight: 1}\n"
    "  - model: org/other@v1\n    parameters: {weight: 3}\n": (
        1, "merge_method",
        SAME + "skillmerge: 1\nmodels:\n  Qwen2_5_7B: hf://Qwen/Qwen2.5-7B\n"
        "  other: hf://org/other@v1\nmerge: (Qwen2_5_7B + 3 * other) / 4\noutput: {path: ./merged}",
    ),
    "merge_method: passthrough\nmodels: [{model: ./rl}]\n": (
        1, "merge_method",
        SAME + "skillmerge: 1\nmodels:\n  rl: ./rl\nmerge: rl\noutput: {path: ./merged}",
    ),
    "merge_method: linear\nparameters: {normalize: false}\nmodels:\n  - model: ./a\n    parameters: {weight: .8}\n"
    "  - model: ./b\n    parameters: {weight: .5}\n": (
        1, "merge_method", f"the weights add up to 1.3, and the model would be scaled by that; {NO}"
    ),
    "merge_method: ties\nbase_model: ./base\nmodels: [{model: ./a, parameters: {weight: 1}}]\n": (
        1, "merge_method", f"`merge_method: ties` has no counterpart in this version: {ANOTHER}; {NO}"
    ),
    "slices:\n  - sources: [{model: ./a, layer_range: [0, 4]}, {model: ./b, layer_range: [0, 4]}]\n"
    "merge_method: slerp\nbase_model: ./a\n": (
        3, "merge_method", f"`merge_method: slerp` has no counterpart in this version: {ANOTHER}; {NO}"
    ),
    "slices:\n  - sources: [{model: ./a, layer_range: [0, 4]}]\nmerge_method: passthrough\n": (
        3, "merge_method", f"`slices` has no counterpart in a recipe; {NO}"
    ),
    "merge_method: linear\nmodels: [{model: ./a, parameters: {weight: [0, 1]}}]\n": (
        1, "merge_method", f"a `weight` that is a list or a filter has no direct counterpart; {RAMP}"
    ),
    "merge_method: linear\nmodels: [{model: ./a+./lora, parameters: {weight: 1}}]\n": (
        1, "merge_method",
        f"`./a+./lora` puts an adapter on a model: merge it in first (peft: `merge_and_unload`); {NO}",
    ),
    "merge_method: linear\nbase_model: ./b\nmodels: [{model: ./a}, {model: ./b}]\nparameters: {weight: 0.5}\n": (
        1, "merge_method",
        SAME + "skillmerge: 1\nmodels:\n  a: ./a\n  b: ./b\nmerge: 0.5 * a + 0.5 * b\n"
        "output: {path: ./merged, like: b}",
    ),
    "models:\n  - model: ./a\n  - model: ./b\n": (
        1, "models", f"`merge_method` is missing; {NO}"
    ),
}  # fmt: skip
OTHERS = {
    '{"peft_type": "LORA", "r": 8}': (
        "the configuration of a PEFT adapter", "peft_type",
        "merge the adapter into its base (peft: `merge_and_unload`), and name that folder as a model of a recipe",
    ),
    '{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}': (
        "a model's config.json", "model_type", f"name its folder as a model of a recipe; {START}"
    ),
    "base_model: meta-llama/Llama-3.1-8B\ndatasets: [{path: x}]\n": (
        "a configuration of Axolotl", "base_model", f"recipes name finished models; {START}"
    ),
    "model_name_or_path: x\nstage: sft\n": (
        "a configuration of LLaMA-Factory", "model_name_or_path", f"recipes name finished models; {START}"
    ),
    '{"metadata": {}, "weight_map": {"a": "b"}}': (
        "the index of a model's weights", "weight_map", f"name its folder as a model of a recipe; {START}"
    ),
    '{"lock_version": 1}': ("a lock, which belongs to a recipe", "lock_version", "name the recipe beside it"),
    "gates: {finite: true}\n": ("a file of gates", "gates", GATES),
    "on: push\njobs: {}\n": ("a workflow of a code host", "on", START),
}  # fmt: skip


@pytest.mark.parametrize("text", MERGEKIT)
def test_foreign_mergekit_is_answered_with_the_recipe_that_says_the_same(tmp_path: Path, text: str) -> None:
    (tmp_path / "merge.yml").write_text(text)
    line, key, fix = MERGEKIT[text]
    told = f"{line}:1: is a configuration of mergekit, not a recipe\n{line:>5} | {text.splitlines()[line - 1]}\n"
    told += f"      | {'^' * len(key)}\nhelp: {fix}\n"
    for command in ("plan", "apply", "inspect"):
        process = run_cli(command, "merge.yml", cwd=tmp_path)
        assert (process.returncode, process.stderr) == (2, f"error: merge.yml:{told}")
    process = run_cli("lint", "merge.yml", cwd=tmp_path)
    marked = told.replace(": is a", ": error: is a", 1).replace("not a recipe", "not a recipe [invalid-recipe]", 1)
    assert process.stdout == f"merge.yml:{marked}1 recipe: 1 error, no warnings\n"


def test_init_writes_the_recipe_that_says_the_same_as_a_file(tmp_path: Path) -> None:
    """Found by a newcomer: the recipe was in an error's help alone."""
    text = next(text for text in MERGEKIT if "task_arithmetic" in text)
    (tmp_path / "merge.yml").write_text(text)
    process = run_cli("init", "recipe.yaml", "--from", "merge.yml", cwd=tmp_path)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == "wrote recipe.yaml, and skillmerge.schema.json beside it for editors\n"
    written = MERGEKIT[text][2].removeprefix(SAME) + "\n"
    assert (tmp_path / "recipe.yaml").read_text().split("\n", 1)[1] == written
    assert run_cli("init", "-", "--from", "merge.yml", cwd=tmp_path).stdout == written


@pytest.mark.parametrize("text", [text for text in MERGEKIT if not MERGEKIT[text][2].startswith(SAME)])
def test_init_refuses_a_file_that_has_no_translation_with_the_reason(text: str, tmp_path: Path) -> None:
    """Found by a newcomer: the error only said that it is a configuration of mergekit, which they had said."""
    (tmp_path / "merge.yml").write_text(text)
    process = run_cli("init", "recipe.yaml", "--from", "merge.yml", cwd=tmp_path)
    reason, _, fix = MERGEKIT[text][2].rpartition("; ")
    assert process.returncode == 2
    assert re.match(rf"error: merge\.yml(:\d+:\d+)?: {re.escape(reason)}\n", process.stderr), process.stderr
    assert process.stderr.endswith(f"help: {fix}\n")
    assert not (tmp_path / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("entry", "place", "fix"),
    [
        ("{weigth: 0.7}", "4:18: the parameter `weigth`", "did you mean `weight`?"),
        ("{weight: [0.2, 1]}", "4:18: a `weight` that is a list", RAMP.replace("0,", "0.2,")),
        ("5", "4:5: `parameters` is not a table", NO),
    ],
)
def test_what_has_no_translation_is_shown_where_it_is(entry: str, place: str, fix: str, tmp_path: Path) -> None:
    text = f"merge_method: linear\nmodels:\n  - model: ./a\n    parameters: {entry}\n"
    (tmp_path / "merge.yml").write_text(text)
    error = run_cli("init", "r.yaml", "--from", "merge.yml", cwd=tmp_path).stderr
    assert error.startswith(f"error: merge.yml:{place}"), error
    assert error.endswith(f"help: {fix}\n")


def test_translation_in_another_folder_finds_the_models(tmp_path: Path) -> None:
    (tmp_path / "ta.yml").write_text(
        "merge_method: task_arithmetic\nbase_model: ./base\nmodels:\n  - {model: runs/rl/final}\n  - {model: /abs/b}\n"
        "  - {model: org/name}\n"
    )
    (tmp_path / "mk").mkdir()
    assert run_cli("init", "mk/t.yaml", "--from", "ta.yml", cwd=tmp_path).stderr == ""
    models = yamltext.read((tmp_path / "mk/t.yaml").read_text(), "t.yaml").data["models"]
    assert [*models.values()] == ["../base", "../runs/rl/final", "/abs/b", "hf://org/name"]
    assert run_cli("init", "t.yaml", "--from", "ta.yml", cwd=tmp_path).stderr == ""
    models = yamltext.read((tmp_path / "t.yaml").read_text(), "t.yaml").data["models"]
    assert [*models.values()] == ["./base", "runs/rl/final", "/abs/b", "hf://org/name"]
    process = run_cli("init", "t.yaml", "--from", "ta.yml", cwd=tmp_path)
    assert process.stderr.endswith("help: choose another file: `skillmerge init my-recipe.yaml --from ta.yml`\n")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("mine.yaml", "skillmerge: 1\nmodels: {a: ./a}\nmerge: a\noutput: {path: out}\n",
         "error: `mine.yaml` is a recipe already\nhelp: copy it, or name a mergekit file\n"),
        ("none.yaml", None, "error: none.yaml does not exist\nhelp: `skillmerge init` writes a recipe to start from\n"),
    ],
)  # fmt: skip
def test_init_from_a_file_that_is_none_of_mergekit(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    process = run_cli("init", "recipe2.yaml", "--from", name, cwd=tmp_path)
    assert (process.returncode, process.stderr) == (2, message)


LINEAR: dict[str, Any] = {"merge_method": "linear", "models": [{"model": "./a"}]}
TASKS: dict[str, Any] = {**LINEAR, "merge_method": "task_arithmetic", "base_model": "./base"}
NOWHERE: list[tuple[dict[str, Any], str]] = [
    ({**LINEAR, "models": 5}, "`models`"),
    ({**LINEAR, "models": True}, "`models`"),
    ({**LINEAR, "models": {"a": 1}}, "`models`"),
    ({**LINEAR, "parameters": 3}, "`parameters`"),
    ({**LINEAR, "parameters": [1]}, "`parameters`"),
    ({**TASKS, "parameters": "x"}, "`parameters`"),
    ({**LINEAR, "models": [{"model": "./a", "parameters": 3}]}, "`parameters`"),
    ({**LINEAR, 5: 6, "a": 7}, "`5`"),
    ({**LINEAR, "models": [{"model": 5}]}, "`5`"),
    ({**LINEAR, "models": [{"model": {"model": {"path": "a"}}}]}, "`{'path': 'a'}`"),
    *(
        ({**LINEAR, "parameters": {"weight": number}}, "`weight`")
        for number in (math.inf, math.nan, -math.inf, 10**400, [1], None)
    ),
    ({**TASKS, "parameters": {"lambda": math.inf}}, "`lambda`"),
    ({**LINEAR, "models": [{"model": name, "parameters": {"weight": 1e308}} for name in "abc"]}, "weights"),
    ({**TASKS, "parameters": {"lambda": 1e200, "weight": 1e200}}, "weights"),
    ({**LINEAR, "tokenizer_source": "union"}, "`tokenizer_source: union`"),
    ({**LINEAR, "tokenizer_source": "./a"}, "`tokenizer_source: ./a`"),
    ({**LINEAR, "tokenizer_source": {"model": "./a"}}, "`tokenizer_source: "),
    ({**LINEAR, "base_model": "./b"}, "`base_model: ./b`"),
    ({**LINEAR, "merge_method": "passthrough", "base_model": "./b"}, "`base_model: ./b`"),
]


@pytest.mark.parametrize("number", range(len(NOWHERE)))
def test_foreign_mergekit_that_cannot_be_said_is_named(number: int) -> None:
    document, named = NOWHERE[number]
    with pytest.raises(mergekit.NoCounterpart) as refused:
        mergekit.equivalent(document)
    assert named in str(refused.value)


@pytest.mark.parametrize("source", [None, "base"])
def test_foreign_mergekit_with_the_usual_tokenizer_is_answered(source: str | None) -> None:
    assert mergekit.equivalent({**LINEAR, "tokenizer_source": source}) == mergekit.equivalent(LINEAR)


@pytest.mark.parametrize(
    "place",
    [
        "null", "True", "no", "~", "12", "1e5", "0x1F", ".inf", "2024-01-01", "a: b", "a #b", "a, b", "[a]", "- a",
        "@a", "*a", "&a", "!a", "|", ">", "%a", "'a'", 'a"b', "C:\\models\\a", " a ", "a\nb", "é", "模型/二", "a:", "?",
        "", "\u2028", "\U0001f600/a", "./true", "./null", "~/a", "/srv/a b", "org/name@v1", "./½", "a" * 3000,
    ],
)  # fmt: skip
def test_foreign_place_is_read_as_it_was(place: str) -> None:
    for document in (TASKS, {**LINEAR, "base_model": place}):
        document = {**document, "models": [{"model": place}, {"model": "./other"}]}
        data = yamltext.read(mergekit.equivalent(document), "recipe.yaml").data
        assert all(isinstance(name, str) for name in data["models"])
        assert {path.removeprefix("hf://") for path in data["models"].values()} >= {place, "./other"}
        assert data["output"].get("like", "base") in data["models"]
        parse(data["merge"], [*data["models"]], [])


def test_foreign_weights_keep_their_digits() -> None:
    models = [{"model": name, "parameters": {"weight": weight}} for name, weight in (("a", 1.2345678), ("b", 2.0))]
    assert "merge: (1.2345678 * a + 2 * b) / 3.2345678\n" in mergekit.equivalent({**LINEAR, "models": models})


def test_foreign_mergekit_in_our_words_computes_what_it_says(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "rl", "sft")):
        write_checkpoint(tmp_path / name, random_tensors(tensor_shapes(), torch.float32, seed))
    (tmp_path / "merge.yml").write_text(next(iter(MERGEKIT)).replace("bfloat16", "float32"))
    skillmerge.init(tmp_path / "recipe.yaml", str(tmp_path / "merge.yml"))
    skillmerge.apply(tmp_path / "recipe.yaml")
    made, base, rl, sft = (read_checkpoint(tmp_path / name) for name in ("merged", "base", "rl", "sft"))
    for name, tensor in made.items():
        wanted = base[name].double() + 0.7 * (rl[name].double() - base[name]) - 0.7 * (sft[name].double() - base[name])
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("text", OTHERS)
def test_foreign_document_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    what, key, fix = OTHERS[text]
    for command in ("plan", "lint"):
        process = run_cli(command, "x.json", cwd=tmp_path)
        told = process.stderr + process.stdout
        assert process.returncode == 2
        assert f"is {what}, not a recipe" in told
        assert f"{'^' * (len(key) + 2 * text.startswith('{'))}\nhelp: {fix}\n" in told


def test_foreign_place_with_an_adapter_is_told(tmp_path: Path) -> None:
    recipe = write_family(tmp_path, shards=1)
    recipe.write_text(recipe.read_text().replace('"rl": "rl"', '"rl": "./sft+./adapter"'))
    told = run_cli("plan", recipe).stderr
    assert "model `rl`: folder `./sft+./adapter` does not exist" in told
    assert told.endswith(
        "help: to put an adapter on `./sft`, merge it in first (peft: `merge_and_unload`), and name that folder\n"
    )
