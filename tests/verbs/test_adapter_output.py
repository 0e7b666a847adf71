"""`output: {kind: adapter}`: several adapters side by side, bit for bit and through the whole pipeline."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_files import DOWN, PREFIX, Q, modules, side_by_side, write_adapter, write_base
from conftest import flip, read_checkpoint, run_cli, write_checkpoint, write_recipe
from hub_server import HubServer
from safetensors.torch import load_file, save_file

import skillmerge
from skillmerge.errors import RecipeError, StalePlan, UnusableWeights

BOTH = {"a": {"adapter": "./a"}, "b": {"adapter": "./b"}}
OUT = {"kind": "adapter", "path": "./out"}


def write_both(folder: Path, **words: Any) -> Path:
    write_base(folder / "base")
    write_adapter(folder / "a", modules(), seed=1)
    write_adapter(folder / "b", modules(kinds=(DOWN,)), **{"seed": 2, "r": 4, "use_rslora": True, **words})
    return folder


def recipe_of(folder: Path, merge: str, models: dict[str, Any] = BOTH, **keys: Any) -> Path:
    return write_recipe(folder, merge, **{"models": models, "output": OUT, "coefficients": None, **keys})


def made(folder: Path) -> dict[str, bytes]:
    return {name: it.numpy().tobytes() for name, it in load_file(folder / "adapter_model.safetensors").items()}


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_stand_side_by_side(tmp_path: Path, dtype: torch.dtype) -> None:
    """Against numpy: lambda by layer, other ranks and scales in places, and nothing of what has a factor of 0."""
    base = write_base(tmp_path / "base", 4).name
    first, second, third = modules(4), modules(4, (DOWN,)), modules(4, (Q,))
    a = write_adapter(tmp_path / "a", first, seed=1, dtype=dtype, ranks={DOWN.format(1): 5})
    b = write_adapter(tmp_path / "b", second, seed=2, dtype=dtype, r=4, use_rslora=True)
    c = write_adapter(tmp_path / "c", third, seed=3, dtype=dtype, alpha_pattern={Q.format(2): 7})
    lam = {"default": 0.3, "rules": [{"layers": 0, "value": 0.0}, {"layers": "2-3", "ramp": [1.0, 0.7]}]}
    models = {"base": base, "a": {"adapter": "a", "onto": "base"}, "b": {"adapter": "b"},
              "c": {"adapter": "c", "onto": "base"}}  # fmt: skip
    skillmerge.apply(recipe_of(tmp_path, "base + lam * (a - base) - b / 3 + 0.1 * (a - c)", models,
                               coefficients={"lam": lam}))  # fmt: skip
    value = [0.0, 0.3, 1.0, 1.0 + (0.7 - 1.0) * 1 / 1]
    layer = lambda name: int(name.split(".")[2])  # noqa: E731
    wanted = side_by_side({a: lambda it: value[layer(it)] + 0.1, b: lambda it: -(1 / 3), c: lambda it: -0.1})
    found = made(tmp_path / "out")
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name] == values.tobytes(), name


def test_configuration_gives_each_module_its_rank_and_a_scale_of_1(tmp_path: Path) -> None:
    write_both(tmp_path)
    skillmerge.apply(recipe_of(tmp_path, "0.5 * a + b"))
    ranks = dict.fromkeys(modules(kinds=(Q,)), 2)
    assert config_of(tmp_path / "out") == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "acme/base", "revision": None,
        "r": 6, "lora_alpha": 6, "rank_pattern": ranks, "alpha_pattern": ranks,
        "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": False, "init_lora_weights": True, "inference_mode": True, "target_modules": sorted(modules()),
    }  # fmt: skip


def test_what_cancels_is_left_out(tmp_path: Path) -> None:
    write_both(tmp_path)
    skillmerge.apply(recipe_of(tmp_path, "a + b - a"))
    assert made(tmp_path / "out").keys() == {
        f"{PREFIX}{name}.lora_{part}.weight" for name in modules(kinds=(DOWN,)) for part in "AB"
    }
    assert "rank_pattern" in config_of(tmp_path / "out")


def test_signs_of_zeros_are_kept(tmp_path: Path) -> None:
    write_both(tmp_path)
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    zeros = {
        name: torch.where(torch.arange(it.numel()).view(it.shape) % 2 == 0, 0.0, -0.0) for name, it in stored.items()
    }
    save_file(zeros, tmp_path / "a" / "adapter_model.safetensors")
    skillmerge.apply(recipe_of(tmp_path, "a + b"))
    wanted = side_by_side({tmp_path / "a": lambda it: 1.0, tmp_path / "b": lambda it: 1.0})
    assert made(tmp_path / "out") == {name: it.tobytes() for name, it in wanted.items()}


def test_adapters_on_adapters_are_all_in_it(tmp_path: Path) -> None:
    write_both(tmp_path)
    models = {"base": "base", "a": {"adapter": "a", "onto": "base"}, "b": {"adapter": "b", "onto": "a"}}
    skillmerge.apply(recipe_of(tmp_path, "base + 0.25 * (b - base)", models))
    wanted = side_by_side({tmp_path / "a": lambda it: 0.25, tmp_path / "b": lambda it: 0.25})
    assert made(tmp_path / "out") == {name: it.tobytes() for name, it in wanted.items()}


@pytest.mark.parametrize("start", ["difference", "model"])
def test_read_again_it_makes_the_same_model(tmp_path: Path, start: str) -> None:
    """Where factors are powers of two, nothing is rounded on the way."""
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "a", modules(), seed=1, lora_alpha=8)
    if start == "difference":
        skillmerge.apply(recipe_of(tmp_path, "0.5 * a", {"a": {"adapter": "a"}}))
    else:
        models = {"base": "base", "a": {"adapter": "a", "onto": "base"}}
        skillmerge.apply(recipe_of(tmp_path, "base + 0.5 * (a - base)", models))
    for folder, name, merge in (("a", "one", "base + 0.5 * v"), ("out", "two", "base + v")):
        models = {"base": "base", "v": {"adapter": folder}}
        skillmerge.apply(recipe_of(tmp_path, merge, models, output={"path": name}))
    one, two = (read_checkpoint(tmp_path / name) for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_tied_head_follows_the_embedding(tmp_path: Path) -> None:
    """A model that stores both: PEFT has the pair once, and ties them again when it loads."""
    rows = torch.randn(32, 8)
    tensors = {"model.embed_tokens.weight": rows, "lm_head.weight": rows.clone()}
    write_checkpoint(tmp_path / "base", tensors, config={"tie_word_embeddings": True})
    for name in "ab":
        write_adapter(tmp_path / name, [])
        pair = {f"{PREFIX}model.embed_tokens.lora_embedding_{part}": torch.randn(size) for part, size in
                (("A", (2, 32)), ("B", (8, 2)))}  # fmt: skip
        save_file(pair, tmp_path / name / "adapter_model.safetensors")
    skillmerge.apply(recipe_of(tmp_path, "base + a + b", {"base": "base", **BOTH}))
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name.removeprefix(PREFIX): tuple(it.shape) for name, it in found.items()} == {
        "model.embed_tokens.lora_embedding_A": (4, 32), "model.embed_tokens.lora_embedding_B": (8, 4)
    }  # fmt: skip
    assert config_of(tmp_path / "out")["target_modules"] == ["model.embed_tokens"]
    lam = {"default": 1.0, "rules": [{"modules": "head", "value": 0.5}]}
    recipe = recipe_of(tmp_path, "base + lam * a", {"base": "base", **BOTH}, coefficients={"lam": lam})
    with pytest.raises(RecipeError, match=r"and `lm_head\.weight`, which the model ties to it"):
        skillmerge.plan(recipe)


def test_any_tiles_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from skillmerge.checkpoints.views import low_rank

    write_both(tmp_path)
    recipe = recipe_of(tmp_path, "0.3 * a + b")
    skillmerge.apply(recipe)
    for area in (1, 7, 19):
        monkeypatch.setattr(low_rank, "AREA", area)
        skillmerge.apply(recipe, tmp_path / f"out{area}", threads=3)
        assert made(tmp_path / f"out{area}") == made(tmp_path / "out")


@pytest.mark.parametrize("ranks", [(60, 131), (9000, 8000)])
def test_tiles_begin_and_end_inside_of_rows(
    tmp_path: Path, ranks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows that are computed as wholes, and of longer ones."""
    from skillmerge.plans import budget

    for name, rank in zip("ab", ranks, strict=True):
        write_adapter(tmp_path / name, [Q.format(0)], seed=rank, r=rank)
        tensors = {f"{PREFIX}{Q.format(0)}.lora_A.weight": torch.randn(rank, 8),
                   f"{PREFIX}{Q.format(0)}.lora_B.weight": torch.randn(1500 if rank < 1000 else 12, rank)}  # fmt: skip
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
    recipe = recipe_of(tmp_path, "0.3 * a - b")
    wanted = side_by_side({tmp_path / "a": lambda it: 0.3, tmp_path / "b": lambda it: -1.0})
    for size in (budget.TILE_BYTES, 1):
        monkeypatch.setattr(budget, "TILE_BYTES", size)
        skillmerge.apply(recipe, tmp_path / f"out{size}")
        assert made(tmp_path / f"out{size}") == {name: it.tobytes() for name, it in wanted.items()}


def test_pipeline_treats_it_as_any_output(tmp_path: Path) -> None:
    """Plan, saved plan, tasks, verify, rebuild."""
    write_both(tmp_path)
    recipe = recipe_of(tmp_path, "lam * a + b", coefficients={"lam": 0.5})
    plan = skillmerge.plan(recipe, save=tmp_path / "plan.json")
    assert {tensor.action for tensor in plan.tensors.values()} == {"join"}
    assert [shard.file for shard in plan.shards] == ["adapter_model.safetensors"]
    result = skillmerge.apply(tmp_path / "plan.json")
    assert sorted(it.name for it in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "skillmerge.manifest.json", "skillmerge.run.json"
    ]  # fmt: skip
    row = next(it for it in result.manifest.tensors if it.name.endswith("layers.0.mlp.down_proj.lora_B.weight"))
    assert row.sources == (("a", row.name), ("b", row.name))
    assert row.coefficients == (0.5,)
    assert skillmerge.verify(tmp_path / "out").tensors == 8
    assert skillmerge.rebuild(tmp_path / "out", check=True).tensors == 8
    skillmerge.rebuild(tmp_path / "out", tmp_path / "again")
    assert made(tmp_path / "again") == made(tmp_path / "out")
    assert skillmerge.apply(recipe).already
    models = {"base": "base", **BOTH}  # of which no tensor is read, but the plan has it
    keys: dict[str, Any] = {"coefficients": {"lam": 0.5}, "output": {**OUT, "path": "tasks"}}
    recipe = recipe_of(tmp_path, "lam * a + b + (base - base)", models, **keys)
    skillmerge.plan(recipe, save=tmp_path / "plan.json")
    skillmerge.shard(tmp_path / "plan.json", index=0, of=1)
    skillmerge.finish(tmp_path / "plan.json")
    assert made(tmp_path / "tasks") == made(tmp_path / "out")
    flip(tmp_path / "out" / "adapter_model.safetensors")
    assert run_cli("verify", tmp_path / "out").returncode == 3


def test_another_adapter_in_its_place_makes_the_plan_stale(tmp_path: Path) -> None:
    write_both(tmp_path)
    skillmerge.plan(recipe_of(tmp_path, "a + b"), save=tmp_path / "plan.json")
    write_adapter(tmp_path / "b", modules(kinds=(DOWN,)), seed=2, r=4)
    with pytest.raises(StalePlan):
        skillmerge.apply(tmp_path / "plan.json")


def test_card_says_how_to_load_it(tmp_path: Path, hub: HubServer) -> None:
    write_both(tmp_path)
    recipe = recipe_of(tmp_path, "a + b", output={**OUT, "license": "mit"})
    skillmerge.apply(recipe, push="acme/joined")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} < set(hub.tree("acme/joined"))
    card = hub.content("acme/joined", "README.md").decode()
    assert "library_name: peft" in card
    assert "- lora" in card
    assert 'PeftModel.from_pretrained(base, "acme/joined")' in card
    assert card.count("A merge of 2 LoRA adapters by `a + b`") == 1


def test_values_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    write_both(tmp_path)
    stored = load_file(tmp_path / "b" / "adapter_model.safetensors")
    name = f"{PREFIX}{DOWN.format(1)}.lora_B.weight"
    stored[name][3, 2] = float("nan")
    save_file(stored, tmp_path / "b" / "adapter_model.safetensors")
    with pytest.raises(UnusableWeights, match=re.escape(f"model `b` holds nan in tensor `{name}`")):
        skillmerge.apply(recipe_of(tmp_path, "a + b"))
    assert not (tmp_path / "out").exists()


def test_factors_beyond_float32_are_named(tmp_path: Path) -> None:
    write_both(tmp_path)
    with pytest.raises(UnusableWeights, match="overflows F32"):
        skillmerge.apply(recipe_of(tmp_path, "1e39 * a + b"))


def test_ignored_tensors_are_left_out(tmp_path: Path) -> None:
    write_both(tmp_path)
    skillmerge.apply(recipe_of(tmp_path, "a + b", ignore=["*.layers.0.*"]))
    assert all(".layers.1." in name for name in made(tmp_path / "out"))


def test_module_whose_name_ends_with_anothers_has_its_own_rank(tmp_path: Path) -> None:
    """PEFT's rule, as it is written there."""
    long, short = f"vision.{Q.format(0)}", Q.format(0)
    write_adapter(tmp_path / "a", [long, short, Q.format(1)], seed=1)
    write_adapter(tmp_path / "b", [short], seed=2)
    skillmerge.apply(recipe_of(tmp_path, "a + b"))
    config = config_of(tmp_path / "out")
    for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        if "lora_A" in name:
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            keys = [key for key in config["rank_pattern"] if re.match(rf"(.*\.)?({key})$", module)]
            assert (config["rank_pattern"][keys[0]] if keys else config["r"]) == len(tensor), module
    assert np.array_equal(list(config["rank_pattern"].values()), list(config["alpha_pattern"].values()))
