"""How much of an update is rounding of its models: against casts whose errors are known, and what is said of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_tensors, read_checkpoint, run_cli, tensor_shapes, write_checkpoint, write_recipe

import skillmerge
from skillmerge.engine.measures.input_rounding import (
    Grain,
    grain_of,
    input_rounding,
    joined,
    precision_of,
    squared_error,
    told_precision,
)
from skillmerge.naming import module_kind
from skillmerge.study.inspect import inspect
from skillmerge.tensors import DTYPES, DType

NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def exact(count: int = 100_000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 0.02


def grain(values: torch.Tensor) -> Grain:
    found = grain_of(values)
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_has_a_grain_or_none(dtype: DType) -> None:
    if dtype.torch_name is None:
        pytest.skip("torch has no such dtype")
    stored = getattr(torch, dtype.torch_name)
    for bits in (torch.zeros(64, dtype=torch.uint8), torch.full((64,), 1, dtype=torch.uint8)):
        found = grain_of(bits.view(stored))
        assert (found is None) == (dtype.kind != "float")
        assert found is None or (found.dtype, precision_of(found)) == (dtype.torch_name, dtype.torch_name)
    assert grain_of(torch.zeros(0, dtype=stored)) == (Grain(dtype.torch_name) if dtype.kind == "float" else None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32", "float64"])
def test_expected_error_is_the_error_of_a_cast_however_it_is_stored(dtype: str, stored: str) -> None:
    cast = exact().to(NARROW[dtype])
    if NARROW[stored].itemsize < cast.itemsize or {dtype, stored} == {"bfloat16", "float16"}:
        pytest.skip("does not fit")
    lost = float(((cast.double() - exact()) ** 2).sum())
    made = grain(cast.to(NARROW[stored]))
    assert squared_error(made) == pytest.approx(lost, rel=0.02)
    assert precision_of(made) == dtype
    assert told_precision(made) == (dtype if dtype == stored else f"{dtype} in {stored}")


def test_numbers_that_are_bfloat16_in_float16_are_told_apart_from_subnormal_ones() -> None:
    assert precision_of(grain(exact().bfloat16().half())) == "bfloat16"


@pytest.mark.parametrize("values", [torch.ones(1000), torch.zeros(1000), torch.tensor([0.5, 2.0, 1.5])])
def test_numbers_that_use_no_bits_show_no_cast(values: torch.Tensor) -> None:
    assert told_precision(grain(values)) == "float32"


def test_one_element_more_decides_for_the_whole_tensor() -> None:
    cast, odd = exact().bfloat16().float(), torch.tensor([0.1])
    assert precision_of(joined([grain(cast), grain(cast)])) == "bfloat16"
    assert precision_of(joined([grain(cast), grain(odd)])) == "float32"


def test_pieces_add_up_to_the_whole() -> None:
    whole = grain(exact().bfloat16())
    pieces = joined(grain(piece) for piece in exact().bfloat16().split(4096))
    assert squared_error(pieces) == pytest.approx(squared_error(whole), rel=1e-6)
    assert pieces.used == whole.used


def test_factors_count_by_their_squares() -> None:
    made = Grain("bfloat16", 0x7F, (1.0,))
    found = input_rounding({"a": made, "b": made, "c": made}, {"a": 0.5, "b": 2.0, "c": -1.0})
    unit = squared_error(made)
    assert found.of_all == pytest.approx((0.25 + 4 + 1) * unit)
    assert found.of_added == pytest.approx((0.25 + 4) * unit)


# ------------------------------------------------------------------------------------------- in inspect and extract


def floor(rl: dict[str, Any], sft: dict[str, Any], names: list[str], alone: bool = False) -> float:
    """The formula of the docs on whole tensors, with numpy: ulp is the distance to the next bfloat16."""

    def squares(tensors: dict[str, torch.Tensor]) -> float:
        values = np.concatenate([tensors[name].double().numpy().ravel() for name in names])
        _, exponents = np.frexp(values)
        return float(((2.0 ** (exponents - 8)) ** 2).sum())  # 8 bits of precision, the hidden one included

    v = np.concatenate([(rl[name].double() - sft[name].double()).numpy().ravel() for name in names])
    whole = squares(rl) + (0.0 if alone else squares(sft))
    return math.sqrt(whole / 12) / float(np.linalg.norm(v))


@pytest.fixture
def cast(tmp_path: Path) -> Path:
    """A base and an RL model in float32 and as casts to bfloat16, stored narrow and wide."""
    shapes = tensor_shapes(layers=2, hidden=64)
    base = random_tensors(shapes, torch.float32)
    step = random_tensors(shapes, torch.float32, 5, 4e-5)
    for name, tensors in (("sft", base), ("rl", {key: value + step[key] for key, value in base.items()})):
        narrow = {key: value.bfloat16() for key, value in tensors.items()}
        write_checkpoint(tmp_path / f"{name}-float32", tensors)
        write_checkpoint(tmp_path / name, narrow)
        write_checkpoint(tmp_path / f"{name}-wide", {key: value.float() for key, value in narrow.items()})
    return tmp_path


@pytest.mark.parametrize("kind", ["", "-wide"])
def test_inspect_and_extract_show_the_floor_of_each_module(cast: Path, kind: str) -> None:
    rl, sft = (read_checkpoint(cast / f"{name}{kind}") for name in ("rl", "sft"))
    skill = skillmerge.extract(str(cast / f"rl{kind}"), str(cast / f"sft{kind}"), cast / "skill")
    groups = {**skill.manifest.as_dict()["statistics"]["modules"], "all": skill.manifest.as_dict()["statistics"]["all"]}
    found = inspect(str(cast / f"sft{kind}"), str(cast / f"rl{kind}"))
    shown = {**found.modules, "all": found.total}
    assert groups.keys() == shown.keys()
    for label in groups:
        names = [name for name in rl if label in ("all", module_kind(name))]
        for rows in (groups, shown):
            assert rows[label]["input_rounding"] == pytest.approx(floor(rl, sft, names), rel=1e-4)
            assert rows[label]["input_rounding_added"] == pytest.approx(floor(rl, sft, names, alone=True), rel=1e-4)
    told = "bfloat16 in float32" if kind else "bfloat16"
    assert found.total["input_precisions"] == [told]
    assert skill.manifest.as_dict()["statistics"]["input_precisions"] == [told]


def test_the_floor_is_the_error_that_a_cast_really_made(cast: Path) -> None:
    """The cast difference against the exact one, where both models were cast."""
    tensors = [read_checkpoint(cast / name) for name in ("rl", "sft", "rl-float32", "sft-float32")]
    rl, sft, rl32, sft32 = (torch.cat([it[name].double().ravel() for name in sorted(it)]) for it in tensors)
    error = float(((rl - sft) - (rl32 - sft32)).norm() / (rl - sft).norm())
    told = inspect(str(cast / "sft"), str(cast / "rl")).total["input_rounding"]
    assert told == pytest.approx(error, rel=0.3), "errors of two casts that are near each other are not independent"


def test_float32_from_training_is_no_cast(cast: Path) -> None:
    found = inspect(str(cast / "sft-float32"), str(cast / "rl-float32"))
    assert found.total["input_rounding"] < 1e-2
    assert found.total["input_precisions"] == ["float32"]
    assert found.as_dict()["warnings"] == []
    skill = skillmerge.extract(str(cast / "rl-float32"), str(cast / "sft-float32"), cast / "skill")
    assert not skill.warnings


@pytest.mark.parametrize("command", ["inspect", "extract"])
def test_update_that_is_mostly_rounding_is_told(cast: Path, command: str) -> None:
    options = {
        "inspect": ("inspect", "sft", "rl", "--stats", "off"),
        "extract": ("extract", "--from", "rl", "--minus", "sft", "-o", "skill"),
    }
    process = run_cli(*options[command], "-q", cwd=cast)
    assert process.returncode == 0
    assert process.stderr == (
        "warning: most of this update may be rounding of its models: 0.83 of its norm is expected from bfloat16 "
        "(0.59 of the added model alone)\n"
        "help: if the models were cast, use their float32 originals; models that were trained in "
        "this precision are exact\n"
    )
    process = run_cli(*options[command], "--json", cwd=cast)
    assert json.loads(process.stdout)["warnings"] == [process.stderr.splitlines()[0].removeprefix("warning: ")]


def test_skills_that_were_rounded_or_cut_to_their_largest_know_it_too(cast: Path) -> None:
    whole = skillmerge.extract(str(cast / "rl"), str(cast / "sft"), cast / "whole").manifest.as_dict()["statistics"]
    for options in ({"dtype": "float32"}, {"keep": 0.5}):
        made = skillmerge.extract(str(cast / "rl"), str(cast / "sft"), cast / "other", overwrite=True, **options)
        found = made.manifest.as_dict()["statistics"]["all"]["input_rounding"]
        assert found == pytest.approx(whole["all"]["input_rounding"], rel=1e-6), options


def test_nothing_is_said_of_models_that_are_not_there(cast: Path) -> None:
    """A stored skill, and a skill that is made of one: what they were cut from is known where they were cut."""
    skillmerge.extract(str(cast / "rl"), str(cast / "sft"), cast / "skill")
    assert inspect(str(cast / "skill")).total["input_rounding"] is None
    for formula in ("0.5 * m", "m"):
        recipe = write_recipe(
            cast,
            formula,
            models={"m": {"skill": "skill"}},
            coefficients=None,
            output={"kind": "skill", "path": "of-it"},
        )
        statistics = skillmerge.apply(recipe, overwrite=True).manifest.as_dict()["statistics"]
        assert "input_rounding" not in statistics["all"]
        assert "input_precisions" not in statistics


def test_tensors_without_an_update_do_not_count(cast: Path) -> None:
    """Norms near 1 have large units: where they did not move they say nothing of the update."""
    for name in ("rl", "sft"):
        tensors = read_checkpoint(cast / name)
        write_checkpoint(cast / f"{name}-norm", {**tensors, "model.norm.weight": torch.ones(64).bfloat16()})
    rl, sft = (read_checkpoint(cast / f"{name}-norm") for name in ("rl", "sft"))
    names = [name for name in rl if name != "model.norm.weight"]
    wanted = floor(rl, sft, names)
    assert inspect(str(cast / "sft-norm"), str(cast / "rl-norm")).total["input_rounding"] == pytest.approx(wanted, 1e-4)
    made = skillmerge.extract(str(cast / "rl-norm"), str(cast / "sft-norm"), cast / "skill").manifest
    assert made.as_dict()["statistics"]["all"]["input_rounding"] == pytest.approx(wanted, rel=1e-4)


def test_a_few_coarse_norms_raise_no_alarm(tmp_path: Path) -> None:
    """Numbers near 1 have units a hundred times those of the matrices, and hold little of the update."""
    shapes = tensor_shapes(layers=1, hidden=16)
    base = random_tensors(shapes, torch.float32)
    base |= {name: value + 1 for name, value in base.items() if "norm" in name}
    step = random_tensors(shapes, torch.float32, 5, 1.5e-4)
    step = {name: value * (8 if "norm" in name else 1) for name, value in step.items()}
    write_checkpoint(tmp_path / "sft", {key: value.bfloat16() for key, value in base.items()})
    write_checkpoint(tmp_path / "rl", {key: (value + step[key]).bfloat16() for key, value in base.items()})
    found = inspect(str(tmp_path / "sft"), str(tmp_path / "rl"))
    assert found.modules["norm"]["input_rounding"] > found.total["input_rounding"] > 0.71
    assert found.modules["attention"]["input_rounding"] < 0.6
    assert found.as_dict()["warnings"] == []
    assert not skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), tmp_path / "skill").warnings


def test_threads_change_nothing_in_what_a_skill_says_of_its_models(cast: Path) -> None:
    made = [
        skillmerge.extract(
            str(cast / "rl"), str(cast / "sft"), cast / f"skill{count}", threads=count
        ).manifest.statistics
        for count in (1, 3)
    ]
    assert made[0] == made[1]
