"""Adapters that were trained with tokens of their own: their tokenizer says which rows are whose, also on a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from conftest import read_checkpoint, run_cli, weights, write_recipe
from hub_server import HubServer
from safetensors.torch import save_file
from token_rows import BASE, BLOCK, EMBEDDING, HEAD, by_token, same_bits, tokenizer_json, write_model

import skillmerge

BARE = [*BASE, None, None]
THINK = [*BASE, "<think>", None]
TARGET = [*BASE, "<tool>", "<think>"]
MODELS = {"target": "target", "base": "base", "rl": {"adapter": "adapter", "onto": "base"}}


def write_adapter(folder: Path, tokenizer: bool = True) -> np.ndarray:
    """Models of ten rows, and an adapter that trained the row of <think>, which is padding in its base."""
    for seed, (name, words) in enumerate({"target": TARGET, "base": BARE}.items()):
        write_model(folder / name, words, seed)
    rows = torch.randn(1, 6, generator=torch.Generator().manual_seed(9))
    config = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "target_modules": ["up_proj"],
        "trainable_token_indices": [8],
    }
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    up = "base_model.model.model.layers.0.mlp.up_proj"
    tensors = {
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": rows,
        f"{up}.lora_A.weight": torch.ones(1, 6), f"{up}.lora_B.weight": torch.ones(5, 1),
    }  # fmt: skip
    save_file(tensors, adapter / "adapter_model.safetensors")
    if tokenizer:
        (adapter / "tokenizer.json").write_text(tokenizer_json(THINK))
        (adapter / "chat_template.jinja").write_text("{{ messages }}<think>")
        (adapter / "README.md").write_text("an adapter")
    return rows.numpy()


def test_ids_of_other_tokens_are_a_problem(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    found = run_cli("plan", write_recipe(tmp_path, "target + lam * (rl - base)", models=MODELS))
    assert found.returncode == 4
    assert "an id means different tokens in models whose embedding or head is merged: `<tool>` is 8" in found.stdout
    assert "`<think>` is 9 in `target`, 8 in `rl`" in found.stdout
    assert "to give each token its own row, add to the recipe `vocabulary: by-token`" in found.stdout


def test_rows_of_its_tokens_go_to_theirs(tmp_path: Path) -> None:
    rows = write_adapter(tmp_path)
    recipe = write_recipe(
        tmp_path, "target + lam * (rl - base)", models=MODELS, **by_token(tokens={"<think>": {"from": "rl"}})
    )
    made = read_checkpoint(skillmerge.apply(recipe, tmp_path / "out").output)
    ours = read_checkpoint(tmp_path / "target")[EMBEDDING].numpy()
    wanted = ours.copy()
    wanted[9] = rows[0]
    assert same_bits(made[EMBEDDING], wanted)
    for task in (
        ["plan", recipe, "-o", tmp_path / "plan.json"],
        ["apply", tmp_path / "plan.json", "-o", tmp_path / "again"],
    ):
        assert run_cli(*task).returncode == 0
    assert same_bits(read_checkpoint(tmp_path / "again")[EMBEDDING], wanted)


def test_output_like_a_model_with_an_adapter_has_the_adapters_tokenizer(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": 0}')
    output = skillmerge.apply(write_recipe(tmp_path, "rl", models=MODELS, coefficients=None), tmp_path / "out").output
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == json.loads(tokenizer_json(THINK))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}<think>"
    names = {it.name for it in (tmp_path / "out").iterdir()}
    assert "generation_config.json" in names
    assert not names & {"tokenizer_config.json", "adapter_config.json", "README.md"}
    assert skillmerge.verify(output).tensors == 3
    assert skillmerge.rebuild(output, check=True).tensors == 3


def test_changed_tokenizer_of_an_adapter_makes_a_plan_stale(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    recipe = write_recipe(tmp_path, "target + lam * (rl - base)", models=MODELS, **by_token())
    assert run_cli("plan", recipe, "-o", tmp_path / "plan.json").returncode == 0
    (tmp_path / "adapter" / "tokenizer.json").write_text(tokenizer_json([*BASE[::-1], "<think>", None]))
    stale = run_cli("apply", tmp_path / "plan.json", "-o", tmp_path / "out")
    assert stale.returncode == 7, stale.stderr
    assert "model rl: other tokens, or tokens with other ids" in stale.stderr


def test_adapter_without_a_tokenizer_has_that_of_its_model(tmp_path: Path) -> None:
    write_adapter(tmp_path, tokenizer=False)
    recipe = write_recipe(tmp_path, "target + lam * (rl - base)", models=MODELS, **by_token())
    made = read_checkpoint(skillmerge.apply(recipe, tmp_path / "out").output)
    ours = read_checkpoint(tmp_path / "target")
    assert torch.equal(made[EMBEDDING], ours[EMBEDDING])
    assert torch.equal(made[HEAD], ours[HEAD])
    assert not torch.equal(made[BLOCK], ours[BLOCK])


def test_hub_and_folder_give_the_same_bytes(hub: HubServer, tmp_path: Path) -> None:
    """The small files of the base are read up to their limit before the adapter's are."""
    write_adapter(tmp_path)
    small = ("tokenizer_config.json", "generation_config.json", "chat_template.json", "special_tokens_map.json")
    for name in small:
        (tmp_path / "base" / name).write_text("{}")
    keys = by_token(tokens={"<think>": {"from": "rl"}}, output={"like": "rl"})
    merge = "base + lam * (target - base) + (rl - base)"
    first = skillmerge.apply(write_recipe(tmp_path, merge, models=MODELS, **keys), tmp_path / "out").output
    for name in ("target", "base", "adapter"):
        hub.create_from(f"acme/{name}", tmp_path / name)
    (tmp_path / "remote").mkdir()
    models = {"target": "hf://acme/target", "base": "hf://acme/base"}
    models |= {"rl": {"adapter": "hf://acme/adapter", "onto": "base"}}
    recipe = write_recipe(tmp_path / "remote", merge, models=models, **keys)
    assert weights(skillmerge.apply(recipe, tmp_path / "remote" / "out").output) == weights(first)
    for file in ("tokenizer.json", "chat_template.jinja"):
        found = (tmp_path / "remote" / "out" / file).read_bytes()
        assert found == (tmp_path / "adapter" / file).read_bytes()
