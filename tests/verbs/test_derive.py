"""Coefficients that follow from the weights: the numbers against numpy, and what the derived recipes merge to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import random_tensors, read_checkpoint, run_cli, tensor_shapes, write_checkpoint, write_recipe

import skillmerge
from skillmerge.errors import UsageError
from skillmerge.naming import layer_of, module_kind
from skillmerge.verbs.derive import derive


@pytest.fixture
def related(tmp_path: Path) -> Path:
    """base, target, sft, rl in float32, where rl - sft has something of target - base in it."""
    base = random_tensors(tensor_shapes(), torch.float32, 1)
    noise = [random_tensors(tensor_shapes(), torch.float32, seed) for seed in range(2, 6)]
    target = {name: base[name] + 0.1 * noise[0][name] for name in base}
    sft = {name: base[name] + 0.1 * noise[1][name] for name in base}
    rl = {name: sft[name] + 0.01 * noise[2][name] + 0.005 * noise[0][name] for name in base}
    for name, tensors in {"base": base, "target": target, "sft": sft, "rl": rl}.items():
        write_checkpoint(tmp_path / name, tensors)
    return write_recipe(tmp_path, coefficients={"lam": 0.5}, output={"path": "merged"})


def cells(folder: Path) -> dict[tuple[object, str], tuple[torch.Tensor, torch.Tensor]]:
    """The update and the target's own, by block and kind."""
    tensors = {name: read_checkpoint(folder / name) for name in ("base", "target", "sft", "rl")}
    found: dict[tuple[object, str], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name in tensors["base"]:
        v = (tensors["rl"][name].double() - tensors["sft"][name].double()).flatten()
        k = (tensors["target"][name].double() - tensors["base"][name].double()).flatten()
        found.setdefault((layer_of(name), module_kind(name)), []).append((v, k))
    return {key: (torch.cat([v for v, _ in rows]), torch.cat([k for _, k in rows])) for key, rows in found.items()}


def merged_updates(folder: Path, recipe: Path) -> dict[tuple[object, str], torch.Tensor]:
    out, target = read_checkpoint(skillmerge.apply(recipe, overwrite=True).output), read_checkpoint(folder / "target")
    found: dict[tuple[object, str], list[torch.Tensor]] = {}
    for name in out:
        update = (out[name].double() - target[name].double()).flatten()
        found.setdefault((layer_of(name), module_kind(name)), []).append(update)
    return {key: torch.cat(rows) for key, rows in found.items()}


def test_matched_updates_are_as_long_as_the_targets_own(related: Path) -> None:
    folder = related.parent
    derived = derive(related, "match", folder / "matched.yaml", base=str(folder / "base"))
    updates = merged_updates(folder, derived.output)
    for cell, (_, k) in cells(folder).items():
        assert float(updates[cell].norm()) == pytest.approx(0.5 * float(k.norm()), rel=1e-4), cell


def test_projected_updates_share_nothing_with_the_targets_own(related: Path) -> None:
    folder = related.parent
    derived = derive(related, "project", folder / "projected.yaml", base=str(folder / "base"))
    updates = merged_updates(folder, derived.output)
    taken = energy = 0.0
    for cell, (v, k) in cells(folder).items():
        wanted = 0.5 * (v - (v @ k) / (k @ k) * k)
        assert torch.allclose(updates[cell], wanted, atol=1e-6), cell
        energy, taken = energy + float(v @ v), taken + float((v @ k) ** 2 / (k @ k))
    assert derived.removed == pytest.approx(taken / energy, rel=1e-9)
    assert derived.chance is not None
    assert derived.chance < 0.05 < derived.removed
    assert f"{derived.removed:.3%}" in derived.output.read_text()


@pytest.mark.parametrize(
    ("formula", "coefficients", "message"),
    [
        ("target + (rl - sft)", {}, "has 0 coefficients"),
        ("target + a * b * (rl - sft)", {"a": 1.0, "b": 1.0}, "has 2 coefficients"),
        ("target + lam * (rl - sft)", {"lam": {"default": 1.0}}, "is already a schedule"),
        ("target + lam * (rl - sft) / 2", {"lam": 1.0}, "that contains numbers"),
        ("(1 - lam) * target + lam * rl / 2 + lam * rl / 2", {"lam": 0.5}, None),
    ],
)
def test_recipes_that_are_not_simple_enough(
    related: Path, formula: str, coefficients: dict[str, object], message: str | None
) -> None:
    folder = related.parent
    recipe = write_recipe(folder, formula, coefficients=coefficients)
    if message is None:
        derive(recipe, "match", folder / "x.yaml", base=str(folder / "base"))
        return
    with pytest.raises(UsageError, match=message):
        derive(recipe, "match", folder / "x.yaml", base=str(folder / "base"))
    assert not (folder / "x.yaml").exists()


def test_places_that_are_taken_or_elsewhere(related: Path) -> None:
    folder = related.parent
    (folder / "taken.yaml").write_text("mine")
    (folder / "sub").mkdir()
    for name, message in (("taken.yaml", "already exists"), ("sub/x.yaml", "is not beside")):
        with pytest.raises(UsageError, match=message):
            derive(related, "match", folder / name, base=str(folder / "base"))


def test_derive_command(related: Path) -> None:
    folder = related.parent
    process = run_cli("derive", related, "--choice", "project", "--base", "base", "-o", "p.yaml", "--json", cwd=folder)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["removed"] > 0
    process = run_cli("derive", related, "--choice", "match", "--base", "base", "-o", "m.yaml", cwd=folder)
    assert "rules" in process.stdout
    assert run_cli("plan", folder / "p.yaml").returncode == 0
