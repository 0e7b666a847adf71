"""Synthetic families of checkpoints in the shapes of published models, written without ever holding one.

    python benchmarks/family.py DIR --size 1.5B [--shards N]

makes DIR/target, DIR/sft and DIR/rl (bfloat16) and DIR/recipe.yaml. The values are drawn so that a merge has
real work: sft and target are noisy copies of one base, rl is sft with most elements unchanged.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from skillmerge.checkpoints.safetensors import build_header

# hidden, layers, mlp, key/value width, vocabulary: the shapes of Qwen2.5.
SIZES = {
    "tiny": (256, 4, 1024, 64, 4096),
    "0.5B": (896, 24, 4864, 128, 151936),
    "1.5B": (1536, 28, 8960, 256, 151936),
    "3B": (2048, 36, 11008, 256, 151936),
}
RECIPE = """\
skillmerge: 1
models: {target: target, sft: sft, rl: rl}
coefficients: {lam: 0.7}
merge: target + lam * (rl - sft)
"""


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    hidden, layers, mlp, narrow, vocabulary = SIZES[size]
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        for name, rows in (("q_proj", hidden), ("k_proj", narrow), ("v_proj", narrow)):
            tensors[f"{block}.self_attn.{name}.weight"] = (rows, hidden)
            tensors[f"{block}.self_attn.{name}.bias"] = (rows,)
        tensors[f"{block}.self_attn.o_proj.weight"] = (hidden, hidden)
        tensors[f"{block}.mlp.gate_proj.weight"] = (mlp, hidden)
        tensors[f"{block}.mlp.up_proj.weight"] = (mlp, hidden)
        tensors[f"{block}.mlp.down_proj.weight"] = (hidden, mlp)
        tensors[f"{block}.input_layernorm.weight"] = (hidden,)
        tensors[f"{block}.post_attention_layernorm.weight"] = (hidden,)
    tensors["model.norm.weight"] = (hidden,)
    return tensors


def config(size: str) -> dict[str, object]:
    hidden, layers, mlp, narrow, vocabulary = SIZES[size]
    head = 64 if narrow <= 128 else 128
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // head,
        "num_key_value_heads": narrow // head,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def make(folder: Path, size: str, shards: int = 1) -> Path:
    """Write the family unless it is there already; the path of its recipe."""
    recipe = folder / "recipe.yaml"
    if recipe.exists():
        return recipe
    tensors = shapes(size)
    pool = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02
    for number, model in enumerate(("target", "sft", "rl")):
        (folder / model).mkdir(parents=True, exist_ok=True)
        (folder / model / "config.json").write_text(json.dumps(config(size), indent=2))
        names = list(tensors)
        count = -(-len(names) // shards)
        weight_map = {}
        for shard in range(shards):
            part = names[shard * count : (shard + 1) * count]
            file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            header, specs = build_header((name, "BF16", tensors[name]) for name in part)
            with open(folder / model / file, "wb") as stream:
                stream.write(header)
                for index, spec in enumerate(specs):
                    _write_values(stream, spec.elements, pool, index, number)
            weight_map |= dict.fromkeys(part, file)
        if shards > 1:
            index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
            (folder / model / "model.safetensors.index.json").write_text(json.dumps(index))
    recipe.write_text(RECIPE)
    return recipe


def _write_values(stream: object, elements: int, pool: torch.Tensor, seed: int, model: int) -> None:
    """One tensor of a model: 0 target, 1 sft, 2 rl (sft with a fifth of its elements moved)."""
    generator = torch.Generator().manual_seed(1000 * seed + min(model, 1))
    moved = torch.Generator().manual_seed(7000 + seed)
    for start in range(0, elements, pool.numel()):
        count = min(pool.numel(), elements - start)
        values = torch.roll(pool, seed * 977 + start)[:count]
        values = values + 5e-4 * torch.randn(count, generator=generator)
        if model == 2:
            values = values + 2e-5 * torch.randn(count, generator=moved) * (torch.rand(count, generator=moved) < 0.2)
        data = values.bfloat16().view(torch.uint8)
        stream.write(data.numpy().tobytes())  # type: ignore[attr-defined]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="1.5B")
    parser.add_argument("--shards", type=int, default=1)
    arguments = parser.parse_args()
    print(make(arguments.folder, arguments.size, arguments.shards))
