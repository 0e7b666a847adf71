"""Tiny models and adapters of every variant, made by transformers and PEFT, and what they mean: two oracles.

`expected` is numpy in float64, in the order that docs/adapters.md gives, rounded once; it shares no code with the
package. `merged` is PEFT's own `merge_and_unload`.
"""

from __future__ import annotations

import atexit
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from conftest import read_checkpoint
from safetensors.torch import load_file, save_file

SMALL = {"hidden_size": 48, "intermediate_size": 81, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 97}  # fmt: skip
MOE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64,
       "head_dim": 16, "num_experts_per_tok": 2}  # fmt: skip
PREFIX = "base_model.model."


TARGETS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj", "lm_head")


def write_adapter(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], seed: int = 0, rank: int = 4, **config: Any
) -> Path:
    """A random adapter for some modules of the models of `conftest.write_family`, without PEFT."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in TARGETS:
        rows, columns = shapes[f"{module}.weight"]
        for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            tensors[f"{PREFIX}{module}.lora_{part}.weight"] = torch.randn(shape, generator=draw) * 0.02
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    document = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, **config}
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


@dataclass(frozen=True)
class Variant:
    """lora: words of `LoraConfig`. model: which architecture. config: words of its configuration. packed: whether the
    base is saved as transformers has it in memory. whole: whether the embeddings are saved beside the adapter, as PEFT
    does where tokens were added."""

    lora: Mapping[str, Any]
    model: str = "llama"
    config: Mapping[str, Any] = field(default_factory=dict)
    packed: bool = False
    whole: bool = False


TIED = {"tie_word_embeddings": True}
Q = ["q_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
VARIANTS = {
    "linear": Variant({"target_modules": ["q_proj", "down_proj", "lm_head"]}),
    "patterns": Variant({
        "target_modules": ["q_proj", "down_proj", "up_proj"],
        "rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 3, "layers.1.self_attn.q_proj": 6, "down_proj": 2},
        "alpha_pattern": {"down_proj": 32, r"layers\.\d+\.mlp\.(up|down)_proj": 5},
    }),
    "rslora": Variant(
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "rank_pattern": {"down_proj": 7}}
    ),
    "fan_in_fan_out": Variant({"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, "gpt2"),
    "conv1d_and_linear": Variant(
        {"target_modules": ["attn.c_proj", "lm_head"]}, "gpt2", config={"tie_word_embeddings": False}
    ),
    "weights_as_parameters": Variant({
        "target_modules": [], "target_parameters": ["q_proj.weight", "up_proj.weight"],
        "alpha_pattern": {"q_proj.weight": 32, "up_proj": 64}, "rank_pattern": {"up_proj.weight": 3},
    }),
    "embedding": Variant({"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding_tied": Variant({"target_modules": ["embed_tokens"]}, config={"tie_word_embeddings": True}),
    "embedding_and_head_tied": Variant(
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, config=TIED
    ),
    "modules_to_save": Variant({"target_modules": Q, "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "tokens": Variant({"target_modules": Q, "trainable_token_indices": [3, 95]}),
    "tokens_tied": Variant(
        {"target_modules": Q, "trainable_token_indices": {"embed_tokens": [95, 3, 7]}},
        config={"tie_word_embeddings": True},
    ),
    "modules_beside": Variant({"target_modules": Q, "modules_to_save": ["embed_tokens", "lm_head"]}, whole=True),
    "modules_tied": Variant(
        {"target_modules": Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, config=TIED
    ),
    "tokens_beside": Variant({"target_modules": Q, "trainable_token_indices": [3, 95]}, whole=True),
    "tokens_beside_tied": Variant({"target_modules": Q, "trainable_token_indices": [3, 95]}, config=TIED, whole=True),
    "bias": Variant({"target_modules": Q, "bias": "lora_only"}, config={"attention_bias": True}),
    "bias_all": Variant({"target_modules": Q, "bias": "all"}, config={"attention_bias": True}),
    "lora_bias": Variant({"target_modules": Q, "lora_bias": True}, config={"attention_bias": True}),
    "dora": Variant({"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "dora_embedding": Variant({"target_modules": ["embed_tokens"], "use_dora": True}),
    "dora_fan": Variant({"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True}, "gpt2"),
    "experts": Variant({"target_modules": Q, "target_parameters": EXPERTS}, "qwen3_moe", packed=True),
    "experts_patterns": Variant(
        {"target_modules": [], "target_parameters": EXPERTS, "rank_pattern": {"down_proj": 3}}, "qwen3_moe",
        packed=True,
    ),
    "experts_transposed": Variant({"target_modules": Q, "target_parameters": EXPERTS}, "gpt_oss"),
    "experts_on_split": Variant({"target_modules": Q, "target_parameters": EXPERTS}, "qwen3_moe"),
    "mixtral_on_split": Variant({"target_modules": Q, "target_parameters": EXPERTS[:1]}, "mixtral"),
}  # fmt: skip
DIFFERENCES = ("linear", "patterns", "rslora", "fan_in_fan_out", "lora_bias", "experts", "experts_patterns",
               "experts_transposed", "experts_on_split", "mixtral_on_split", "embedding",
               "embedding_and_head_tied")  # fmt: skip
"""Those that add the same to every model."""
MERGED = [name for name in VARIANTS if name != "embedding_and_head_tied"]
"""Those that PEFT merges as they were trained. It adds both pairs of a tied head to the one matrix."""


def model_of(variant: Variant, dtype: torch.dtype) -> Any:
    import transformers as t

    torch.manual_seed(0)
    if variant.model == "gpt2":
        config: Any = t.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16, bos_token_id=0,
                                   eos_token_id=0, **variant.config)  # fmt: skip
        made: Any = t.GPT2LMHeadModel(config)
    elif variant.model == "qwen3_moe":
        config = t.Qwen3MoeConfig(**MOE, intermediate_size=64, moe_intermediate_size=20, num_experts=4)
        made = t.Qwen3MoeForCausalLM(config)
    elif variant.model == "mixtral":
        made = t.MixtralForCausalLM(t.MixtralConfig(**MOE, intermediate_size=20, num_local_experts=4))
    elif variant.model == "gpt_oss":
        made = t.GptOssForCausalLM(t.GptOssConfig(**MOE, intermediate_size=24, num_local_experts=4))
    else:
        made = t.LlamaForCausalLM(t.LlamaConfig(**{**SMALL, **variant.config}))
    return made.to(dtype)


@cache
def adapter(name: str, dtype: torch.dtype = torch.float32, seed: int = 7) -> Path:
    """A folder with `base` and `adapter`. Nobody may change it."""
    from peft import LoraConfig, get_peft_model

    variant, folder = VARIANTS[name], Path(mkdtemp(prefix="skillmerge-adapter-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model = model_of(variant, dtype)
    model.save_pretrained(folder / "base", save_original_format=not variant.packed)
    words = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **variant.lora}
    trained = get_peft_model(model, LoraConfig(**words))
    torch.manual_seed(seed)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.02
    trained.save_pretrained(folder / "adapter", save_embedding_layers=variant.whole or "auto")
    return folder


def merged(folder: Path, out: Path, dtype: torch.dtype, packed: bool) -> dict[str, torch.Tensor]:
    """What PEFT makes of base and adapter, computed in `dtype`, as it saves it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    whole = PeftModel.from_pretrained(base, folder / "adapter").to(dtype).merge_and_unload()
    whole.save_pretrained(out, save_original_format=not packed)
    return read_checkpoint(out)


def wide(values: torch.Tensor) -> np.ndarray:
    return values.to(torch.float64).numpy()


def product(a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """s B A: for k in their order, acc += B[:, k] A[k]."""
    total = np.zeros((b.shape[0], a.shape[1]))
    for k in range(a.shape[0]):
        total = total + b[:, k : k + 1] * a[k : k + 1]
    return total * scale


def expected(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of the base with the adapter on it, those that it changes as float32."""
    base, found, _ = _parts(folder)
    return {**{name: wide(value).astype(np.float32) for name, value in base.items()}, **found}


def expected_difference(folder: Path) -> dict[str, np.ndarray]:
    """What the adapter adds to the tensors of the base, as float32."""
    base, _, added = _parts(folder)
    zeros = {name: np.zeros(tuple(value.shape), np.float32) for name, value in base.items()}
    return {**zeros, **{name: value.astype(np.float32) for name, value in added.items()}}


def sizes(folder: Path) -> dict[str, np.ndarray]:
    """The sums of the sizes of all that is added up: |W| + the sum of |s b a|."""
    base, found, _ = _parts(folder, np.abs)
    return {**{name: np.abs(wide(value)) for name, value in base.items()}, **found}


def _parts(
    folder: Path, of: Callable[[np.ndarray], np.ndarray] = np.asarray
) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The base, what it becomes, and what is added to it in float64. of: what is taken of each stored element."""
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    tensors = {
        name.removeprefix(PREFIX): of(wide(value))
        for name, value in load_file(folder / "adapter" / "adapter_model.safetensors").items()
    }
    base = {name: torch.from_numpy(of(wide(it))).to(it.dtype) for name, it in read_checkpoint(folder / "base").items()}
    tied = json.loads((folder / "base" / "config.json").read_text()).get("tie_word_embeddings")
    # Of what is there twice, one is enough.
    tensors = {
        name: it for name, it in tensors.items() if ".original_module." not in name and ".modules_to_save." not in name
    }
    if tied and "lm_head.weight" not in base:
        tensors = {name: it for name, it in tensors.items() if not name.startswith("lm_head.")}
    found: dict[str, np.ndarray] = {}
    added: dict[str, np.ndarray] = {}
    for name, a in tensors.items():
        module = re.sub(r"(\.base_layer)*\.lora_(embedding_)?A(\.weight)?$", "", name)
        if module == name:
            continue
        embedding = "lora_embedding_A" in name
        b = tensors[name.replace("_A", "_B")]
        for target, value in _products(base, module, a, b, config, embedding).items():
            added[target] = value
            whole = wide(base[target]) + value
            if (magnitude := tensors.get(f"{module}.lora_magnitude_vector")) is not None:
                along = 0 if embedding or config.get("fan_in_fan_out") else 1
                norms = np.sqrt((whole * whole).sum(axis=along, keepdims=True))
                whole = whole * (magnitude.reshape(-1, 1) if along else magnitude.reshape(1, -1)) / norms
            found[target] = whole.astype(np.float32)
    for name, value in tensors.items():
        if name.endswith(".lora_B.bias"):
            module = name.removesuffix(".lora_B.bias")
            added[f"{module}.bias"] = value * _scale(config, module)
            found[f"{module}.bias"] = (wide(base[f"{module}.bias"]) + added[f"{module}.bias"]).astype(np.float32)
        elif name.endswith("trainable_tokens_delta"):
            indices = config["trainable_token_indices"]
            rows = indices if isinstance(indices, list) else indices["embed_tokens"]
            found["model.embed_tokens.weight"] = wide(base["model.embed_tokens.weight"]).astype(np.float32)
            found["model.embed_tokens.weight"][rows] = value.astype(np.float32)
        elif "lora" not in name and not name.endswith(".base_layer.weight"):
            found[name.replace(".base_layer", "")] = value.astype(np.float32)
    if tied and "lm_head.weight" in base:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    return base, found, added


def _products(
    base: Mapping[str, torch.Tensor], module: str, a: np.ndarray, b: np.ndarray, config: Mapping[str, Any],
    embedding: bool,
) -> dict[str, np.ndarray]:  # fmt: skip
    weight = f"{module}.weight"
    if weight in base:
        named = any(weight.endswith(name) for name in config.get("target_parameters") or ())
        whole = product(a, b, _scale(config, weight if named else module))
        # What PEFT writes as `fan_in_fan_out` is true of the last module.
        turned = embedding or (module.startswith("transformer.h.") and "c_" in module)
        return {weight: whole.T if turned else whole}
    for name in config["target_parameters"]:
        target = f"{module}.{name.rpartition('.')[2]}"
        if target not in base:
            if found := _split(base, module, target, a, b, config):
                return found
            continue
        experts, *sides = base[target].shape
        rank = _rank(config, target)
        stack = a.reshape(experts, -1, a.shape[1])
        if len(a) != experts * rank or sorted(sides) != sorted((b.shape[0], a.shape[1])):
            continue
        columns = b.reshape(b.shape[0], rank, experts)
        each = [product(stack[e], columns[:, :, e], _scale(config, target)) for e in range(experts)]
        return {target: np.stack([it if it.shape == tuple(sides) else it.T for it in each])}
    raise AssertionError(module)


def _split(
    base: Mapping[str, torch.Tensor], module: str, target: str, a: np.ndarray, b: np.ndarray, config: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The same for each expert of a model that has them one by one; nothing if the shapes are not those."""
    inside, names = module, ("gate_proj", "up_proj", "down_proj")
    if f"{module}.0.down_proj.weight" not in base:
        inside, names = module.replace(".mlp.", ".block_sparse_moe."), ("w1", "w3", "w2")
    parts = names[:2] if target.endswith("gate_up_proj") else names[2:]
    found = {}
    for expert in range(4):
        whole = product(a.reshape(4, -1, a.shape[1])[expert], b.reshape(len(b), -1, 4)[:, :, expert],
                        _scale(config, target))  # fmt: skip
        for part, value in zip(parts, np.split(whole, len(parts)), strict=True):
            found[f"{inside}.{expert}.{part}.weight"] = value
    return found if all(base[name].shape == value.shape for name, value in found.items()) else {}


def _pattern(table: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    return next((value for key, value in table.items() if re.match(rf"(.*\.)?({key})$", name)), otherwise)


def _rank(config: Mapping[str, Any], name: str) -> int:
    return int(_pattern(config.get("rank_pattern", {}), name, config["r"]))


def _scale(config: Mapping[str, Any], name: str) -> float:
    alpha, rank = _pattern(config.get("alpha_pattern", {}), name, config["lora_alpha"]), _rank(config, name)
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
