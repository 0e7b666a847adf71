"""What is told of finished weights: rounding by layer, updates that are too large, and what --strict makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_checkpoint, run_cli, tensor_shapes, write_checkpoint, write_family, write_recipe

import skillmerge
from skillmerge.engine.measures.cells import cells, rows_of
from skillmerge.engine.measures.skill_statistics import SkillStatistics
from skillmerge.errors import CheckFailed
from skillmerge.outputs.comparison import compare
from skillmerge.study.inspect import inspect

Q, UP = "model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.up_proj.weight"
CURES = "help: set `output.dtype: float32` or `output.rounding: stochastic`\n"


def stepped(folder: Path, steps: dict[int, float], hidden: int = 64, norms: float = 0.0, **keys: Any) -> Path:
    """A target of bfloat16 ones, whose unit is 2^-7 upward; RL adds to the MLP of each layer so much of a unit."""
    target = {f"model.layers.{layer}.mlp.up_proj.weight": torch.ones(hidden, hidden) for layer in steps}
    target |= {f"model.layers.{layer}.input_layernorm.weight": torch.ones(hidden) for layer in steps}
    start = {name: torch.zeros_like(value) for name, value in target.items()}
    rl = {}
    for layer, step in steps.items():
        rl[f"model.layers.{layer}.mlp.up_proj.weight"] = torch.full((hidden, hidden), step / 128)
        rl[f"model.layers.{layer}.input_layernorm.weight"] = torch.full((hidden,), norms / 128)
    for name, tensors in (("target", target), ("sft", start), ("rl", rl)):
        write_checkpoint(folder / name, {key: value.bfloat16() for key, value in tensors.items()})
    return write_recipe(folder, coefficients={"lam": 1.0}, **keys)


def test_rounding_that_cancels_in_the_mean_is_told_by_its_worst_layer(tmp_path: Path) -> None:
    """0.75 and 1.5 of a unit come out as 1 and 2 units, 1.25 and 2.5 as 1 and 2: in the mean nearly all is right."""
    recipe = stepped(tmp_path, {0: 0.75, 1: 1.5, 2: 1.25, 3: 2.5})
    process = run_cli("apply", recipe, "-q")
    worst = "layer 0 mlp: effective lambda is 1.33 of what was requested (bfloat16 rounding); "
    said = worst + "4 of 4 cells are more than 10% off"
    assert (process.returncode, process.stderr) == (0, f"warning: {said}\n{CURES}")
    document = json.loads(run_cli("apply", recipe, "--json", "--overwrite").stdout)
    assert abs(document["statistics"]["all"]["realised"] - 1) < 0.1, "nothing is seen in the mean"
    assert document["warnings"] == [said]
    manifest = json.loads((tmp_path / "merged" / "skillmerge.manifest.json").read_text())
    assert manifest["warnings"] == [said]
    report = run_cli("apply", recipe, "--report", tmp_path / "report.html")
    assert report.returncode == 0
    page = (tmp_path / "report.html").read_text()
    assert said in page
    assert "<td class=p10><b>1.33</b>" in page
    assert "<td class=n6><b>0.8</b>" in page
    assert "<i class=n10>0.667</i>" in page, "the legend"


def test_strict_keeps_back_what_rounding_has_changed(tmp_path: Path) -> None:
    process = run_cli("apply", stepped(tmp_path, {0: 0.25, 1: 1.0}), "--strict")
    assert process.returncode == 3
    assert "layer 0 mlp: effective lambda is 0.00 of what was requested" in process.stderr
    assert not (tmp_path / "merged").exists()


def test_stochastic_rounding_and_float32_are_not_told(tmp_path: Path) -> None:
    for output in ({"dtype": "float32"}, {"rounding": "stochastic"}):
        recipe = stepped(tmp_path, {0: 0.5, 1: 1.25}, output={"path": "merged", **output})
        assert not skillmerge.apply(recipe, overwrite=True).warnings, output


def test_dtype_that_rounds_is_named(tmp_path: Path) -> None:
    narrow = {"path": "merged", "dtype": "float16"}
    assert not skillmerge.apply(stepped(tmp_path, {0: 0.25}, output=narrow)).warnings, "float16 is finer there"
    said = "layer 0 mlp: effective lambda is 0.00 of what was requested (float16 rounding); 1 of 2 cells are more than"
    process = run_cli("apply", stepped(tmp_path, {0: 0.01, 1: 1.0}, output=narrow), "-q", "--overwrite")
    assert process.stderr == f"warning: {said} 10% off\n{CURES}"


def test_few_elements_are_told_together_and_not_alone(tmp_path: Path) -> None:
    """Each layer's norm has 64 elements, too few to judge; all four have enough."""
    recipe = stepped(tmp_path, dict.fromkeys(range(4), 1.0), norms=0.25)
    process = run_cli("apply", recipe, "-q")
    said = "norm: effective lambda is 0.00 of what was requested (bfloat16 rounding); 1 of 2 kinds of module are more"
    assert process.stderr == f"warning: {said} than 10% off\n{CURES}"
    assert not any(cell.is_off for cell in cells(rows_of(skillmerge.apply(recipe).manifest.tensors)))
    assert not skillmerge.apply(stepped(tmp_path, {0: 1.0}, norms=0.25), overwrite=True).warnings, "64 elements in all"


def test_what_was_made_before_is_told_when_it_is_found(tmp_path: Path) -> None:
    recipe = stepped(tmp_path, {0: 0.25, 1: 1.0})
    first, second = (skillmerge.apply(recipe) for _ in range(2))
    assert second.already
    assert second.warnings == first.warnings


# ------------------------------------------------------------------------------------------------- the update's size


def changed(folder: Path, name: str, by: float) -> Path:
    """A family in float32 in which one tensor of `rl` is `by` of its own norm further away."""
    recipe = write_family(folder, tensor_shapes(), torch.float32, shards=1)
    tensors = read_checkpoint(folder / "rl")
    step = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(8))
    tensors[name] = read_checkpoint(folder / "sft")[name] + step * by * tensors[name].norm() / step.norm()
    write_checkpoint(folder / "rl", tensors)
    return recipe


def test_matrix_that_changes_too_much_is_told_in_apply_extract_and_inspect(tmp_path: Path) -> None:
    recipe = changed(tmp_path, Q, 0.6)
    t, y = read_checkpoint(tmp_path / "target"), read_checkpoint(skillmerge.apply(recipe).output)
    ratio = float((y[Q] - t[Q]).norm() / t[Q].norm())
    said = f"`{Q}` changes by {ratio:.2f} of its norm, which is implausibly large"
    process = run_cli("apply", recipe, "-q")
    accept = "; to accept it, add to the recipe: `accept: [update-size]`"
    assert process.stderr == f"warning: {said}\nhelp: check that the models belong together{accept}\n"
    extract = ("extract", "--from", "rl", "--minus", "sft", "-o", "skill")
    passing = "; to accept it, pass `--accept update-size`, or add to a recipe: `accept: [update-size]`"
    assert run_cli("inspect", "sft", "rl", "--report", "r.html", cwd=tmp_path).returncode == 0
    assert "changes by 0.60 of its norm" in (tmp_path / "r.html").read_text()
    for command, way in ((("inspect", "sft", "rl"), ""), (extract, passing)):
        assert run_cli(*command, "-q", cwd=tmp_path).stderr == (
            f"warning: `{Q}` changes by 0.60 of its norm, which is implausibly large\n"
            f"help: check that the models belong together{way}\n"
        )
    manifest = json.loads((tmp_path / "skill" / "skillmerge.manifest.json").read_text())
    assert manifest["statistics"]["large"] == {Q: pytest.approx(0.6, rel=1e-2)}
    process = run_cli(*extract, "-q", "--overwrite", "--accept", "update-size", cwd=tmp_path)
    assert (process.returncode, process.stderr) == (0, "")


def test_several_matrices_are_counted_and_the_largest_is_named(tmp_path: Path) -> None:
    recipe = changed(tmp_path, Q, 0.6)
    tensors = read_checkpoint(tmp_path / "rl")
    write_checkpoint(tmp_path / "rl", {**tensors, UP: tensors[UP] * 1.9})
    (said,) = skillmerge.apply(recipe).warnings
    assert said.startswith(f"`{UP}` changes by 0.6")
    assert said.endswith("which is implausibly large; 2 matrices change by more than 0.3")


@pytest.mark.parametrize(
    "name",
    ["model.norm.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight", "lm_head.weight"],
)
def test_norms_and_rows_of_tokens_may_move_far(tmp_path: Path, name: str) -> None:
    assert not skillmerge.apply(changed(tmp_path, name, 0.9)).warnings
    assert inspect(str(tmp_path / "sft"), str(tmp_path / "rl"), stats="off").as_dict()["warnings"] == []


def test_biases_and_matrices_of_zeros_are_not_judged(tmp_path: Path) -> None:
    fused, fresh = "model.layers.0.mlp.experts.down_proj_bias", "model.layers.0.mlp.adapter.weight"
    shapes = {**tensor_shapes(), fused: (4, 16), fresh: (8, 16)}
    recipe = write_family(tmp_path, shapes, torch.float32, shards=1)
    for model in ("target", "sft", "rl"):
        tensors = read_checkpoint(tmp_path / model)
        tensors[fused] = torch.full((4, 16), 2.0 if model == "rl" else 1.0)
        tensors[fresh] = torch.full((8, 16), 0.1 if model == "rl" else 0.0)
        write_checkpoint(tmp_path / model, tensors)
    assert not skillmerge.apply(recipe).warnings
    assert not skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), tmp_path / "skill").warnings


def test_update_below_the_bound_is_not_told(tmp_path: Path) -> None:
    assert not skillmerge.apply(changed(tmp_path, Q, 0.3)).warnings, "0.7 of it arrives"


def test_accepted_update_is_kept_with_what_was_seen(tmp_path: Path) -> None:
    changed(tmp_path, Q, 0.6)
    recipe = write_recipe(tmp_path, accept=["update-size"])
    process = run_cli("apply", recipe, "--strict", "-q")
    assert (process.returncode, process.stderr) == (0, "")
    manifest = json.loads((tmp_path / "merged" / "skillmerge.manifest.json").read_text())
    (found,) = manifest["accepted"]
    assert (found["name"], found["accepted"]) == ("update-size", True)
    assert found["message"].startswith(f"`{Q}` changes by 0.4")
    assert "warnings" not in manifest
    assert inspect(recipe, stats="off").as_dict()["warnings"] == []


def test_update_that_is_too_large_is_refused_by_strict(tmp_path: Path) -> None:
    process = run_cli("apply", changed(tmp_path, Q, 0.6), "--strict", "-q")
    assert process.returncode == 3
    assert not (tmp_path / "merged").exists()


def test_manifest_made_before_skills_knew_their_models_is_said_again(tmp_path: Path) -> None:
    write_family(tmp_path)
    new = skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), tmp_path / "skill").manifest
    assert isinstance(new.statistics, SkillStatistics)
    whole = replace(new.statistics.all, input_rounding=None, input_rounding_added=None)
    old = replace(new, statistics=replace(new.statistics, all=whole, input_precisions=()))
    compare(tmp_path, old, new)
    with pytest.raises(CheckFailed, match="`statistics` differs when rebuilt"):
        compare(tmp_path, new, old)
