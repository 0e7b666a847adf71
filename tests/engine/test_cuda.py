"""The CUDA path gives the CPU's bytes and statistics, and falls back when the GPU is full. Needs a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import random_tensors, write_checkpoint, write_recipe
from test_equivalence import EXPRESSIONS, SHAPES, digests, write_models
from test_laws import every_kind_of_number

import skillmerge
from skillmerge.methods.evaluate import Scratch
from skillmerge.reporter import Reporter

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def on_both(recipe: Path, **options: object) -> tuple[dict[str, str], dict[str, str]]:
    results = [
        skillmerge.apply(recipe, recipe.parent / device, device=device, stats="full", **options)  # type: ignore[arg-type]
        for device in ("cpu", "cuda")
    ]
    assert results[0].manifest.statistics == results[1].manifest.statistics
    assert results[0].manifest.tensors == results[1].manifest.tensors
    return digests(results[0].output), digests(results[1].output)


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cuda_gives_the_same_bytes(tmp_path: Path, expression: str, dtype: torch.dtype) -> None:
    write_models(tmp_path, dtype=dtype)
    coefficients = {"lam": 0.7} if "lam" in expression else {}
    cpu, cuda = on_both(write_recipe(tmp_path, expression, coefficients=coefficients))
    assert cuda == cpu


@pytest.mark.parametrize("output", [{"rounding": "stochastic"}, {"dtype": "float16"}, {"dtype": "float32"}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cuda_rounds_to_the_same_bytes(tmp_path: Path, output: dict[str, str], dtype: torch.dtype) -> None:
    write_models(tmp_path, dtype=dtype)
    cpu, cuda = on_both(write_recipe(tmp_path, output={"path": "merged", **output}))
    assert cuda == cpu


@pytest.mark.parametrize("lam", [1.0, 0.7, -0.7, 1 / 3])
def test_cuda_gives_the_same_bytes_for_every_kind_of_number(tmp_path: Path, lam: float) -> None:
    for seed, name in enumerate(("target", "rl", "sft")):
        write_checkpoint(tmp_path / name, {"model.layers.0.mlp.weight": every_kind_of_number(torch.bfloat16, seed)})
    cpu, cuda = on_both(write_recipe(tmp_path, "target + (rl - sft) * lam / 3", coefficients={"lam": lam}))
    assert cuda == cpu


def test_full_gpu_falls_back_to_smaller_pieces_then_to_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate(("target", "rl", "sft")):
        write_checkpoint(tmp_path / name, random_tensors(SHAPES, seed=seed))
    recipe = write_recipe(tmp_path)
    wanted = digests(skillmerge.apply(recipe, tmp_path / "cpu", device="cpu").output)

    heard: list[str] = []

    class Warnings(Reporter):
        def warn(self, message: str, fix: str | None = None) -> None:
            heard.append(message)

    plain = Scratch.get

    def full(self: Scratch, purpose: str, index: int, dtype: torch.dtype, count: int) -> torch.Tensor:
        if self.device.type == "cuda":
            raise torch.cuda.OutOfMemoryError("no room")
        return plain(self, purpose, index, dtype, count)

    monkeypatch.setattr(Scratch, "get", full)
    result = skillmerge.apply(recipe, tmp_path / "full", device="cuda", reporter=Warnings())
    assert digests(result.output) == wanted
    assert any("pieces" in message for message in heard)
    assert any("with the CPU" in message for message in heard)
