"""What `plan` says that a method reads before its arithmetic is what it reads."""

from __future__ import annotations

import pytest
import torch
from in_memory import bound, compute, prepared, readings

from skillmerge.methods.linear import compile_term
from skillmerge.methods.preparation import Preparation, state_of_model
from skillmerge.methods.table import METHODS
from skillmerge.recipes.formula.bind import bind
from skillmerge.recipes.formula.catalog import NAMES, explained
from skillmerge.recipes.formula.parser import parse
from skillmerge.tensors import BLOCK

A, B = "(a - base)", "(b - base)"
CALLS = {
    f"trim({A}, density=.5)": 2,
    f"trim({A}, density=.5, rescale=l1)": 3,
    f"trim({A}, density=.5, scope=model, rescale=l2)": 3,
    f"drop({A}, density=.5)": 0,
    f"drop({A}, density=.5, spread=.1)": 0,
    f"drop({A}, density=.5, rescale=l1)": 1,
    f"drop({A}, density=.5, spread=.1, rescale=l2)": 1,
    f"band({A}, density=.5)": 2,
    f"band({A}, density=.5, rescale=l2)": 3,
    f"clip({A}, at=1)": 0,
    f"match({A}, to={B})": 1,
    f"match({A}, to={B}, scope=model)": 1,
    f"project({A}, off={B})": 1,
    f"elect({A}, {B})": 0,
    f"elect({A}, {B}, zero=majority)": 1,
    f"ties({A}, {B}, density=.5)": 2,
    f"ties({A}, {B}, density=.5, rescale=l1, zero=majority)": 4,
    f"pick({A}, {B})": 0,
    f"ram({A}, {B})": 0,
    f"ram({A}, {B}, boost=.1)": 1,
    f"ram({A}, {B}, boost=.1, scope=matrix)": 1,
    f"model_stock({A}, {B})": 1,
    f"model_stock({A}, {B}, scope=row)": 0,
    f"sce({A}, {B})": 1,
    f"sce({A}, {B}, select=.5)": 4,
    "slerp(a, b, t=.5)": 1,
    "slerp(a, b, t=.5, scope=row)": 0,
    "multislerp(a, b)": 1,
    "karcher(a, b)": 1,
    "median(a, b)": 0,
    f"trim(elect({A}, {B}), density=.5)": 2,
    f"trim({A}, density=.5) + trim({B}, density=.5)": 2,
    f"trim(trim({A}, density=.5), density=.5)": 4,
    f"match(trim({A}, density=.5), to={B})": 3,
}


@pytest.fixture(scope="module")
def models() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(5, 7, generator=generator) for name in ("base", "a", "b")}


@pytest.mark.parametrize("call", CALLS)
def test_readings_are_those_of_the_plan(call: str, models: dict[str, torch.Tensor]) -> None:
    term = bind(parse(call, list(models), []), {})
    assert term is not None
    assert compile_term(term).readings == CALLS[call]
    assert prepared(call, models)[1] == CALLS[call]


@pytest.mark.parametrize("name", METHODS)
def test_readings_of_every_example_are_those_of_the_plan(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = {model: torch.randn(5, 7, generator=generator) for model in NAMES.split()}
    example = explained(METHODS[name]).parts["Example"]
    term = bound(example, list(tensors), lam=0.5)
    assert term is not None
    assert compile_term(term).readings == prepared(example, tensors, lam=0.5)[1]


def test_stacked_experts_ask_a_few_at_a_time() -> None:
    """What is counted for ranks takes half a megabyte for each matrix."""
    generator = torch.Generator().manual_seed(3)
    experts = {model: torch.randn(70, 3, 5, generator=generator) for model in ("base", "a", "b")}
    text = f"base + ties({A}, {B}, density=.5)"
    program = compile_term(bound(text, list(experts)))
    preparation = Preparation(program, experts["a"].shape, "w", 0)
    assert {stretch.unit for stretch in preparation.stretches(BLOCK)} == set(range(16))
    whole = compute(text, experts)
    for index in range(70):
        assert torch.equal(whole[index], compute(text, {model: it[index] for model, it in experts.items()}))


def test_some_experts_are_asked_a_few_at_a_time_and_no_others() -> None:
    """Units begin where their slice of the tensor does, and end with it."""
    generator = torch.Generator().manual_seed(3)
    experts = {model: torch.randn(70, 3, 5, generator=generator) for model in ("base", "a", "b")}
    program = compile_term(bound(f"base + ties({A}, {B}, density=.5)", list(experts)))
    preparation = Preparation(program, experts["a"].shape, "w", 0, span=(20 * 15, 60 * 15))
    asked = [{stretch.unit for stretch in reading} for reading in readings(preparation, experts)]
    assert asked[0] == set(range(20, 36))
    assert max(map(len, asked)) == 16
    assert set().union(*asked) == set(range(20, 60))
    assert all(len(numbers) == 40 for numbers in preparation.found().values())


def test_whole_model_is_asked_for_each_vector_of_experts_once() -> None:
    """Packed vectors are the rows of one matrix, and each slice of experts has some of them."""
    tensors = {model: torch.zeros(6, 5) for model in ("base", "a")}
    program = compile_term(bound(f"base + trim({A}, density=.5, scope=model)", list(tensors)))
    (call,) = program.calls
    of_model = {call.position: state_of_model(call, 30)}
    slices = [Preparation(program, (6, 5), "w", 0, of_model, span) for span in ((0, 10), (10, 30))]
    asked = [(it.first, it.last) for each in slices for it in each.stretches(BLOCK)]
    assert asked == [(0, 10), (10, 30)]


def test_matrices_ask_after_the_whole_model() -> None:
    """All of its units ask at the same time, which would be too many counts for what each asks by itself."""
    generator = torch.Generator().manual_seed(3)
    tensors = {model: torch.randn(5, 7, generator=generator) for model in ("base", "a", "b")}
    text = f"trim({A}, density=.5, scope=model) + trim({B}, density=.5)"
    assert prepared(text, tensors)[1] == compile_term(bound(text, list(tensors))).readings == 2 + 2
