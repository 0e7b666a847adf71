"""Sparse patches, written and read: the exact elements, whatever they are; refused where they do not fit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_tensors, read_checkpoint, run_cli, tensor_shapes, write_checkpoint, write_recipe
from safetensors.torch import load_file, save_file
from test_laws import DTYPES, every_kind_of_number

import skillmerge
from skillmerge.bits import bit_view
from skillmerge.errors import CheckFailed, InputError, RecipeError, UsageError
from skillmerge.tensors import CHUNK

WHOLE = {name: name for name in ("target", "sft", "rl")}
PATCHED = {"sft": "sft", "rl": {"patch": "patch", "onto": "sft"}}


def apply_patch(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The format as its users read it."""
    patch = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    result = {name: tensor.clone() for name, tensor in tensors.items()}
    for name in {name.rpartition(".")[0] for name in patch}:
        flat = result[name].view(-1)
        flat[patch[name + ".indices"].long()] = patch[name + ".values"]
    return result


def write_patch(folder: Path, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], kind: Any) -> None:
    """The format as its users write it."""
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in before.items():
        places = (bit_view(tensor) != bit_view(after[name])).view(-1).nonzero().view(-1)
        if len(places):
            tensors |= {f"{name}.indices": places.to(kind), f"{name}.values": after[name].view(-1)[places]}
    save_file(tensors, folder / "delta_sparse.safetensors")
    shapes = {name: list(tensor.shape) for name, tensor in before.items()}
    (folder / "delta_metadata.json").write_text(json.dumps({"format": "sparse_coo", "shapes": shapes}))


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(bit_view(left[n]), bit_view(right[n])) for n in left)


def write_pair(folder: Path, dtype: torch.dtype = torch.bfloat16, elements: int = 3 * CHUNK // 2) -> None:
    """`sft` and `rl` of random bits: most of a large tensor is the same, all of a small one is not."""
    tensors = {}
    for seed, name in enumerate(("sft", "rl")):
        numbers = every_kind_of_number(dtype, seed)
        large = every_kind_of_number(dtype, 7).repeat(-(-elements // numbers.numel()))[:elements].clone()
        if name == "rl":
            large[CHUNK - 3 : CHUNK + 5] = numbers[:8]
            large[::1001] = numbers[0]
        tensors[name] = {"large": large.view(2, -1), "small": numbers, "kept": every_kind_of_number(dtype, 9)}
        write_checkpoint(folder / name, tensors[name])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_patch_of_a_skill_is_the_other_parent(tmp_path: Path, dtype: torch.dtype) -> None:
    """Random bit patterns of all exponents, signs of zeros included; and back again."""
    if dtype == torch.float64:
        for seed, name in enumerate(("sft", "rl")):
            values = every_kind_of_number(torch.float32, seed).double() * (1 + seed * 2**-40)
            write_checkpoint(tmp_path / name, {"w": values})
    else:
        write_pair(tmp_path, dtype)
    skill = skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), tmp_path / "skill").output
    written = skillmerge.export_patch(skill, tmp_path / "patch", onto=str(tmp_path / "sft"))
    sft, rl = read_checkpoint(tmp_path / "sft"), read_checkpoint(tmp_path / "rl")
    assert same(apply_patch(tmp_path / "patch", sft), rl)
    assert written.elements == sum(int((bit_view(sft[name]) != bit_view(rl[name])).sum()) for name in sft)
    again = skillmerge.extract(str(tmp_path / "patch"), str(tmp_path / "sft"), tmp_path / "again").output
    for file in skill.glob("*.safetensors"):
        assert (again / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_patched_model_stands_for_a_whole_one(tmp_path: Path, kind: Any) -> None:
    """A merge with the patch has the bytes of the merge with the checkpoint."""
    shapes = tensor_shapes()
    sft, target = random_tensors(shapes, seed=1), random_tensors(shapes, seed=2)
    rl = {name: torch.where(torch.rand(t.shape) < 0.2, t * 1.01, t) for name, t in sft.items()}
    for name, tensors in {"sft": sft, "rl": rl, "target": target}.items():
        write_checkpoint(tmp_path / name, tensors)
    write_patch(tmp_path / "patch", sft, rl, kind)
    formula = "target + 0.7 * (rl - sft)"
    direct = skillmerge.apply(write_recipe(tmp_path, formula, models=WHOLE), tmp_path / "direct")
    recipe = write_recipe(tmp_path, formula, models={"target": "target", **PATCHED})
    through = skillmerge.apply(recipe, tmp_path / "through", hash_inputs=True, threads=2)
    assert same(read_checkpoint(direct.output), read_checkpoint(through.output))
    inputs = {item.name: item.as_dict() for item in through.manifest.inputs}
    assert [item.name for item in through.manifest.inputs] == ["target", "sft", "rl"]
    assert inputs["rl"]["files"][0]["sha256"] != inputs["sft"]["files"][0]["sha256"]


def test_a_patch_alone_is_written_out(tmp_path: Path) -> None:
    """`merge: rl` makes the whole checkpoint of it, with the base's config and layout."""
    write_pair(tmp_path)
    write_patch(tmp_path / "patch", *(read_checkpoint(tmp_path / name) for name in ("sft", "rl")), torch.int32)
    result = skillmerge.apply(write_recipe(tmp_path, "rl", models=PATCHED), tmp_path / "out")
    assert same(read_checkpoint(result.output), read_checkpoint(tmp_path / "rl"))
    assert [item.name for item in result.manifest.inputs] == ["sft", "rl"]


def test_another_base_is_refused(tmp_path: Path) -> None:
    write_pair(tmp_path)
    skill = skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), tmp_path / "skill").output
    with pytest.raises(
        CheckFailed, match=r"is not the checkpoint that .* was extracted from: tensor `(small|large)` differs"
    ):
        skillmerge.export_patch(skill, tmp_path / "patch", onto=str(tmp_path / "rl"))
    assert not (tmp_path / "patch").exists()
    assert not list(tmp_path.glob(".patch*"))


def exported(folder: Path) -> None:
    """`patch`, which makes `rl` of `sft`, and says so; and `target`, of the same shapes."""
    shapes = tensor_shapes()
    sft, target = random_tensors(shapes, seed=1), random_tensors(shapes, seed=2)
    rl = {name: torch.where(torch.rand(t.shape) < 0.2, t * 1.01, t) for name, t in sft.items()}
    for name, tensors in {"sft": sft, "rl": rl, "target": target}.items():
        write_checkpoint(folder / name, tensors)
    skill = skillmerge.extract(str(folder / "rl"), str(folder / "sft"), folder / "skill").output
    skillmerge.export_patch(skill, folder / "patch", onto=str(folder / "sft"))


def test_a_patch_is_for_the_model_that_it_was_made_for(tmp_path: Path) -> None:
    exported(tmp_path)
    models = {"target": "target", "new": {"patch": "patch", "onto": "target"}}
    process = run_cli("plan", write_recipe(tmp_path, "new", models=models, coefficients={}))
    assert process.returncode == 4
    assert "patch: the patch is for another model than " in process.stderr
    assert "help: name the model that the patch was made for" in process.stderr


def test_a_patch_that_does_not_say_what_it_is_for_is_noted(tmp_path: Path) -> None:
    exported(tmp_path)
    metadata = json.loads((tmp_path / "patch" / "delta_metadata.json").read_text())
    recipe = write_recipe(tmp_path, "rl", models=PATCHED, coefficients={})
    without = skillmerge.plan(recipe).notes
    del metadata["base"]
    (tmp_path / "patch" / "delta_metadata.json").write_text(json.dumps(metadata))
    note = "patch `rl` does not say which model it is for: check that it is for `sft`"
    assert skillmerge.plan(recipe).notes == (without[0], note)


def test_applying_a_patch_is_not_called_a_merge_of_nothing(tmp_path: Path) -> None:
    exported(tmp_path)
    recipe = write_recipe(tmp_path, "rl", models=PATCHED, coefficients={})
    planned, applied = run_cli("plan", recipe), run_cli("apply", recipe)
    assert "\nwrites `sft` with the patch applied\n" in planned.stdout
    assert "wrote `sft` with the patch applied\n" in applied.stdout
    for text in (planned.stdout, planned.stderr, applied.stdout, applied.stderr):
        assert not re.search("warning|nothing|0%", text), text
    assert same(read_checkpoint(tmp_path / "merged"), read_checkpoint(tmp_path / "rl"))


def test_applied_patch_passes_the_default_gate(tmp_path: Path) -> None:
    """The donor is the patched model, and nothing differs from it; but the patch is no merge that did nothing."""
    exported(tmp_path)
    recipe = write_recipe(tmp_path, "rl", models=PATCHED, coefficients={}, gates={"finite": True})
    done = skillmerge.apply(recipe, tmp_path / "out")
    assert [(it.gate, it.passed) for it in done.gates] == [("changed", True), ("finite", True)]
    assert skillmerge.gate(done.output).ok
    recipe = write_recipe(tmp_path, "rl", models={"rl": "rl"}, coefficients={}, gates={"finite": True})
    with pytest.raises(CheckFailed, match=r"changed: 0 "):
        skillmerge.apply(recipe, tmp_path / "copy")


def test_a_rounded_skill_has_no_patch(tmp_path: Path) -> None:
    write_pair(tmp_path)
    rounded = skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), tmp_path / "r", dtype="float32").output
    with pytest.raises(InputError, match="is not the exact difference of two checkpoints"):
        skillmerge.export_patch(rounded, tmp_path / "patch", onto=str(tmp_path / "sft"))


def edit(patch: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = patch / "delta_sparse.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)


DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "descending": (lambda t: t.update({"small.indices": t["small.indices"].flip(0)}), "not a list of ascending places"),
    "twice": (lambda t: t["small.indices"].__setitem__(1, t["small.indices"][0]), "not a list of ascending places"),
    "negative": (lambda t: t["small.indices"].__setitem__(0, -1), "not a list of ascending places"),
    "outside": (lambda t: t["large.indices"].__setitem__(-1, 1 << 30), "not a list of ascending places"),
    "no values": (lambda t: t.pop("small.values"), "places but no values"),
    "other dtype": (lambda t: t.update({"small.values": t["small.values"].float()}), "does not fit it"),
    "other length": (lambda t: t.update({"small.values": t["small.values"][1:]}), "does not fit it"),
    "of nothing": (lambda t: t.update({"x.indices": t["small.indices"], "x.values": t["small.values"]}), "is not in"),
    "whole tensor": (lambda t: t.update({"small": t["small.values"]}), "no places or values: small"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told(tmp_path: Path, damage: str) -> None:
    write_pair(tmp_path)
    write_patch(tmp_path / "patch", *(read_checkpoint(tmp_path / name) for name in ("sft", "rl")), torch.int32)
    change, message = DAMAGE[damage]
    edit(tmp_path / "patch", change)
    with pytest.raises(InputError, match=message) as caught:
        skillmerge.apply(write_recipe(tmp_path, "rl", models=PATCHED), tmp_path / "out")
    assert caught.value.fix
    assert not (tmp_path / "out").exists()


def test_shapes_of_another_model_are_refused(tmp_path: Path) -> None:
    write_pair(tmp_path)
    write_patch(tmp_path / "patch", *(read_checkpoint(tmp_path / name) for name in ("sft", "rl")), torch.int32)
    (tmp_path / "patch" / "delta_metadata.json").write_text(json.dumps({"shapes": {"small": [1, 2]}}))
    with pytest.raises(InputError, match=r"is not for .*: tensor `small` has shape"):
        skillmerge.apply(write_recipe(tmp_path, "rl", models=PATCHED), tmp_path / "out")


def test_a_patch_is_no_model_and_needs_one(tmp_path: Path) -> None:
    write_pair(tmp_path)
    write_patch(tmp_path / "patch", *(read_checkpoint(tmp_path / name) for name in ("sft", "rl")), torch.int32)
    with pytest.raises(InputError, match="is a sparse patch, not a model") as caught:
        skillmerge.apply(write_recipe(tmp_path, "rl", models={"rl": "patch"}), tmp_path / "out")
    assert "onto" in str(caught.value.fix)
    for models, message in (
        ({"rl": {"patch": "patch"}}, "`patch` and `onto` go together"),
        ({"rl": {"path": "rl", "onto": "sft"}, "sft": "sft"}, "`patch` and `onto` go together"),
        ({"rl": {"patch": "patch", "path": "rl"}}, "more than one of"),
        ({"rl": {"patch": "patch", "onto": "stf"}, "sft": "sft"}, "`stf` is not a model of this recipe"),
        ({"rl": {"patch": "patch", "onto": "rl"}}, "`rl` is a patch itself"),
    ):
        with pytest.raises(RecipeError, match=message):
            skillmerge.apply(write_recipe(tmp_path, "rl", models=models), tmp_path / "out")


def test_a_patch_that_changes_is_noticed(tmp_path: Path) -> None:
    """The plan of a patched model depends on the patch: the same command does not say that it is done already."""
    write_pair(tmp_path)
    sft, rl = (read_checkpoint(tmp_path / name) for name in ("sft", "rl"))
    write_patch(tmp_path / "patch", sft, rl, torch.int32)
    recipe = write_recipe(tmp_path, "rl", models=PATCHED)
    first = skillmerge.apply(recipe, tmp_path / "out")
    assert skillmerge.apply(recipe, tmp_path / "out").already
    shutil.rmtree(tmp_path / "patch")
    rl["small"][0] = 3.0
    write_patch(tmp_path / "patch", sft, rl, torch.int32)
    with pytest.raises(UsageError, match="already exists"):
        skillmerge.apply(recipe, tmp_path / "out")
    again = skillmerge.apply(recipe, tmp_path / "out", overwrite=True)
    assert first.manifest.files != again.manifest.files


def test_commands(tmp_path: Path) -> None:
    write_pair(tmp_path)
    assert run_cli("extract", "--from", "rl", "--minus", "sft", "-o", "skill", cwd=tmp_path).returncode == 0
    process = run_cli("export", "skill", "--onto", "sft", "-o", "patch", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "of the elements in 2 tensors" in process.stdout
    process = run_cli("extract", "--from", "patch", "--minus", "sft", "-o", "again", "--json", cwd=tmp_path)
    assert json.loads(process.stdout)["ok"]
    process = run_cli("verify", "again", "--parent", "rl", cwd=tmp_path)
    assert "`rl` of this skill" in process.stdout
    assert run_cli("export", "skill", "-o", "x", cwd=tmp_path).returncode == 2
    assert run_cli("export", "skill", "-o", "x", "--onto", "sft", "--lora-rank", "2", cwd=tmp_path).returncode == 2
    assert run_cli("export", "skill", "-o", "x", "--onto", "sft", "--base", "y", cwd=tmp_path).returncode == 2
    assert run_cli("export", "skill", "-o", "x", "--onto", "rl", cwd=tmp_path).returncode == 3
