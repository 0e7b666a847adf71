"""The laws of methods, bit for bit."""

from __future__ import annotations

import hashlib
import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_memory import bound, compute
from torch import Tensor

from skillmerge.methods.terms import Call, Leaf, Scaled, Sum
from skillmerge.recipes.formula.tree import ExpressionError

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
A, B, C = "a - z", "b - z", "c - z"
DIFFERENCES = [
    f"trim({A}, density=.3, rescale=l2)", f"drop({A}, density=.5)", f"drop({A}, density=.5, spread=.2)",
    f"band({A}, density=.5, rescale=l1)", f"clip({A}, at=.1)", f"clip({A}, at=0)", f"match({A}, to={B})",
    f"project({A}, off={B})", f"elect({A}, {B}, {C})", f"elect({A}, {B}, weights=[-1, -2])",
    f"elect({A}, {B}, weights=[1, -2], normalize=no, zero=majority)", f"elect({A}, {B}, weights=-1, pick=max)",
    f"elect({A}, weights=-1, normalize=no)",
    f"ties({A}, {B}, density=.4, rescale=l1)", f"ties({A}, {B}, density=0)", f"pick({A}, {B}, {C})",
    f"ram({A}, {B}, {C}, boost=.2, scope=matrix)", f"ram({A}, threshold=.1)", f"model_stock({A}, {B})",
    f"model_stock({A}, {B}, negative=keep)", f"model_stock({A}, z - a, {C}, negative=keep)",
    f"slerp({A}, {B}, t=-2, linear_above=1, scope=row)", f"model_stock({A}, {B}, scope=row)", f"sce({A}, {B})",
    f"sce({A}, {B}, {C}, select=.4)", f"slerp({A}, {B}, t=.3)", f"slerp({A}, {B}, t=-2, linear_above=1)",
    f"slerp({A}, {B}, t=.3, scope=row)", f"multislerp({A}, {B}, {C})", f"multislerp({A}, {B}, weights=[3, -2])",
    f"karcher({A}, {B}, {C})", f"median({A}, {B}, {C})", f"median({A}, {B})",
    f"trim(elect({A}, drop({B}, density=.5)), density=.5)",
]  # fmt: skip
MODELS = [
    "slerp(a, b, t=.3)", "slerp(a, b, t=.7, scope=row)", "multislerp(a, b, c)", "karcher(a, b, c)", "median(a, b, c)",
    "median(a, b)", "slerp(slerp(a, b, t=.5), c, t=.25)",
]  # fmt: skip


def numbers(dtype: torch.dtype, seed: int, shape: tuple[int, ...] = (6, 50)) -> Tensor:
    """Numbers of two signs, zeros of two signs among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    zeros = torch.rand(shape, generator=generator) < 0.2
    return torch.where(zeros, torch.copysign(torch.zeros(()), values), values).to(dtype)


def models(dtype: torch.dtype, shape: tuple[int, ...] = (6, 50)) -> dict[str, Tensor]:
    return {name: numbers(dtype, seed, shape) for seed, name in enumerate("abcz")}


def assert_same_bits(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == wanted.dtype
    different = (found.view(BITS[found.dtype]) != wanted.view(BITS[wanted.dtype])).nonzero()
    assert not len(different), (different[:3], found[tuple(different[0])], wanted[tuple(different[0])])


# ------------------------------------------------------------------------------------------------------------- zeros


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", DIFFERENCES)
def test_zeros_give_plus_zero(text: str, dtype: torch.dtype) -> None:
    """As in a matrix that no model changed; and in one that others changed elsewhere."""
    tensors = models(dtype)
    unchanged = dict.fromkeys("abcz", tensors["z"])
    assert_same_bits(compute(text, unchanged, dtype=dtype), torch.zeros_like(tensors["z"]))
    changed = {**tensors, **{name: tensors[name].clone() for name in "abc"}}
    for name in "abc":
        changed[name][:, 10:20] = tensors["z"][:, 10:20]
    assert_same_bits(compute(text, changed, dtype=dtype)[:, 10:20], torch.zeros(6, 10, dtype=dtype))


@pytest.mark.parametrize("text", MODELS)
def test_models_that_are_zero_give_zero(text: str) -> None:
    zero = torch.zeros(6, 50, dtype=torch.bfloat16)
    assert_same_bits(compute(text, dict.fromkeys("abc", zero), dtype=torch.bfloat16), zero)


@pytest.mark.parametrize("form", ["base + lam * @", "base - lam * @", "base + @", "lam * @ + base", "base + @ / 3"])
@pytest.mark.parametrize("lam", [0.7, -0.7])
def test_elements_that_nobody_changed_keep_the_bits_of_the_base(form: str, lam: float) -> None:
    for dtype in DTYPES:
        tensors = {**models(dtype), "base": numbers(dtype, 9)}
        for name in "abc":
            tensors[name][:, :25] = tensors["z"][:, :25]
        for text in DIFFERENCES:
            found = compute(form.replace("@", text), tensors, dtype=dtype, lam=lam)
            assert_same_bits(found[:, :25], tensors["base"][:, :25])


# ------------------------------------------------------------------------------------------ one operand, all of it


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "text",
    [
        *(f"{name}(a - z, density={one})" for name in ("trim", "drop", "band") for one in ("1", "one", ".5 + .5")),
        "trim(a - z, density=1, rescale=l2)", "drop(a - z, density=1, seed=4)", "band(a - z, density=1, gamma=.5)",
        "elect(a - z)", "elect(a - z, weights=.3)", "elect(a - z, pick=max)",
        "elect(a - z, 0 * (b - z), weights=[.3, 2])",
        "slerp(a - z, b - z, t=0)", "slerp(b - z, a - z, t=one)", "karcher(a - z)", "median(a - z)",
    ],
)  # fmt: skip
def test_what_takes_everything_takes_it_as_it_is(text: str, dtype: torch.dtype) -> None:
    tensors = models(dtype)
    assert_same_bits(compute(text, tensors, dtype=dtype, one=1.0), compute("a - z", tensors, dtype=dtype))
    assert isinstance(bound(text, list(tensors), one=1.0), Sum)


@pytest.mark.parametrize("text", ["slerp(a, b, t=0)", "slerp(b, a, t=1)", "median(a)", "karcher(a)"])
def test_end_of_an_arc_is_a_model_that_is_copied(text: str) -> None:
    assert bound(text, ["a", "b"]) == Leaf("a")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ["", ", linear_above=0", ", linear_above=1", ", scope=row"])
def test_slerp_of_equal_models_is_the_model(dtype: torch.dtype, options: str) -> None:
    model = numbers(dtype, 1)
    for t in (0.5, 0.3, -1.0, 7.0):
        found = compute(f"slerp(a, b, t=t{options})", {"a": model, "b": model.clone()}, dtype=dtype, t=t)
        assert_same_bits(found, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("third", [1.0, -1.0])
def test_median_of_zeros_of_two_signs_is_the_same_in_any_order_and_any_cutting(
    dtype: torch.dtype, third: float
) -> None:
    """Instructions for many elements and for the last few of them differ in which zero is the smaller one."""
    values = [torch.full((37,), value, dtype=dtype) for value in (0.0, -0.0, third)]
    wanted = torch.full((37,), math.copysign(0.0, third), dtype=dtype)
    for order in itertools.permutations(values):
        assert_same_bits(compute("median(a, b, c)", dict(zip("abc", order, strict=True)), dtype=dtype), wanted)


@pytest.mark.parametrize("text", ["median(a, b, c)", "median(a, b)"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_median_of_what_is_no_number_is_none(text: str, sign: float) -> None:
    """Whichever sign it has: devices differ in that."""
    tensors = models(torch.float32)
    tensors["a"][2, 5:40] = torch.copysign(torch.tensor(math.nan), torch.tensor(sign))
    assert torch.equal(compute(text, tensors).isnan(), tensors["a"].isnan())


# ------------------------------------------------------------------------------------------------------- zero operands


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("a + zero * trim(b - z, density=.5)", "a"),
        ("a + zero * slerp(b, c, t=.5) - 0 * a", "a"),
        ("a + trim(zero * (b - z), density=.5)", "a"),
        ("a + trim(b - z, density=zero) + drop(b - z, density=0) + band(b - z, density=0)", "a"),
        ("a + elect(zero * (b - z), 0 * (c - z))", "a"),
        ("a + elect(zero * (b - z), c - z, a - z, weights=[7, 1, .5])", "a + elect(c - z, a - z, weights=[1, .5])"),
        ("a + ties(b - z, zero * (c - z), density=.5, weights=[2, 3])", "a + ties(b - z, density=.5, weights=[2])"),
        ("a + ram(b - z, c - z, zero * (a - z))", "a + ram(b - z, c - z)"),
        ("a + pick(zero * (a - z), b - z)", "a + pick(b - z)"),
        ("a + elect(trim(b - z, density=zero), c - z, a - z)", "a + elect(c - z, a - z)"),
    ],
)
def test_zero_factor_removes_the_call_or_the_operand(text: str, same: str) -> None:
    names = list("abcz")
    assert bound(text, names, zero=0.0) == bound(same, names)


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("a + model_stock(zero * (b - z), c - z)", 21, "gives `model_stock` a 1st operand that is zero"),
        ("a + sce(b - z, c - z, 0 * (a - z))", 24, "gives `sce` a 3rd operand that is zero"),
        ("slerp(zero * a, b, t=.5)", 11, "gives `slerp` a 1st operand that is zero"),
        ("multislerp(a, b, zero * c)", 22, "gives `multislerp` a 3rd operand that is zero"),
        ("karcher(a, zero * b)", 16, "gives `karcher` a 2nd operand that is zero"),
        ("median(a, b, zero * c)", 18, "gives `median` a 3rd operand that is zero"),
        ("a + match(b - z, to=zero * (c - z))", 17, "gives `match` a `to` that is zero"),
        ("a + project(b - z, off=0 * (c - z))", 19, "gives `project` a `off` that is zero"),
    ],
)
def test_zero_operand_is_a_mistake_elsewhere(text: str, place: int, message: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        bound(text, list("abcz"), zero=0.0)
    assert (str(caught.value), caught.value.position) == (message, place)


# ---------------------------------------------------------------------------------------------------- any expression

_OPERATIONS = [
    "trim({0}, density=.6)", "trim({0}, density=.3, rescale=l2)", "band({0}, density=.5, gamma=.1)", "clip({0}, at=.5)",
    "match({0}, to={1})", "project({0}, off={1})", "elect({0}, {1})", "elect({0}, {1}, {2}, weights=[1, .3, .7])",
    "ties({0}, {1}, density=.5)", "pick({0}, {1})", "ram({0}, {1}, boost=.3, scope=matrix)", "model_stock({0}, {1})",
    "sce({0}, {1}, select=.6)", "slerp({0}, {1}, t=.3)", "multislerp({0}, {1}, {2})", "karcher({0}, {1})",
    "median({0}, {1}, {2})", "{0} + {1}", "({0} - ({1}))", "-.5 * ({0})", "({0}) / 3",
    "slerp({0}, {1}, t=.3, scope=row)",
]  # fmt: skip


def difference(dice: random.Random, depth: int, random_calls: bool = False) -> str:
    """A difference, with calls in calls."""
    if depth == 0 or dice.random() < 0.2:
        return dice.choice(["a - z", "b - z", "c - z", "(b - c)", "0.7 * (a - b)"])
    form = dice.choice([*_OPERATIONS, *["drop({0}, density=.6)"] * (3 * random_calls)])
    return form.format(*(difference(dice, depth - 1, random_calls) for _ in range(3)))


@settings(max_examples=40, deadline=None, database=None)
@given(st.integers(0, 1 << 32), st.sampled_from(DTYPES))
def test_matrices_of_a_tensor_are_merged_by_themselves(seed: int, dtype: torch.dtype) -> None:
    text = f"a + {difference(random.Random(seed), 3)}"
    tensors = models(dtype, (2, 2, 5, 7))
    whole = compute(text, tensors, dtype=dtype)
    for i in range(2):
        for j in range(2):
            alone = compute(text, {name: tensor[i, j] for name, tensor in tensors.items()}, dtype=dtype)
            assert_same_bits(whole[i, j], alone)


@settings(max_examples=12, deadline=None, database=None)
@given(st.integers(0, 1 << 32), st.sampled_from(DTYPES))
def test_cutting_into_runs_changes_no_bit(seed: int, dtype: torch.dtype) -> None:
    text = f"a + {difference(random.Random(seed), 2, random_calls=True)}"
    tensors = models(dtype, (3, 190, 370))
    tiles = [compute(text, tensors, tile=tile * 65_536) for tile in (1, 2, 5)]
    assert_same_bits(tiles[1], tiles[0])
    assert_same_bits(tiles[2], tiles[0])


@settings(max_examples=40, deadline=None, database=None)
@given(st.integers(0, 1 << 32))
def test_call_in_a_call_is_the_outer_one_of_what_the_inner_one_gives(seed: int) -> None:
    dice = random.Random(seed)
    inner = [difference(dice, 2) for _ in range(3)]
    outer = dice.choice(_OPERATIONS)
    tensors = {name: tensor.double() for name, tensor in models(torch.float32).items()}
    stages = {f"x{index}": compute(text, tensors) for index, text in enumerate(inner)}
    stages["zero"] = torch.zeros_like(tensors["z"])
    found = compute(outer.format(*(f"({text})" for text in inner)), tensors)
    wanted = compute(outer.format(*(f"(x{index} - zero)" for index in range(3))), stages)
    assert torch.equal(found, wanted)


# ------------------------------------------------------------------------------------------------------------- lots


def lot(seed: int, tensor: str, ordinal: int, index: int) -> float:
    """SplitMix64 in Python's integers."""
    text = b"skillmerge drop\x00%d\x00%s\x00%d" % (seed, tensor.encode(), ordinal)
    mask = (1 << 64) - 1
    z = int.from_bytes(hashlib.sha256(text).digest()[:8], "little") + (index + 1) * 0x9E3779B97F4A7C15 & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return ((z ^ z >> 31) >> 11) / 2**53


def kept_of(text: str, name: str, seed: int, shape: tuple[int, ...]) -> list[int]:
    """The indexes of what a drop of ones leaves."""
    tensors = {"a": torch.ones(shape), "z": torch.zeros(shape)}
    return compute(text, tensors, name=name, seed=seed).flatten().nonzero().flatten().tolist()


@pytest.mark.parametrize("seed", [0, 1, 12345678901234567890])
@pytest.mark.parametrize("name", ["w", "model.layers.0.mlp.wéight"])
def test_lots_are_those_of_the_specification(name: str, seed: int) -> None:
    drop = "drop(a - z, density={}, rescale=none{})"
    for shape, density in (((), 0.5), ((40,), 0.3), ((3, 5, 7), 0.8)):
        count = torch.Size(shape).numel()

        def wanted(density: float, seed: int, ordinal: int, count: int = count) -> list[int]:
            return [index for index in range(count) if lot(seed, name, ordinal, index) < density]

        assert kept_of(drop.format(density, ""), name, seed, shape) == wanted(density, seed, 0)
        assert kept_of(drop.format(density, ", seed=77"), name, seed, shape) == wanted(density, 77, 0)
        second = f"0 * {drop.format(0.1, '')} + {drop.format(density, '')}"
        assert kept_of(second, name, seed, shape) == wanted(density, seed, 1), "the second one in the text"
        nested = f"drop({drop.format(0.6, '')}, density=.7, rescale=none)"
        both = [index for index in wanted(0.7, seed, 0) if index in wanted(0.6, seed, 1)]
        assert kept_of(nested, name, seed, shape) == both, "the outer one is written first"


def test_first_lots_are_known() -> None:
    assert [round(lot(0, "w", 0, index), 3) for index in range(6)] == [0.456, 0.798, 0.36, 0.338, 0.201, 0.071]


def test_lots_of_a_tensor_do_not_begin_anew_in_its_matrices() -> None:
    kept = kept_of("drop(a - z, density=.5)", "w", 0, (2, 64))
    assert kept == kept_of("drop(a - z, density=.5)", "w", 0, (2, 8, 8))
    assert {index for index in kept if index < 64} != {index - 64 for index in kept if index >= 64}


def test_calls_keep_their_numbers_where_others_fall_away() -> None:
    (call,) = _parts(bound("0 * drop(a - z, density=.5) + drop(b - z, density=.5)", list("abz")))
    assert call.ordinal == 1


def _parts(term: object) -> list[Call]:
    if isinstance(term, Call):
        return [term]
    if isinstance(term, Sum):
        return _parts(term.left) + _parts(term.right)
    return _parts(term.inner) if isinstance(term, Scaled) else []
