"""What names say."""

from __future__ import annotations

import pytest

from skillmerge.naming import layer_of, module_kind


@pytest.mark.parametrize(
    ("name", "kind", "block"),
    [
        ("model.layers.7.self_attn.q_proj.weight", "attention", ("model.layers", 7)),
        ("model.layers.7.self_attn.q_norm.weight", "norm", ("model.layers", 7)),
        ("model.layers.7.mlp.gate_proj.weight", "mlp", ("model.layers", 7)),
        ("model.layers.7.mlp.gate.weight", "router", ("model.layers", 7)),
        ("model.layers.7.mlp.experts.12.up_proj.weight", "expert", ("model.layers", 7)),
        ("model.layers.7.mlp.shared_expert.up_proj.weight", "expert", ("model.layers", 7)),
        ("model.layers.7.mlp.shared_expert_gate.weight", "router", ("model.layers", 7)),
        ("model.layers.0.block_sparse_moe.gate.weight", "router", ("model.layers", 0)),
        ("model.layers.0.block_sparse_moe.experts.1.w1.weight", "expert", ("model.layers", 0)),
        ("model.layers.10.post_attention_layernorm.weight", "norm", ("model.layers", 10)),
        ("model.embed_tokens.weight", "embedding", None),
        ("model.norm.weight", "norm", None),
        ("lm_head.weight", "head", None),
        ("transformer.h.3.attn.c_attn.weight", "attention", ("transformer.h", 3)),
        ("h.3.ln_1.weight", "norm", ("h", 3)),
        ("transformer.wte.weight", "embedding", None),
        ("encoder.layer.11.output.dense.weight", "mlp", ("encoder.layer", 11)),
        ("bert.encoder.layer.11.attention.output.LayerNorm.weight", "norm", ("bert.encoder.layer", 11)),
        ("encoder.block.0.layer.1.DenseReluDense.wi.weight", "mlp", ("encoder.block", 0)),
        ("decoder.block.2.layer.1.EncDecAttention.k.weight", "attention", ("decoder.block", 2)),
        ("model.encoder.layers.1.fc1.weight", "mlp", ("model.encoder.layers", 1)),
        ("visual.blocks.4.attn.qkv.weight", "attention", ("visual.blocks", 4)),
        ("visual.merger.mlp.0.weight", "mlp", None),
        ("shared.weight", "embedding", None),
        ("something.new", "other", None),
    ],
)
def test_name_says_its_module_and_block(name: str, kind: str, block: tuple[str, int] | None) -> None:
    assert module_kind(name) == kind
    assert layer_of(name) == block
