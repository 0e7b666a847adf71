"""The layouts of one mixture of experts, made from whole tensors without skillmerge: what every reader is held to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Experts = Mapping[str, Tensor]
"""gate and up [E, I, H], down [E, H, I]; their biases [E, I], [E, I], [E, H]."""

AT = "model.layers.0.mlp"
NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}


def experts(count: int, inner: int, hidden: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Experts:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (count, inner, hidden), "up": (count, inner, hidden), "down": (count, hidden, inner)}
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    biases = {f"{name}_bias": torch.randn(it.shape[:2], generator=generator).to(dtype) for name, it in made.items()}
    return {**made, **biases, "router": torch.randn((count, hidden), generator=generator).to(dtype)}


def split(it: Experts, at: str = AT) -> dict[str, Tensor]:
    found = {f"{at}.gate.weight": it["router"]}
    for expert in range(len(it["gate"])):
        found |= {f"{at}.experts.{expert}.{name}.weight": it[part][expert] for part, name in NAMES.items()}
    return found


def split_with_bias(it: Experts, at: str = AT) -> dict[str, Tensor]:
    found = split(it, at)
    for expert in range(len(it["gate"])):
        found |= {f"{at}.experts.{expert}.{name}.bias": it[f"{part}_bias"][expert] for part, name in NAMES.items()}
    return found


def mixtral(it: Experts, at: str = "model.layers.0.block_sparse_moe") -> dict[str, Tensor]:
    found = {f"{at}.gate.weight": it["router"]}
    for expert in range(len(it["gate"])):
        found |= {f"{at}.experts.{expert}.{name}.weight": it[part][expert] for part, name in MIXTRAL.items()}
    return found


def packed(it: Experts, at: str = AT) -> dict[str, Tensor]:
    return {
        f"{at}.gate.weight": it["router"],
        f"{at}.experts.gate_up_proj": torch.cat([it["gate"], it["up"]], 1),
        f"{at}.experts.down_proj": it["down"],
    }


def transposed(it: Experts, at: str = AT) -> dict[str, Tensor]:
    found = packed(it, at)
    return {name: tensor.transpose(1, 2) if tensor.dim() == 3 else tensor for name, tensor in found.items()}


def gpt_oss(it: Experts, at: str = AT) -> dict[str, Tensor]:
    both = torch.stack([it["gate"], it["up"]], 2).flatten(1, 2)
    biases = torch.stack([it["gate_bias"], it["up_bias"]], 2).flatten(1)
    return {
        f"{at}.router.weight": it["router"],
        f"{at}.experts.gate_up_proj": both.transpose(1, 2),
        f"{at}.experts.gate_up_proj_bias": biases,
        f"{at}.experts.down_proj": it["down"].transpose(1, 2),
        f"{at}.experts.down_proj_bias": it["down_bias"],
    }


def by_kind(it: Experts, at: str = AT) -> dict[str, Tensor]:
    """Each projection packed by itself, as trainers have them."""
    return {f"{at}.gate.weight": it["router"]} | {f"{at}.experts.{name}": it[part] for part, name in MIXTRAL.items()}


def by_expert(it: Experts, at: str = AT) -> dict[str, Tensor]:
    """Each expert by itself, with gate and up as one matrix."""
    apart = {
        name: tensor
        for name, tensor in split(it, at).items()
        if not name.endswith(("up_proj.weight", "gate_proj.weight"))
    }
    both = torch.cat([it["gate"], it["up"]], 1)
    return apart | {f"{at}.experts.{expert}.gate_up_proj.weight": matrix for expert, matrix in enumerate(both)}


LAYOUTS = {
    "split": split, "mixtral": mixtral, "packed": packed, "transposed": transposed, "by_kind": by_kind,
    "by_expert": by_expert,
}  # fmt: skip
WITH_BIAS = {"split": split_with_bias, "gpt_oss": gpt_oss}


def dense(it: Experts, fused: bool, at: str = "model.layers.0") -> dict[str, Tensor]:
    """One layer of Phi-3, or of a model that has its projections apart: rows of `down` stand for queries."""
    query, key, value = it["down"][0], it["down"][1][:2], it["down"][2][:2]
    if fused:
        return {
            f"{at}.self_attn.qkv_proj.weight": torch.cat([query, key, value]),
            f"{at}.mlp.gate_up_proj.weight": torch.cat([it["gate"][0], it["up"][0]]),
        }
    found = {
        f"{at}.self_attn.{name}_proj.weight": tensor for name, tensor in zip("qkv", (query, key, value), strict=True)
    }
    return {**found, f"{at}.mlp.gate_proj.weight": it["gate"][0], f"{at}.mlp.up_proj.weight": it["up"][0]}
