"""Documents of other tools, handed to a command as a recipe: what is said of each, whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import run_cli, write_family

GATES = "run it on an output: `skillmerge gate FOLDER --gates FILE`"
START = "start one: `skillmerge init recipe.yaml`"
MERGEKIT = {
    "models:\n  - model: ./a\nmerge_method: ties\n": (3, "merge_method"),
    "slices:\n  - sources: [{model: ./a, layer_range: [0, 4]}]\n": (1, "slices"),
    "models:\n  - model: ./a\n  - model: ./b\n": (1, "models"),
    "merge_method: ties\nmodels:\n  - model: ./a\n---\nmerge_method: ties\nmodels:\n  - model: ./b\n": (
        1, "merge_method",
    ),
    "merge_method: ties\nparameters: &p {weight: 1}\nmodels:\n  - {model: ./a, parameters: {<<: *p}}\n": (
        1, "merge_method",
    ),
    "merge_method: ties\nmodels: [{model: ./a}]\nmerge_method: ties\n": (3, "merge_method"),
}  # fmt: skip
OTHERS = {
    '{"peft_type": "LORA", "r": 8}': (
        "the configuration of a PEFT adapter", "peft_type",
        "in a recipe's `models:` write `{adapter: FOLDER}`, or `{adapter: FOLDER, onto: MODEL}`",
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
def test_foreign_mergekit_is_answered_with_the_command_that_translates_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "merge.yml").write_text(text)
    line, key = MERGEKIT[text]
    told = f"{line}:1: is a configuration of mergekit, not a recipe\n{line:>5} | {text.splitlines()[line - 1]}\n"
    told += f"      | {'^' * len(key)}\nhelp: translate it: `skillmerge import merge.yml -o recipe.yaml`\n"
    for command in ("plan", "apply", "inspect"):
        process = run_cli(command, "merge.yml", cwd=tmp_path)
        assert (process.returncode, process.stderr) == (2, f"error: merge.yml:{told}")
    process = run_cli("lint", "merge.yml", cwd=tmp_path)
    marked = told.replace(": is a", ": error: is a", 1).replace("not a recipe", "not a recipe [invalid-recipe]", 1)
    assert process.stdout == f"merge.yml:{marked}1 recipe: 1 error, no warnings\n"


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
        "help: to put an adapter on `./sft`, name both: `{adapter: ./adapter, onto: NAME}`, NAME being that model\n"
    )
