"""Finite checks and sums in a fixed order, against independent computations."""

from __future__ import annotations

import math
import random

import pytest
import torch

from skillmerge.bits import any_nonfinite, canonical_nan, first_nonfinite, fold_sum

CPU = torch.device("cpu")
FLOATS = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("index", [0, 1234, 65_535])
def test_nonfinite_is_found_wherever_it_is(dtype: torch.dtype, value: float, index: int) -> None:
    values = torch.full((65_536,), torch.finfo(dtype).max, dtype=dtype)
    values[::2] *= -1
    assert not any_nonfinite(values)
    assert first_nonfinite(values) is None
    values[index] = value
    assert any_nonfinite(values)
    assert first_nonfinite(values) == index


def test_every_nan_gets_the_same_bits() -> None:
    values = torch.tensor([0x7FC1, 0x7F81, -1, 0x3F80], dtype=torch.int16).view(torch.bfloat16)
    canonical_nan(values)
    bits = values.view(torch.int16).tolist()
    assert bits[0] == bits[1] == bits[2]
    assert bits[3] == 0x3F80


@pytest.mark.parametrize("count", [1, 2, 3, 1000, 65_535, 65_536])
def test_fold_sum_is_a_sum(count: int) -> None:
    generator = random.Random(count)
    values = [generator.uniform(-1, 1) for _ in range(count)]
    assert fold_sum(torch.tensor(values, dtype=torch.float64)) == pytest.approx(math.fsum(values), abs=1e-11)
