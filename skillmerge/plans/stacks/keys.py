"""Keys of `config.json` that say what the layers of a model are. Data alone.

Architectures share most of them. A key that is missing here is left as it is, unless it looks like a list of layers.
"""

from __future__ import annotations

import re

LISTS = re.compile(
    r"layer|block|attn|attention|moe|mlp|ffn|expert|mamba|pattern|types?$|multiplier|sparsity|window|intermediate_size|limit"
    r"|num_(query|kv|key_value)_heads|head_dim|rope_theta"
)
"""Keys of lists, and of text with a letter for each layer, that may be about layers."""
NO_LISTS = re.compile(r"token|section|architectures|_ids$")

ALWAYS = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Keys of lists that are useless with another length."""

NUMBERS = {
    "mlp_only_layers": 0, "moe_layers": 0, "cross_attention_layers": 0, "attn_layer_indices": 0, "full_attn_idxs": 0,
    "hybrid_layer_ids": 0, "kda_layers": 1, "full_attn_layers": 1,
}  # fmt: skip
"""Keys of lists of layers by number, and what the first layer is called in them."""
UNKNOWN_NUMBERS = re.compile(r"layers?$|_idxs?$|_indices$|layer_ids$")

TABLES = ("per_layer_config",)
"""Keys of tables of layers by number, written as text: what is theirs alone."""

FIRST = {
    "first_k_dense_replace": 0, "num_dense_layers": 0, "num_hash_layers": 0, "num_first_full_attention_layers": 0,
    "max_window_layers": 0, "moe_layer_start_index": 0, "moe_layer_end_index": 1,
}  # fmt: skip
"""Keys that say how many of the first layers are of a kind, or with 1 which layer is the last of them."""
LAST = ("num_kv_shared_layers", "num_last_full_attention_layers")

EVERY: dict[str, int | str] = {
    "sliding_window_pattern": 1, "_sliding_window_pattern": 1, "full_attention_interval": 1,
    "no_rope_layer_interval": 1, "interleave_moe_layer_step": 1, "decoder_sparse_step": 1, "moe_layer_interval": 1,
    "layer_group_size": 1, "moe_layer_freq": 0, "global_attn_every_n_layers": 0, "n_layers_per_attn_res_block": 0,
    "attn_layer_period": "attn_layer_offset", "expert_layer_period": "expert_layer_offset",
}  # fmt: skip
"""Keys that say that one in so many layers is of another kind: what its number lacks to a multiple, or the key of what
it has beyond one."""
REPEATED = ("block_types", "_block_types")
"""Keys of lists of kinds that repeat over the layers."""

LISTED = {
    "sliding_window_pattern": "layer_types", "_sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types", "layer_group_size": "layer_types",
    "global_attn_every_n_layers": "layer_types", "max_window_layers": "layer_types",
    "num_first_full_attention_layers": "layer_types", "num_last_full_attention_layers": "layer_types",
    "no_rope_layer_interval": "no_rope_layers", "interleave_moe_layer_step": "moe_layers",
}  # fmt: skip
"""Rules that a list replaces, if there is one."""
WHOLE = {
    "num_hidden_groups": "the layers share their weights",
    "hidden_size_per_layer_input": "its embeddings have columns for each layer",
    "cross_layer_interval": "layers of another kind stand between its layers",
}
"""Keys of models that no stack can be made of, and why."""
BY_NUMBER = ("scale_attn_by_inverse_layer_idx", "kv_source_layers")
"""Keys that let layers compute with their numbers, or those of others."""
QUANTISED = ("quantization_config", "compression_config", "quantization")
"""Keys under which libraries say how weights are quantized."""
