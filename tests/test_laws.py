"""The laws of the arithmetic, bit for bit: signs of zeros and subnormals included, infinities refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import PAST, read_checkpoint, write_checkpoint, write_recipe

import skillmerge
from skillmerge.errors import InputError

INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
DTYPES = list(INTEGERS)
ALWAYS = PAST
FORMS = [PAST, "lam * (rl - sft) + target", "target - lam * (sft - rl)", "rl * lam - sft * lam + target"]


def every_kind_of_number(dtype: torch.dtype, seed: int, count: int = 140_000) -> torch.Tensor:
    """Random bit patterns of all exponents (what is not finite or too large to subtract is made a zero)."""
    generator = torch.Generator().manual_seed(seed)
    integers = INTEGERS[dtype]
    low, high = torch.iinfo(integers).min, torch.iinfo(integers).max
    values = torch.randint(low, high, (count,), generator=generator, dtype=integers).view(dtype)
    tame = values.isfinite() & (values.abs() < torch.finfo(dtype).max / 8)
    values = torch.where(tame, values, torch.zeros((), dtype=dtype))
    special = torch.tensor([0.0, -0.0, torch.finfo(dtype).tiny, -torch.finfo(dtype).tiny], dtype=dtype)
    subnormal = torch.ones(2, dtype=integers).view(dtype)
    values[:4], values[4:6] = special, subnormal
    values[6:1000:2] = -0.0
    return values


def apply(
    folder: Path, merge: str, lam: float, target: torch.Tensor, rl: torch.Tensor, sft: torch.Tensor
) -> torch.Tensor:
    for name, tensor in (("target", target), ("rl", rl), ("sft", sft)):
        write_checkpoint(folder / name, {"model.layers.0.mlp.weight": tensor})
    recipe = write_recipe(folder, merge, coefficients={"lam": lam})
    return read_checkpoint(skillmerge.apply(recipe, overwrite=True).output)["model.layers.0.mlp.weight"]


def assert_same_bits(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == wanted.dtype
    bits = INTEGERS[wanted.dtype]
    different = (found.view(bits) != wanted.view(bits)).nonzero().flatten()
    assert different.numel() == 0, (different[:5], found[different[:5]], wanted[different[:5]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_lambda_zero_gives_the_target(tmp_path: Path, dtype: torch.dtype) -> None:
    target, rl, sft = (every_kind_of_number(dtype, seed) for seed in range(3))
    assert_same_bits(apply(tmp_path, ALWAYS, 0.0, target, rl, sft), target)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lam", [1.0, 0.7, -0.7, 3.0])
@pytest.mark.parametrize("form", FORMS[:3])
def test_rl_equal_to_sft_gives_the_target(tmp_path: Path, dtype: torch.dtype, lam: float, form: str) -> None:
    target, same = every_kind_of_number(dtype, 1), every_kind_of_number(dtype, 2)
    assert_same_bits(apply(tmp_path, form, lam, target, same, same.clone()), target)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_target_equal_to_sft_with_lambda_one_gives_rl(tmp_path: Path, dtype: torch.dtype, form: str) -> None:
    target, rl = every_kind_of_number(dtype, 1), every_kind_of_number(dtype, 2)
    assert_same_bits(apply(tmp_path, form, 1.0, target, rl, target.clone()), rl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lam", [1.0, 0.7, -0.7])
def test_elements_that_rl_left_alone_keep_the_targets_bits(tmp_path: Path, dtype: torch.dtype, lam: float) -> None:
    target, sft = every_kind_of_number(dtype, 1), every_kind_of_number(dtype, 2)
    rl = torch.where(torch.arange(sft.numel()) % 3 == 0, every_kind_of_number(dtype, 3), sft)
    found = apply(tmp_path, PAST, lam, target, rl, sft)
    kept = rl.view(INTEGERS[dtype]) == sft.view(INTEGERS[dtype])
    assert_same_bits(found[kept], target[kept])


@pytest.mark.parametrize("target_dtype", DTYPES)
def test_laws_hold_where_dtypes_are_mixed(tmp_path: Path, target_dtype: torch.dtype) -> None:
    target = every_kind_of_number(target_dtype, 1)
    same = every_kind_of_number(torch.bfloat16, 2)
    assert_same_bits(apply(tmp_path, PAST, 0.7, target, same.float(), same), target)


def test_average_of_a_model_with_itself_is_the_model(tmp_path: Path) -> None:
    model = every_kind_of_number(torch.bfloat16, 1)
    assert_same_bits(apply(tmp_path, "0.5 * target + 0.5 * rl", 1.0, model, model.clone(), model), model)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("model", ["target", "rl", "sft"])
def test_infinities_and_nans_are_refused_by_tensor_and_index(tmp_path: Path, value: float, model: str) -> None:
    tensors = {name: every_kind_of_number(torch.bfloat16, seed) for seed, name in enumerate(("target", "rl", "sft"))}
    tensors[model][100_003] = value
    with pytest.raises(
        InputError, match=rf"`{model}` holds .* in tensor `model.layers.0.mlp.weight` at element 100003"
    ):
        apply(tmp_path, PAST, 0.7, **tensors)
    assert not (tmp_path / "merged").exists()


def test_stochastic_rounding_keeps_what_needs_no_rounding(tmp_path: Path) -> None:
    target, same = every_kind_of_number(torch.bfloat16, 1), every_kind_of_number(torch.bfloat16, 2)
    for name, tensor in (("target", target), ("rl", same), ("sft", same)):
        write_checkpoint(tmp_path / name, {"model.layers.0.mlp.weight": tensor})
    recipe = write_recipe(tmp_path, output={"path": "merged", "rounding": "stochastic", "seed": 7})
    found = read_checkpoint(skillmerge.apply(recipe).output)["model.layers.0.mlp.weight"]
    assert_same_bits(found, target)
