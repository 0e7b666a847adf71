"""What rounding did: counts and sums against whole-tensor computations, sampling, warnings."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_checkpoint, run_cli, write_checkpoint, write_family, write_recipe

import skillmerge
from skillmerge.engine.rounding_statistics import SAMPLE_STRIDE, BlockStatistics, is_sampled, total_of
from skillmerge.methods.linear import compile_term
from skillmerge.methods.terms import Leaf, Scaled, Sum
from skillmerge.plans.plan import TensorPlan
from skillmerge.tensors import BLOCK

NAME = "model.layers.0.mlp.up_proj.weight"


def past(folder: Path, lam: float, size: float, count: int = 300_000, **output: object) -> dict:
    """Merge one tensor with updates of about `size` and measure it in full; the manifest."""
    generator = torch.Generator().manual_seed(0)
    target = (torch.randn(count, generator=generator) * 0.02).bfloat16()
    sft = (target.float() + 1e-3 * torch.randn(count, generator=generator)).bfloat16()
    moved = torch.rand(count, generator=generator) < 0.3
    rl = torch.where(moved, (sft.float() + size * torch.randn(count, generator=generator)).bfloat16(), sft)
    for name, tensor in (("target", target), ("sft", sft), ("rl", rl)):
        write_checkpoint(folder / name, {NAME: tensor})
    recipe = write_recipe(folder, coefficients={"lam": lam}, output={"path": "merged", **output})
    return skillmerge.apply(recipe, stats="full", overwrite=True).manifest.as_dict()


def whole(folder: Path, lam: float) -> dict[str, float]:
    """The same figures from whole tensors in float64, with numpy."""
    t, r, s = (read_checkpoint(folder / name)[NAME].double().numpy() for name in ("target", "rl", "sft"))
    y = read_checkpoint(folder / "merged")[NAME]
    base = torch.from_numpy(t).to(y.dtype).double().numpy()
    out, v = y.double().numpy(), r - s
    moved = v != 0
    return {
        "updated": int(moved.sum()),
        "vanished": int((moved & (out == base)).sum()),
        "changed": int((out != base).sum()),
        "realised": float(np.dot(out - base, v) / np.dot(v, v)),
    }


@pytest.mark.parametrize("lam", [0.3, 1.0, -0.5])
def test_statistics_equal_a_whole_tensor_computation(tmp_path: Path, lam: float) -> None:
    document = past(tmp_path, lam, 3e-4)
    row = document["tensors"][0]["statistics"]
    wanted = whole(tmp_path, lam)
    assert row["total"] == row["elements"] == 300_000
    assert {key: row[key] for key in ("updated", "vanished", "changed")} == {
        key: wanted[key] for key in ("updated", "vanished", "changed")
    }
    group = document["statistics"]["modules"]["mlp"]
    # u is lambda * v rounded to float32, hence not to the last digit.
    assert group["realised_lambda"] == pytest.approx(wanted["realised"], rel=1e-6)
    assert group["asked_lambda"] == pytest.approx(lam, rel=1e-12)
    assert group["vanished"] == pytest.approx(wanted["vanished"] / wanted["updated"])
    assert document["statistics"]["all"]["changed"] == pytest.approx(wanted["changed"] / 300_000)


def test_small_coefficient_vanishes_in_bfloat16_and_not_in_float32(tmp_path: Path) -> None:
    narrow = past(tmp_path, 0.3, 1e-5)["statistics"]["all"]
    wide = past(tmp_path, 0.3, 1e-5, dtype="float32")["statistics"]["all"]
    assert narrow["vanished"] > 0.5
    assert abs(narrow["realised"] - 1) > 0.1
    assert wide["vanished"] < 0.01
    assert wide["realised"] == pytest.approx(1, abs=1e-3)


def test_stochastic_rounding_realises_what_was_asked_in_the_mean(tmp_path: Path) -> None:
    summary = past(tmp_path, 0.3, 1e-5, rounding="stochastic")["statistics"]["all"]
    assert summary["realised_lambda"] == pytest.approx(0.3, abs=0.1)


def test_sampled_blocks_are_a_fixed_share_and_at_least_one() -> None:
    for blocks in (1, 2, SAMPLE_STRIDE, 1000):
        sampled = [block for block in range(blocks) if is_sampled(NAME, block, blocks, "sampled")]
        assert 1 <= len(sampled) <= -(-blocks // min(blocks, SAMPLE_STRIDE))
        assert len([block for block in range(blocks) if is_sampled(NAME, block, blocks, "full")]) == blocks
        assert not any(is_sampled(NAME, block, blocks, "off") for block in range(blocks))


def test_apply_warns_when_rounding_takes_the_update_away(tmp_path: Path) -> None:
    past(tmp_path, 0.3, 1e-5)
    process = run_cli("apply", tmp_path / "recipe.yaml", "--overwrite", "--set", "lam=0.29", "-q")
    assert process.returncode == 0
    assert process.stderr == (
        "warning: layer 0 mlp: effective lambda is 0.39 of what was requested (bfloat16 rounding)\n"
        "help: set `output.dtype: float32` or `output.rounding: stochastic`\n"
    )


def test_statistics_can_be_off(tmp_path: Path) -> None:
    result = skillmerge.apply(write_family(tmp_path), stats="off")
    assert result.manifest.statistics.mode == "off"
    assert not any(tensor.statistics for tensor in result.manifest.tensors)


def test_experts_that_all_differ_take_no_longer_than_their_blocks() -> None:
    """A tensor of 4,000 experts and 20 blocks of each, as large models have hundreds of."""
    experts, each = 4000, 20
    slices = []
    for expert in range(experts):
        term = Sum(Leaf("t"), Scaled(Sum(Leaf("rl"), Leaf("sft"), True), 0.5 + expert % 2, divide=False), False)
        piece = TensorPlan("n", "BF16", (experts, each, BLOCK), "merge", (), (), compile_term(term))
        slices.append(replace(piece, experts=(expert, expert + 1)))
    tensor = TensorPlan("n", "BF16", (experts, each, BLOCK), "merge", (), slices=tuple(slices))
    blocks = {at * BLOCK: BlockStatistics(BLOCK, 1, 0, 1, 4.0, 2.0, 1.0, 1.0) for at in range(experts * each)}
    started = time.process_time()
    found = total_of(tensor, dict(reversed(blocks.items())))
    assert time.process_time() - started < 2
    lambdas = [0.5, 1.5] * (experts * each // 2)
    assert found.vv == pytest.approx(sum(4 / lam / lam for lam in lambdas), rel=1e-12)
    assert found.dv == pytest.approx(sum(2 / lam for lam in lambdas), rel=1e-12)
