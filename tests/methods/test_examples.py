"""Every method on small matrices, worked out by hand."""

from __future__ import annotations

import math
import re

import pytest
import torch
from in_memory import compute, prepared

_V, _W, _Z = ((4, -3, 0), (2, -1, 1)), ((2, 3, -1), (0, -1, -4)), ((0, 0, 0), (0, 0, 0))
MODELS = {
    "a": _V, "b": _W, "c": ((6, -5, 4), (-3, 2, 1)), "z": _Z,
    "e1": ((3, 0, 0), (0, 0, 0)), "e2": ((0, 4, 0), (0, 0, 0)), "e3": ((0, 0, 5), (0, 0, 0)),
    "p": ((2, 0, 0), (0, 0, 0)), "q": ((1, math.sqrt(3), 0), (0, 0, 0)),
}  # fmt: skip
_HALF = math.sqrt(0.5)
_32 = 4 / 31  # -<v, w>/<w, w> of the example
_SIN = math.sin(math.pi / 8)
_COS = math.cos(math.pi / 8)
_BOOSTED = ((3, 0, -1.02), (2.04, -1, -1.5))

EXAMPLES = {
    "trim(v, density=.5)": ((4, -3, 0), (2, 0, 0)),
    "trim(v, density=.3)": ((4, 0, 0), (0, 0, 0)),
    "trim(v, density=.7)": _V,
    "trim(v, density=.1)": ((4, 0, 0), (0, 0, 0)),
    "trim(v, density=.5, rescale=l1)": ((4 * 11 / 9, -3 * 11 / 9, 0), (2 * 11 / 9, 0, 0)),
    "trim(v, density=.3, rescale=l2)": ((math.sqrt(31), 0, 0), (0, 0, 0)),
    "drop(v, density=.5)": ((8, 0, 0), (4, -2, 2)),
    "drop(v, density=.5, rescale=none)": ((4, 0, 0), (2, -1, 1)),
    "drop(v, density=.5, rescale=l1)": ((4 * 11 / 8, 0, 0), (2 * 11 / 8, -11 / 8, 11 / 8)),
    "band(c - z, density=.5, gamma=.2)": ((0, -5, 4), (-3, 0, 0)),
    "band(c - z, density=.5, gamma=0)": ((6, -5, 4), (0, 0, 0)),
    "clip(v, at=1)": ((1, -1, 0), (1, -1, 1)),
    "match(v, to=2 * w)": ((8, -6, 0), (4, -2, 2)),
    "project(v, off=w)": ((4 + 2 * _32, -3 + 3 * _32, -_32), (2, -1 - _32, 1 - 4 * _32)),
    "elect(v, w)": ((3, 3, -1), (2, -1, -4)),
    "elect(v, w, weights=[1, .5])": ((10 / 3, -3, -1), (2, -1, -4)),
    "elect(v, w, normalize=no)": ((6, 3, -1), (2, -2, -4)),
    "elect(v, w, pick=max)": ((4, 3, -1), (2, -1, -4)),
    "elect(v, w, zero=majority)": ((3, -3, -1), (2, -1, -4)),
    "ties(v, w, density=.5)": ((3, 3, 0), (2, 0, -4)),
    "model_stock(p - z, q - z)": ((1, 1 / math.sqrt(3), 0), (0, 0, 0)),
    "sce(v, w)": ((3, 3, -1), (2, -1, -4)),
    "sce(v, w, select=.5)": ((0, 3, 0), (0, 0, -4)),
    "ram(v, w, threshold=.5)": ((3, 0, -1), (2, -1, -1.5)),
    "ram(v, w, threshold=.5, boost=.1, cap=.2, scope=matrix)": _BOOSTED,
    "ram(v, w, threshold=.5, boost=.2, cap=1, scope=matrix)": ((3, 0, -1.2), (2.4, -1, -1.5)),
    "pick(v, w)": ((4, -3, -1), (2, -1, -4)),
    "slerp(e1, e2, t=.5)": ((3 * _HALF, 4 * _HALF, 0), (0, 0, 0)),
    "slerp(e1, e2, t=.25)": ((3 * _COS, 4 * _SIN, 0), (0, 0, 0)),
    "multislerp(e1, e2)": ((3.5 * _HALF, 3.5 * _HALF, 0), (0, 0, 0)),
    "karcher(e1, e2)": ((3.5 * _HALF, 3.5 * _HALF, 0), (0, 0, 0)),
    "karcher(e1, e2, e3)": ((4 / math.sqrt(3), 4 / math.sqrt(3), 4 / math.sqrt(3)), (0, 0, 0)),
    "median(a, b, c)": ((4, -3, 0), (0, -1, 1)),
    "median(a, b)": ((3, 0, -0.5), (1, -1, -1.5)),
}  # fmt: skip


def computed(text: str, dtype: torch.dtype) -> torch.Tensor:
    tensors = {name: torch.tensor(rows, dtype=dtype) for name, rows in MODELS.items()}
    for name, written in (("v", "(a - z)"), ("w", "(b - z)")):
        text = re.sub(rf"\b{name}\b", written, text)
    return compute(text, tensors)


@pytest.mark.parametrize("text", EXAMPLES)
def test_example_is_what_was_worked_out_by_hand(text: str) -> None:
    """In float64, to the last digits; and what every format holds, to the bit."""
    wanted = torch.tensor(EXAMPLES[text], dtype=torch.float64)
    found = computed(text, torch.float64)
    assert torch.allclose(found, wanted, rtol=4e-16, atol=1e-16), (found, wanted)
    whole = wanted == wanted.round()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if "q" not in text.split("(")[1]:
            assert torch.equal(computed(text, dtype).double()[whole].round(decimals=6), wanted[whole])


def test_multislerp_of_unequal_weights_has_the_mean_direction() -> None:
    m = torch.tensor([0.75, 0.25], dtype=torch.float64) / math.sqrt(0.625)
    found = computed("multislerp(e1, e2, weights=[.75, .25])", torch.float64)
    assert torch.allclose(found[0, :2], 3.25 * m, rtol=4e-16)
    assert [round(value, 3) for value in found.flatten().tolist()] == [3.083, 1.028, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "readings"),
    [
        ("clip(a - z, at=1)", 0), ("drop(a - z, density=.5)", 0), ("elect(a - z, b - z)", 0), ("median(a, b, c)", 0),
        ("drop(a - z, density=.5, rescale=l2)", 1), ("slerp(a, b, t=.5)", 1), ("karcher(a, b, c)", 1),
        ("multislerp(a, b, c)", 1), ("model_stock(a - z, b - z)", 1), ("sce(a - z, b - z)", 1),
        ("ram(a - z, b - z, boost=1, scope=matrix)", 1), ("elect(a - z, b - z, zero=majority)", 1),
        ("trim(a - z, density=.5)", 2), ("band(a - z, density=.5)", 2), ("ties(a - z, b - z, density=.5)", 2),
        ("ties(trim(a - z, density=.9), b - z, density=.5)", 4),
        ("trim(a - z, density=.5) + trim(b - z, density=.5)", 2),
    ],
)  # fmt: skip
def test_operands_are_read_as_often_as_a_method_needs(text: str, readings: int) -> None:
    tensors = {name: torch.tensor(rows, dtype=torch.float32) for name, rows in MODELS.items()}
    assert prepared(text, tensors)[1] == readings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_number_beyond_the_dtype_of_accumulation_is_a_number(dtype: torch.dtype) -> None:
    assert torch.equal(computed("clip(v, at=1e300)", dtype).double(), torch.tensor(_V).double())
    assert torch.equal(computed("ram(v, threshold=1e300)", dtype), torch.zeros(2, 3))
    assert torch.equal(computed("v / 1e300", dtype).round(), torch.zeros(2, 3))
