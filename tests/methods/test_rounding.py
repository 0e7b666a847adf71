"""Rounding, and the random numbers behind it, against independent computations."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch

from skillmerge.methods.rounding import round_nearest, round_stochastic, rounding_key

CPU = torch.device("cpu")
FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def awkward(dtype: torch.dtype) -> torch.Tensor:
    """float64 values on, next to and between the values and ties of `dtype`, subnormals included."""
    bits = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}[dtype]
    top = torch.finfo(dtype).max
    grid = torch.arange(0, 3000, dtype=bits).view(dtype).to(torch.float64)
    grid = torch.cat([grid, torch.rand(3000, dtype=torch.float64).to(dtype).to(torch.float64) * top / 4])
    step = torch.from_numpy(oracle.unit(grid.numpy(), dtype))
    parts = [grid + step * share for share in (0.0, 0.25, 0.5, 0.75)]
    ties = grid + step * 0.5
    parts += [torch.nextafter(ties, ties * 2), torch.nextafter(ties, torch.zeros(()).double())]
    values = torch.cat(parts)
    return torch.cat([values, -values])


@pytest.mark.parametrize("dtype", FLOATS)
def test_float64_is_rounded_once_ties_to_even(dtype: torch.dtype) -> None:
    values = awkward(dtype)
    found = round_nearest(values, torch.empty(values.shape, dtype=dtype))
    assert np.array_equal(found.to(torch.float64).numpy(), oracle.rounded(values.numpy(), dtype))


@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_float32_is_rounded_once_ties_to_even(dtype: torch.dtype) -> None:
    values = awkward(dtype).to(torch.float32)
    found = round_nearest(values, torch.empty(values.shape, dtype=dtype))
    assert np.array_equal(found.double().numpy(), oracle.rounded(values.double().numpy(), dtype))


def test_rounding_overflows_to_infinity_and_keeps_nan() -> None:
    values = torch.tensor([1e300, -1e300, math.nan, math.inf, 65520.0, 65519.99], dtype=torch.float64)
    found = round_nearest(values, torch.empty(6, dtype=torch.float16)).tolist()
    assert found[:2] == [math.inf, -math.inf]
    assert math.isnan(found[2])
    assert found[3:] == [math.inf, math.inf, 65504.0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_stochastic_rounding_takes_a_neighbour_and_is_right_in_the_mean(dtype: torch.dtype, wide: torch.dtype) -> None:
    if dtype == wide:
        pytest.skip("nothing to round")
    count = 200_000
    low = torch.tensor(1.0, dtype=dtype).double()
    step = oracle.unit(np.ones(1), dtype)[0]
    for share in (0.0, 0.1, 0.5, 0.9):
        values = (torch.full((count,), 1.0, dtype=torch.float64) + share * step).to(wide)
        exact = float((values[0].double() - low) / step)
        found = round_stochastic(values, torch.empty(count, dtype=dtype), key=123, first=0).double()
        assert set(((found - low) / step).tolist()) <= {0.0, 1.0}
        mean = float(((found - low) / step).mean())
        assert abs(mean - exact) <= 5 * math.sqrt(max(exact * (1 - exact), 1e-12) / count)


def test_stochastic_rounding_depends_on_the_element_not_on_the_cut() -> None:
    values = torch.randn(10_000)
    whole = round_stochastic(values, torch.empty(10_000, dtype=torch.bfloat16), key=9, first=0)
    for cut in (1, 777, 9_999):
        parts = [
            round_stochastic(piece, torch.empty(len(piece), dtype=torch.bfloat16), key=9, first=start)
            for start, piece in ((0, values[:cut]), (cut, values[cut:]))
        ]
        assert torch.equal(torch.cat(parts), whole)
    other = round_stochastic(values, torch.empty(10_000, dtype=torch.bfloat16), key=10, first=0)
    assert not torch.equal(other, whole)


def test_random_numbers_are_splitmix64() -> None:
    """Against the published algorithm on Python's integers."""
    from skillmerge.methods.rounding import uniform

    def reference(key: int, index: int) -> float:
        mask = (1 << 64) - 1
        z = (key + (index + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return ((z ^ (z >> 31)) >> 11) * 2.0**-53

    key = rounding_key(3, "model.norm.weight")
    assert 0 <= key < 1 << 64
    assert uniform(key, 1 << 40, 50, CPU).tolist() == [reference(key, (1 << 40) + i) for i in range(50)]


def test_rounding_key_depends_on_seed_and_name() -> None:
    keys = {rounding_key(seed, name) for seed in (0, 1) for name in ("a", "b")}
    assert len(keys) == 4
