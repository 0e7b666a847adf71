"""The GitHub Action: the published schema, no text from outside in a script, and its steps run as a runner does."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from action_runner import Run, load_yaml, read_outputs, run_action
from command_server import Commands
from schemas import fits, fits_sarif

import skillmerge

ROOT = Path(__file__).parent.parent
ACTION = ROOT / "action.yml"


@pytest.fixture
def act(tmp_path: Path, commands: Commands) -> Callable[..., Run]:
    """Run the action beside the family, with `skillmerge` on the path as an installation has it."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (programs / "python").chmod(0o755)
    runs = 0

    def run(**inputs: str) -> Run:
        nonlocal runs
        runs += 1
        environment = {"PATH": f"{programs}:{commands.folder}:/usr/bin:/bin", "NO_COLOR": "1"}
        return run_action(ACTION, tmp_path, tmp_path / f"runner {runs}", environment, **inputs)

    return run


def test_action_fits_the_published_schema() -> None:
    fits(load_yaml(ACTION.read_text()), "vendor.github-actions")


def test_no_expression_stands_in_a_script() -> None:
    """What is interpolated into a script is run; variables are only data."""
    scripts = [step["run"] for step in load_yaml(ACTION.read_text())["runs"]["steps"] if "run" in step]
    assert len(scripts) == 4
    assert not any("${{" in script or "eval " in script for script in scripts)


def test_every_variable_in_a_script_is_quoted() -> None:
    """But for an assignment, in which nothing is split."""
    for step in load_yaml(ACTION.read_text())["runs"]["steps"]:
        bare = re.sub(r'"[^"]*"', "", step.get("run", ""))
        assert not [name for name in step.get("env", {}) if re.search(rf"(?<!what=)\$\{{?{name}\b", bare)]


def test_plan_writes_plan_summary_comment_and_findings(family: Path, act: Callable[..., Run]) -> None:
    run = act(recipe="recipe.yaml", report="report.html")
    assert not run.failed, run.log
    assert run.outputs["status"] == "0"
    assert run.outputs["digest"] == skillmerge.plan(family).digest
    assert json.loads((family.parent / run.outputs["plan"]).read_text())["digest"] == run.outputs["digest"]
    assert "**Can be applied**: 12 tensors" in run.summary
    assert Path(run.outputs["comment"]).read_text() == run.summary
    fits_sarif(json.loads(Path(run.outputs["sarif"]).read_text()))
    assert (family.parent / "report.html").read_text().startswith("<!doctype html>")
    assert run.outcome("Apply") == "skipped"
    assert not (family.parent / "merged").exists()
    kept = run.steps[-1]
    assert kept.uses is not None
    assert re.fullmatch(r"actions/upload-artifact@v\d+", kept.uses)
    assert kept.inputs["path"].splitlines()[:2] == ["plan.json", "report.html"]
    assert run.outcome("Set up Python") == "skipped"


def test_apply_does_the_plan_that_was_saved(family: Path, act: Callable[..., Run]) -> None:
    plan = act(recipe="recipe.yaml", arguments="--set\nlam=0.25\n")
    run = act(recipe="recipe.yaml", command="apply", output="else where")
    assert not run.failed, run.log
    result = json.loads(Path(run.outputs["result"]).read_text())
    assert result["plan_digest"] == plan.outputs["digest"]
    events = [json.loads(line)["event"] for line in Path(run.outputs["events"]).read_text().splitlines()]
    assert (events[0], events[-1]) == ("started", "published")
    assert Path(run.outputs["junit"]).exists()
    assert skillmerge.verify(family.parent / "else where").tensors == 12
    assert "wrote " in run.summary
    assert run.outcome("Plan") == "skipped"


def test_apply_refuses_a_plan_whose_inputs_changed(
    family: Path, act: Callable[..., Run], edit: Callable[..., Path]
) -> None:
    act(recipe="recipe.yaml")
    shard = family.parent / "rl" / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes())
    run = act(recipe="recipe.yaml", command="apply")
    assert run.failed
    assert run.outputs["status"] == "7"
    assert "exit status 7" in run.summary
    assert run.steps[-1].uses, "what there is is kept also of a run that failed"


def test_plan_shows_what_changed_since_the_last_one_in_the_same_file(family: Path, act: Callable[..., Run]) -> None:
    assert "Changes since" not in act(recipe="recipe.yaml", diff="plan.json").summary
    run = act(recipe="recipe.yaml", diff="plan.json", arguments="--set\nlam=0.5")
    assert "0.7 before, 0.5 now" in run.summary
    assert not run.failed


@pytest.mark.parametrize(("fail_on", "failed"), [("errors", True), ("never", False)])
def test_a_recipe_with_mistakes_fails_before_anything_is_planned(
    family: Path, act: Callable[..., Run], edit: Callable[..., Path], fail_on: str, failed: bool
) -> None:
    edit(family, merge="target + lam * (rl - stf)")
    run = act(recipe="recipe.yaml", fail_on=fail_on)
    assert run.failed == failed
    assert run.outcome("Plan") == "skipped"
    assert run.outputs["status"] == "2"
    assert "recipe.yaml:" in run.summary
    assert "did you mean 'sft'?" in run.summary


def test_warnings_fail_where_they_are_asked_to(
    family: Path, act: Callable[..., Run], edit: Callable[..., Path]
) -> None:
    edit(family, coefficients={"lam": 1, "mu": 1})
    assert not act(recipe="recipe.yaml").failed
    assert act(recipe="recipe.yaml", fail_on="warnings").failed


def test_warnings_of_a_plan_fail_it_where_they_are_asked_to(family: Path, act: Callable[..., Run]) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 3}
    for name in ("target", "rl", "sft"):
        scaling = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}} if name == "rl" else {}
        (family.parent / name / "config.json").write_text(json.dumps({**config, **scaling}))
    assert not act(recipe="recipe.yaml").failed
    run = act(recipe="recipe.yaml", fail_on="warnings")
    assert (run.failed, run.outputs["status"]) == (True, "4")
    assert "**Cannot be applied with `--strict`**: 1 warning." in run.summary
    assert "- warning: `rope scaling: " in run.summary.replace("``", "`")


def test_a_plan_that_cannot_be_made_is_told_in_the_summary(family: Path, act: Callable[..., Run]) -> None:
    (family.parent / "rl" / "model-00001-of-00002.safetensors").write_bytes(b"short")
    run = act(recipe="recipe.yaml")
    assert run.failed
    assert run.outputs["status"] == "4"
    assert "No plan: exit status 4" in run.summary
    assert "model-00001-of-00002.safetensors" in run.summary
    assert run.outputs["digest"] == ""


def test_work_that_is_left_is_no_failure_of_a_plan(family: Path, act: Callable[..., Run]) -> None:
    run = act(recipe="recipe.yaml", arguments="--detailed-exitcode")
    assert run.outputs["status"] == "10"
    assert not run.failed


@pytest.mark.parametrize("hostile", ["$(touch pwned).yaml", "`touch pwned`.yaml", '"; touch pwned; ".yaml', "-rf.yaml"])
def test_hostile_names_are_only_names(family: Path, act: Callable[..., Run], hostile: str) -> None:
    (family.parent / hostile).write_text(family.read_text())
    for command in ("plan", "apply"):
        run = act(recipe=hostile, command=command, output=f"out {hostile}", plan=f"{hostile}.json")
        assert not run.failed, run.log
    assert (family.parent / f"out {hostile}").is_dir()
    assert not list(family.parent.rglob("pwned"))


def test_hostile_arguments_are_only_arguments(family: Path, act: Callable[..., Run]) -> None:
    run = act(recipe="recipe.yaml", arguments="--set\nlam=$(touch pwned)\n;touch pwned\n")
    assert run.failed
    assert not list(family.parent.rglob("pwned"))


@pytest.mark.parametrize("inputs", [{"command": "destroy"}, {"fail_on": "nothing"}])
def test_inputs_that_are_none_of_the_choices_are_refused(
    family: Path, act: Callable[..., Run], inputs: dict[str, Any]
) -> None:
    run = act(recipe="recipe.yaml", **inputs)
    assert run.outcome("Lint") == "failure"
    assert run.outcome("Plan") == run.outcome("Apply") == "skipped"


def test_runner_reads_outputs_as_the_real_one_does() -> None:
    assert read_outputs("a=b=c\nd<<EOF\n1\n2\nEOF\n") == {"a": "b=c", "d": "1\n2"}


def test_apply_refuses_a_plan_of_another_recipe(family: Path, act: Callable[..., Run]) -> None:
    assert not act(recipe="recipe.yaml").failed
    family.write_text(family.read_text().replace("0.7", "0.9"))
    run = act(recipe="recipe.yaml", command="apply")
    assert run.failed
    assert run.outputs["status"] == "7"
    assert not (family.parent / "merged").exists()


def test_what_a_recipe_prints_gives_the_runner_no_commands(family: Path, act: Callable[..., Run]) -> None:
    family.write_text('{"skillmerge": 1, "x\\n::error ::forged": 3}')
    run = act(recipe="recipe.yaml")
    assert run.failed
    printed = "\n".join(step.output for step in run.steps)
    assert not any(line.startswith("::error") for line in printed.splitlines())
    assert "::stop-commands::quiet-" in printed
