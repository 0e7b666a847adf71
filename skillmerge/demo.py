"""The built-in example: a small family of Qwen2-shaped checkpoints, made on the spot, and a recipe for it.

base, the source's SFT and RL, and the target's SFT; random weights with updates of realistic sizes, so that
the figures look like those of real runs. The models say nothing sensible; they load and run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from skillmerge.checkpoints.safetensors_header import build_header
from skillmerge.sidefiles import index_bytes
from skillmerge.tensors import TensorSpec

LAYERS, HIDDEN, MLP, HEADS, SHARDS = 6, 128, 384, 4, 3
WORDS = (
    "<pad>",
    "<eos>",
    "<unk>",
    "the",
    "a",
    "skill",
    "model",
    "learns",
    "knows",
    "answers",
    "question",
    "fact",
)
VOCABULARY = 512

RECIPE = """\
# Parametric Skill Transfer: put what RL taught the source into the target.
skillmerge: 1
models:
  target: ./target-sft
  rl: ./source-rl
  sft: ./source-sft
coefficients:
  lam:
    default: 1.0
    rules:
      - {layers: 0-1, value: 0.0}          # the first blocks stay the target's
      - {layers: 2-, ramp: [0.5, 1.0]}     # then more and more of the skill
      - {modules: [embedding, norm], value: 0}
merge: target + lam * (rl - sft)
output:
  path: ./merged
"""


def write_family(folder: Path) -> Path:
    """Write base, source-sft, source-rl and target-sft into `folder`, and the recipe; the recipe's path."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shapes = _shapes()

    def noise(scale: float) -> dict[str, torch.Tensor]:
        return {name: torch.randn(shape, generator=generator) * scale for name, shape in shapes.items()}

    def plus(*parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: sum((part[name] for part in parts), torch.zeros(())) for name in shapes}

    norms = {name: torch.ones(shape) if len(shape) == 1 else torch.zeros(shape) for name, shape in shapes.items()}
    base = plus(noise(0.02), norms)
    source_sft, target_sft = plus(base, noise(1e-3)), plus(base, noise(1e-3))
    # RL moves a fifth of the weights, and those by little.
    moved = {name: torch.rand(shape, generator=generator) < 0.2 for name, shape in shapes.items()}
    step = noise(3e-4)
    source_rl = plus(source_sft, {name: step[name] * moved[name] for name in shapes})
    for name, tensors in (
        ("base", base),
        ("source-sft", source_sft),
        ("source-rl", source_rl),
        ("target-sft", target_sft),
    ):
        _write_checkpoint(folder / name, {key: value.bfloat16() for key, value in tensors.items()})
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    return recipe


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj"):
            shapes[f"{block}.self_attn.{name}.weight"] = (HIDDEN, HIDDEN)
            shapes[f"{block}.self_attn.{name}.bias"] = (HIDDEN,)
        shapes[f"{block}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{block}.mlp.gate_proj.weight"] = (MLP, HIDDEN)
        shapes[f"{block}.mlp.up_proj.weight"] = (MLP, HIDDEN)
        shapes[f"{block}.mlp.down_proj.weight"] = (HIDDEN, MLP)
        shapes[f"{block}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{block}.post_attention_layernorm.weight"] = (HIDDEN,)
    return {**shapes, "model.norm.weight": (HIDDEN,)}


def _write_checkpoint(folder: Path, tensors: dict[str, Any]) -> None:
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    count = -(-len(names) // SHARDS)
    shards: dict[str, list[TensorSpec]] = {}
    for number in range(SHARDS):
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = names[number * count : (number + 1) * count]
        header, specs = build_header((name, "BF16", tuple(tensors[name].shape)) for name in part)
        data = b"".join(bytes(tensors[spec.name].view(torch.uint8).flatten().tolist()) for spec in specs)
        (folder / file).write_bytes(header + data)
        shards[file] = list(specs)
    (folder / "model.safetensors.index.json").write_bytes(index_bytes(shards))
    for name, document in _side_files().items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _side_files() -> dict[str, Any]:
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    vocabulary |= {f"word{number}": number for number in range(len(WORDS), VOCABULARY)}
    special = [
        {"id": number, "content": WORDS[number], "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for number in range(3)
    ]  # fmt: skip
    return {
        "config.json": {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": HIDDEN,
            "intermediate_size": MLP,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-06,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "torch_dtype": "bfloat16",
        },
        "generation_config.json": {"eos_token_id": 1, "pad_token_id": 0, "max_new_tokens": 16},
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": special,
            "normalizer": None,
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "<pad>",
            "eos_token": "<eos>",
            "unk_token": "<unk>",
        },
    }
