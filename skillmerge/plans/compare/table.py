"""The table of compared settings: what each is, what follows if it differs, and how serious that is.

Data alone; the documentation's page is made from it. Values are effective ones, as `config_values` reads them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from skillmerge.plans.compare.found import Level


@dataclass(frozen=True, slots=True)
class Row:
    """One setting of a configuration. level, name: those of the finding if models differ in it.

    keys: how configurations call it; none where `config_values` works it out. default: what absence means, unless the
    architecture has its own; UNKNOWN where that is not known, False where all that counts is whether it is on.
    follows: what a difference does.
    """

    what: str
    level: Level
    name: str | None
    follows: str
    keys: tuple[str, ...] = ()
    default: Any = None


UNKNOWN = object()

_ROPE = "the update was trained for other positions than the output computes"
_HEADS = "the same numbers are split into other heads"
_SCALES = "the weights were trained for other magnitudes"
_EXPERTS = "the same experts are chosen and weighted in another way"

ROWS = (
    Row("rope base", "problem", "rope", _ROPE),
    Row("rope local base", "problem", "rope", _ROPE),
    Row("rope partial", "problem", "rope", _ROPE, default=1.0),
    Row("rope sections", "problem", "rope", _ROPE),
    Row("rope trained scaling", "problem", "rope", _ROPE),
    Row("rope scaling", "warning", "rope-scaling", "positions are scaled in only some of the models"),
    Row("attention heads", "problem", "heads", _HEADS,
        ("num_attention_heads", "n_head", "n_heads", "num_heads"), UNKNOWN),
    Row("key and value heads", "problem", "heads", _HEADS),
    Row("head size", "problem", "heads", _HEADS),
    Row("decoder attention heads", "problem", "heads", _HEADS, ("decoder_attention_heads",), UNKNOWN),
    Row("encoder attention heads", "problem", "heads", _HEADS, ("encoder_attention_heads",), UNKNOWN),
    *(
        Row(key, "problem", "heads", _HEADS, (key,), UNKNOWN)
        for key in (
            "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "linear_num_key_heads", "linear_num_value_heads",
            "linear_key_head_dim", "linear_value_head_dim", "mamba_n_heads", "mamba_d_head", "mamba_n_groups",
            "n_groups", "multi_query", "new_decoder_architecture", "relative_attention_num_buckets",
        )
    ),
    Row("activation", "problem", "activation", "the weights were trained for another function"),
    *(
        Row(key, "problem", "activation", "the weights were trained for another function", (key,), UNKNOWN)
        for key in (
            "encoder_activation_function", "decoder_activation_function", "mlp_activation_function", "mlp_hidden_act",
            "mamba_hidden_act", "hidden_mamba_act", "projector_hidden_act", "projection_hidden_act",
            "encoder_hidden_act", "decoder_hidden_act", "speech_encoder_hidden_act", "pooler_hidden_act", "pooler_act",
        )
    ),
    *(
        Row(key, "problem", "scales", _SCALES, (key,))
        for key in (
            "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "attention_multiplier",
            "residual_multiplier", "embedding_multiplier", "logits_scaling", "logit_scale", "scale_emb", "scale_depth",
            "dim_model_base", "attn_scale", "floor_scale", "swiglu_limit",
            "clip_qkv", "lm_head_multiplier", "key_multiplier", "ssm_multipliers",
            "mup_width_multiplier", "mup_attn_multiplier", "mup_embedding_multiplier", "attention_in_multiplier",
        )
    ),
    *(
        Row(key, "problem", "scales", "the layers are computed in another order or form", (key,), False)
        for key in (
            "use_parallel_residual", "parallel_attn", "use_qk_norm", "qk_layernorm", "alibi", "scale_attn_weights",
            "scale_attn_by_inverse_layer_idx", "do_layer_norm_before", "apply_residual_connection_post_layernorm",
            "use_bidirectional_attention", "scale_embedding", "emb_scale_by_sqrt_dim", "attn_temperature_tuning",
        )
    ),
    Row("position_embedding_type", "problem", "rope", _ROPE, ("position_embedding_type",), UNKNOWN),
    *(
        Row(key, "problem", "rope", _ROPE, (key,), UNKNOWN)
        for key in (
            "rope_ratio", "global_rope_theta", "local_rope_theta", "compress_rope_theta", "rotary_dim", "rope_pct",
            "rotary_percent", "rotary_emb_fraction", "rotary_base", "rope_base", "rope_freq_base",
        )
    ),
    Row("experts per token", "problem", "experts", _EXPERTS,
        ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "top_k_experts"), UNKNOWN),
    Row("norm_topk_prob", "problem", "experts", _EXPERTS, ("norm_topk_prob",), False),
    *(
        Row(key, "problem", "experts", _EXPERTS, (key,), UNKNOWN)
        for key in (
            "scoring_func", "topk_method", "n_group", "topk_group", "routed_scaling_factor", "first_k_dense_replace",
            "moe_layer_freq", "decoder_sparse_step", "mlp_only_layers", "interleave_moe_layer_step", "moe_layers",
            "n_shared_experts", "num_shared_experts", "use_grouped_topk",
        )
    ),
    Row("layers without positions", "problem", "rope", _ROPE),
    Row("sliding window", "problem", "window", "the layers attend over another distance"),
    *(
        Row(key, "problem", "window", "the layers attend over another distance", (key,))
        for key in ("attention_chunk_size", "attention_window", "local_attention",
                    "global_attn_every_n_layers")
    ),
    Row("norm epsilon", "note", None, "the donor's is used", ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon",
        "norm_epsilon", "norm_eps", "layernorm_epsilon"), UNKNOWN),
    Row("longest input", "note", None, "the donor's is used", ("max_position_embeddings", "n_positions", "max_seq_len",
        "max_sequence_length"), UNKNOWN),
)  # fmt: skip

IGNORED = re.compile(
    r"^_|transformers_version|use_cache|dtype|dropout|pdrop|^drop|initializer|init_std|name_or_path|architectures"
    r"|id2label|label2id|problem_type|task_specific|return_|output_|^is_|chunk_size_feed|pruned_heads|torchscript"
    r"|^temperature$|^top_[kp]$|typical_p|penalty|num_beam|num_return|do_sample|early_stopping|max_length|min_length"
    r"|no_repeat|no_rope_layer|bad_words|forced_|suppress|begin_suppress|prefix$|sep_token|decoder_start|cross_attention_hidden"
    r"|aux_loss|jitter|router_z_loss|pretraining_tp|gradient_checkpointing|unsloth|attn_implementation|flash_attn"
    r"|auto_map|quantization|token_id|token_index|vocab|tokenizer|tie_|finetuning|model_type|cache_implementation"
    r"|_config$|^rope_(theta|scaling|parameters|local_base_freq)$|^rotary_(pct|emb_base)$|^partial_rotary_factor$"
    r"|^original_max_position_embeddings$"
    r"|^sliding_window(_pattern)?$|^use_sliding_window$|^max_window_layers$|layer_types$|no_rope_layer"
    r"|^(mlp_)?hidden_act(ivation)?$|^dense_act_fn$|^feed_forward_proj$|^activation(_function|_type)?$|^ff(n)?_act(ivation|_fn)$|num_key_value|kv_heads|head_dim"
    r"|num_hidden_layers|n_layers?$|num_layers|hidden_size|n_embd|d_model|intermediate|ffn_dim|n_inner|num_experts$"
    r"|num_local_experts|n_routed_experts|license|language|trained|train_|optim|batch|seed|version|summary_",
    re.IGNORECASE,
)
"""Keys that are not compared: they do not change what is computed, or the shapes of the weights or another row show
the same."""
