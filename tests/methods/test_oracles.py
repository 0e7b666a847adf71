"""Every method against numpy in float64: formats, shapes, kinds of numbers, one to five operands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import method_oracles as oracles
import numpy as np
import oracle
import pytest
import torch
from in_memory import compute
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
SMALL = [(), (1, 9), (9, 1), (7,), (5, 8), (3, 4, 6)]
LARGE = [(66_001,), (300, 517), (2, 251, 300)]
"""Above a block of 65,536 elements, and none that ends with one; of the last, the second matrix begins inside one."""
WEIGHTS = (1.0, 0.5, 0.25, 2.0, 0.75)
UNEVEN = (0.3, 1.1, 0.7, 0.9, 0.2)


class Case(NamedTuple):
    """keywords: as they are written, `W` for weights. numbers: the same for the oracle. least, most: operands."""

    method: str
    keywords: str = ""
    numbers: Mapping[str, Any] = {}
    least: int = 1
    most: int = 5
    models: bool = False
    other: str = ""
    """The keyword that is one more operand."""


CASES = [
    *(Case("trim", f"density={d}", {"density": d}, 1, 1) for d in (0.01, 0.25, 0.5, 0.99)),
    *(Case("trim", f"density=.4, rescale={r}", {"density": 0.4, "rescale": r}, 1, 1) for r in ("l1", "l2")),
    *(Case("drop", f"density={d}", {"density": d}, 1, 1) for d in (0.25, 0.7)),
    *(Case("drop", f"density=.5, rescale={r}", {"density": 0.5, "rescale": r}, 1, 1) for r in ("none", "l1", "l2")),
    Case("drop", "density=.5, spread=.3", {"density": 0.5, "spread": 0.3}, 1, 1),
    Case("drop", "density=.6, spread=.1, rescale=l1", {"density": 0.6, "spread": 0.1, "rescale": "l1"}, 1, 1),
    Case("band", "density=.5", {"density": 0.5}, 1, 1),
    Case("band", "density=.3, gamma=.2", {"density": 0.3, "gamma": 0.2}, 1, 1),
    Case("band", "density=.9, gamma=.5, rescale=l1", {"density": 0.9, "gamma": 0.5, "rescale": "l1"}, 1, 1),
    Case("clip", "at=.25", {"at": 0.25}, 1, 1),
    Case("match", "", {}, 2, 2, other="to"),
    Case("project", "", {}, 2, 2, other="off"),
    Case("elect"),
    Case("elect", "weights=W", {"weights": WEIGHTS}),
    Case("elect", "weights=U", {"weights": UNEVEN}),
    Case("elect", "normalize=no", {"normalize": "no"}),
    Case("elect", "weights=W, pick=max", {"weights": WEIGHTS, "pick": "max"}),
    Case("elect", "zero=majority", {"zero": "majority"}),
    Case("ties", "density=.3", {"density": 0.3}),
    Case("ties", "density=.6, rescale=l1, weights=W, normalize=no",
         {"density": 0.6, "rescale": "l1", "weights": WEIGHTS, "normalize": "no"}),
    Case("ties", "density=.4, zero=majority, pick=max", {"density": 0.4, "zero": "majority", "pick": "max"}),
    Case("pick"),
    Case("ram"),
    Case("ram", "threshold=.25", {"threshold": 0.25}),
    Case("ram", "threshold=.25, boost=.1, cap=.2, scope=matrix", {"threshold": 0.25, "boost": 0.1, "cap": 0.2}),
    Case("ram", "threshold=.25, boost=.5, cap=2, scope=matrix", {"threshold": 0.25, "boost": 0.5, "cap": 2.0}),
    Case("model_stock", "", {}, 2),
    Case("model_stock", "negative=keep", {"negative": "keep"}, 2),
    Case("model_stock", "scope=row", {"scope": "row"}, 2),
    Case("sce", "", {}, 2),
    Case("sce", "select=.4", {"select": 0.4}, 2),
    Case("sce", "floor=100", {"floor": 100.0}, 2),
    *(Case("slerp", f"t={t}", {"t": t}, 2, 2, models) for t in (0.3, 0.5) for models in (True, False)),
    Case("slerp", "t=1.5, linear_above=1", {"t": 1.5, "linear_above": 1.0}, 2, 2, True),
    Case("slerp", "t=.5, linear_above=0", {"t": 0.5, "linear_above": 0.0}, 2, 2, True),
    Case("slerp", "t=.4, scope=row", {"t": 0.4, "scope": "row"}, 2, 2, True),
    Case("multislerp", "", {}, 2, models=True),
    Case("multislerp", "weights=U", {"weights": UNEVEN}, 2),
    Case("karcher", "", {}, 1, models=True),
    Case("karcher", "steps=2, tolerance=0", {"steps": 2, "tolerance": 0.0}, 2),
    Case("median", "", {}, 1, models=True),
    Case("median"),
]  # fmt: skip


def numbers(kind: str, shape: tuple[int, ...], count: int, dtype: torch.dtype) -> list[Tensor]:
    """Models of a kind; the last is what the others begin with."""
    generator = torch.Generator().manual_seed(hash((shape, count)) % 1000)

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    base = draw()
    if kind == "random":
        models = [base + draw() for _ in range(count)]
    elif kind == "near":  # updates as RL makes them: most are zero, the rest a few units
        models = [base * (1 + 0.01 * draw() * (draw() > 0.8)) for _ in range(count)]
    elif kind == "ties":  # few sizes, all exact
        base = torch.zeros(shape)
        models = [(2 * draw()).round() / 4 for _ in range(count)]
    elif kind == "zero":
        models = [base.clone() if index % 2 == 0 else base + draw() for index in range(count)]
    else:
        assert kind == "antiparallel"
        base, first = torch.zeros(shape), (8 * draw()).round() / 8
        models = [first * (-2.0 if index % 2 else 1.0) for index in range(count)]
    return [model.to(dtype) for model in (*models, base)]


KINDS = ["random", "near", "ties", "zero", "antiparallel"]


def written(case: Case, count: int) -> str:
    operands = [f"m{index}" if case.models else f"m{index} - z" for index in range(count)]
    others = [f"{case.other}={operands.pop()}"] if case.other else []
    lists = {"W": WEIGHTS, "U": UNEVEN}
    keywords = [f"weights={list(lists[word[-1]][:count])}" if word.endswith(("=W", "=U")) else word
                for word in case.keywords.split(", ") if word]  # fmt: skip
    return f"{case.method}({', '.join([*operands, *others, *keywords])})"


def expected(case: Case, models: list[Tensor], name: str) -> np.ndarray:
    *operands, base = [model.double().numpy() for model in models]
    operands = operands if case.models else [operand - base for operand in operands]
    given = {
        word: value[: len(operands)] if isinstance(value, tuple) else value for word, value in case.numbers.items()
    }
    function: Callable[..., np.ndarray] = getattr(oracles, case.method)
    if case.method == "drop":
        draw = oracles.lots(oracles.key(0, name, 0), operands[0].size).reshape(operands[0].shape)
        function = oracles.drop_spread if "spread" in given else oracles.drop
        return oracles.by_matrix(lambda v, draw: function(v, draw=draw, **given), [operands[0], draw])
    if len(operands) == 1 and case.method in ("elect", "median", "karcher"):
        return operands[0]
    return oracles.by_matrix(function, operands, **given)


def has_round_factors(case: Case) -> bool:
    """Whether nothing is lost before the one rounding where a float32 holds the value."""
    inexact = case.method in ("sce", "model_stock", "slerp", "multislerp", "karcher")
    return not inexact and "U" not in case.keywords and "spread" not in case.keywords


def assert_rounds_to(found: Tensor, exact: np.ndarray, models: list[Tensor], what: str, round_factors: bool) -> None:
    """Within one unit, and what the dtype of accumulation loses where large terms cancel."""
    wanted, dtype = oracle.rounded(exact, found.dtype), found.dtype
    difference = np.abs(found.double().numpy() - wanted)
    largest = np.max([model.double().abs().numpy() for model in models], axis=0)
    allowed = oracle.unit(wanted, dtype) + (2.0**-21 if dtype.itemsize == 2 else 2.0**-46) * largest
    if round_factors:
        allowed = np.where(exact.astype(np.float32) == exact, 0, allowed)
    wrong = np.argwhere(~((difference <= allowed) | np.isnan(exact)))
    if len(wrong):
        at = tuple(wrong[0])
        raise AssertionError((what, len(wrong), at, found[at], exact[at]))


def check(case: Case, kind: str, shape: tuple[int, ...], count: int, dtype: torch.dtype, name: str = "w") -> None:
    models = numbers(kind, shape, count, dtype)
    text = written(case, count)
    names = [*(f"m{index}" for index in range(count)), "z"]
    found = compute(text, dict(zip(names, models, strict=True)), name=name, dtype=dtype)
    what = f"{text} of {kind} {shape}"
    assert_rounds_to(found, expected(case, models, name), models, what, has_round_factors(case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.method}({case.keywords})")
def test_method_is_its_formula_rounded_once(case: Case, dtype: str) -> None:
    turn = 0
    for count in range(case.least, case.most + 1):
        for kind in KINDS:
            if case.method == "multislerp" and kind == "antiparallel" and count > 2:
                continue  # may cancel, and is an error then
            turn += 1
            for shape in (SMALL[turn % len(SMALL)], SMALL[(turn + 3) % len(SMALL)]):
                check(case, kind, shape, count, DTYPES[dtype])


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.method}({case.keywords})")
def test_method_of_several_blocks_is_its_formula(case: Case, shape: tuple[int, ...]) -> None:
    turn = CASES.index(case) + LARGE.index(shape)
    dtype = list(DTYPES.values())[turn % 3]
    check(case, KINDS[turn % 3], shape, min(case.most, max(case.least, 2 + turn % 2)), dtype, "model.layers.0.w")


def test_positions_that_do_not_vary_are_left_out_where_variances_are_tiny() -> None:
    """Variances that a float32 cannot hold, and a position where the updates agree."""
    tensors = {
        "a": torch.tensor([[1e-25, 2e-25, 3e-25, 1.0]]), "b": torch.tensor([[-1e-25, 1e-26, 5e-25, 1.0]]),
        "z": torch.zeros(1, 4),
    }  # fmt: skip
    found = compute("sce(a - z, b - z, select=.9)", tensors)
    assert found[0, 3] == 0
    exact = oracles.sce(*(tensors[name].double().numpy() for name in "ab"), select=0.9)
    np.testing.assert_allclose(found.double().numpy(), exact, rtol=1e-12)
