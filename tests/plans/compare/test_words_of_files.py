"""What models' files say is told as one line of plain text, whatever it is, and stops nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import run_cli

HALF = "\ud800"
CONFIG: dict[str, Any] = {"model_type": "llama", "hidden_act": "silu", f"a{HALF}": 2}


def says(recipe: Path, **keys: Any) -> Path:
    """Give each model a configuration, and `rl` these keys too."""
    for model in ("target", "rl", "sft"):
        own = {**CONFIG, **(keys if model == "rl" else {})}
        (recipe.parent / model / "config.json").write_text(json.dumps(own))
    return recipe


@pytest.mark.parametrize("command", ["plan", "apply"])
def test_half_of_a_surrogate_pair_is_written_out(command: str, family: Path) -> None:
    """Found by a review: all was computed, and then no manifest and no report could be written."""
    recipe = says(family, **{f"a{HALF}": 1, "rope_scaling": {"type": "dynamic", "factor": 2.0, "x": HALF}})
    report = family.parent / "r.html"
    process = run_cli(command, recipe, "--report", report)
    assert process.returncode == 0, process.stderr
    assert "note: `a\\ud800` differs, which skillmerge does not know the meaning of: the donor's is used\n" in (
        process.stdout + process.stderr
    )
    assert "has dynamic, factor 2, x \\ud800" in report.read_text()


def test_half_of_a_surrogate_pair_is_kept_in_manifest_and_saved_plan(family: Path) -> None:
    recipe = says(family, rope_scaling={"type": "dynamic", "factor": 2.0, "x": HALF})
    plan, out = family.parent / "p.json", family.parent / "out"
    assert run_cli("plan", recipe, "--save", plan).returncode == 0
    process = run_cli("apply", plan, "--output", out)
    assert process.returncode == 0, process.stderr
    (found,) = json.loads(plan.read_text())["compared"]
    assert found["values"] == {"target": "none", "rl": "dynamic, factor 2, x \\ud800", "sft": "none"}
    assert found["message"] in json.loads((out / "skillmerge.manifest.json").read_text())["warnings"]
    assert run_cli("verify", out).returncode == run_cli("rebuild", out, "--check").returncode == 0


def test_value_begins_no_line_of_its_own(family: Path) -> None:
    """Found by a review: a configuration could print a digest and a count of warnings."""
    recipe = says(family, hidden_act="\nplan 0000\n0 warnings\t")
    process = run_cli("plan", recipe, "-q")
    assert process.stdout.splitlines()[0] == (
        "problem: activation: `rl` has \\nplan 0000\\n0 warnings\\t, the donor `target` silu: "
        "the weights were trained for another function"
    )


def test_method_of_quantization_begins_no_line_of_its_own(family: Path) -> None:
    recipe = says(family, quantization_config={"quant_method": f"\nplan {HALF}"})
    process = run_cli("plan", recipe)
    assert "config.json says it is quantized (\\nplan \\ud800)" in process.stderr
