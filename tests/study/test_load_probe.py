"""The load probe names whatever keeps transformers from loading a model, or the model from answering."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import copy_with, run_cli, write_recipe
from model_families import UPDATES

pytestmark = pytest.mark.xdist_group("transformers")


def test_load_names_a_tensor_too_many(
    families: Callable[[str], Path], load: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    extra = {"model.layers.7.surplus.weight": torch.ones(3)}
    report = load(copy_with(families("llama") / "merged", tmp_path / "broken", **extra))
    assert report["ok"] is False
    assert report["unexpected_keys"] == ["model.layers.7.surplus.weight"]
    assert report["why"] == "unexpected_keys: model.layers.7.surplus.weight"


def test_load_names_a_tensor_of_another_shape_with_both_shapes(
    families: Callable[[str], Path], load: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    changed = {"model.layers.1.self_attn.k_proj.weight": torch.ones(8, 32)}
    report = load(copy_with(families("llama") / "merged", tmp_path / "broken", **changed))
    assert report["ok"] is False
    assert report["why"] == "mismatched_keys: model.layers.1.self_attn.k_proj.weight [8, 32] instead of [16, 32]"


def test_load_names_an_expert_that_does_not_fit_the_others(
    families: Callable[[str], Path], load: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    changed = {"model.layers.1.mlp.experts.2.up_proj.weight": torch.ones(8, 32)}
    report = load(copy_with(families("qwen3_moe") / "merged", tmp_path / "broken", **changed))
    assert report["ok"] is False
    assert "model.layers.1.mlp.experts.gate_up_proj" in report["why"]


def test_load_refuses_outputs_that_are_not_finite(
    families: Callable[[str], Path], load: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    norm = torch.full((32,), float("nan"), dtype=torch.bfloat16)
    changed = {"model.norm.weight": norm}
    report = load(copy_with(families("llama") / "merged", tmp_path / "broken", **changed))
    assert (report["ok"], report["finite"]) == (False, False)
    assert "not finite" in report["why"]


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"architectures": ["LlamaForNothing"]}, "LlamaForNothing"),
        ({"model_type": "unheard-of"}, "unheard-of"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}, "trust_remote_code"),
        ({"hidden_act": "unheard-of"}, "unheard-of"),
        ({"num_hidden_layers": 3}, "model.layers.2."),
        ({"num_hidden_layers": 1}, "model.layers.1."),
    ],
)
def test_load_says_what_is_wrong_with_a_config(
    config: dict[str, Any],
    why: str,
    families: Callable[[str], Path],
    load: Callable[[Path], dict[str, Any]],
    tmp_path: Path,
) -> None:
    report = load(copy_with(families("llama") / "merged", tmp_path / "broken", config=config))
    assert report["ok"] is False
    assert why in report["why"]


def test_load_of_a_model_that_names_no_class_takes_the_automatic_one(
    families: Callable[[str], Path], load: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    target = families("llama") / "merged"
    report = load(copy_with(target, tmp_path / "headless", drop="lm_head.weight", config={"architectures": None}))
    assert report["ok"], report["why"]
    assert (report["class"], report["shape"]) == ("LlamaModel", [1, 8, 32])


def test_load_reports_a_missing_shard_and_serves_on(
    families: Callable[[str], Path], load: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    merged = families("llama") / "merged"
    broken = Path(shutil.copytree(merged, tmp_path / "broken"))
    next(broken.glob("model-00002-*")).unlink()
    report = load(broken)
    assert report["ok"] is False
    assert "model-00002-" in report["why"]
    assert load(merged)["ok"] is True


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        (
            "ViTForImageClassification",
            {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
            | {"image_size": 32, "patch_size": 16},
        ),
        (
            "Wav2Vec2ForCTC",
            {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
            | {"vocab_size": 16, "conv_dim": [16, 16], "conv_kernel": [10, 8], "conv_stride": [5, 4]}
            | {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
        ),
    ],
)
def test_load_makes_up_pictures_and_sound(
    architecture: str,
    settings: dict[str, Any],
    transformers: Any,
    load: Callable[[Path], dict[str, Any]],
    tmp_path: Path,
) -> None:
    kind = getattr(transformers, architecture)
    kind(kind.config_class(**settings)).save_pretrained(tmp_path)
    report = load(tmp_path)
    assert report["ok"], report["why"]
    assert report["finite"] is True


def test_load_says_so_where_it_cannot_make_up_inputs(
    transformers: Any, load: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    """Text and picture both needed: the weights fit, and the report says that only the run failed."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 64},
        vision_config={**small, "image_size": 28, "patch_size": 14},
        projection_dim=16,
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    report = load(tmp_path)
    assert report["ok"] is False
    assert report["why"].startswith("its weights load, but it fails on made-up inputs")


def test_verify_load_on_the_command_line(families: Callable[[str], Path], tmp_path: Path) -> None:
    """The whole way as a person goes it; then a donor whose config promises biases that nobody has."""
    folder = families("qwen3_moe")
    apply = partial(run_cli, "apply", "--device", "cpu", "--output")
    assert apply(tmp_path / "merged", folder / "recipe.yaml").returncode == 0
    checked = run_cli("verify", "--load", "--json", tmp_path / "merged")
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["load"]["class"] == "Qwen3MoeForCausalLM"

    for model in UPDATES:
        copy_with(folder / model, tmp_path / model, config={"attention_bias": True})
    recipe = write_recipe(tmp_path)
    assert apply(tmp_path / "promising", recipe).returncode == 0
    assert run_cli("verify", tmp_path / "promising").returncode == 0
    checked = run_cli("verify", "--load", tmp_path / "promising")
    assert checked.returncode == 3
    assert "missing_keys: model.layers.0.self_attn.k_proj.bias" in checked.stderr


@pytest.mark.parametrize("name", ["bert", "t5", "whisper"])
def test_what_writes_no_text_from_text_generates_nothing(
    name: str, families: Callable[[str], Path], transformers: Any
) -> None:
    from skillmerge.study.loads.load_probe import main

    report = main(str(families(name) / "merged"), tokens=2)
    assert report["ok"], report["why"]
    assert report["generated"] is None


def test_generated_tokens_are_those_of_the_library(families: Callable[[str], Path], transformers: Any) -> None:
    from skillmerge.study.loads.load_probe import main

    folder = families("llama") / "merged"
    report = main(str(folder), tokens=6)["generated"]
    assert (report["prompt"], report["dtype"]) == ([1, 2, 3, 4, 5, 6, 7, 8], "bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    ids = torch.tensor([report["prompt"]])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=False
    )
    assert report["tokens"] == made[0, 8:].tolist()
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, -1].float()
    likely = dict(map(tuple, report["steps"][0]["likely"]))
    assert likely[report["tokens"][0]] == pytest.approx(float(logits.log_softmax(-1).max()))
    assert report["steps"][0]["largest"] == float(logits.abs().max())
