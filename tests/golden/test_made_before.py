"""What version 0.1.0 left goes on working where its models would not be merged today: problems become warnings."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import run_cli
from playing import prepare
from scenarios import OTHER_DONOR, SCENARIOS

FOUND = (
    "warning: rope base: `rl` has 77, the donor `target` 10,000: the update was trained for other positions than the "
    "output computes\n"
)
NEW_KEYS = {"accepted", "warnings", "notes", "compared", "merged_share"}


def left_behind(scenario: str, work: Path, *, foreign: bool = True) -> None:
    """The models and the artefact of a scenario. foreign: `rl` says that it turns positions by another base."""
    prepare(SCENARIOS[scenario], work)
    path = work / "rl" / "config.json"
    config, status = json.loads(path.read_text()), path.stat()
    if foreign:
        path.write_text(json.dumps({**config, "model_type": "qwen2", "rope_theta": 77}))
        os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))


def test_output_is_verified_and_rebuilt(tmp_path: Path) -> None:
    left_behind("old output", tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    assert run_cli("verify", "merged", cwd=tmp_path).returncode == 0
    checked = run_cli("rebuild", "merged", "--check", "--device", "cpu", "-q", cwd=tmp_path)
    assert (checked.returncode, checked.stderr) == (0, FOUND)
    again = run_cli("rebuild", "merged", "-o", "again", "--device", "cpu", "-q", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert FOUND in again.stderr
    made = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    weights = {name for name in before if not name.startswith("skillmerge.")}
    assert {name: made[name] for name in weights} == {name: before[name] for name in weights}


def test_saved_plan_is_applied_and_a_new_one_is_refused(tmp_path: Path) -> None:
    left_behind("old plan", tmp_path)
    applied = run_cli("apply", "plan.json", "--device", "cpu", "-q", cwd=tmp_path)
    assert applied.returncode == 0, applied.stderr
    assert applied.stderr.startswith(FOUND)
    refused = run_cli("apply", "recipe.yaml", "-o", "new", "--device", "cpu", "-q", cwd=tmp_path)
    assert refused.returncode == 4
    assert FOUND.removeprefix("warning: ") in refused.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("scenario", "recipe"), [("old skill", "with-skill.yaml"), ("old staging", "recipe.yaml")])
def test_skill_goes_on_working_and_staging_folder_is_in_nobodys_way(scenario: str, recipe: str, tmp_path: Path) -> None:
    """The journal of then does not say of which formula its shards are."""
    left_behind(scenario, tmp_path, foreign=False)
    applied = run_cli("apply", recipe, "-o", "merged", "--device", "cpu", cwd=tmp_path)
    assert applied.returncode == 0, applied.stderr
    assert ("note: dropped an unfinished run of another plan" in applied.stderr) == (scenario == "old staging")
    assert run_cli("verify", "merged", cwd=tmp_path).returncode == 0


def test_new_keys_are_left_out_where_they_say_nothing(tmp_path: Path) -> None:
    left_behind("old output", tmp_path, foreign=False)
    old = json.loads((tmp_path / "merged" / "skillmerge.manifest.json").read_text())
    shutil.rmtree(tmp_path / "merged")
    applied = run_cli("apply", "recipe.yaml", "-o", "merged", "--device", "cpu", "-q", cwd=tmp_path)
    new = json.loads((tmp_path / "merged" / "skillmerge.manifest.json").read_text())
    assert applied.returncode == 0, applied.stderr
    assert (new.keys() - old.keys()) & NEW_KEYS <= ({"warnings"} if "warning" in applied.stderr else set())
    assert old.keys() <= new.keys()


def test_saved_plan_goes_on_with_the_donor_of_then_and_says_so(tmp_path: Path) -> None:
    prepare(OTHER_DONOR, tmp_path)
    applied = run_cli("apply", "plan.json", "-o", "merged", "--device", "cpu", cwd=tmp_path)
    assert (applied.returncode, applied.stderr) == (
        0,
        "warning: the donor is `sft`, as in the earlier plan; for `target + rl - sft` it would be `target` now: the "
        "output takes its names, dtypes, config and tokenizer from `sft`\n"
        "help: keep it with `output: {like: sft}` in the recipe, or plan the recipe again\n"
        "note: dropped an unfinished run of another plan\n",
    )
    assert json.loads((tmp_path / "merged" / "skillmerge.manifest.json").read_text())["donor"] == "sft"
    assert run_cli("apply", "plan.json", "-o", "new", "--strict", "-q", cwd=tmp_path).returncode == 2
    assert run_cli("rebuild", "merged", "--check", "--device", "cpu", "-q", cwd=tmp_path).returncode == 0
