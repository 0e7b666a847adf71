"""Candidates of a sweep: axes, grids, and the recipe with other numbers in its text."""

from __future__ import annotations

from pathlib import Path

import pytest

from skillmerge.errors import UsageError
from skillmerge.recipes.parse import load
from skillmerge.verbs.sweep.candidates import grid, parse_axis, path_of, with_values

SCHEDULE = """\
skillmerge: 1
models: {target: ./target, rl: ./rl, sft: ./sft}   # three
coefficients:
  lam:
    default: 1.0          # elsewhere
    rules:
      - {layers: 0-1, value: 0.25}
      - {layers: 2-3, ramp: [0.5, 1.0]}   # a ramp
  mu: 2e-1
merge: target + mu * lam * (rl - sft)
"""


# ------------------------------------------------------------------------------------------------------ candidates


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("lam=0:1:0.25", [0, 0.25, 0.5, 0.75, 1]),
        ("lam=0:2:0.1", [round(0.1 * step, 1) for step in range(21)]),
        ("lam=0.5,1,2,1", [0.5, 1, 2]),
        ("lam=-1", [-1]),
        ("lam=1:1:5", [1]),
        ("lam=0:1:0.4", [0, 0.4, 0.8]),
    ],
)
def test_axes_are_the_numbers_that_a_person_would_write(text: str, values: list[float]) -> None:
    assert list(parse_axis(text).values) == values


@pytest.mark.parametrize(
    "text", ["lam", "=1", "lam=", "lam=a", "lam=1:0", "lam=0:1:0", "lam=0:1:2:3", "lam=nan", "lam=0:9:1e-9"]
)
def test_axes_without_meaning_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="`"):
        parse_axis(text)


def test_grid_is_every_combination() -> None:
    found = list(grid([parse_axis("a=1,2"), parse_axis("b=0:1:0.5")]))
    assert [tuple(values.values()) for values in found] == [(a, b) for a in (1, 2) for b in (0, 0.5, 1)]
    with pytest.raises(UsageError, match="is a range") as caught:
        list(grid([parse_axis("a=0:1")]))
    assert "--search" in str(caught.value.fix)


def test_candidate_is_the_recipe_with_other_numbers(tmp_path: Path) -> None:
    """Comments, order, and everything else stay."""
    (tmp_path / "recipe.yaml").write_text(SCHEDULE)
    recipe = load(tmp_path / "recipe.yaml")
    values = {"lam.rules.1.ramp.0": 0.125, "lam.rules.1.ramp.1": 10.0, "lam.default": -3.5, "mu": 1e-7}
    text = with_values(recipe, values).document.text
    wanted = (
        SCHEDULE.replace("[0.5, 1.0]", "[0.125, 10]").replace("default: 1.0", "default: -3.5").replace("2e-1", "1e-07")
    )
    assert text == wanted
    assert with_values(recipe, values).coefficients["lam"].rules[1].ramp == (0.125, 10.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lam", "is a schedule"), ("nu", "is not a number"), ("lam.rules.0.layers", "is not a number"),
        ("lam.rules.7.value", "is not a number"), ("lam.rules.1.ramp", "is not a number"),
    ],
)  # fmt: skip
def test_names_of_no_number_are_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(SCHEDULE)
    with pytest.raises(UsageError, match=message) as caught:
        path_of(load(tmp_path / "recipe.yaml"), name)
    assert caught.value.fix


def test_numbers_tied_by_an_alias_are_refused(tmp_path: Path) -> None:
    text = SCHEDULE.replace("  mu: 2e-1\n", "  mu: *a\n").replace(
        "  lam:\n    default: 1.0", "  lam: &a\n    default: 1.0"
    )
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UsageError, match="cannot be changed in the text"):
        with_values(load(tmp_path / "recipe.yaml"), {"lam.default": 0.5})


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_every_kind_of_line_end(tmp_path: Path, end: str) -> None:
    (tmp_path / "recipe.yaml").write_bytes(SCHEDULE.replace("\n", end).encode())
    text = with_values(load(tmp_path / "recipe.yaml"), {"mu": 0.5}).document.text
    assert text == SCHEDULE.replace("2e-1", "0.5").replace("\n", end)
