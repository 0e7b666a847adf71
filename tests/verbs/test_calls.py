"""Recipes that call methods, as people meet them: in the words of the recipe, with numbers that can be set."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_cli

import skillmerge
from skillmerge.errors import UsageError
from skillmerge.outputs.hub.card import write_card
from skillmerge.outputs.output import Output
from skillmerge.recipes.recipe import Push

CALL = "target + lam * ties(rl - sft, sft - target, density=keep, weights=[1, by / 2], zero=majority)"
NUMBERS = {"lam": 0.5, "keep": {"default": 0.5, "rules": [{"layers": "0-", "ramp": [0.25, 0.75]}]}, "by": 1.0}


@pytest.fixture
def recipe(family: Path, edit: Callable[..., Path]) -> Path:
    return edit(family, merge=CALL, coefficients=NUMBERS)


def weights_of(output: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(output.glob("*.safetensors"))]


def test_call_is_shown_in_the_words_of_the_recipe(recipe: Path) -> None:
    folder = recipe.parent
    views = {
        "lint": run_cli("lint", recipe.name, cwd=folder).stdout,
        "plan": run_cli("plan", recipe.name, "--report", "plan.html", cwd=folder).stdout,
        "markdown": run_cli("plan", recipe.name, "--markdown", "-", cwd=folder).stdout,
        "apply": run_cli("apply", recipe.name, "--report", "apply.html", cwd=folder).stdout,
    }
    assert "no errors, no warnings" in views["lint"]
    assert views["plan"].splitlines()[0] == f"recipe.yaml: {CALL}"
    assert f"`{CALL}`" in views["markdown"].splitlines()[2]
    for name in ("plan", "apply"):
        assert f"<code>{html.escape(CALL)}</code>" in (folder / f"{name}.html").read_text()
    manifest = json.loads((folder / "merged" / "skillmerge.manifest.json").read_text())
    assert manifest["expression"] == CALL
    card = write_card(Output.open(folder / "merged").manifest, Push("acme/merged"), "mit")
    assert f"A merge of 3 models by `{CALL}`" in card


def test_numbers_of_a_call_are_set_like_any_coefficient(recipe: Path, edit: Callable[..., Path]) -> None:
    folder = recipe.parent
    process = run_cli("plan", recipe, "--set", "keep=0.3", "--set", "by=0.5")
    assert "--set keep=0.3 replaces the whole `keep` schedule" in process.stdout
    numbers = {"lam": 1.0, "keep": 0.3, "by": 0.5}
    found = skillmerge.apply(recipe, folder / "set", coefficients=numbers).output
    written = CALL.replace("lam * ", "").replace("=keep", "=0.3").replace("by / 2", "0.25")
    edit(recipe, merge=written, coefficients=None)
    assert weights_of(found) == weights_of(skillmerge.apply(recipe, folder / "written").output)


def test_schedule_of_a_keyword_holds_layer_by_layer(recipe: Path) -> None:
    plan = skillmerge.plan(recipe)
    names = list(plan.coefficients)
    densities = {name: tensor.coefficients[names.index("keep")] for name, tensor in plan.tensors.items()}
    assert densities["model.layers.0.mlp.up_proj.weight"] == 0.25
    assert densities["model.layers.1.mlp.up_proj.weight"] == 0.5
    assert densities["model.layers.2.mlp.up_proj.weight"] == 0.75
    assert densities["model.embed_tokens.weight"] == 0.5


def test_sweep_tries_the_numbers_of_a_call(recipe: Path) -> None:
    axes = ["keep.rules.0.ramp.1=0.5,1", "by=0.5,1"]
    found = skillmerge.sweep(recipe, axes, "wc -c < {}/config.json; cat {}/*.safetensors | cksum | cut -d' ' -f1")
    assert len(found.trials) == 4
    assert len({trial.scores["score"].value for trial in found.trials}) == 4
    assert skillmerge.plan(found.best_recipe).ok
    assert (
        json.loads("".join(it for it in found.best_recipe.read_text().splitlines(True) if it[0] != "#"))["merge"]
        == CALL
    )


@pytest.mark.parametrize(
    ("merge", "name", "fix"),
    [
        (
            "target + trim(rl - sft, density=0.3)",
            "density",
            "give the number a name: `coefficients: {density: 0.3}`, and write `density=density` in `trim`",
        ),
        (
            "target + ram(rl - sft, sft - target)",
            "boost",
            "give the number a name: `coefficients: {boost: 0}`, and write `boost=boost` in `ram`",
        ),
        (
            "target + elect(rl - sft, sft - target, weights=[1, 2])",
            "weights",
            "give a number a name: `coefficients: {w: 1}`, and write `w` in the list of `weights`",
        ),
        (
            "target + trim(rl - sft, density=0.3)",
            "rescale",
            "name a number of the recipe: `coefficients: {rescale: 0.7}` and `merge: target + rescale * (rl - sft)`",
        ),
    ],
)
def test_number_without_a_name_is_answered_with_where_to_write_one(
    merge: str, name: str, fix: str, family: Path, edit: Callable[..., Path]
) -> None:
    edit(family, merge=merge, coefficients=None)
    with pytest.raises(UsageError, match="no such coefficient") as error:
        skillmerge.plan(family, coefficients={name: 0.5})
    assert error.value.fix == fix
    with pytest.raises(UsageError, match="is not a number of the recipe's coefficients") as error:
        skillmerge.sweep(family, [f"{name}=0.1,0.2"], "true {}")
    assert error.value.fix == fix


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ("target + lam * ties(rl, sft - target, density=keep)", "`ties` combines differences, and its 1st operand is"),
        ("target + lam * keep * match(rl - sft, to=target)", "`match` combines differences, and its `to` is a model"),
    ],
)
def test_lint_finds_a_call_that_does_not_fit_under_a_ramp(
    merge: str, message: str, recipe: Path, edit: Callable[..., Path]
) -> None:
    numbers = {name: NUMBERS[name] for name in ("lam", "keep")}
    (finding,) = skillmerge.lint(edit(recipe, merge=merge, coefficients=numbers)).findings
    assert message in finding.message
    assert (finding.rule.id, finding.place is not None) == ("not-one-model", True)
    assert message in run_cli("plan", recipe).stderr
