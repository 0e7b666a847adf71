"""Small adapters written file by file, and what several of them are side by side: an oracle in numpy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."
Q, DOWN = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.down_proj"
SIDES = {"q_proj": (12, 8), "down_proj": (8, 20)}
"""Outputs and inputs."""


def modules(layers: int = 2, kinds: tuple[str, ...] = (Q, DOWN)) -> list[str]:
    return [kind.format(layer) for layer in range(layers) for kind in kinds]


def write_adapter(
    folder: Path,
    names: list[str],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    ranks: Mapping[str, int] = {},
    **config: Any,
) -> Path:
    """ranks: of modules that have another than `r`."""
    generator = torch.Generator().manual_seed(seed)
    words = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3, "fan_in_fan_out": False,
             "target_modules": names, "rank_pattern": dict(ranks), "base_model_name_or_path": "acme/base",
             **config}  # fmt: skip
    tensors = {}
    for name in names:
        outputs, inputs = SIDES[name.rpartition(".")[2]]
        rank = ranks.get(name, words["r"])
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * 0.1
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.1
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.to(dtype) for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(words))
    return folder


def write_base(folder: Path, layers: int = 2) -> Path:
    from conftest import random_tensors, write_checkpoint

    shapes = {f"{name}.weight": SIDES[name.rpartition(".")[2]] for name in modules(layers)}
    tensors = random_tensors({"model.embed_tokens.weight": (32, 8), **shapes, "model.norm.weight": (8,)}, torch.float32)
    return write_checkpoint(folder, tensors)


def scale_of(config: Mapping[str, Any], name: str) -> float:
    rank = config["rank_pattern"].get(name, config["r"])
    alpha = config.get("alpha_pattern", {}).get(name, config["lora_alpha"])
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def side_by_side(adapters: Mapping[Path, Callable[[str], float]]) -> dict[str, np.ndarray]:
    """A' and B' of every module, as they are to be written. adapters: and the factor of each for a module."""
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for folder, factor in adapters.items():
        config = json.loads((folder / "adapter_config.json").read_text())
        stored = {
            name: value.to(torch.float64).numpy()
            for name, value in load_file(folder / "adapter_model.safetensors").items()
        }
        for name, a in stored.items():
            if not name.endswith(".lora_A.weight"):
                continue
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            b = stored[name.replace("lora_A", "lora_B")]
            if factor(module) != 0:
                found.setdefault(module, []).append((a, b * (factor(module) * scale_of(config, module))))
    result = {}
    for module, pairs in found.items():
        result[f"{PREFIX}{module}.lora_A.weight"] = np.vstack([a for a, _ in pairs]).astype(np.float32)
        result[f"{PREFIX}{module}.lora_B.weight"] = np.hstack([b for _, b in pairs]).astype(np.float32)
    return result
