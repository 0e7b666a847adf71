"""Quantized tensors that all models hold alike: `extract` and `inspect` pass them by, and refuse others by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_tensors, read_checkpoint, run_cli, tensor_shapes, write_checkpoint, write_recipe

import skillmerge
from skillmerge.study.inspect import inspect

FP8: dict[str, Any] = {"quantization_config": {"quant_method": "fp8"}}
EXPERTS = "model.layers.{}.mlp.experts.gate_up_proj"


def fp8(seed: int) -> dict[str, torch.Tensor]:
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        tensors[name] = torch.randn(tensor_shapes()[name], generator=generator).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.full((1, 1), 0.01 + seed)
    return tensors


def mxfp4(seed: int) -> dict[str, torch.Tensor]:
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(3):
        for part, shape in (("blocks", (4, 8, 2, 16)), ("scales", (4, 8, 2))):
            bits = torch.randint(0, 256, shape, generator=generator)
            tensors[f"{EXPERTS.format(layer)}_{part}"] = bits.to(torch.uint8)
    return tensors


KINDS = {"fp8": (fp8, FP8), "fp8 no config": (fp8, {}), "mxfp4": (mxfp4, {"quantization_config": {"q": 1}})}


@pytest.fixture(params=KINDS)
def equal(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Three models of the same quantized tensors, and a twin of each that is without them."""
    make, config = KINDS[request.param]
    same = make(0)
    for seed, name in enumerate(("target", "rl", "sft")):
        plain = {key: value for key, value in random_tensors(tensor_shapes(), seed=seed).items() if key not in same}
        write_checkpoint(tmp_path / name, {**same, **plain}, config=config)
        write_checkpoint(tmp_path / f"{name}-plain", plain)
    return tmp_path, same


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_extract_passes_equal_ones_by(equal: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, same = equal
    process = run_cli("extract", "--from", folder / "rl", "--minus", folder / "sft", "-o", folder / "skill")
    assert process.returncode == 0, process.stderr
    skillmerge.extract(str(folder / "rl-plain"), str(folder / "sft-plain"), folder / "skill-plain")
    document, plain = (json.loads((folder / name / "skill.json").read_text()) for name in ("skill", "skill-plain"))
    assert document["same"] == sorted(same)
    assert (document["tensors"], document["planes"]) == (plain["tensors"], {"plus": "rl", "minus": "sft"})
    assert (document["exact"], "same" in plain) == (True, False)
    for command in (("verify", "skill"), ("verify", "skill", "--parent", "rl"), ("rebuild", "skill", "--check")):
        assert run_cli(*command, cwd=folder).returncode == 0


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"keep": 0.5}, {"zstd": True}], ids=str)
def test_skill_of_equal_ones_is_applied_as_its_models_are(
    equal: tuple[Path, dict[str, torch.Tensor]], options: dict[str, Any]
) -> None:
    folder, same = equal
    skillmerge.extract(str(folder / "rl"), str(folder / "sft"), folder / "skill", **options)
    models = {"target": "target", "skill": {"skill": "skill"}}
    skillmerge.apply(write_recipe(folder, "target + lam * skill", models=models), folder / "by-skill")
    made, target = read_checkpoint(folder / "by-skill"), read_checkpoint(folder / "target")
    assert {name: bits(made[name]) for name in same} == {name: bits(tensor) for name, tensor in same.items()}
    assert not torch.equal(made["model.norm.weight"], target["model.norm.weight"])
    config = json.loads((folder / "by-skill" / "config.json").read_text())
    assert config.get("quantization_config") == json.loads((folder / "rl" / "config.json").read_text()).get(
        "quantization_config"
    )
    if "dtype" not in options and "keep" not in options:
        skillmerge.apply(write_recipe(folder), folder / "by-models")
        by_models = read_checkpoint(folder / "by-models")
        assert {name: bits(made[name]) for name in made} == {name: bits(by_models[name]) for name in by_models}


def test_skill_of_a_skill_passes_them_by_too(equal: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, same = equal
    skillmerge.extract(str(folder / "rl"), str(folder / "sft"), folder / "skill")
    output = {"kind": "skill", "path": "half"}
    recipe = write_recipe(folder, "0.5 * m", models={"m": {"skill": "skill"}}, coefficients=None, output=output)
    skillmerge.apply(recipe)
    assert json.loads((folder / "half" / "skill.json").read_text())["same"] == sorted(same)
    skillmerge.apply(write_recipe(folder, "target + lam * m", models={"target": "target", "m": {"skill": "half"}}))


def test_skill_that_was_cut_without_them_does_not_pass_for_one(tmp_path: Path) -> None:
    """Only what a skill says is the same is taken for it, not all that it lacks."""
    for seed, name in enumerate(("target", "rl", "sft")):
        write_checkpoint(tmp_path / name, {**random_tensors(tensor_shapes(), seed=seed), **fp8(seed)}, config=FP8)
    process = run_cli("extract", "--from", "rl", "--minus", "sft", "-o", "skill", "--ignore", "*up_proj*", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "same" not in json.loads((tmp_path / "skill" / "skill.json").read_text())
    recipe = write_recipe(tmp_path, "target + lam * m", models={"target": "target", "m": {"skill": "skill"}})
    process = run_cli("plan", recipe)
    assert process.returncode == 4
    assert f"model `target` ({tmp_path / 'target'}) is quantized" in process.stderr


def test_skill_without_what_is_multiplied_by_0_is_one(tmp_path: Path) -> None:
    """Its skills were refused by the check of what was written: numbers that are no floats have no planes."""
    for seed, name in enumerate(("target", "rl", "sft")):
        more = {**fp8(seed), "step": torch.tensor([1, 2])}
        write_checkpoint(tmp_path / name, {**random_tensors(tensor_shapes(), seed=seed), **more}, config=FP8)
    rules = [{"tensors": ["*.up_proj.*", "step"], "value": 0}]
    recipe = write_recipe(
        tmp_path,
        "lam * (rl - sft)",
        models={"rl": "rl", "sft": "sft"},
        coefficients={"lam": {"default": 0.7, "rules": rules}},
        output={"kind": "skill", "path": "skill"},
    )
    skillmerge.apply(recipe)
    document = json.loads((tmp_path / "skill" / "skill.json").read_text())
    assert document["same"] == sorted(fp8(0))
    assert "step" not in document["tensors"]
    recipe = write_recipe(tmp_path, "target + m", models={"target": "target", "m": {"skill": "skill"}}, coefficients={})
    skillmerge.apply(recipe)
    made, target = read_checkpoint(tmp_path / "merged"), read_checkpoint(tmp_path / "target")
    for name in (*fp8(0), "step"):
        assert bits(made[name]) == bits(target[name])


def test_inspect_passes_equal_ones_by(equal: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, same = equal
    found = inspect(str(folder / "sft"), str(folder / "rl"))
    plain = inspect(str(folder / "sft-plain"), str(folder / "rl-plain"))
    assert found.tensors == plain.tensors
    assert found.left == dict.fromkeys(same, "quantized, and the same in all models")
    assert "left out" in run_cli("inspect", folder / "sft", folder / "rl", "--stats", "off").stdout
    assert inspect(write_recipe(folder)).left == found.left
    skillmerge.extract(str(folder / "rl"), str(folder / "sft"), folder / "skill")
    assert inspect(str(folder / "skill")).total["norm"] == found.total["norm"]
    by_skill = inspect(write_recipe(folder, "target + lam * m", models={"target": "target", "m": {"skill": "skill"}}))
    assert by_skill.total["norm"] == found.total["norm"]


def test_inspect_of_a_recipe_leaves_out_what_is_only_copied(tmp_path: Path) -> None:
    for seed, name in enumerate(("target", "rl", "sft")):
        write_checkpoint(tmp_path / name, {**random_tensors(tensor_shapes(), seed=seed), **fp8(seed)}, config=FP8)
    rules = {"lam": {"default": 0.7, "rules": [{"modules": "mlp", "value": 0}]}}
    for recipe in (
        write_recipe(tmp_path, coefficients=rules),
        write_recipe(tmp_path, copy=[{"tensors": "*.up_proj.*", "from": "target"}]),
    ):
        assert inspect(recipe).left == dict.fromkeys(fp8(0), "quantized, and only copied")


@pytest.mark.parametrize(
    ("command", "fix"),
    [
        (
            ("extract", "--from", "rl", "--minus", "sft", "-o", "skill"),
            "leave these tensors out of the skill: `ignore` in a recipe, `--ignore` of `extract`",
        ),
        (
            ("inspect", "sft", "rl"),
            "inspect a recipe that takes these tensors from one model: `copy`, or a coefficient of 0 for them",
        ),
    ],
    ids=["extract", "inspect"],
)
@pytest.mark.parametrize("changed", ["bytes", "shape", "dtype", "missing"])
def test_unequal_ones_are_refused_by_name_with_a_way_out(
    tmp_path: Path, command: tuple[str, ...], fix: str, changed: str
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    for seed, model in enumerate(("rl", "sft")):
        same = fp8(0)
        if model == "sft":
            if changed == "bytes":
                same[name].view(torch.uint8).view(-1)[-1] ^= 1
            elif changed == "shape":
                same[name] = same[name][:2].clone()
            elif changed == "dtype":
                same[name] = same[name].to(torch.float8_e5m2)
            else:
                del same[name]
        plain = {key: value for key, value in random_tensors(tensor_shapes(), seed=seed).items() if key not in fp8(0)}
        write_checkpoint(tmp_path / model, {**plain, **same})
    process = run_cli(*command, cwd=tmp_path)
    assert process.returncode == 4
    error, help_ = process.stderr.splitlines()[:2]
    assert error.startswith("error: model `")
    assert name in error
    assert help_ == (f"help: use the checkpoint it was quantized from (bfloat16, float16 or float32), or {fix}")
    assert not (tmp_path / "skill").exists()
