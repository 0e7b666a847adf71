"""The families that teams merge, as tiny models of transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from skillmerge.naming import layer_of

UPDATES = {"target": [(1, 5e-3)], "sft": [(2, 5e-3)], "rl": [(2, 5e-3), (3, 1e-3)]}
"""Model -> the updates (seed, scale) that it has on top of a common base."""

LAM = 0.7

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DENSE = {"attention", "mlp", "norm", "embedding"}
SPARSE = {"attention", "expert", "router", "norm", "embedding"}


@dataclass(frozen=True)
class Family:
    """A model class of transformers, its tiny config, and what its checkpoint's names should say.

    stacks: blocks in each stack. kinds: all module kinds present, but for `other`, which `others` names.
    wide: how the names of tensors end that such checkpoints keep in float32. shard_size: of target and rl;
    sft is one file.
    """

    architecture: str
    settings: dict[str, Any]
    kinds: set[str]
    stacks: dict[str, int] = field(default_factory=lambda: {"model.layers": 2})
    others: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    wide: str | None = None
    shard_size: str = "5GB"


FAMILIES = {
    "llama": Family("LlamaForCausalLM", TEXT, DENSE | {"head"}, shard_size="20KB"),
    "qwen2": Family("Qwen2ForCausalLM", {**TEXT, "tie_word_embeddings": True}, DENSE),
    "qwen3": Family("Qwen3ForCausalLM", {**TEXT, "head_dim": 8, "tie_word_embeddings": True}, DENSE),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {**TEXT, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        SPARSE | {"head"},
        shard_size="20KB",
    ),
    "mistral": Family("MistralForCausalLM", {**TEXT, "head_dim": 8}, DENSE | {"head"}),
    "mixtral": Family("MixtralForCausalLM", {**TEXT, "num_local_experts": 4}, SPARSE | {"head"}, shard_size="20KB"),
    "gemma2": Family("Gemma2ForCausalLM", {**TEXT, "head_dim": 8}, DENSE),
    "gemma3_text": Family("Gemma3ForCausalLM", {**TEXT, "head_dim": 8}, DENSE),
    "gemma3_vision": Family(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**TEXT, "head_dim": 8},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "image_size": 28,
                "patch_size": 14,
                "vision_use_head": False,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 60,
            "boi_token_index": 61,
            "eoi_token_index": 62,
        },
        DENSE,
        stacks={"language_model.model.layers": 2, "vision_tower.encoder.layers": 3},
        others=("multi_modal_projector.mm_input_projection_weight",),
        shard_size="40KB",
    ),
    "phi3": Family("Phi3ForCausalLM", TEXT, DENSE | {"head"}),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        {
            **TEXT,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        SPARSE | {"mlp", "head"},
        wide="e_score_correction_bias",
        shard_size="20KB",
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        {**TEXT, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        SPARSE | {"head"},
        shard_size="40KB",
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        | {"bos_token_id": 1, "eos_token_id": 2},
        DENSE,
        stacks={"transformer.h": 2},
    ),
    "bert": Family(
        "BertForMaskedLM",
        {key: value for key, value in TEXT.items() if key != "num_key_value_heads"},
        DENSE | {"head"},
        stacks={"bert.encoder.layer": 2},
        dtype=torch.float32,
        shard_size="40KB",
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        {"vocab_size": 64, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_decoder_layers": 3}
        | {"num_heads": 4, "decoder_start_token_id": 0},
        DENSE,
        stacks={"encoder.block": 2, "decoder.block": 3},
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "num_mel_bins": 8}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48}
        | {"decoder_ffn_dim": 48, "max_source_positions": 16, "max_target_positions": 32}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        DENSE,
        stacks={"model.encoder.layers": 2, "model.decoder.layers": 3},
        others=tuple(f"model.encoder.conv{n}.{part}" for n in (1, 2) for part in ("bias", "weight")),
        dtype=torch.float16,
        shard_size="40KB",
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {
                **TEXT,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            },
            "vision_config": {
                "depth": 3,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 4,
                "out_hidden_size": 32,
                "patch_size": 14,
                "fullatt_block_indexes": [1],
            },
            "image_token_id": 60,
            "video_token_id": 61,
            "vision_start_token_id": 62,
            "vision_end_token_id": 63,
        },
        DENSE | {"head"},
        stacks={"model.layers": 2, "visual.blocks": 3},
        shard_size="40KB",
    ),
}

TIED_HEADS = {
    "qwen2": {"lm_head.weight": "model.embed_tokens.weight"},
    "gemma3_vision": {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"},
    "gpt2": {"lm_head.weight": "transformer.wte.weight"},
    "bert": {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"},
    "t5": {
        "lm_head.weight": "shared.weight",
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    },
    "whisper": {"proj_out.weight": "model.decoder.embed_tokens.weight"},
}
"""Copies of the embedding that other writers store too, and transformers does not."""

KINDS = (
    ("llama", "model.layers.1.mlp.gate_proj.weight", "mlp"),
    ("llama", "model.layers.1.post_attention_layernorm.weight", "norm"),
    ("qwen3", "model.layers.0.self_attn.q_norm.weight", "norm"),
    ("qwen3_moe", "model.layers.0.mlp.gate.weight", "router"),
    ("qwen3_moe", "model.layers.0.mlp.experts.3.gate_proj.weight", "expert"),
    ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", "router"),
    ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w1.weight", "expert"),
    ("phi3", "model.layers.0.self_attn.qkv_proj.weight", "attention"),
    ("deepseek_v3", "model.layers.0.mlp.up_proj.weight", "mlp"),
    ("deepseek_v3", "model.layers.0.self_attn.kv_a_layernorm.weight", "norm"),
    ("deepseek_v3", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "attention"),
    ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias", "router"),
    ("deepseek_v3", "model.layers.1.mlp.shared_experts.down_proj.weight", "expert"),
    ("gpt_oss", "model.layers.0.self_attn.sinks", "attention"),
    ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj_bias", "expert"),
    ("gpt_oss", "model.layers.0.mlp.router.bias", "router"),
    ("gpt2", "transformer.h.0.attn.c_proj.weight", "attention"),
    ("gpt2", "transformer.h.0.mlp.c_proj.weight", "mlp"),
    ("gpt2", "transformer.ln_f.bias", "norm"),
    ("gpt2", "transformer.wpe.weight", "embedding"),
    ("bert", "bert.encoder.layer.0.attention.output.dense.weight", "attention"),
    ("bert", "bert.encoder.layer.0.attention.output.LayerNorm.weight", "norm"),
    ("bert", "bert.encoder.layer.0.intermediate.dense.weight", "mlp"),
    ("bert", "bert.encoder.layer.0.output.dense.weight", "mlp"),
    ("bert", "cls.predictions.transform.dense.weight", "head"),
    ("t5", "decoder.block.0.layer.1.EncDecAttention.k.weight", "attention"),
    ("t5", "decoder.block.0.layer.2.DenseReluDense.wi.weight", "mlp"),
    ("t5", "shared.weight", "embedding"),
    ("whisper", "model.decoder.layers.2.encoder_attn.q_proj.weight", "attention"),
    ("whisper", "model.encoder.layers.0.fc1.weight", "mlp"),
    ("qwen2_5_vl", "visual.blocks.0.attn.qkv.weight", "attention"),
    ("qwen2_5_vl", "visual.patch_embed.proj.weight", "embedding"),
)


def save_models(transformers: Any, folder: Path, family: Family) -> None:
    """target, sft and rl in `folder`, as transformers saves them."""
    kind = getattr(transformers, family.architecture)
    torch.manual_seed(0)
    model = kind(kind.config_class(**family.settings)).to(family.dtype)
    for name, buffer in model.named_buffers():
        if family.wide and name.endswith(family.wide):
            buffer.data = buffer.data.to(torch.float32)
    weights = list({tensor.data_ptr(): tensor for tensor in model.state_dict().values()}.values())
    base = [tensor.clone() for tensor in weights]
    for name, updates in UPDATES.items():
        for tensor, start in zip(weights, base, strict=True):
            tensor.copy_(start)
        for seed, scale in updates:
            generator = torch.Generator().manual_seed(seed)
            for tensor in weights:
                tensor += scale * torch.randn(tensor.shape, generator=generator)
        model.save_pretrained(folder / name, max_shard_size="5GB" if name == "sft" else family.shard_size)


def inside_block(name: str) -> str:
    """The end of a tensor's name, from its block on: the runtime may call what comes before differently."""
    block = layer_of(name)
    assert block is not None
    return name[len(block[0].rpartition(".")[0]) :].lstrip(".")
