"""Programs made of expressions: asked lambda, equal bits, few registers."""

from __future__ import annotations

import pytest

from skillmerge.methods.linear import compile_term
from skillmerge.methods.terms import Leaf, Sum
from skillmerge.recipes.formula.bind import bind
from skillmerge.recipes.formula.parser import parse

MODELS = ["a", "b", "c"]


def bound(text: str, **values: float):
    return bind(parse(text, MODELS, list(values) or ["lam"]), values)


def test_added_difference_is_turned_round_and_subtracted() -> None:
    """t + lam * (rl - sft) as t - lam * (sft - rl): where rl = sft the zero keeps t's sign."""
    program = compile_term(bound("a + lam * (b - c)", lam=0.5))
    steps = [(step.op, step.model or step.factor) for step in program.steps]
    assert steps == [
        ("load", "c"),
        ("load", "b"),
        ("subtract", 1.0),
        ("multiply", 0.5),
        ("load", "a"),
        ("subtract", 1.0),
    ]
    assert (program.registers, program.base, program.asked) == (2, "a", 0.5)
    assert program.same_bits == ()


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("a + 0.5 * (b - c)", 0.5),
        ("a - 0.5 * (b - c)", -0.5),
        ("a + (b - c) / 4", 0.25),
        ("a + (b - c)", 1.0),
        ("(a + b) / 2", 1.0),
    ],
)
def test_program_knows_the_lambda_that_was_asked(text: str, asked: float) -> None:
    assert compile_term(bound(text)).asked == asked


def test_lambda_one_needs_the_rule_for_equal_bits() -> None:
    assert compile_term(bound("a + b - c")).same_bits == (("a", "c", "b"), ("b", "c", "a"))
    assert compile_term(bound("a + (b - c)")).same_bits == (("a", "c", "b"),)


def test_registers_stay_few_however_the_sum_is_written() -> None:
    text = " + ".join(f"0.1 * (a - (b - (c - {number} * b)))" for number in range(1, 20))
    term = Sum(Leaf("a"), bound(text), False)
    assert compile_term(term).registers <= 5
