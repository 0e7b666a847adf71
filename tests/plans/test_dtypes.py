"""Tensors that keep their dtype: quantized ones, which are only ever copied, and those that `keep_dtype` names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    about_model,
    random_tensors,
    read_checkpoint,
    run_cli,
    tensor_shapes,
    write_checkpoint,
    write_recipe,
)
from safetensors import safe_open

import skillmerge
from skillmerge.errors import InputError, RecipeError

FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
UP = "model.layers.{}.mlp.up_proj.weight"
LEAVE = [{"modules": "mlp", "value": 0}]


def fp8(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    tensors = random_tensors(tensor_shapes(), seed=seed)
    for layer in range(3):
        name = UP.format(layer)
        tensors[name] = (tensors[name].float() * 100).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.full((1, 1), 0.01 * scale)
    return tensors


def mxfp4(seed: int) -> dict[str, torch.Tensor]:
    tensors = random_tensors(tensor_shapes(), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in range(3):
        experts = f"model.layers.{layer}.mlp.experts"
        for part, shape in (("blocks", (4, 8, 2, 16)), ("scales", (4, 8, 2))):
            tensors[f"{experts}.gate_up_proj_{part}"] = torch.randint(0, 256, shape, generator=generator).to(
                torch.uint8
            )
        tensors[f"{experts}.gate_up_proj_bias"] = torch.randn(4, 8, generator=generator).to(torch.bfloat16)
    return tensors


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", ["same", "float32"])
def test_fp8_tensors_that_are_only_copied_pass_byte_for_byte(tmp_path: Path, dtype: str) -> None:
    for seed, name in enumerate(("target", "rl", "sft")):
        write_checkpoint(tmp_path / name, fp8(seed, 1 + seed), config=FP8)
    recipe = write_recipe(
        tmp_path, coefficients={"lam": {"default": 0.7, "rules": LEAVE}}, output={"path": "merged", "dtype": dtype}
    )
    process = run_cli("apply", recipe)
    assert process.returncode == 0, process.stderr
    made, target = read_checkpoint(tmp_path / "merged"), read_checkpoint(tmp_path / "target")
    for layer in range(3):
        for name in (UP.format(layer), UP.format(layer) + "_scale_inv"):
            assert made[name].dtype == target[name].dtype
            assert torch.equal(bits(made[name]), bits(target[name]))
    assert not torch.equal(made["model.norm.weight"], target["model.norm.weight"])
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["quantization_config"] == FP8["quantization_config"]
    assert run_cli("verify", tmp_path / "merged").returncode == 0
    assert run_cli("rebuild", tmp_path / "merged", "--check").returncode == 0


def test_fp8_tensors_that_are_equal_in_all_models_pass(tmp_path: Path) -> None:
    same = fp8(7)
    for seed, name in enumerate(("target", "rl", "sft")):
        other = random_tensors(tensor_shapes(), seed=seed)
        kept = {key: value for key, value in same.items() if "up_proj" in key}
        write_checkpoint(tmp_path / name, {**other, **kept}, config=FP8)
    recipe = write_recipe(tmp_path)
    plan = skillmerge.plan(recipe)
    assert {plan.tensors[name].action for name in same if "up_proj" in name} == {"same"}
    skillmerge.apply(recipe)
    made = read_checkpoint(tmp_path / "merged")
    assert all(torch.equal(bits(made[name]), bits(value)) for name, value in same.items() if "up_proj" in name)


@pytest.mark.parametrize("changed", ["weight", "weight_scale_inv"])
def test_fp8_tensors_that_differ_are_refused_by_name(tmp_path: Path, changed: str) -> None:
    for seed, name in enumerate(("target", "rl", "sft")):
        tensors = fp8(0)
        if name == "sft":
            tensor = tensors[UP.format(0).replace("weight", changed)]
            tensor.view(-1)[-1] = 3 if changed == "weight" else 0.5
        write_checkpoint(tmp_path / name, {**tensors, **random_tensors({"model.norm.weight": (16,)}, seed=seed)})
    recipe = write_recipe(tmp_path)
    for command in ("plan", "apply"):
        process = run_cli(command, recipe)
        assert process.returncode == 4
        assert f": model `sft` ({tmp_path / 'sft'}) is quantized" in process.stderr.splitlines()[0]
        assert UP.format(0) in process.stderr


@pytest.mark.parametrize("target", ["model", "r", "mod"])
def test_quantised_model_is_named_where_another_folder_begins_like_it(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages begin with `model` too, and with the place of `rl`."""
    for seed, (folder, config) in enumerate([(target, {}), ("rl", FP8), ("sft", {})]):
        write_checkpoint(tmp_path / folder, random_tensors(tensor_shapes(), seed=seed), config=config)
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(Path(), models={"target": target, "rl": "rl", "sft": "sft"})
    message = (
        "model `rl` (rl) is quantized, so its numbers cannot be added: config.json says it is quantized (fp8), and "
        "`lm_head.weight` is not that of `target`"
    )
    process = run_cli("plan", recipe)
    assert (process.returncode, process.stderr.splitlines()[0]) == (4, f"error: recipe.yaml:5:9: {message}")
    (tmp_path / "rl" / "model.safetensors").write_bytes(b"no weights")
    process = run_cli("plan", recipe)
    assert (process.returncode, process.stderr.splitlines()[0].split(": ")[:3]) == (
        4,
        ["error", "recipe.yaml:5:9", "model `rl`"],
    )


def test_a_quantised_target_takes_no_arithmetic_with_plain_models(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "target", fp8(0), config=FP8)
    for seed, name in enumerate(("rl", "sft"), 1):
        write_checkpoint(tmp_path / name, random_tensors(tensor_shapes(), seed=seed))
    recipe = write_recipe(tmp_path)
    process = run_cli("plan", recipe)
    message = (
        f"model `target` ({tmp_path / 'target'}) is quantized, so its numbers cannot be added: config.json says it is "
        "quantized (fp8)"
    )
    assert (process.returncode, process.stderr) == (
        4,
        f"error: {about_model(recipe, 'target', message)}\n"
        "help: use the checkpoint it was quantized from (bfloat16, float16 or float32), or take these tensors from one "
        "model: a coefficient of 0 for them, or `copy`\n",
    )
    rules = {"lam": {"default": 0.7, "rules": LEAVE}}
    skillmerge.apply(write_recipe(tmp_path, coefficients=rules))
    skillmerge.apply(
        write_recipe(tmp_path, copy=[{"tensors": "*.up_proj.*", "from": "target"}], output={"path": "other"})
    )
    for name, tensor in read_checkpoint(tmp_path / "target").items():
        for merged in ("merged", "other"):
            assert "up_proj" not in name or torch.equal(bits(read_checkpoint(tmp_path / merged)[name]), bits(tensor))


def test_mxfp4_blocks_pass_where_they_are_only_copied(tmp_path: Path) -> None:
    for seed, name in enumerate(("target", "rl", "sft")):
        write_checkpoint(tmp_path / name, mxfp4(seed), config={"quantization_config": {"quant_method": "mxfp4"}})
    refused = run_cli("plan", write_recipe(tmp_path))
    assert (refused.returncode, "(mxfp4)" in refused.stderr) == (4, True)
    rules = [{"tensors": "*.experts.gate_up_proj_*", "value": 0}]
    skillmerge.apply(write_recipe(tmp_path, coefficients={"lam": {"default": 0.7, "rules": rules}}))
    made, target = read_checkpoint(tmp_path / "merged"), read_checkpoint(tmp_path / "target")
    assert all(torch.equal(made[name], target[name]) for name in target if "experts" in name)


@pytest.mark.parametrize(
    ("tensors", "config", "reason"),
    [
        ({"a.qweight": torch.int32, "a.scales": torch.float16}, {}, "tensor `a.qweight` belongs to a quantized layout"),
        ({"a.weight": torch.uint8, "a.weight.absmax": torch.float32}, {}, "tensor `a.weight.absmax` belongs to"),
        ({"a.weight": torch.float16}, {"quantization": {"bits": 4}}, r"config.json says it is quantized \(MLX\)"),
        ({"a.weight": torch.float16}, {"compression_config": {"quant_method": "ct"}}, r"is quantized \(ct\)"),
    ],
)  # fmt: skip
def test_other_layouts_are_only_copied_too(
    tmp_path: Path, tensors: dict[str, torch.dtype], config: dict[str, Any], reason: str
) -> None:
    for seed, name in enumerate(("target", "rl", "sft"), 1):
        made = {key: torch.full((4, 4), seed).to(dtype) for key, dtype in tensors.items()}
        write_checkpoint(tmp_path / name, {**made, **random_tensors({"norm.weight": (8,)}, seed=seed)}, config=config)
    with pytest.raises(InputError, match=reason):
        skillmerge.plan(write_recipe(tmp_path))
    rules = {"lam": {"default": 0.7, "rules": [{"tensors": "a.*", "value": 0}]}}
    skillmerge.apply(write_recipe(tmp_path, coefficients=rules))
    made, target = read_checkpoint(tmp_path / "merged"), read_checkpoint(tmp_path / "target")
    assert all(torch.equal(bits(made[name]), bits(target[name])) for name in tensors)


# ------------------------------------------------------------------------------------------------------- keep_dtype


def mixed(folder: Path, **output: Any) -> Path:
    """A family of bfloat16 with two tensors a layer that its models keep in float32."""
    for seed, name in enumerate(("target", "rl", "sft")):
        step = random_tensors(tensor_shapes(), seed=seed, scale=1e-3)
        tensors = {key: value + step[key] for key, value in random_tensors(tensor_shapes()).items()}
        for layer in range(3):
            tensors |= random_tensors(
                {f"model.layers.{layer}.mixer.A_log": (8,), f"model.layers.{layer}.gate.e_score_correction_bias": (4,)},
                torch.float32, seed,
            )  # fmt: skip
        write_checkpoint(folder / name, tensors, config={"torch_dtype": "bfloat16"})
    return write_recipe(folder, output={"path": "merged", **output})


def stored(folder: Path) -> dict[str, str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - it is no dict


def test_keep_dtype_keeps_what_the_output_would_level(tmp_path: Path) -> None:
    globs = ["*.A_log", "*.e_score_correction_bias"]
    recipe = mixed(tmp_path, dtype="float16", keep_dtype=globs)
    process = run_cli("apply", recipe)
    assert (process.returncode, "warning" in process.stderr) == (0, False)
    for name, dtype in stored(tmp_path / "merged").items():
        assert dtype == ("F32" if name.endswith(("A_log", "bias")) else "F16")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["torch_dtype"] == "float16"


def test_keep_dtype_holds_under_copy_too(tmp_path: Path) -> None:
    recipe = mixed(tmp_path, dtype="float16", keep_dtype=["*.A_log", "*_bias"])
    document = json.loads(recipe.read_text())
    recipe.write_text(json.dumps({**document, "copy": [{"tensors": "*.A_log", "from": "rl"}]}))
    skillmerge.apply(recipe)
    made, rl = read_checkpoint(tmp_path / "merged"), read_checkpoint(tmp_path / "rl")
    assert all(torch.equal(made[name], rl[name]) for name in made if name.endswith("A_log"))


def test_levelled_tensors_are_warned_of_with_the_rule_that_keeps_them(tmp_path: Path) -> None:
    recipe = mixed(tmp_path, dtype="bfloat16")
    warning = (
        "warning: `output.dtype: bfloat16` rounds 6 tensors that the donor keeps in F32 beside its BF16: "
        "model.layers.0.gate.e_score_correction_bias, model.layers.0.mixer.A_log, "
        "model.layers.1.gate.e_score_correction_bias, model.layers.1.mixer.A_log … and 2 more\n"
        "help: to keep them as they are, add to `output:`\n"
        '  keep_dtype: ["model.layers.*.gate.e_score_correction_bias", "model.layers.*.mixer.A_log"]\n'
    )
    assert warning in run_cli("plan", recipe).stdout
    assert warning in run_cli("apply", recipe, "-q").stderr
    assert run_cli("plan", recipe, "--strict").returncode == 2
    keep = ["model.layers.*.gate.e_score_correction_bias", "model.layers.*.mixer.A_log"]
    settled = run_cli("plan", mixed(tmp_path, dtype="bfloat16", keep_dtype=keep), "--strict")
    assert (settled.returncode, "warning" in settled.stdout) == (0, False)


@pytest.mark.parametrize("dtype", ["same", "float32"])
def test_nothing_is_levelled_where_nothing_is_rounded(tmp_path: Path, dtype: str) -> None:
    assert not skillmerge.plan(mixed(tmp_path, dtype=dtype)).warnings


def test_a_float32_model_that_is_written_in_bfloat16_is_no_levelling(tmp_path: Path) -> None:
    for seed, name in enumerate(("target", "rl", "sft")):
        write_checkpoint(tmp_path / name, random_tensors(tensor_shapes(), torch.float32, seed))
    assert not skillmerge.plan(write_recipe(tmp_path, output={"path": "merged", "dtype": "bfloat16"})).warnings


def test_keep_dtype_that_matches_nothing_is_told_with_names_near_it(tmp_path: Path) -> None:
    recipe = mixed(tmp_path, dtype="bfloat16", keep_dtype=["model.layers.*.mixer.A_lag"])
    with pytest.raises(RecipeError, match="A_lag` matches no tensor of the donor") as error:
        skillmerge.plan(recipe)
    assert error.value.fix == "did you mean `model.layers.*.mixer.A_log`?"


def test_keep_dtype_is_of_models(tmp_path: Path) -> None:
    recipe = mixed(tmp_path, kind="skill", keep_dtype=["*"])
    document = {**json.loads(recipe.read_text()), "merge": "rl - sft", "coefficients": {}}
    recipe.write_text(json.dumps(document))
    with pytest.raises(RecipeError, match="a skill has no `keep_dtype`"):
        skillmerge.plan(recipe)
