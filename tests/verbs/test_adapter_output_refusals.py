"""What cannot be written as one adapter: exit 2, the reason, and what to write instead."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import DOWN, PREFIX, SIDES, Q, modules, write_adapter, write_base
from conftest import run_cli, write_recipe
from safetensors.torch import load_file, save_file

A, B = {"adapter": "a"}, {"adapter": "b"}
ON = {"adapter": "a", "onto": "base"}
RANK = "for the nearest adapter of a rank, store the formula as a skill"
MODEL = "for a model, leave `output.kind` out"

FORMULAS = {
    "method": ({"a": A, "b": B}, "ties(a, b, density=0.5)", "`ties` is no sum of models with factors", RANK),
    "whole": ({"base": "base", "a": ON, "other": "other"}, "base + (a - base) + (other - base)",
              "`other` is a whole model, whose difference from `base`, which the adapters are on, may be of any rank",
              MODEL),
    "target": ({"base": "base", "a": ON, "other": "other"}, "other + (a - base)", "`other` is a whole model", MODEL),
    "two whole": ({"base": "base", "a": A, "other": "other"}, "a + base - other",
                  "`other` is a whole model, whose difference from any other", RANK),
    "two bases": ({"base": "base", "other": "other", "a": ON, "b": {"adapter": "b", "onto": "other"}},
                  "(a - base) + (b - other)",
                  "`a` is put onto `base`, and `b` onto `other`: an adapter has one base", MODEL),
    "skill": ({"a": A, "s": {"skill": "s"}}, "a + s", "`s` is a skill, whose difference may be of any rank", RANK),
    "no adapter": ({"base": "base", "other": "other"}, "base - other", "the formula names no adapter", RANK),
    "degree": ({"base": "base", "a": ON}, "base + a", "gives 2 models' worth of weights",
               "an adapter is a difference, or one model with adapters on it: base + lam * v"),
    "nothing": ({"a": A, "b": B}, "a - a + b - b", "leaves nothing of any adapter", None),
}  # fmt: skip


def write_all(folder: Path, **words: Any) -> Path:
    write_base(folder / "base")
    write_base(folder / "other")
    write_adapter(folder / "a", modules(), seed=1)
    write_adapter(folder / "b", modules(), seed=2, **words)
    return folder


def write_out(folder: Path, merge: str, models: dict[str, Any], **output: Any) -> Path:
    made = {"kind": "adapter", "path": "./out", **output}
    return write_recipe(folder, merge, models=models, output=made, coefficients=None)


def refused(folder: Path, recipe: Path, message: str, fix: str | None) -> None:
    for verb in ("plan", "apply"):
        found = run_cli(verb, recipe, cwd=folder)
        assert found.returncode == 2, found.stderr
        assert message in found.stderr
        assert fix is None or fix in found.stderr
        assert "Traceback" not in found.stderr
    assert not (folder / "out").exists()


@pytest.mark.parametrize("name", FORMULAS)
def test_formula_that_is_no_sum_of_adapters(tmp_path: Path, name: str) -> None:
    models, merge, message, fix = FORMULAS[name]
    write_all(tmp_path)
    (tmp_path / "s").mkdir()
    refused(tmp_path, write_out(tmp_path, merge, models), message, fix)


def test_formula_that_is_a_difference_in_places(tmp_path: Path) -> None:
    """Of no tensor that an adapter changes, too."""
    write_all(tmp_path)
    for rule in ({"layers": 0, "value": 0.0}, {"modules": "embedding", "value": 0.0}):
        keys = {"models": {"base": "base", "a": A}, "output": {"kind": "adapter", "path": "out"},
                "coefficients": {"mu": {"default": 1.0, "rules": [rule]}}}  # fmt: skip
        recipe = write_recipe(tmp_path, "mu * base + 0.5 * a", **keys)
        refused(tmp_path, recipe, "the expression gives a difference for tensor `model.", "with the factor 1 in all")


def test_adapters_of_different_models(tmp_path: Path) -> None:
    write_all(tmp_path, base_model_name_or_path="acme/other")
    message = "`a` says that it was trained on `acme/base`, and `b` on `acme/other`: an adapter has one base"
    refused(tmp_path, write_out(tmp_path, "a + b", {"a": A, "b": B}), message, "give each adapter `onto:` that model")
    both = {"base": "base", "a": ON, "b": {"adapter": "b", "onto": "base"}}
    recipe = write_out(tmp_path, "(a - base) + (b - base)", both)
    found = run_cli("apply", recipe)
    assert found.returncode == 0, found.stderr
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"


def add(folder: Path, tensors: dict[str, tuple[int, ...]], **config: Any) -> None:
    weights, words = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    found = {**load_file(weights), **{f"{PREFIX}{name}": torch.ones(it) for name, it in tensors.items()}}
    if config.get("use_dora"):  # which is of all of an adapter's modules
        found = {name: it for name, it in found.items() if ".layers.1." not in name}
    save_file(found, weights)
    words.write_text(json.dumps({**json.loads(words.read_text()), **config}))


PARTS = {
    "dora": ({f"{name}.lora_magnitude_vector": SIDES[name.rpartition(".")[2]][:1] for name in modules(1)},
             {"use_dora": True},
             "adapter `a` scales the base's rows (DoRA), which cannot be put side by side: `model.layers.0"),
    "replaced": ({"model.norm.weight": (8,)}, {"modules_to_save": ["norm"]},
                 "adapter `a` replaces tensors, which cannot be put side by side: `model.norm.weight`"),
    "tokens": ({"model.embed_tokens.token_adapter.trainable_tokens_delta": (1, 8)}, {"trainable_token_indices": [3]},
               "adapter `a` replaces tensors, which cannot be put side by side: `model.embed_tokens.weight`"),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_are_no_sums(tmp_path: Path, name: str) -> None:
    tensors, config, message = PARTS[name]
    write_all(tmp_path)
    add(tmp_path / "a", tensors, **config)
    both = {"base": "base", "a": ON, "b": B}
    recipe = write_out(tmp_path, "base + (a - base) + b", both)
    refused(tmp_path, recipe, message, "or leave these tensors out with `ignore`")
    ignored = message.rpartition("`model")[2].rstrip("`")
    text = json.loads(recipe.read_text())
    recipe.write_text(
        json.dumps({**text, "ignore": [f"model{ignored}*" if ignored.startswith(".layers") else f"model{ignored}"]})
    )
    assert run_cli("apply", recipe).returncode == 0


def test_rows_of_tokens_of_two_adapters_are_left_out(tmp_path: Path) -> None:
    """Neither says how many rows there are."""
    write_all(tmp_path)
    for name, row in (("a", 3), ("b", 9)):
        rows = {"model.embed_tokens.token_adapter.trainable_tokens_delta": (1, 8)}
        add(tmp_path / name, rows, trainable_token_indices=[row])
    recipe = write_out(tmp_path, "a + b", {"a": A, "b": B})
    refused(tmp_path, recipe, "replaces tensors, which cannot be put side by side", "leave these tensors out")
    recipe.write_text(json.dumps({**json.loads(recipe.read_text()), "ignore": ["model.embed_tokens.weight"]}))
    assert run_cli("apply", recipe).returncode == 0


def test_biases_have_to_be_in_all_modules(tmp_path: Path) -> None:
    write_all(tmp_path)
    base = load_file(tmp_path / "base" / "model.safetensors")
    for name in modules():
        base[f"{name}.bias"] = torch.zeros(SIDES[name.rpartition(".")[2]][0])
    save_file(base, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    add(write_adapter(tmp_path / "c", modules(1, (Q,))), {f"{Q.format(0)}.lora_B.bias": (12,)}, lora_bias=True)
    models = {"base": "base", "a": {**ON, "adapter": "c"}, "b": B}
    message = "adapter `a` adds to biases (`lora_bias`), and the output would not in all of its modules"
    refused(tmp_path, write_out(tmp_path, "base + (a - base) + b", models), message, None)
    sides = {f"{name}.lora_B.bias": (SIDES[name.rpartition(".")[2]][0],) for name in modules()}
    add(tmp_path / "a", sides, lora_bias=True)
    models = {"base": "base", "a": ON, "b": B}
    found = run_cli("apply", write_out(tmp_path, "base + 0.25 * (a - base) + b", models))
    assert found.returncode == 0, found.stderr
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(made[f"{PREFIX}{DOWN.format(1)}.lora_B.bias"], torch.full((8,), 0.25 * 1.5))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_bias"] is True


KEYS = {
    "gates": ({}, {"gates": {"finite": True}}, "an adapter has no `gates`"),
    "copy": ({}, {"copy": [{"tensors": "*", "from": "base"}]}, "an adapter has no `copy`"),
    "like": ({"like": "base"}, {}, "an adapter has no `like`"),
    "shard_size": ({"shard_size": "1GB"}, {}, "an adapter has no `shard_size`"),
    "rounding": ({"rounding": "stochastic"}, {}, "an adapter has no `rounding`"),
    "dtype": ({"dtype": "bfloat16"}, {}, "an adapter is written as float32, not bfloat16"),
    "keep": ({"keep": 0.5}, {}, "only a skill can be pruned"),
    "compression": ({"compression": "zstd"}, {}, "only a skill can be compressed"),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_of_other_kinds(tmp_path: Path, name: str) -> None:
    output, keys, message = KEYS[name]
    write_all(tmp_path)
    recipe = write_out(tmp_path, "base + (a - base)", {"base": "base", "a": ON}, **output)
    recipe.write_text(json.dumps({**json.loads(recipe.read_text()), **keys}))
    refused(tmp_path, recipe, message, None)


def test_ranks_beyond_what_can_be_read_again(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", modules(1, (Q,)), r=40_000)
    write_adapter(tmp_path / "b", modules(1, (Q,)), r=30_000)
    recipe = write_out(tmp_path, "a + b", {"a": A, "b": B})
    refused(tmp_path, recipe, "add up to 70,000; the most is 65,536", RANK)


@pytest.mark.parametrize(("most", "what"), [("MAX_HEADER_BYTES", "adapter_model.safetensors would have a header"),
                                            ("MAX_CONFIG_BYTES", "adapter_config.json would be a file")])  # fmt: skip
def test_more_modules_than_can_be_read_again(
    tmp_path: Path, most: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before anything is written."""
    from skillmerge.plans.adapters import planning

    monkeypatch.setattr(planning, most, 300)
    write_all(tmp_path)
    message = f"an adapter of 4 modules is too large to be read again: {what} of"
    refused(tmp_path, write_out(tmp_path, "a + b", {"a": A, "b": B}), message, "leave tensors out with `ignore`")


def test_other_commands_say_what_to_do(tmp_path: Path) -> None:
    write_all(tmp_path)
    recipe = write_recipe(tmp_path, "lam * a + b", models={"a": A, "b": B}, output={"kind": "adapter", "path": "out"})
    swept = run_cli("sweep", recipe, "--set", "lam=0:1:3", "--score", "true", cwd=tmp_path)
    assert (swept.returncode, "an adapter cannot be scored" in swept.stderr) == (2, True)
    assert run_cli("lint", recipe).returncode == 0
    made = run_cli("apply", recipe, cwd=tmp_path)
    assert "wrote" in made.stdout + made.stderr
    assert "--load" not in made.stdout + made.stderr
    loaded = run_cli("verify", "out", "--load", cwd=tmp_path)
    assert loaded.returncode == 2
    assert "is an adapter, which no runtime loads alone" in loaded.stderr
    wrong = json.loads(recipe.read_text())
    wrong["output"]["kind"] = "lora"
    recipe.write_text(json.dumps(wrong))
    assert re.search("adapter", run_cli("lint", recipe).stdout + run_cli("lint", recipe).stderr)
