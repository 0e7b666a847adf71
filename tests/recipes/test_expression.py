"""Parsing, degrees and binding of expressions."""

from __future__ import annotations

import pytest

from skillmerge.methods.terms import Leaf, Scaled, degree, sole_model, weights
from skillmerge.recipes.formula.bind import bind
from skillmerge.recipes.formula.parser import parse
from skillmerge.recipes.formula.tree import ExpressionError

MODELS = ["a", "b", "c"]


def bound(text: str, **values: float):
    return bind(parse(text, MODELS, list(values) or ["lam"]), values)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a", {"a": 1}),
        ("a + b - c", {"a": 1, "b": 1, "c": -1}),
        ("a - (b - c)", {"a": 1, "b": -1, "c": 1}),
        ("a - b - c", {"a": 1, "b": -1, "c": -1}),
        ("2 * a / 4", {"a": 0.5}),
        ("-a", {"a": -1}),
        ("--a", {"a": 1}),
        ("+a", {"a": 1}),
        ("2 * (a + 3 * (b - c)) / 2", {"a": 1, "b": 3, "c": -3}),
        ("(1 - 0.25) * a + 0.25 * b", {"a": 0.75, "b": 0.25}),
        (".5*a + 5e-1*b", {"a": 0.5, "b": 0.5}),
        ("(2 + 3) * a - 4 * a", {"a": 1}),
    ],
)
def test_expression_has_the_weights_of_school_arithmetic(text: str, wanted: dict[str, float]) -> None:
    assert weights(bound(text)) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a", 1),
        ("a - b", 0),
        ("a + b", 2),
        ("a + 0.7 * (b - c)", 1),
        ("(a + b + c) / 3", 1),
        ("0.1*a + 0.2*b + 0.7*c", 1),
    ],
)
def test_degree_says_what_an_expression_is(text: str, wanted: float) -> None:
    assert degree(bound(text)) == wanted


def test_terms_with_coefficient_zero_fall_away() -> None:
    assert bound("a + lam * (b - c)", lam=0.0) == Leaf("a")
    assert bound("lam * a", lam=0.0) is None
    assert bound("lam * a - b", lam=0.0) == Scaled(Leaf("b"), -1.0, False)
    assert sole_model(bound("b - b + a")) == "a"


def test_greek_names_are_names_and_the_micro_sign_is_mu() -> None:
    node = parse("a + \u00b5 * (b - c)", MODELS, ["\u03bc"])
    assert weights(bind(node, {"\u03bc": 0.5})) == {"a": 1, "b": 0.5, "c": -0.5}


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("a + d", 4, "neither a model nor a coefficient"),
        ("a / b", 2, "divides by a model"),
        ("a * b", 2, "multiplies two models"),
        ("a + 1", 2, "adds a number"),
        ("1 - a", 2, "adds a number"),
        ("a +", 3, "nothing where"),
        ("(a", 0, "never closed"),
        ("a)", 1, "where an operator or the end is expected"),
        ("a b", 2, "lacks an operator"),
        ("2 a", 2, "lacks an operator"),
        ("a ** 2", 2, "has `\\*\\*`"),
        ("a; b", 1, "unexpected character"),
        ("dare_ties(a, b)", 0, "no method of this version"),
        ("a.b", 1, "unexpected character"),
        ("1e999 * a", 0, "not finite"),
        ("lam", 0, "no model in it"),
        ("", 0, "nothing where"),
        ("(" * 60 + "a" + ")" * 60, 50, "nested deeper"),
        ("a" + " - a" * 400, 602, "more than 150 operations"),
    ],
)
def test_mistake_is_told_where_it_stands(text: str, position: int, message: str) -> None:
    with pytest.raises(ExpressionError, match=message) as error:
        parse(text, MODELS, ["lam"])
    assert error.value.position == position


@pytest.mark.parametrize("text", ["a / lam", "a * (1 / lam)", "a / (lam - lam)"])
def test_division_by_zero_is_refused(text: str) -> None:
    with pytest.raises(ExpressionError, match="divides by zero"):
        bind(parse(text, MODELS, ["lam"]), {"lam": 0.0})
