"""Calls whose operands are zero, fall away or are weighed the other way around."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import run_cli, write_family
from in_memory import bound

from skillmerge.recipes.formula.bind import bind
from skillmerge.recipes.formula.parser import parse
from skillmerge.recipes.formula.tree import ExpressionError


def recipe(merge: str, lam: str = "1") -> str:
    return f"""\
skillmerge: 1
models: {{target: ./target, rl: ./rl, sft: ./sft}}
coefficients: {{lam: {lam}}}
merge: {merge}
output: {{path: out}}
"""


def test_comma_between_operands_is_none_of_a_number() -> None:
    spaced = bound("pick((a - b) * 2, 5 * (a - b))", ["a", "b"])
    assert bound("pick((a - b)*2,5*(a - b))", ["a", "b"]) == spaced


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("calls"), config={"model_type": "odd"}).parent


def test_negative_weights_are_warned_about(folder: Path) -> None:
    (folder / "r.yaml").write_text(recipe("target + elect(rl - sft, target - sft, weights=[1, -1])"))
    process = run_cli("plan", "r.yaml", cwd=folder)
    assert process.returncode == 0
    assert "warning: " in process.stdout
    assert "weights" in process.stdout.partition("warning: ")[2]


@pytest.mark.parametrize("text", ["elect(target)", "trim(rl, density=lam)", "slerp(target, rl - sft, t=0)"])
def test_operands_of_calls_that_fall_away_have_to_fit_too(text: str) -> None:
    with pytest.raises(ExpressionError, match="operand is a "):
        bound(text, ["target", "rl", "sft"], lam=1.0)


def test_stored_skill_is_a_difference_of_a_call_that_falls_away() -> None:
    node = parse("target + trim(math, density=1) + elect(math, 0 * target)", ["target", "math"], [])
    assert bind(node, {}, {"math"}) is not None
    with pytest.raises(ExpressionError, match="`trim` combines differences, and its 1st operand is a model"):
        bind(node, {})


def test_call_of_the_whole_model_has_the_same_operands_in_all_tensors(folder: Path) -> None:
    lam = "{default: 1, rules: [{layers: 0, value: 0}]}"
    (folder / "r.yaml").write_text(recipe("target + ram(lam * (rl - sft), target - sft, boost=.1)", lam))
    process = run_cli("plan", "r.yaml", cwd=folder)
    assert process.returncode == 2
    said = "the expression gives `ram` other operands for some tensors, and with scope=model it takes all as one"
    assert f"r.yaml:4:17: {said}\n" in process.stderr
    for fine in ("ram(lam * (rl - sft), target - sft, boost=.1, scope=matrix)", "ram(rl - sft, target - sft) * lam"):
        (folder / "r.yaml").write_text(recipe(f"target + {fine}", lam))
        assert run_cli("plan", "r.yaml", cwd=folder).returncode == 0


@pytest.mark.parametrize(
    ("merge", "places"),
    [
        ("target + elect(trim(rl - sft, density=.5), target - sft)", "sft rl"),
        ("slerp(target, rl, t=.5)", "SFT RL"),
        ("2 * target - slerp(target, rl, t=.5) + trim(lam * (target - sft), density=.5)", "sft target"),
    ],
)
def test_inspect_names_the_difference_that_a_call_changes(folder: Path, merge: str, places: str) -> None:
    (folder / "r.yaml").write_text(recipe(merge))
    process = run_cli("inspect", "r.yaml", cwd=folder)
    assert process.returncode == 2
    assert process.stderr.endswith(f"help: inspect the difference itself: `skillmerge inspect {places}`\n")


def test_inspect_names_no_stack_which_lies_nowhere(folder: Path) -> None:
    text = recipe("target + trim(high - sft, density=.5)")
    stack = "high: {stack: [{from: rl, layers: 0-2}]}"
    (folder / "r.yaml").write_text(text.replace("sft: ./sft}", f"sft: ./sft, {stack}}}"))
    process = run_cli("inspect", "r.yaml", cwd=folder)
    assert process.returncode == 2
    assert process.stderr.endswith("help: inspect the difference itself: `skillmerge inspect SFT RL`\n")
