"""Tiny model families for the golden recordings, the same bytes on every machine.

Numbers come from the raw output of numpy's PCG64, which never changes; bfloat16 is made by cutting bits off, and the
safetensors files are written by hand. Neither torch nor transformers takes part, so that no release of either can
change what goes into a recording.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

MTIME_NS = 1_700_000_000_123_456_789
"""Modification time of every input file: journals, saved plans and manifests tell changed inputs by it."""

Shapes = dict[str, tuple[int, ...]]

UPDATES: dict[str, tuple[tuple[str, float, float], ...]] = {
    "base": (),
    "target": (("target", 4e-3, 1.0),),
    "sft": (("sft", 4e-3, 1.0),),
    "rl": (("sft", 4e-3, 1.0), ("rl", 8e-4, 0.4)),
    "rl2": (("sft", 4e-3, 1.0), ("rl2", 8e-4, 0.4)),
}
"""Role -> its updates on the base: (name of the noise, scale, share of the elements that it moves)."""

_NUMPY = {"F32": np.float32, "F16": np.float16}
_ITEMSIZE = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8}
_TOKENIZER = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}
_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@dataclass(frozen=True)
class Family:
    """One architecture: tensor names and shapes, a literal config, and how its weights are stored.

    dtypes: the dtype of tensors whose names contain a text, the first that fits; "" fits all. shards: files of each
    role that is not named in `single`.
    """

    shapes: Shapes
    config: Mapping[str, Any]
    dtypes: tuple[tuple[str, str], ...] = (("", "BF16"),)
    shards: int = 1
    single: tuple[str, ...] = ()
    side_files: Mapping[str, str] = field(default_factory=dict)

    def dtype_of(self, name: str) -> str:
        return next(dtype for part, dtype in self.dtypes if part in name)


def raw_numbers(label: str, count: int) -> np.ndarray:
    """Unsigned 64-bit numbers that depend on the label alone."""
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "big")
    return np.random.PCG64(seed).random_raw(count)


def noise(label: str, count: int, share: float = 1.0) -> np.ndarray:
    """Bell-shaped float64 numbers of variance 1/3; all but a share of them are 0."""
    raw = raw_numbers(label, count)
    quarters = sum(((raw >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.float64) for shift in (0, 16, 32, 48))
    values = quarters / 65536.0 - 2.0
    if share < 1.0:
        moved = raw_numbers(label + " moved", count) < np.uint64(int(share * 2**64))
        values = np.where(moved, values, 0.0)
    return values


def to_bytes(values: np.ndarray, dtype: str) -> bytes:
    """The values in a safetensors dtype, little-endian; bfloat16 by dropping the low 16 bits."""
    if dtype == "I64":
        return values.astype("<i8").tobytes()
    if dtype == "BF16":
        return (values.astype("<f4").view("<u4") >> np.uint32(16)).astype("<u2").tobytes()
    return values.astype(np.dtype(_NUMPY[dtype]).newbyteorder("<")).tobytes()


def tensor_values(family: str, role: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float64 values of one tensor, before they are put into its dtype. `mixed+head` has the numbers of `mixed`."""
    count, family = int(np.prod(shape)), family.partition("+")[0]
    is_norm = "norm" in name.lower() or ".ln_" in name
    start = np.ones(count) if is_norm else 0.05 * noise(f"{family}/base/{name}", count)
    for update, scale, share in UPDATES[role]:
        start = start + scale * noise(f"{family}/{update}/{name}", count, share)
    return start


def safetensors_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """A safetensors file of name -> (dtype, shape, data), wide dtypes first, as the format's library orders them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start, parts = 0, []
    for name, (dtype, shape, data) in sorted(tensors.items(), key=lambda item: -_ITEMSIZE[item[1][0]]):
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + len(data)]}
        start += len(data)
        parts.append(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def write_model(folder: Path, family: str, role: str, resized: Mapping[str, tuple[int, ...]] | None = None) -> None:
    """Write one model of a family into `folder`, with side files and fixed modification times.

    resized: other shapes of some tensors, as of an extended vocabulary.
    """
    known = FAMILIES[family]
    folder.mkdir(parents=True)
    shapes = {**known.shapes, **(resized or {})}
    tensors = {}
    for name, shape in shapes.items():
        dtype = known.dtype_of(name)
        values = np.arange(int(np.prod(shape))) if dtype == "I64" else tensor_values(family, role, name, shape)
        tensors[name] = (dtype, shape, to_bytes(values, dtype))
    _write_shards(folder, tensors, 1 if role in known.single else known.shards)
    config = dict(known.config)
    for name, shape in (resized or {}).items():
        if "embed" in name and "vocab_size" in config:
            config["vocab_size"] = shape[0]
    side_files = {"config.json": json.dumps(config, indent=2) + "\n", **known.side_files}
    for name, text in side_files.items():
        (folder / name).write_text(text, encoding="utf-8")
    for path in folder.iterdir():
        os.utime(path, ns=(MTIME_NS, MTIME_NS))


def _write_shards(folder: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]], shards: int) -> None:
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return
    names, weight_map = list(tensors), {}
    size = -(-len(names) // shards)
    for number in range(shards):
        part = {name: tensors[name] for name in names[number * size : (number + 1) * size]}
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        (folder / file).write_bytes(safetensors_bytes(part))
        weight_map |= dict.fromkeys(part, file)
    total = sum(len(data) for _, _, data in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _stack(prefix: str, layers: int, parts: Mapping[str, tuple[int, ...]]) -> Shapes:
    return {f"{prefix}.{layer}.{part}": shape for layer in range(layers) for part, shape in parts.items()}


def _decoder(prefix: str, layers: int, hidden: int = 32) -> Shapes:
    attention = {f"self_attn.{part}_proj.weight": (hidden, hidden) for part in ("q", "o")}
    attention |= {f"self_attn.{part}_proj.weight": (hidden // 2, hidden) for part in ("k", "v")}
    mlp = {
        "mlp.gate_proj.weight": (48, hidden),
        "mlp.up_proj.weight": (48, hidden),
        "mlp.down_proj.weight": (hidden, 48),
    }
    norms = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    return _stack(prefix, layers, {**attention, **mlp, **norms})


def _llama() -> Shapes:
    ends = {"model.norm.weight": (32,), "lm_head.weight": (64, 32)}
    return {"model.embed_tokens.weight": (64, 32), **_decoder("model.layers", 4), **ends}


def _qwen2() -> Shapes:
    biases = {f"self_attn.{part}_proj.bias": (size,) for part, size in (("q", 32), ("k", 16), ("v", 16))}
    return {
        "model.embed_tokens.weight": (64, 32),
        **_decoder("model.layers", 2),
        **_stack("model.layers", 2, biases),
        "model.norm.weight": (32,),
    }


def _mixtral() -> Shapes:
    experts = {
        f"block_sparse_moe.experts.{number}.{part}.weight": (16, 24) if part == "w2" else (24, 16)
        for number in range(3)
        for part in ("w1", "w2", "w3")
    }
    attention = {f"self_attn.{part}_proj.weight": (16, 16) for part in ("q", "k", "v", "o")}
    other = {"block_sparse_moe.gate.weight": (3, 16), "input_layernorm.weight": (16,)}
    ends = {"model.norm.weight": (16,), "lm_head.weight": (40, 16)}
    return {
        "model.embed_tokens.weight": (40, 16),
        **_stack("model.layers", 2, {**attention, **experts, **other}),
        **ends,
    }


def _gpt2() -> Shapes:
    parts = {
        "ln_1.weight": (24,), "ln_1.bias": (24,), "attn.c_attn.weight": (24, 72), "attn.c_attn.bias": (72,),
        "attn.c_proj.weight": (24, 24), "ln_2.weight": (24,), "mlp.c_fc.weight": (24, 96),
        "mlp.c_proj.weight": (96, 24),
    }  # fmt: skip
    ends = {"transformer.ln_f.weight": (24,), "transformer.ln_f.bias": (24,)}
    embeddings = {"transformer.wte.weight": (50, 24), "transformer.wpe.weight": (16, 24)}
    return {**embeddings, **_stack("transformer.h", 2, parts), **ends}


def _bert() -> Shapes:
    parts = {f"attention.self.{part}.weight": (16, 16) for part in ("query", "key", "value")}
    parts |= {"attention.output.dense.weight": (16, 16), "attention.output.LayerNorm.weight": (16,)}
    parts |= {"intermediate.dense.weight": (32, 16), "output.dense.weight": (16, 32), "output.LayerNorm.bias": (16,)}
    embeddings = {"bert.embeddings.word_embeddings.weight": (40, 16), "bert.embeddings.LayerNorm.weight": (16,)}
    return {**embeddings, **_stack("bert.encoder.layer", 3, parts), "cls.predictions.bias": (40,)}


def _t5() -> Shapes:
    attention = {f"layer.0.SelfAttention.{part}.weight": (16, 16) for part in ("q", "k", "v", "o")}
    cross = {f"layer.1.EncDecAttention.{part}.weight": (16, 16) for part in ("q", "v")}
    encoder = {**attention, "layer.1.DenseReluDense.wi.weight": (24, 16), "layer.1.layer_norm.weight": (16,)}
    decoder = {**attention, **cross, "layer.2.DenseReluDense.wo.weight": (16, 24)}
    return {
        "shared.weight": (40, 16),
        **_stack("encoder.block", 2, encoder),
        **_stack("decoder.block", 3, decoder),
        "decoder.final_layer_norm.weight": (16,),
    }


def _vision() -> Shapes:
    sight = {"self_attn.q_proj.weight": (16, 16), "mlp.fc1.weight": (24, 16), "layer_norm1.weight": (16,)}
    return {
        "language_model.model.embed_tokens.weight": (64, 32),
        **_decoder("language_model.model.layers", 2),
        "vision_tower.embeddings.patch_embedding.weight": (16, 3, 4, 4),
        **_stack("vision_tower.encoder.layers", 3, sight),
        "multi_modal_projector.linear.weight": (32, 16),
    }


def _mixed() -> Shapes:
    parts = {"attn.weight": (12, 12), "mlp.router_bias": (7,), "mlp.fc1.weight": (20, 12), "norm.weight": (12,)}
    return {"model.position_ids": (1, 9), "embed.weight": (30, 12), **_stack("layers", 3, parts)}


def _decoder_config(architecture: str, kind: str, layers: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "num_hidden_layers": layers, "vocab_size": 64}
    return {"architectures": [architecture], "model_type": kind, **sizes, "torch_dtype": "bfloat16", **more}


FAMILIES: dict[str, Family] = {
    "llama": Family(
        _llama(),
        _decoder_config("LlamaForCausalLM", "llama", 4),
        shards=3,
        single=("sft",),
        side_files={
            "tokenizer.json": json.dumps(_TOKENIZER),
            "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}',
            "generation_config.json": '{"eos_token_id": 2}',
            "chat_template.jinja": _TEMPLATE,
            "LICENSE": "Apache License 2.0\n",
            "README.md": "---\nlicense: apache-2.0\n---\n# A model\n",
            "trainer_state.json": "{}",
        },
    ),
    "qwen2": Family(
        _qwen2(),
        _decoder_config("Qwen2ForCausalLM", "qwen2", 2, tie_word_embeddings=True),
        side_files={"tokenizer.json": json.dumps(_TOKENIZER)},
    ),
    "mixtral": Family(
        _mixtral(),
        {"architectures": ["MixtralForCausalLM"], "num_hidden_layers": 2, "vocab_size": 40, "torch_dtype": "bfloat16"},
        shards=2,
    ),
    "gpt2": Family(
        _gpt2(),
        {"architectures": ["GPT2LMHeadModel"], "n_layer": 2, "vocab_size": 50, "torch_dtype": "float16"},
        dtypes=(("", "F16"),),
    ),
    "bert": Family(
        _bert(),
        {"architectures": ["BertForMaskedLM"], "num_hidden_layers": 3, "vocab_size": 40, "torch_dtype": "float32"},
        dtypes=(("", "F32"),),
    ),
    "t5": Family(
        _t5(),
        {"architectures": ["T5ForConditionalGeneration"], "num_layers": 2, "num_decoder_layers": 3, "vocab_size": 40},
    ),
    "vision": Family(
        _vision(),
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": {"num_hidden_layers": 2, "vocab_size": 64, "hidden_size": 32},
            "vision_config": {"num_hidden_layers": 3, "hidden_size": 16},
        },
        dtypes=(("multi_modal", "F32"), ("", "BF16")),
        shards=2,
    ),
    "mixed": Family(
        _mixed(),
        {"architectures": ["Mixed"], "num_hidden_layers": 3},
        dtypes=(("position_ids", "I64"), ("norm", "F32"), ("router", "F32"), ("attn", "F16"), ("", "BF16")),
    ),
    "mixed+head": Family(
        {**_mixed(), "value_head.weight": (1, 12), "layers.9.extra": (5,)},
        {"architectures": ["Mixed"], "num_hidden_layers": 3},
        dtypes=(("position_ids", "I64"), ("norm", "F32"), ("router", "F32"), ("attn", "F16"), ("", "BF16")),
    ),
    "tiles": Family(
        {"model.layers.0.mlp.up_proj.weight": (600, 1003), "model.layers.0.norm.weight": (600,)},
        {"architectures": ["Tiles"], "num_hidden_layers": 1},
    ),
}


FAMILIES["tiles+wide"] = replace(FAMILIES["tiles"], dtypes=(("", "F32"),))
"""Parents in float32 of a bfloat16 target: the arithmetic is in float64 then, and has to round to 16 bits once."""


def write_families(folder: Path, wanted: Mapping[str, str]) -> None:
    """Write models into `folder`: wanted is folder name -> "family/role", or "family/role+rows" with a vocabulary
    that is longer by so many rows."""
    for name, what in wanted.items():
        family, _, role = what.partition("/")
        role, _, rows = role.partition("+")
        resized = {key: (shape[0] + int(rows), *shape[1:]) for key, shape in FAMILIES[family].shapes.items()
                   if key.endswith(("embed_tokens.weight", "lm_head.weight"))} if rows else None  # fmt: skip
        write_model(folder / name, family, role, resized)
