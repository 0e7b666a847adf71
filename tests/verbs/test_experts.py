"""Coefficients for some experts: in rules, for experts one by one and packed, in models, skills, tasks and methods."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pytest
import torch
from conftest import MODELS, numpy_of, read_checkpoint, run_cli, weights, write_checkpoint, write_recipe
from torch import Tensor

import skillmerge
from skillmerge.errors import RecipeError

COUNT = 5
SIZES = [(COUNT, 12, 8), (COUNT, 190, 130)]
"""Few elements, and matrices that end within blocks of 65,536."""
RULES = {"lam": {"default": 0.7, "rules": [{"experts": "0-1", "value": 0.0}, {"experts": "3", "value": 0.3}]}}
LAMBDAS = (0.0, 0.0, 0.7, 0.3, 0.7)


def family(folder: Path, make: Callable[..., dict[str, Tensor]], size: tuple[int, int, int] = SIZES[0]) -> Path:
    for seed, model in enumerate(MODELS):
        base, moved = layouts.experts(*size), layouts.experts(*size, 50 + seed)
        made = {name: (it.float() + 0.05 * moved[name].float()).bfloat16() for name, it in base.items()}
        write_checkpoint(folder / model, make(made), shards=2, config={"model_type": "odd"})
    return write_recipe(folder, coefficients=RULES)


def expected(folder: Path, size: tuple[int, int, int]) -> dict[str, Any]:
    """Every expert's matrices by numpy, one by one: t - lam * (sft - rl) in float32, rounded once; t itself for 0."""
    target, rl, sft = (numpy_of(folder / model) for model in MODELS)
    found = {}
    for name, it in target.items():
        number = name.partition(".experts.")[2].partition(".")[0]
        lam = np.float32(LAMBDAS[int(number)] if number else 0.7)
        value = it.astype(np.float32) - lam * (sft[name].astype(np.float32) - rl[name].astype(np.float32))
        found[name] = it if lam == 0 else value.astype(it.dtype)
    return found


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layout", ["packed", "transposed", "mixtral"])
def test_each_expert_has_its_lambda_in_every_layout(tmp_path: Path, layout: str, size: tuple[int, int, int]) -> None:
    split = family(tmp_path / "split", layouts.split, size)
    skillmerge.apply(split)
    one_by_one = numpy_of(tmp_path / "split" / "merged")
    for name, wanted in expected(tmp_path / "split", size).items():
        assert np.array_equal(one_by_one[name].view(np.uint16), wanted.view(np.uint16)), name
    other = family(tmp_path / layout, getattr(layouts, layout), size)
    for threads in (1, 3):
        skillmerge.apply(other, overwrite=True, threads=threads)
        merged = read_checkpoint(tmp_path / layout / "merged")
        made = as_parts(read_checkpoint(tmp_path / "split" / "merged"))
        wanted_tensors = getattr(layouts, layout)(made)
        assert merged.keys() == wanted_tensors.keys()
        for name, tensor in merged.items():
            assert torch.equal(tensor.view(torch.int16), wanted_tensors[name].contiguous().view(torch.int16)), name


def as_parts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    at = f"{layouts.AT}.experts"
    stacked = {
        part: torch.stack([tensors[f"{at}.{expert}.{name}.weight"] for expert in range(COUNT)])
        for part, name in layouts.NAMES.items()
    }
    return {**stacked, "router": tensors[f"{layouts.AT}.gate.weight"]}
