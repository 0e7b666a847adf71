"""What is nearly a recipe: each near miss has a way forward, and the lines that it names are a recipe's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import run_cli

from skillmerge.recipes.lint import lint

HEAD = "skillmerge: 1\nmodels: {target: ./target, rl: ./rl, sft: ./sft}\n"
LAM = HEAD + "coefficients: {@}\nmerge: target + lam * (rl - sft)\noutput: {path: out}\n"
REST = HEAD + "@\nmerge: target + (rl - sft)\noutput: {path: out}\n"
END = HEAD + "merge: target + (rl - sft)\n@\n"
MODELS = "skillmerge: 1\nmodels: {target: ./target, sft: ./sft, @}\nmerge: target + (rl - sft)\noutput: {path: out}\n"
MERGE = HEAD + "@\noutput: {path: out}\n"
NEAR = {
    (LAM, "lam: {ramp: [0, 1]}"): "lam: {rules: [{layers: 0-, ramp: [0, 1]}]}",
    (LAM, "lam: {layers: 0-3, value: 0.5}"): "lam: {rules: [{layers: 0-3, value: 0.5}]}",
    (LAM, "lam: {experts: 0-3, value: 0}"): "lam: {rules: [{experts: 0-3, value: 0}]}",
    (LAM, "lam: {default: 1, modules: mlp, value: 0}"): "lam: {default: 1, rules: [{modules: mlp, value: 0}]}",
    (LAM, "lam: {self_attn: 0.3, mlp: 0.5}"):
        "lam: {rules: [{modules: attention, value: 0.3}, {modules: mlp, value: 0.5}]}",
    (LAM, "lam: {0-3: 0.5, 4-: 1}"): 'lam: {rules: [{layers: 0-3, value: 0.5}, {layers: 4-, value: 1}]}',
    (LAM, "lam: {start: 0, end: 1}"): "lam: {rules: [{layers: 0-, ramp: [0, 1]}]}",
    (LAM, "lam: {min: 0.2, max: 0.9}"): "lam: {rules: [{layers: 0-, ramp: [0.2, 0.9]}]}",
    (LAM, "lam: [{layers: 0-1, value: 0.4}]"): "lam: {rules: [{layers: 0-1, value: 0.4}]}",
    (LAM, "lam: [{filter: mlp, value: 0.5}, {filter: norm, value: 0}, {value: 1}]"):
        'lam: {default: 1, rules: [{tensors: "*norm*", value: 0}, {tensors: "*mlp*", value: 0.5}]}',
    (LAM, "lam: {rules: {layers: 0-3, value: 0.5}}"): "rules: [{layers: 0-3, value: 0.5}]",
    (LAM, "lam: {rules: [{layers: 0-3, ramp: 0-1}]}"): "ramp: [0.5, 1]",
    (LAM, "lam: {rules: [{layers: 0-3, value: [0.3, 1.0]}]}"): "ramp: [0.3, 1.0]",
    (LAM, "lam: {rules: [{ramp: [0, 1]}]}"): "layers: 0-",
    (LAM, "lam: {rules: [{layers: all, value: 0.5}]}"): "layers: 0-",
    (LAM.replace("coefficients: {@}", "@"), "lam: 0.5"): "coefficients: {lam: 0.5}",
    (LAM.replace("coefficients: {@}", "@"), "coefficients: 0.5"): "coefficients: {lam: 0.7}",
    (REST, "dtype: bfloat16"): "output: {path: out, dtype: bfloat16}",
    (REST, "finite: true"): "gates: {finite: true}",
    (REST, "tokenizer_source: rl"): "output: {path: out, like: rl}",
    (REST, "base_model: rl"): "output: {path: out, like: rl}",
    (REST, "merge_method: linear"): "merge: target + lam * (rl - sft)",
    (REST, "ignore: rl.bias"): "ignore: [rl.bias]",
    (REST, "accept: rope"): "accept: [rope]",
    (REST, 'copy: {tensors: "*.norm.*", from: rl}'): 'copy: [{tensors: "*.norm.*", from: rl}]',
    (REST, "gates: [finite]"): "gates: {finite: true, loads: true}",
    (REST, "gates: {norm_ratio: 0.3}"): "norm_ratio: {max: 0.3}",
    (REST, 'gates: {norm_ratio: "< 0.3"}'): "norm_ratio: {max: 0.3}",
    (REST, "gates: {realised: 0.9}"): "realised: {min: 0.9}",
    (REST, "gates: {loads: vllm}"): "loads: [vllm]",
    (REST, "gates: {perplexity: 10}"): "perplexity: {text: FILE, max: 10}",
    (REST, "gates: {commands: [score.py]}"): 'commands: [{run: "python score.py {}", min: 0.5}]',
    (END, "output: ./out"): "output: {path: ./out}",
    (END, "output: {path: out, push: me/model}"): "push: {repo: me/model}",
    (END, "output: {path: out, seed: random}"): "seed: 0",
    (MODELS, "rl: {path: hf://a/b, revision: v1}"): "path: hf://a/b@v1",
    (MODELS, "rl: {path: ./rl, rename: {model.x: model.y}}"): "rename: [{from: model.x, to: model.y}]",
    (MODELS, "rl: {path: ./rl, rename: {a: 2}}"): 'rename: [{from: "model.language_model.", to: "model."}]',
    (MODELS, "rl: "): "rl: ./rl",
    (MODELS, "rl: {path: ./rl, weight: 0.5}"): "merge",
    (MODELS, "rl: {path: ./rl, lora: ./a}"): "{adapter: FOLDER, onto: MODEL}",
    (MODELS, "rl: {path: ./rl, adapter: ./a}"): "{adapter: …, onto: NAME}",
    (MERGE, "merge: [target, rl]"): "merge: target + lam * (rl - sft)",
    (MERGE, "merge: {target: 0.5, rl: 0.5}"): "merge: 0.5 * target + 0.5 * rl",
    (MERGE, "merge: {target: 0.123456789, rl: 1}"): "merge: 0.123456789 * target + 1 * rl",
    (MERGE, "merge: {}"): "merge: target + lam * (rl - sft)",
    (LAM, "lam: {start: 12345678, end: 0.123456789}"): "lam: {rules: [{layers: 0-, ramp: [12345678, 0.123456789]}]}",
    (REST, "seed: 12345678"): "output: {path: out, seed: 12345678}",
    (REST, "gates: {changed: 0.123456789}"): "changed: {min: 0.123456789}",
    (REST, 'gates: {changed: "> .5.5"}'): "changed: {min: 0.3}",
    (REST, 'gates: {changed: "> .5"}'): "changed: {min: .5}",
    (REST, "gates: {changed: .inf}"): "changed: {min: 0.3}",
    (REST, "copy: {}"): 'copy: [{tensors: "*.norm.*", from: target}]',
}  # fmt: skip


@pytest.mark.parametrize("mistake", NEAR)
def test_near_miss_is_told_what_to_write(tmp_path: Path, mistake: tuple[str, str]) -> None:
    text, written = mistake
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace("@", written))
    found = [it for it in lint(path).findings if it.rule.level == "error"]
    assert found
    assert f"`{NEAR[mistake]}`" in str(found[0].fix)


@pytest.mark.parametrize("mistake", [it for it in NEAR if it[0] == LAM and NEAR[it].startswith("lam:")])
def test_lines_that_are_advised_are_a_recipe(tmp_path: Path, mistake: tuple[str, str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(mistake[0].replace("@", NEAR[mistake]))
    assert lint(path).ok


@pytest.mark.parametrize(
    "written",
    [
        "lam: {start: 0, end: .inf}",
        "lam: {attention: .nan}",
        "lam: [{filter: [mlp], value: 0.5}]",
        "lam: [{filter: mlp, value: [0, 1]}, {value: 0.3}]",
        "lam: [{filter: mlp, value: .inf}]",
        "lam: [0, .inf]",
    ],
)
def test_nothing_is_advised_that_is_no_recipe(tmp_path: Path, written: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(LAM.replace("@", written))
    (found, *_) = (it for it in lint(path).findings if it.rule.level == "error")
    assert "`lam:" not in str(found.fix)


@pytest.mark.parametrize("models", ["", "5", "false", "[target]"])
@pytest.mark.parametrize("key", ["tokenizer", "base"])
def test_unknown_key_beside_models_that_are_no_table_is_a_mistake(tmp_path: Path, key: str, models: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"skillmerge: 1\nmodels: {models}\n{key}: target\nmerge: target\noutput: {{path: out}}\n")
    process = run_cli("lint", path)
    assert (process.returncode, "Traceback" in process.stderr) == (2, False)
    plan = run_cli("plan", path)
    assert plan.returncode == 2
    assert ": `models` must be a table, not " in plan.stderr.splitlines()[0]


def test_sections_of_a_recipe_have_examples(tmp_path: Path) -> None:
    """Of every key of the whole recipe that is no table or list, or empty, something is said."""
    for key in ("models", "coefficients", "merge", "copy", "ignore", "accept", "output", "gates"):
        lines = {"skillmerge": "1", "models": "{a: ./a}", "merge": "a", key: "12"}
        path = tmp_path / "recipe.yaml"
        path.write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
        (first, *_) = (it for it in lint(path).findings if it.rule.level == "error")
        assert re.search(rf"`{key}: ", str(first.fix)), key
