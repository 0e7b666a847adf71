"""What configurations leave out: the names that architectures use, and the defaults of missing keys.

Data alone. Defaults are those of the configuration classes of transformers; `tests/plans/compare` holds them against
the installed version.
"""

from __future__ import annotations

from typing import Any

TEXT_OF = {
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_omni": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "qwen3_omni_moe": "qwen3_moe",
}
"""Multimodal architectures and the text architecture of their language model. Others name it in `text_config`."""

ACTIVATIONS = {
    "swish": "silu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_accurate": "gelu_pytorch_tanh",
    "gelu_python": "gelu",
    "geglu": "gelu",
    "swiglu": "silu",
}
"""Spellings of the same function. All tanh approximations of GELU compute the same formula."""

ROPE_TYPES = {"su": "longrope", "mrope": "default", "axial": "default", None: "default"}
"""Older names, and kinds that scale nothing: `mrope` only announces sections, which are compared separately, and
`axial` that images have two axes."""

SCALING_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
"""Yarn factors with the values that apply if they are missing."""

TRAINED_SCALINGS = ("llama3", "longrope")
"""Rotary scalings that a model is trained with. The others are added after training, for long inputs."""

WINDOW_PATTERNS = {"gemma2": 2, "gemma3": 6, "cohere2": 4, "gpt_oss": 2, "olmo3": 4, "exaone4": 4}
"""One in this many layers has full attention, unless the configuration lists its layers."""

WINDOW_OFF = ("qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "qwen3", "qwen3_moe", "smollm3")
"""Architectures whose window is off unless `use_sliding_window` is true."""

WITHOUT_ROPE_EVERY = {"smollm3": 4, "llama4": 4}
"""One in this many layers has no rotary positions, unless the configuration lists its layers."""

NUMBERED = ("diffllama",)
"""Architectures whose layers compute with their own numbers."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rope base": 1e4, "activation": "silu"},
    "mistral": {"kv_heads": 8, "rope base": 1e4, "activation": "silu", "sliding_window": 4096},
    "mixtral": {"kv_heads": 8, "rope base": 1e6, "activation": "silu", "num_experts_per_tok": 2},
    "qwen2": {"kv_heads": 32, "rope base": 1e4, "activation": "silu"},
    "qwen2_moe": {"kv_heads": 16, "rope base": 1e4, "activation": "silu", "num_experts_per_tok": 4},
    "qwen3": {"kv_heads": 32, "head_dim": 128, "rope base": 1e4, "activation": "silu"},
    "qwen3_moe": {"kv_heads": 4, "rope base": 1e4, "activation": "silu", "num_experts_per_tok": 8},
    "gemma": {"kv_heads": 16, "head_dim": 256, "rope base": 1e4, "activation": "gelu_pytorch_tanh"},
    "gemma2": {
        "kv_heads": 4, "head_dim": 256, "rope base": 1e4, "activation": "gelu_pytorch_tanh", "sliding_window": 4096,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256,
    },
    "gemma3": {
        "kv_heads": 4, "head_dim": 256, "rope base": 1e6, "rope local base": 1e4, "activation": "gelu_pytorch_tanh",
        "sliding_window": 4096, "query_pre_attn_scalar": 256,
    },
    "qwen2_vl": {"kv_heads": 8, "rope base": 1e6, "activation": "silu"},
    "qwen2_5_vl": {"kv_heads": 8, "rope base": 1e6, "activation": "silu"},
    "qwen3_vl": {"kv_heads": 32, "head_dim": 128, "rope base": 5e5, "activation": "silu"},
    "phi": {"rope base": 1e4, "rope partial": 0.5, "activation": "gelu_pytorch_tanh"},
    "phi3": {"rope base": 1e4, "activation": "silu"},
    "gpt_neox": {"rope base": 1e4, "rope partial": 0.25, "activation": "gelu", "use_parallel_residual": True},
    "gpt2": {"activation": "gelu_pytorch_tanh", "scale_attn_weights": True},
    "starcoder2": {"kv_heads": 2, "rope base": 1e4, "activation": "gelu_pytorch_tanh"},
    "stablelm": {"kv_heads": 32, "rope base": 1e4, "rope partial": 0.25, "activation": "silu"},
    "cohere": {"rope base": 5e5, "activation": "silu", "logit_scale": 0.0625},
    "cohere2": {"rope base": 1e4, "activation": "silu", "logit_scale": 0.0625, "sliding_window": 4096},
    "olmo2": {"rope base": 1e4, "activation": "silu"},
    "olmoe": {"rope base": 1e4, "activation": "silu", "num_experts_per_tok": 8},
    "granite": {
        "rope base": 1e4, "activation": "silu", "attention_multiplier": 1.0, "residual_multiplier": 1.0,
        "embedding_multiplier": 1.0, "logits_scaling": 1.0,
    },
    "deepseek_v3": {"rope base": 1e4, "activation": "silu", "num_experts_per_tok": 8, "norm_topk_prob": True},
    "glm4": {"kv_heads": 2, "head_dim": 128, "rope base": 1e4, "rope partial": 0.5, "activation": "silu"},
    "smollm3": {"kv_heads": 4, "rope base": 2e6, "activation": "silu"},
}  # fmt: skip
"""Values of missing keys."""
