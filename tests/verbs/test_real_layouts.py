"""Real models of transformers in two layouts each: merged across them, against whole tensors and the library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODELS, read_checkpoint, weights, write_checkpoint, write_recipe
from model_families import FAMILIES, TEXT, Family, save_models
from torch import Tensor

import skillmerge

SPARSE = {**TEXT, "head_dim": 8, "num_experts_per_tok": 2}
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
TOKENS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
MORE = {
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        {**SPARSE, "n_routed_experts": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
        set(),
        wide="e_score_correction_bias",
    ),
    "hy_v3": Family(
        "HYV3ForCausalLM",
        {**SPARSE, "num_experts": 4, "moe_intermediate_size": 16},
        set(),
        wide="e_score_correction_bias",
    ),
    "llama4": Family(
        "Llama4ForCausalLM",
        {**SPARSE, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1},
        set(),
    ),
    "qwen3_vl_moe": Family(
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": {**SPARSE, "num_experts": 4, "moe_intermediate_size": 24, "rope_parameters": ROPE},
            "vision_config": {**VISION, "patch_size": 14, "deepstack_visual_indexes": [0]},
            **TOKENS,
        },
        set(),
    ),
}
KNOWN = {**FAMILIES, **MORE}
Tensors = dict[str, Tensor]


def one_by_one(tensors: Tensors) -> Tensors:
    """Packed experts, [E, in, out], apart: gpt-oss has gate and up in turn, Llama 4 one behind the other."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        at, _, what = name.rpartition(".experts.")
        in_turn = f"{at}.experts.gate_up_proj_bias" in tensors
        if not at or what.startswith(tuple("0123456789")):
            found[name] = tensor
            continue
        kind = "bias" if what.endswith("_bias") else "weight"
        for expert, matrix in enumerate(tensor):
            whole = matrix.T if kind == "weight" else matrix
            parts = {"down_proj": whole}
            if what.startswith("gate_up"):
                gate, up = (whole[::2], whole[1::2]) if in_turn else whole.chunk(2)
                parts = {"gate_proj": gate, "up_proj": up}
            found |= {f"{at}.experts.{expert}.{part}.{kind}": it.contiguous() for part, it in parts.items()}
    return found


def turned(tensors: Tensors) -> Tensors:
    """Qwen3-VL-MoE as its first checkpoints are: matrices of experts transposed."""
    return {
        name: it.transpose(1, 2).contiguous() if ".experts." in name and it.dim() == 3 else it
        for name, it in tensors.items()
    }


def unfused(tensors: Tensors) -> Tensors:
    """Phi-3 with its projections apart: 32 rows of queries, 16 of keys and of values."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if "qkv_proj" in name:
            parts = zip(("q_proj", "k_proj", "v_proj"), tensor.split([32, 16, 16]), strict=True)
            found |= {name.replace("qkv_proj", part): it.contiguous() for part, it in parts}
        elif "gate_up_proj" in name:
            parts = zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True)
            found |= {name.replace("gate_up_proj", part): it.contiguous() for part, it in parts}
        else:
            found[name] = tensor
    return found


BY_HAND: dict[str, Callable[[Tensors], Tensors]] = {
    "gpt_oss": one_by_one, "llama4": one_by_one, "qwen3_vl_moe": turned, "phi3": unfused,
}  # fmt: skip
"""Models that transformers saves in one layout only."""


def as_other(transformers: Any, name: str, source: Path, folder: Path) -> None:
    """Write a checkpoint in the other layout: by transformers where it has two, else from whole tensors."""
    if name in BY_HAND:
        config = json.loads((source / "config.json").read_text())
        write_checkpoint(folder, BY_HAND[name](read_checkpoint(source)), shards=2, config=config)
        return
    model = getattr(transformers, KNOWN[name].architecture).from_pretrained(source, dtype="auto")
    model.save_pretrained(folder, save_original_format=False, max_shard_size="20KB")


@pytest.mark.parametrize(
    "name",
    ["qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "gpt_oss", "llama4", "qwen3_vl_moe", "phi3", "hy_v3"],
)
def test_real_models_are_merged_across_their_layouts(
    transformers: Any, tmp_path: Path, load: Callable[[Path], dict[str, Any]], name: str
) -> None:
    save_models(transformers, tmp_path / "own", KNOWN[name])
    for model in MODELS:
        as_other(transformers, name, tmp_path / "own" / model, tmp_path / "other" / model)
    assert read_checkpoint(tmp_path / "own" / "rl").keys() != read_checkpoint(tmp_path / "other" / "rl").keys() or (
        name == "qwen3_vl_moe"
    )
    wanted = {"own": skillmerge.apply(write_recipe(tmp_path / "own")).output}
    as_other(transformers, name, wanted["own"], tmp_path / "other" / "wanted")
    wanted["other"] = tmp_path / "other" / "wanted"
    for donor, rest in (("own", "other"), ("other", "own")):
        models = {"target": f"{donor}/target", "rl": f"{rest}/rl", "sft": f"{donor}/sft"}
        recipe = write_recipe(tmp_path, models=models, output={"path": f"of_{donor}"})
        output = skillmerge.apply(recipe).output
        merged, expected = read_checkpoint(output), read_checkpoint(wanted[donor])
        assert merged.keys() == expected.keys()
        different = [key for key, it in merged.items() if not torch.equal(bits(it), bits(expected[key]))]
        assert different == []
        if donor == "own" or name not in ("gpt_oss", "llama4", "phi3"):
            report = load(output)
            assert report["ok"], report
    assert weights(tmp_path / "of_own").keys() == weights(wanted["own"]).keys()


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
