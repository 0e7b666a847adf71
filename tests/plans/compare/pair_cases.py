"""Pairs of models that do not belong together: a real model, and the one thing that is changed in its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from old_configs import OLD

ROWS = 16
WORDS = [*"abcdefgh", "ab", "cd", "abcd"]
ADDED = {11: "<|endoftext|>", 12: "<|im_end|>", 13: "<think>", 14: "</think>"}
GONE = object()
"""A key that the changed configuration leaves out."""

GRANITE: dict[str, Any] = {
    "architectures": ["GraniteForCausalLM"], "attention_multiplier": 0.015625, "embedding_multiplier": 12.0,
    "hidden_act": "silu", "hidden_size": 2048, "logits_scaling": 8.0, "max_position_embeddings": 131072,
    "model_type": "granite", "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
    "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000000.0,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.47.0", "vocab_size": 49155,
}  # fmt: skip
QWEN_MOE: dict[str, Any] = {
    **OLD["Qwen/Qwen3-8B"], "architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 1, "head_dim": 128,
    "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "output_router_logits": False,
}  # fmt: skip
BERT: dict[str, Any] = {
    "architectures": ["BertForMaskedLM"], "hidden_act": "gelu", "hidden_size": 768, "intermediate_size": 3072,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12,
    "num_hidden_layers": 12, "pad_token_id": 0, "position_embedding_type": "absolute", "vocab_size": 30522,
}  # fmt: skip
REAL: dict[str, dict[str, Any]] = {
    "qwen": OLD["Qwen/Qwen2.5-7B"],
    "qwen3": OLD["Qwen/Qwen3-8B"],
    "llama": OLD["meta-llama/Llama-3.1-8B"],
    "llama3.0": OLD["meta-llama/Meta-Llama-3-8B"],
    "mistral": OLD["mistralai/Mistral-7B-v0.1"],
    "gemma2": OLD["google/gemma-2-2b"],
    "gemma3": OLD["google/gemma-3-1b-it"],
    "gemma3vl": {
        **OLD["google/gemma-3-4b-it"],
        "vision_config": {**OLD["google/gemma-3-4b-it"]["vision_config"], "hidden_act": "gelu_pytorch_tanh"},
    },
    "phi3": OLD["microsoft/Phi-3-mini-128k-instruct"],
    "pythia": OLD["EleutherAI/pythia-1b"],
    "qwen2vl": OLD["Qwen/Qwen2-VL-7B-Instruct"],
    "deepseek": OLD["deepseek-ai/DeepSeek-V3"],
    "mixtral": OLD["mistralai/Mixtral-8x7B-v0.1"],
    "gpt2": OLD["openai-community/gpt2"],
    "cohere": OLD["CohereForAI/c4ai-command-r-v01"],
    "granite": GRANITE,
    "qwen3moe": QWEN_MOE,
    "bert": BERT,
}


@dataclass(frozen=True)
class Case:
    """One pair. base: in REAL. changed: keys of the configuration of `rl` (or of the model in `where`), GONE without.

    inner: the key of the nested table that is changed. files: other side files of that model. head: whether its
    weights hold one, where that is another than what the base says. key: what the finding says that differs.
    """

    id: str
    base: str
    name: str
    key: str
    changed: Mapping[str, Any] = field(default_factory=dict)
    level: str = "problem"
    where: str = "rl"
    inner: str | None = None
    files: Mapping[str, Any] = field(default_factory=dict)
    head: bool | None = None


def tokenizer(words: list[str] = WORDS, added: Mapping[int, str] = ADDED, **parts: Any) -> dict[str, Any]:
    """A small `tokenizer.json` with the added tokens that Qwen and its reasoning models have."""
    return {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": text, "special": True} for number, text in added.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "vocab": {word: number for number, word in enumerate(words)},
            "merges": [["a", "b"], ["c", "d"], ["ab", "cd"]],
        },
        **parts,
    }  # fmt: skip


def _bpe(merges: list[list[str]]) -> dict[str, Any]:
    return {"type": "BPE", "vocab": {word: number for number, word in enumerate(WORDS)}, "merges": merges}


_JSON = "tokenizer.json"
_SCALING = OLD["meta-llama/Llama-3.1-8B"]["rope_scaling"]
_LONG = REAL["phi3"]["rope_scaling"]

CASES = (
    Case("another architecture", "llama", "architecture", "model_type",
         {"model_type": "mistral", "sliding_window": None}),
    Case("another number of layers", "qwen", "architecture", "num_hidden_layers", {"num_hidden_layers": 3}),
    Case("rotary base of Qwen2.5-Math", "qwen", "rope", "rope base", {"rope_theta": 10000}),
    Case("rotary base in the new form", "qwen", "rope", "rope base",
         {"rope_theta": GONE, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    Case("rotary base left out", "qwen", "rope", "rope base", {"rope_theta": GONE}),
    Case("local rotary base", "gemma3", "rope", "rope local base", {"rope_local_base_freq": 50000}),
    Case("partial rotary factor", "pythia", "rope", "rope partial", {"rotary_pct": 1.0}),
    Case("sections of multimodal positions", "qwen2vl", "rope", "rope sections",
         {"rope_scaling": {"type": "mrope", "mrope_section": [24, 20, 20]}}),
    Case("Llama 3.1 put on 3.0", "llama3.0", "rope", "rope trained scaling", {"rope_scaling": _SCALING}),
    Case("factor of Llama 3.2", "llama", "rope", "rope trained scaling", {"rope_scaling": {**_SCALING, "factor": 32}}),
    Case("longrope factors", "phi3", "rope", "rope trained scaling",
         {"rope_scaling": {**_LONG, "long_factor": [1.2] * 48}}),
    Case("Phi-3 of 4k and 128k", "phi3", "rope", "rope trained scaling", {"rope_scaling": None}),
    Case("kind of positions", "bert", "rope", "position_embedding_type",
         {"position_embedding_type": "relative_key"}),
    Case("yarn", "qwen", "rope-scaling", "rope scaling",
         {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}, "warning"),
    Case("linear scaling", "mistral", "rope-scaling", "rope scaling",
         {"rope_scaling": {"type": "linear", "factor": 2.0}}, "warning"),
    Case("dynamic scaling in the new form", "llama3.0", "rope-scaling", "rope scaling",
         {"rope_scaling": GONE, "rope_theta": GONE,
          "rope_parameters": {"rope_type": "dynamic", "rope_theta": 500000.0, "factor": 2.0}}, "warning"),
    Case("attention heads", "qwen", "heads", "attention heads", {"num_attention_heads": 56, "head_dim": 128}),
    Case("key and value heads", "llama", "heads", "key and value heads", {"num_key_value_heads": 4}),
    Case("key and value heads left out", "qwen", "heads", "key and value heads", {"num_key_value_heads": GONE}),
    Case("size of a head", "qwen3", "heads", "head size", {"head_dim": 64}),
    Case("latent heads", "deepseek", "heads", "qk_rope_head_dim", {"qk_rope_head_dim": 32}),
    Case("activation", "llama", "activation", "activation", {"hidden_act": "gelu"}),
    Case("activation that another key overrides", "gemma2", "activation", "activation",
         {"hidden_activation": "gelu"}),
    Case("activation of the vision tower", "gemma3vl", "activation", "vision_config: activation",
         {"hidden_act": "silu"}, inner="vision_config"),
    Case("no cap on attention", "gemma2", "scales", "attn_logit_softcapping", {"attn_logit_softcapping": None}),
    Case("cap on logits", "gemma2", "scales", "final_logit_softcapping", {"final_logit_softcapping": 50.0}),
    Case("scale of queries", "gemma2", "scales", "query_pre_attn_scalar", {"query_pre_attn_scalar": 144}),
    Case("attention multiplier", "granite", "scales", "attention_multiplier", {"attention_multiplier": 0.0078125}),
    Case("residual multiplier", "granite", "scales", "residual_multiplier", {"residual_multiplier": GONE}),
    Case("embedding multiplier", "granite", "scales", "embedding_multiplier", {"embedding_multiplier": 6.0}),
    Case("scale of logits", "cohere", "scales", "logit_scale", {"logit_scale": 0.25}),
    Case("residual in parallel", "pythia", "scales", "use_parallel_residual", {"use_parallel_residual": False}),
    Case("attention scores that are not scaled", "gpt2", "scales", "scale_attn_weights",
         {"scale_attn_weights": False}),
    Case("experts per token", "mixtral", "experts", "experts per token", {"num_experts_per_tok": 4}),
    Case("weights of experts not normalized", "qwen3moe", "experts", "norm_topk_prob", {"norm_topk_prob": GONE}),
    Case("score of experts", "deepseek", "experts", "scoring_func", {"scoring_func": "softmax"}),
    Case("groups of experts", "deepseek", "experts", "topk_group", {"topk_group": 8}),
    Case("scale of routing", "deepseek", "experts", "routed_scaling_factor", {"routed_scaling_factor": 1.0}),
    Case("sparse step", "qwen3moe", "experts", "decoder_sparse_step", {"decoder_sparse_step": 2}),
    Case("no window", "mistral", "window", "sliding window", {"sliding_window": None}),
    Case("window in force", "qwen", "window", "sliding window",
         {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}),
    Case("window on other layers", "gemma3", "window", "sliding window", {"sliding_window_pattern": 2}),
    Case("window of a nested model", "gemma3vl", "window", "sliding window", {"sliding_window": 512},
         inner="text_config"),
    Case("a head of its own", "gemma2", "ties", "tie_word_embeddings", {"tie_word_embeddings": False}, head=True),
    Case("a head that is the embedding", "qwen", "ties", "tie_word_embeddings", {"tie_word_embeddings": True},
         "warning", head=False),
    Case("added tokens in another order", "qwen", "tokenizer", "tokens",
         files={_JSON: tokenizer(added={**ADDED, 13: "</think>", 14: "<think>"})}),
    Case("renamed tokens of the R1 distills", "qwen", "tokenizer", "tokens",
         files={_JSON: tokenizer(added={**ADDED, 11: "<｜end▁of▁sentence｜>"})}),
    Case("another vocabulary", "llama", "tokenizer", "tokens",
         files={_JSON: tokenizer([*"hgfedcba", "ab", "cd", "abcd"])}),
    Case("a vocabulary that is moved by one", "mistral", "tokenizer", "tokens",
         files={_JSON: tokenizer(["<unk>", *WORDS], {})}),
    Case("a token renamed in the tokenizer's settings alone", "gpt2", "tokenizer", "tokens",
         files={_JSON: None, "vocab.json": {**{word: number for number, word in enumerate(WORDS)}, "<eos>": 11}}),
    Case("normalizer", "qwen", "tokenization", "normalizer", level="warning",
         files={_JSON: tokenizer(normalizer={"type": "Lowercase"})}),
    Case("pre-tokenizer", "llama", "tokenization", "pre-tokenizer", level="warning",
         files={_JSON: tokenizer(pre_tokenizer={"type": "Whitespace"})}),
    Case("merges", "qwen", "tokenization", "merges", level="warning",
         files={_JSON: tokenizer(model=_bpe([["c", "d"], ["a", "b"], ["ab", "cd"]]))}),
    Case("a stop token", "qwen", "stop-tokens", "eos_token_id", level="warning",
         files={"generation_config.json": {"eos_token_id": [11, 12]}}),
    Case("a stop token of the configuration", "llama", "stop-tokens", "eos_token_id", {"eos_token_id": 12}, "warning",
         files={"generation_config.json": None}),
    Case("another chat template", "qwen", "chat-template", "chat_template", level="warning",
         files={"chat_template.jinja": "{{ other }}"}),
    Case("another chat template in the settings", "llama", "chat-template", "chat_template", level="warning",
         files={"chat_template.jinja": None, "tokenizer_config.json": {"chat_template": "{{ other }}"}}),
    Case("weights of another dtype", "qwen", "dtype-config", "dtype", {"torch_dtype": "float32"}, "warning", "target"),
    Case("rows beyond the vocabulary", "qwen", "dtype-config", "vocab_size", {"vocab_size": 12}, "warning", "target"),
    Case("no head, and not tied", "gemma2", "ties", "tie_word_embeddings", {"tie_word_embeddings": False}, "warning",
         "all", head=False),
)  # fmt: skip
