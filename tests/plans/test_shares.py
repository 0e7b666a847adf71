"""How much of a model the formula changes, and rules that take much of it out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import random_tensors, run_cli, tensor_shapes, write_checkpoint, write_recipe

import skillmerge
from skillmerge.tensors import format_count, percent

Edit = Callable[..., Path]

SIZES = {"model.a.weight": 800, "model.b.weight": 90, "model.c.weight": 11, "model.d.weight": 99}
"""A thousand parameters."""


@pytest.fixture
def thousand(tmp_path: Path) -> Path:
    for seed, model in enumerate(("target", "rl", "sft")):
        tensors = random_tensors({name: (size,) for name, size in SIZES.items()}, seed=seed)
        write_checkpoint(tmp_path / model, tensors, config={"model_type": "odd"})
    return write_recipe(tmp_path)


def zero(*names: str) -> dict[str, Any]:
    return {"coefficients": {"lam": {"rules": [{"tensors": f"model.{name}.weight", "value": 0} for name in names]}}}


def copied(*names: str, model: str = "target") -> dict[str, Any]:
    return {"copy": [{"tensors": f"model.{name}.weight", "from": model} for name in names]}


@pytest.mark.parametrize(
    ("keys", "share", "warned"),
    [
        ({}, 1.0, False),
        (zero("b"), 0.91, False),
        (zero("a", "b", "c"), 0.099, False),
        (zero("a", "b", "c", "d"), 0.0, False),
        (copied("b"), 0.91, False),
        (copied("d"), 0.901, False),
        (copied("b", "c"), 0.899, True),
        (copied("b", "c", model="rl"), 0.899, True),
        (copied("a"), 0.2, True),
        ({**copied("a"), **zero("a")}, 0.2, False),
        ({**copied("c", "b"), **zero("a")}, 0.099, True),
        ({"merge": "target", "coefficients": None}, 0.0, False),
        ({"merge": "target + rl - rl", "coefficients": None, "accept": ["donor"]}, 0.0, False),
        ({"merge": "rl", "output": {"path": "merged", "like": "target"}, "coefficients": None}, 1.0, False),
        ({"merge": "target + (rl - sft) / lam", **zero("a"), **copied("a")}, 0.2, True),
    ],
)
def test_share_is_of_what_the_formula_changes(
    thousand: Path, edit: Edit, keys: dict[str, Any], share: float, warned: bool
) -> None:
    plan = skillmerge.plan(edit(thousand, **keys))
    assert plan.merged_share == pytest.approx(share)
    assert [warning.name for warning in plan.warnings if warning.name] == ["merged-share"] * warned


def test_rules_that_take_much_out_are_told_unless_accepted(thousand: Path, edit: Edit) -> None:
    edit(thousand, **copied("b", "c"))
    shown = run_cli("plan", thousand)
    assert "merges 89.9% of 1 K parameters, reads " in shown.stdout
    lines = shown.stdout.splitlines()
    at = lines.index(
        "warning: `copy:` takes 10.1% of the parameters that have a coefficient other than 0 out of the formula, which "
        "changes 89.9% of the output"
    )
    assert lines[at + 1] == (
        "help: if that is intended, add to the recipe `accept: [merged-share]`; a part that is to stay as it is can "
        "have a coefficient of 0 instead"
    )
    assert run_cli("plan", thousand, "--strict").returncode == 2
    assert "`copy:` takes 10.1%" in run_cli("apply", thousand, "-q").stderr
    document = json.loads(run_cli("plan", thousand, "--json").stdout)
    assert document["merged_share"] == pytest.approx(0.899)
    edit(thousand, accept=["merged-share"])
    assert skillmerge.plan(thousand).warnings == ()
    done = run_cli("apply", thousand, "--overwrite")
    assert "merged 89.9% of 1 K parameters" in done.stdout
    assert json.loads(run_cli("apply", thousand, "--json").stdout)["merged_share"] == pytest.approx(0.899)


def test_what_others_have_and_is_ignored_counts(thousand: Path, edit: Edit) -> None:
    folder = thousand.parent
    for model in ("rl", "sft"):
        more = {f"visual.{index}.weight": (60,) for index in range(3)}
        shapes = {**{name: (size,) for name, size in SIZES.items()}, **more}
        write_checkpoint(folder / model, random_tensors(shapes), config={})
    edit(thousand, ignore=["visual.*"])
    (warning,) = skillmerge.plan(thousand).warnings
    assert warning.message == (
        "`ignore:` takes 15.3% of the parameters that have a coefficient other than 0 out of the formula, which "
        "changes 100% of the output"
    )
    edit(thousand, coefficients={"lam": {"rules": [{"tensors": "visual.*", "value": 0}]}})
    with pytest.raises(skillmerge.errors.RecipeError, match="matches no tensor"):
        skillmerge.plan(thousand)
    edit(thousand, coefficients={"lam": 0.7}, **copied("b"))
    (warning,) = skillmerge.plan(thousand).warnings
    assert warning.message.startswith("`copy:` and `ignore:` take 22.9% of the parameters")


def test_what_has_problems_has_no_share(thousand: Path) -> None:
    write_checkpoint(thousand.parent / "rl", random_tensors(tensor_shapes()))
    plan = skillmerge.plan(thousand)
    assert plan.problems
    assert plan.merged_share is None
    assert "merged_share" not in plan.as_dict()
    assert "merges" not in run_cli("plan", thousand).stdout


def test_a_skill_may_be_of_any_part_of_a_model(thousand: Path, edit: Edit) -> None:
    edit(thousand, merge="rl - sft", coefficients=None, ignore=["model.a.*"], output={"kind": "skill", "path": "skill"})
    plan = skillmerge.plan(thousand)
    assert (plan.merged_share, [it for it in plan.warnings if it.name]) == (None, [])


@pytest.mark.parametrize(
    ("count", "told"),
    [(0, "0"), (999, "999"), (1000, "1 K"), (999_600, "1 M"), (1_543_714_304, "1.54 B"), (2e12, "2 T")],
)
def test_parameters_are_counted_for_people(count: float, told: str) -> None:
    assert format_count(count) == told


@pytest.mark.parametrize(
    ("share", "told"), [(0, "0%"), (1e-9, "0.1%"), (0.984, "98.4%"), (0.99999, "99.9%"), (1.0, "100%")]
)
def test_only_all_is_all_and_only_nothing_is_nothing(share: float, told: str) -> None:
    assert percent(share) == told
