"""A small model, an adapter for it with whatever should be refused, and what is said of it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import run_cli, write_checkpoint
from safetensors.torch import save_file

from skillmerge.checkpoints.kinds.lora import adapter as lora
from skillmerge.verbs import apply  # noqa: F401 - so that no test waits for torch

Q = "model.layers.0.self_attn.q_proj"
PREFIX = "base_model.model."
SHAPES = {"model.embed_tokens.weight": (12, 8), f"{Q}.weight": (6, 8), f"{Q}.bias": (6,),
          "model.layers.0.mlp.down_proj.weight": (8, 10), "lm_head.weight": (12, 8)}  # fmt: skip
PAIR = {f"{Q}.lora_A.weight": (2, 8), f"{Q}.lora_B.weight": (6, 2)}


def write_both(
    folder: Path,
    tensors: Mapping[str, tuple[int, ...] | None] = {},
    *,
    base: Mapping[str, Any] = {},
    onto: bool = True,
    rename: Sequence[Mapping[str, str]] = (),
    **config: Any,
) -> Path:
    """A model, an adapter for one of its modules with other tensors beside or in place of its own, and a recipe."""
    shapes = {**PAIR, **tensors}
    made = {f"{PREFIX}{name}" if not name.startswith("!") else name[1:]: torch.randn(shape) * 0.1
            for name, shape in shapes.items() if shape is not None}  # fmt: skip
    (folder / "adapter").mkdir(parents=True)
    document = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(document))
    save_file(made, folder / "adapter" / lora.WEIGHTS)
    whole = {name: shape for name, shape in {**SHAPES, **base}.items() if isinstance(shape, tuple)}
    settings = {"tie_word_embeddings": True} if base.get("tied") else base.get("config", {})
    write_checkpoint(folder / "base", {name: torch.randn(shape) for name, shape in whole.items()}, config=settings)
    entry = {
        "adapter": "adapter",
        **({"onto": "base"} if onto else {}),
        **({"rename": list(rename)} if rename else {}),
    }
    recipe = {"skillmerge": 1, "models": {"base": "base", "v": entry},
              "merge": "v" if onto else "base + v", "output": {"path": "out"}}  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder


def refused(folder: Path, *command: str) -> str:
    """What is said, without places that are not the same each time."""
    started = time.process_time()
    process = run_cli(*(command or ("apply", "recipe.yaml")), cwd=folder)
    assert process.returncode == 4, process.stderr
    assert time.process_time() - started < 2
    assert not (folder / "out").exists()
    lines = [line for line in process.stderr.replace(f"{folder}/", "").splitlines() if " | " not in line]
    return re.sub(r"^error: recipe.yaml:1:\d+: model `v`: ", "", "\n".join(lines))
