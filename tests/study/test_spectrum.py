"""Directions of an update, against those of numpy and those known beforehand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    numpy_of,
    random_tensors,
    run_cli,
    write_checkpoint,
)

from skillmerge.errors import UsageError
from skillmerge.study.inspect import inspect
from skillmerge.study.spectrum import SPECTRUM_KEYS, describe_spectrum


def test_small_float64_updates_have_a_spectrum(tmp_path: Path) -> None:
    before = random_tensors({"model.layers.0.mlp.up_proj.weight": (40, 60)}, torch.float64)
    update = torch.outer(torch.ones(40), torch.linspace(1, 2, 60)).double() * 1e-12
    write_checkpoint(tmp_path / "a", before)
    write_checkpoint(tmp_path / "b", {name: tensor + update for name, tensor in before.items()})
    (row,) = inspect(str(tmp_path / "a"), str(tmp_path / "b"), spectral=4).spectra.values()
    assert row["stable_rank"] == pytest.approx(1, abs=1e-3)


# ------------------------------------------------------------------------------------------------------ directions


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def test_directions_of_a_known_update() -> None:
    """Singular values, and the weights' own directions, are known; half of the update lies along them."""
    rows, columns, k = 300, 200, 8
    left, right = orthonormal(rows, 2 * k, 1), orthonormal(columns, 2 * k, 2)
    weights = left[:, :k] * torch.linspace(10, 3, k, dtype=torch.float64) @ right[:, :k].T
    along = torch.zeros(2 * k, dtype=torch.float64)
    along[: k // 2] = along[k : k + k // 2] = 2.0
    update = left * along @ right.T
    found = describe_spectrum(update, weights, k, seed=0)
    assert found["stable_rank"] == pytest.approx(k, rel=1e-6)
    assert found["effective_rank"] == pytest.approx(k, rel=1e-6)
    assert found["leading_energy"] == pytest.approx(1)
    assert found["principal_left"] == pytest.approx(0.5)
    assert found["principal_right"] == pytest.approx(0.5)
    assert found["principal_left_chance"] == k / rows
    assert found["principal_right_chance"] == k / columns
    assert found["subspace_overlap"] == pytest.approx(0.5)
    assert found["least_angle"] == pytest.approx(0, abs=1e-3)
    apart = describe_spectrum(left[:, k:] @ right[:, k:].T, weights, k, seed=0)
    assert apart["principal_left"] == pytest.approx(0, abs=1e-9)
    assert apart["least_angle"] == pytest.approx(90, abs=1e-3)
    nothing = describe_spectrum(torch.zeros(4, 4), None, 2, seed=0)
    assert set(nothing) == set(SPECTRUM_KEYS)
    assert set(nothing.values()) == {None}


def test_directions_equal_those_of_numpy(tmp_path: Path) -> None:
    shapes = {"model.layers.0.mlp.up_proj.weight": (90, 70), "model.norm.weight": (16,)}
    for seed, name in enumerate(("sft", "rl")):
        write_checkpoint(tmp_path / name, random_tensors(shapes, torch.float32, seed))
    found = inspect(str(tmp_path / "sft"), str(tmp_path / "rl"), spectral=64).spectra
    assert list(found) == ["model.layers.0.mlp.up_proj.weight"]
    sft, rl = (
        numpy_of(tmp_path / name)["model.layers.0.mlp.up_proj.weight"].astype(np.float64) for name in ("sft", "rl")
    )
    v = rl - sft
    u, s, _ = np.linalg.svd(v, full_matrices=False)
    left, _, right = np.linalg.svd(sft, full_matrices=False)
    energy = (s**2).sum()
    shares = s[:64] ** 2 / (s[:64] ** 2).sum()
    cosines = np.linalg.svd(u[:, :64].T @ left[:, :64], compute_uv=False)
    wanted = {
        "stable_rank": energy / s[0] ** 2,
        "effective_rank": np.exp(-(shares * np.log(shares)).sum()),
        "leading_energy": (s[:64] ** 2).sum() / energy,
        "principal_left": ((left[:, :64].T @ v) ** 2).sum() / energy,
        "principal_right": ((v @ right[:64].T) ** 2).sum() / energy,
        "subspace_overlap": (cosines**2).mean(),
    }
    for key, value in wanted.items():
        assert found["model.layers.0.mlp.up_proj.weight"][key] == pytest.approx(value, rel=1e-4), key


def test_directions_are_shown(family: Path) -> None:
    process = run_cli("inspect", family, "--spectral", "4", "--report", family.parent / "report.html")
    assert process.returncode == 0, process.stderr
    assert "Directions (medians over matrices)" in process.stdout
    assert "stable rank" in (family.parent / "report.html").read_text()
    with pytest.raises(UsageError, match="1 to 64"):
        inspect(family, spectral=65)
