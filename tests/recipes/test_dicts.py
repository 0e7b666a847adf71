"""Recipes that are dicts, or come from standard input: the same plans and the same bytes as from a file."""

from __future__ import annotations

import io
import json
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import skillmerge
from skillmerge.errors import RecipeError, UsageError
from skillmerge.recipes import yamltext
from tests.conftest import run_cli

RECIPE: dict[str, Any] = {
    "skillmerge": 1,
    "models": {"target": "./target", "rl": Path("rl"), "sft": "./sft"},
    "coefficients": {"lam": {"default": 1e-05, "rules": [{"layers": "0-", "ramp": (0.25, 1.0)}]}},
    "merge": "target + lam * (rl - sft)",
}


@pytest.fixture
def here(family: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(family.parent)
    return family.parent


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_dict_gives_the_bytes_of_its_file(here: Path) -> None:
    (here / "same.yaml").write_text(yamltext.dump(json.loads(json.dumps(RECIPE, default=str))))
    skillmerge.apply("same.yaml", "of-file")
    made = skillmerge.apply(RECIPE, "of-dict")
    assert weights(here / "of-dict") == weights(here / "of-file") != {}
    assert made.manifest.recipe.text == (here / "same.yaml").read_text()


def test_output_of_a_dict_is_verified_rebuilt_and_up_to_date(here: Path) -> None:
    skillmerge.apply(RECIPE, "merged")
    verdict, rebuilt = skillmerge.verify("merged"), skillmerge.rebuild("merged", check=True)
    assert verdict.tensors == rebuilt.tensors == rebuilt.of > 0
    assert skillmerge.apply(RECIPE, "merged").already


def test_dict_is_planned_saved_inspected_linted_and_swept(here: Path) -> None:
    plan = skillmerge.plan(RECIPE, save="plan.json")
    assert plan.digest == skillmerge.plan(RECIPE).digest
    assert skillmerge.apply("plan.json", "merged").plan is not None
    assert skillmerge.inspect(RECIPE).total["elements"] > 0
    assert skillmerge.lint(RECIPE).files == ("recipe",)
    (here / "score.py").write_text("print(0.5)")
    found = skillmerge.sweep(RECIPE, ["lam.default=0,1"], "python3 score.py {}")
    assert (found.output.name, found.best_recipe.name) == ("recipe.sweep", "recipe.best.yaml")


def test_mistake_in_a_dict_is_named_without_a_line(here: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        skillmerge.plan({**RECIPE, "mrge": "a"})
    assert (caught.value.message, caught.value.fix) == ("unknown key `mrge`", "did you mean `merge`?")


def test_value_that_yaml_cannot_hold_is_named_by_its_place(here: Path) -> None:
    with pytest.raises(UsageError, match=r"recipe\.models\.rl: object cannot be in a recipe"):
        skillmerge.plan({**RECIPE, "models": {"rl": object()}})


_WORDS = [
    "no", "1e-3", "0o7", "~", "null", "- a", "a: b", "#x", ".5", "1_000", "λ", "*", "&a", "<<", "=", "", " x ", 
    "é\u2028",
]  # fmt: skip
_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**12), 10**12), st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(_WORDS), st.text("aé:#-'\"\\ ", max_size=6),
)  # fmt: skip
_TABLES = st.dictionaries(st.sampled_from(["a", "no", "1", "*"]), _VALUES, max_size=3)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is slow
@given(st.fixed_dictionaries({"plain": _VALUES, "list": st.lists(_VALUES | _TABLES, max_size=4), "table": _TABLES}))
def test_dumped_dict_reads_as_it_was(data: dict[str, Any]) -> None:
    assert yamltext.read(yamltext.dump(data), "recipe").data == data


def test_recipe_and_saved_plan_come_from_standard_input(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (here / "recipe.yaml").read_text()
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    saved = run_cli("plan", "-", "--save", "-")
    assert saved.returncode == 0, saved.stderr
    assert json.loads(saved.stdout)["digest"] == skillmerge.plan("recipe.yaml").digest
    monkeypatch.setattr("sys.stdin", io.StringIO(saved.stdout))
    made = run_cli("apply", "-", "-o", "piped", "-q")
    assert (made.returncode, made.stdout) == (0, ""), made.stderr
    skillmerge.apply("recipe.yaml", "plain")
    assert weights(here / "piped") == weights(here / "plain") != {}
    for command in ("lint", "inspect"):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert run_cli(command, "-").returncode == 0


def test_gates_come_from_standard_input(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skillmerge.apply("recipe.yaml", "merged")
    monkeypatch.setattr("sys.stdin", io.StringIO("gates: {norm_ratio: {max: 0}}"))
    assert run_cli("gate", "merged", "--gates", "-", "-q").returncode == 3


def test_two_files_on_standard_output_are_refused(here: Path) -> None:
    process = run_cli("plan", "recipe.yaml", "--save", "-", "--markdown", "-")
    assert process.stderr == (
        "error: --save and --markdown both write to standard output\nhelp: name a file for --markdown\n"
    )
    process = run_cli("lint", "recipe.yaml", "--sarif", "-")
    assert json.loads(process.stdout)["version"] == "2.1.0"
    assert run_cli("plan", "recipe.yaml", "--report", "-").stdout.startswith("<!doctype html>")
    assert run_cli("plan", "recipe.yaml", "--markdown", "-").stdout.startswith("<!-- skillmerge plan -->")


class Level(IntEnum):
    ONE = 1


class Place(str, Enum):
    HERE = "./target"


@pytest.mark.parametrize("lam", [np.float64(1), np.float32(1), np.int64(1), Level.ONE])
def test_numbers_and_texts_of_other_types_are_those_of_python(here: Path, lam: Any) -> None:
    """YAML has no word for them."""
    plain = skillmerge.plan({**RECIPE, "coefficients": {"lam": 1}})
    models = {**RECIPE["models"], "target": Place.HERE}
    other = skillmerge.plan({**RECIPE, "models": models, "coefficients": {"lam": lam}})
    assert other.weights_digest == plain.weights_digest


def test_dict_that_contains_itself_is_refused(here: Path) -> None:
    endless: dict[str, Any] = {**RECIPE}
    endless["coefficients"] = endless
    with pytest.raises(UsageError, match="nested too deeply"):
        skillmerge.plan(endless)
