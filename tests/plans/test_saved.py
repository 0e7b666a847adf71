"""Saved plans: applied as they are, refused where anything changed, compared in words."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import random_tensors, run_cli, tensor_shapes, weights, write_checkpoint, write_recipe
from hub_server import HubServer

import skillmerge
from skillmerge.errors import StalePlan, UsageError
from skillmerge.plans.changes import differences
from skillmerge.plans.saved import describe, looks_saved, read


def saved(recipe: Path, name: str = "plan.json", *options: str) -> Path:
    plan = recipe.parent / name
    process = run_cli("plan", recipe, "-o", plan, "--json", *options)
    assert process.returncode == 0, process.stderr
    return plan


def test_a_saved_plan_is_applied_as_it_is(family: Path, tmp_path: Path) -> None:
    """From another folder too, and with the coefficients that were set when it was made."""
    plan = saved(family, "plan.json", "--set", "lam=0.3")
    assert looks_saved(plan)
    assert not looks_saved(family)
    first = skillmerge.apply(plan)
    assert first.output == family.parent / "merged"
    other = skillmerge.apply(family, tmp_path / "other", coefficients={"lam": 0.3})
    assert weights(first.output) == weights(other.output)
    assert first.manifest.plan_digest == json.loads(plan.read_text())["digest"] == other.manifest.plan_digest
    with pytest.raises(UsageError, match="fixes its coefficients"):
        skillmerge.apply(plan, coefficients={"lam": 1.0})


def rewrite(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))


def other_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    write_checkpoint(folder, {**random_tensors(tensor_shapes(), seed=5), "new": random_tensors({"x": (3,)})["x"]})


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "written again": (lambda folder: rewrite(folder / "sft"), "model sft: rewritten"),
    "a config": (
        lambda folder: (folder / "target" / "config.json").write_text('{"a": 1}'),
        "other files changed: config.json",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_makes_it_stale(family: Path, change: str) -> None:
    plan = saved(family)
    make, message = CHANGES[change]
    make(family.parent)
    with pytest.raises(StalePlan, match=message) as caught:
        skillmerge.apply(plan)
    assert "skillmerge plan" in str(caught.value.fix)
    assert not (family.parent / "merged").exists()
    process = run_cli("apply", plan)
    assert process.returncode == 7
    assert "is stale" in process.stderr


def test_a_recipe_that_changed_is_not_looked_at(family: Path) -> None:
    """The plan has its own."""
    plan = saved(family)
    digest = json.loads(plan.read_text())["digest"]
    write_recipe(family.parent, coefficients={"lam": 0.1})
    assert skillmerge.apply(plan).manifest.plan_digest == digest


def test_differences_in_words(family: Path) -> None:
    folder = family.parent
    first = read(saved(family, "a.json")).document
    assert differences(first, read(saved(family, "b.json")).document) == []
    rules = {"default": 0.7, "rules": [{"layers": 1, "value": 0.5}]}
    write_recipe(folder, coefficients={"lam": rules}, output={"path": "merged", "dtype": "float32"})
    found = differences(first, read(saved(family, "c.json")).document)
    assert "the recipe's text changed" in found
    assert "output dtype: same before, float32 now" in found
    assert any(line.startswith("lam: 0.7 before, 0.5 now, in model.layers 1") for line in found)
    assert any(line.startswith("the dtype of ") and "BF16 before, F32 now" in line for line in found)
    process = run_cli("plan", family, "--diff", folder / "a.json")
    assert process.returncode == 0
    assert "- lam: 0.7 before, 0.5 now" in process.stdout
    document = json.loads(run_cli("plan", family, "--diff", folder / "c.json", "--json").stdout)
    assert document["changes"] == []


def test_differences_of_models(family: Path) -> None:
    folder = family.parent
    first = read(saved(family, "a.json")).document
    for name in ("target", "rl", "sft"):
        other_weights(folder / name)
    write_recipe(folder, models={"target": "target", "rl": "rl", "sft": "sft", "more": "sft"})
    write_recipe(folder, "target + lam * (rl - more)", models={"target": "target", "rl": "rl", "more": "sft"})
    found = differences(first, read(saved(family, "b.json")).document)
    assert "model sft is no longer used" in found
    assert any(line.startswith("model more is new: ") for line in found)
    assert any(line.startswith("model rl: other tensors or sizes in ") for line in found)
    assert any(line.startswith("1 tensors are new: new") for line in found)


def test_commits_are_those_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch that has changed since is read where it was."""
    with HubServer(tmp_path / "hub") as hub, hub.environment(monkeypatch):
        for seed, name in enumerate(("target", "rl", "sft")):
            folder = write_checkpoint(tmp_path / name, random_tensors(tensor_shapes(), seed=seed))
            hub.create_from(f"acme/{name}", folder)
        models = {name: f"hf://acme/{name}" for name in ("target", "rl", "sft")}
        recipe = write_recipe(tmp_path, models=models)
        plan = saved(recipe)
        wanted = weights(skillmerge.apply(recipe, tmp_path / "before").output)
        later = write_checkpoint(tmp_path / "later", random_tensors(tensor_shapes(), seed=9))
        hub.commit("acme/rl", {path.name: path.read_bytes() for path in later.iterdir()})
        assert weights(skillmerge.apply(plan, tmp_path / "after").output) == wanted
        assert weights(skillmerge.apply(recipe, tmp_path / "newer").output) != wanted


def test_detailed_exit_status(family: Path) -> None:
    assert run_cli("plan", family, "--detailed-exitcode").returncode == 10
    output = skillmerge.apply(family).output
    assert run_cli("plan", family, "--detailed-exitcode").returncode == 0
    path = next(output.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert run_cli("plan", family, "--detailed-exitcode").returncode == 10
    assert skillmerge.apply(family).already
    with pytest.raises(UsageError, match="already exists"):
        skillmerge.apply(family, full=True)
    assert not skillmerge.apply(family, full=True, overwrite=True).already
    assert run_cli("plan", family, "--detailed-exitcode").returncode == 0


def test_result_file_is_what_json_prints(family: Path) -> None:
    process = run_cli("apply", family, "--result-file", family.parent / "result.json", "--json")
    printed, kept = json.loads(process.stdout), json.loads((family.parent / "result.json").read_text())
    assert printed == kept
    assert kept["files"]


@pytest.mark.parametrize("text", ['{"ok": true}', '{\n "ok": true, "version": 99}', '{\n "ok": true', '{\n "ok": []}'])
def test_what_is_no_plan_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UsageError, match=r"is not a saved plan|is unknown|cannot be read"):
        read(tmp_path / "plan.json")
    assert run_cli("apply", tmp_path / "plan.json").returncode == 2


def test_a_plan_is_no_recipe_for_other_commands(family: Path) -> None:
    plan = saved(family)
    for command in (("plan",), ("inspect",), ("sweep", "--set", "lam=1", "--score", "true")):
        process = run_cli(command[0], plan, *command[1:])
        assert process.returncode == 2
        assert "is a saved plan, not a recipe" in process.stderr


def test_a_result_file_that_cannot_be_is_told_first(family: Path) -> None:
    os.mkfifo(family.parent / "pipe")  # nobody waits for the other end
    for place in (family.parent / "no" / "result.json", family.parent, family.parent / "pipe"):
        assert run_cli("apply", family, "--result-file", place).returncode == 2
    assert run_cli("plan", family, "--report", family.parent / "pipe").returncode == 2
    assert run_cli("plan", family, "--diff", family.parent / "pipe").returncode == 2
    assert not (family.parent / "merged").exists()


@pytest.mark.parametrize(
    "edit",
    [
        lambda plan: plan.update(inputs=7),
        lambda plan: plan["inputs"][0].update(revision=7),
        lambda plan: plan["inputs"][0]["files"][0].pop("header_sha256"),
        lambda plan: plan["tensors"][0].pop("action"),
        lambda plan: plan.update(versions=[], digest="0"),
        lambda plan: plan.pop("side_files"),
    ],
)
def test_a_plan_that_was_damaged_is_told(family: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Found by fuzzing: a part that was missing deep inside ended apply and plan --diff with a traceback."""
    plan = saved(family)
    document = json.loads(plan.read_text())
    edit(document)
    plan.write_text(json.dumps(document, indent=1))
    made = skillmerge.plan(family)
    with pytest.raises(UsageError, match="is not a saved plan"):
        read(plan).changes(json.loads(json.dumps(describe(made))))
    with pytest.raises(UsageError, match="is not a saved plan"):
        skillmerge.apply(plan)


def test_a_plan_is_applied_only_as_it_was_read(family: Path) -> None:
    """Who read an edited plan has approved of something else than what its digest stands for."""
    plan = saved(family)
    plan.write_text(plan.read_text().replace("0.7\n", "0.1\n"))
    assert read(plan).document["tensors"][0]["coefficients"] == [0.1]
    with pytest.raises(StalePlan, match=r"lam: 0\.1 before, 0\.7 now"):
        skillmerge.apply(plan)


@pytest.mark.parametrize(
    "spoil", [lambda it: it["recipe"].update(file="/"), lambda it: it.update(overrides={"lam": 10**400})]
)
def test_plan_with_what_no_plan_has_is_none(family: Path, spoil: Callable[[dict[str, Any]], None]) -> None:
    plan = saved(family)
    document = json.loads(plan.read_text())
    spoil(document)
    plan.write_text(json.dumps(document, indent=1))
    process = run_cli("apply", plan)
    assert process.returncode == 2, process.stderr
    assert "is not a saved plan" in process.stderr


def test_commands_to_run_next_keep_the_coefficients_that_were_set(
    family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr("skillmerge.cli.commands.merging.suggest", shown.append)
    plan = family.parent / "plan.json"
    run_cli("plan", family, "--set", "lam=0.5")
    run_cli("plan", family, "--set", "lam=0.5", "-o", plan)
    assert shown == [f"skillmerge apply {family} --set lam=0.5", f"skillmerge apply {plan}"]
    rewrite(family.parent / "sft")
    with pytest.raises(StalePlan) as caught:
        skillmerge.apply(plan)
    assert caught.value.fix == (f"check the changes and plan again: skillmerge plan {family} --set lam=0.5 -o {plan}")
