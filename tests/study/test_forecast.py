"""The forecast of rounding is what `apply` then measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    random_tensors,
    write_checkpoint,
    write_family,
    write_recipe,
)

import skillmerge
from skillmerge.study.forecast import GRID
from skillmerge.study.inspect import inspect
from skillmerge.tensors import ULP_EDGES


@pytest.mark.parametrize(("mode", "output"), [
    ("bfloat16", {}), ("float32", {"dtype": "float32"}), ("bfloat16, stochastic", {"rounding": "stochastic"}),
])  # fmt: skip
def test_curve_is_what_apply_measures_at_each_lambda(tmp_path: Path, mode: str, output: dict[str, Any]) -> None:
    recipe = write_family(tmp_path)
    found = inspect(recipe, stats="full")
    assert found.forecast is not None
    points = {point["lambda"]: point for point in found.forecast["curves"][mode]["all"]}
    assert list(points) == list(GRID)
    for lam in (0.1, 0.5, 1.0, 1.3, 2.0):
        recipe = write_recipe(tmp_path, coefficients={"lam": lam}, output={"path": "merged", **output})
        measured = skillmerge.apply(recipe, stats="full", overwrite=True).manifest.statistics.all
        assert points[lam]["realised"] == pytest.approx(measured.realised_lambda, rel=1e-12)
        assert points[lam]["vanished"] == measured.vanished
        assert points[lam]["changed"] == measured.changed


def test_float64_is_read_and_left_alone(tmp_path: Path) -> None:
    """The same values in two dtypes have the same figures, forecast included."""
    shapes = {"model.layers.0.mlp.up_proj.weight": (300, 400)}
    found = []
    for dtype in (torch.float32, torch.float64):
        folder = tmp_path / str(dtype)
        for seed, name in enumerate(("target", "rl", "sft")):
            tensors = {key: value.to(dtype) for key, value in random_tensors(shapes, torch.float32, seed).items()}
            write_checkpoint(folder / name, tensors)
        recipe = write_recipe(folder, output={"path": "merged", "dtype": "bfloat16"})
        found.append(inspect(recipe, stats="full"))
        assert found[-1].forecast is not None
        measured = skillmerge.apply(recipe, stats="full").manifest.statistics
        assert found[-1].forecast["as_planned"] == measured
    narrow, wide = (item.as_dict() for item in found)
    for key in ("norm", "changed", "cosine", "largest", "conflict"):
        assert narrow["all"][key] == wide["all"][key]
    sft, rl = torch.tensor([2.0, 1.0], dtype=torch.float64), torch.tensor([-2.0, 1.0], dtype=torch.float64)
    for name, tensor in (("sft", sft), ("rl", rl)):
        write_checkpoint(tmp_path / "pair" / name, {"model.norm.weight": tensor})
    total = inspect(str(tmp_path / "pair" / "sft"), str(tmp_path / "pair" / "rl")).total
    assert total["changed"] == 0.5
    assert total["ulps"] == [*[0] * len(ULP_EDGES), 1]


def test_curves_of_very_many_tensors_are_sampled(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan's own figures are not, and the curves stay near."""
    whole = inspect(family).forecast
    monkeypatch.setattr("skillmerge.study.forecast.MOST", 6)
    some = inspect(family).forecast
    assert whole is not None
    assert some is not None
    assert some["as_planned"] == whole["as_planned"]
    one, other = (found["curves"]["bfloat16"]["all"][9] for found in (whole, some))
    assert one != other
    assert other["realised"] == pytest.approx(one["realised"], abs=0.1)
