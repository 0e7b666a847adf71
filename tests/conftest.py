"""Readable factories: tiny checkpoints of any dtype and shard layout, families of them, and recipes.

Weights are written with the safetensors library, never with skillmerge's own byte layer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

PEAK_MEMORY = "1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
"""An expression for a process's own peak in bytes; ru_maxrss would begin with its parent's."""

PAST = "target + lam * (rl - sft)"


def tensor_shapes(layers: int = 3, hidden: int = 16, vocabulary: int = 32) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        shapes[f"{block}.self_attn.q_proj.weight"] = (hidden, hidden)
        shapes[f"{block}.mlp.up_proj.weight"] = (2 * hidden, hidden)
        shapes[f"{block}.input_layernorm.weight"] = (hidden,)
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def random_tensors(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16, seed: int = 0, scale: float = 0.02
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * scale).to(dtype) for name, shape in shapes.items()}


def write_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], *, shards: int = 1, config: Mapping[str, Any] | None = None
) -> Path:
    """A checkpoint folder as save_pretrained would write it."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    count = -(-len(names) // shards)
    weight_map = {}
    for number in range(shards):
        part = {name: tensors[name].contiguous() for name in names[number * count : (number + 1) * count]}
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(dict(config or {}), indent=2))
    return folder


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read with the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def write_recipe(folder: Path, merge: str = PAST, **keys: Any) -> Path:
    """A recipe over folders target, rl and sft beside it; JSON is YAML."""
    document: dict[str, Any] = {
        "skillmerge": 1,
        "models": {"target": "target", "rl": "rl", "sft": "sft"},
        "coefficients": {"lam": 0.7},
        "merge": merge,
        "output": {"path": "merged"},
    }
    document |= keys
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}, indent=1))
    return path


def write_family(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 2,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """target, sft and rl in `folder`, and the PaST recipe over them; the recipe's path."""
    shapes = shapes or tensor_shapes()
    base = random_tensors(shapes, torch.float32)
    noise = {name: random_tensors(shapes, torch.float32, seed, 1e-3) for seed, name in enumerate(("target", "sft"), 1)}
    step = random_tensors(shapes, torch.float32, 9, 3e-4)
    for name in ("target", "sft", "rl"):
        added = noise["target" if name == "target" else "sft"]
        tensors = {key: value + added[key] + (step[key] if name == "rl" else 0) for key, value in base.items()}
        write_checkpoint(
            folder / name, {key: value.to(dtype) for key, value in tensors.items()}, shards=shards, config=config
        )
    return write_recipe(folder)


def run_cli(*arguments: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line as its user runs it, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "skillmerge.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "120", **environment},
        timeout=120,
        check=False,
    )


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """The recipe of a small bfloat16 family in two shards."""
    return write_family(tmp_path)


@pytest.fixture
def edit() -> Callable[..., Path]:
    """Rewrite a JSON recipe: edit(path, merge="target") sets keys, None removes them."""

    def change(path: Path, **keys: Any) -> Path:
        document = {**json.loads(path.read_text()), **keys}
        path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}, indent=1))
        return path

    return change
