"""Stored skills: exact whatever the parents hold, small, readable by others, refused where they are damaged."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from conftest import (
    random_tensors,
    read_checkpoint,
    run_cli,
    tensor_shapes,
    weights,
    write_checkpoint,
    write_recipe,
)
from safetensors.torch import load_file, save_file
from skill_reader import read_skill
from stored_skills import WITH_SKILL, both
from test_laws import DTYPES, INTEGERS, every_kind_of_number

import skillmerge
from skillmerge.bits import bit_view
from skillmerge.checkpoints.kinds.sparse import Encoder
from skillmerge.errors import CheckFailed, InputError, SkillmergeError, UsageError
from skillmerge.tensors import BLOCK, UNIT
from skillmerge.verbs.extract import check_parent

# -------------------------------------------------------------------------------------------------------- lossless


FORMS = {
    "target + lam * (rl - sft)": "target + lam * math",
    "target - lam * (rl - sft)": "target - lam * math",
    "lam * (rl - sft) + target": "lam * math + target",
    "target - lam * (sft - rl)": "target + lam * math",
    "(2 * target + lam * (rl - sft) / 3) / 2": "(2 * target + lam * math / 3) / 2",
}


ALL_DTYPES = [*DTYPES, torch.float64]


def numbers(dtype: torch.dtype, seed: int) -> torch.Tensor:
    if dtype == torch.float64:  # of few exponents, and some zeros of both signs
        values = every_kind_of_number(torch.bfloat16, seed).double()
        return torch.where(values.abs() < 1e30, values * (1 + seed * 2**-40), values)
    return every_kind_of_number(dtype, seed)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("parents", ["any", "near", "sft is target", "rl is target", "rl is sft"])
def test_merge_through_the_skill_has_the_bytes_of_the_merge(tmp_path: Path, dtype: torch.dtype, parents: str) -> None:
    """Random bit patterns of all exponents, signs of zeros and subnormals included."""
    target, rl, sft = (numbers(dtype, seed) for seed in range(3))
    if parents == "near":
        kept = torch.arange(sft.numel()) % 5 > 0
        rl = torch.where(kept, sft, (sft.double() * 1.004).to(dtype))
    elif parents == "sft is target":
        sft = target.clone()
    elif parents == "rl is target":
        rl = target.clone()
    elif parents == "rl is sft":
        rl = sft.clone()
    for name, tensor in (("target", target), ("rl", rl), ("sft", sft)):
        write_checkpoint(tmp_path / name, {"model.layers.0.mlp.weight": tensor})
    for lam in (1.0, -1.0, 0.3):
        for direct, stored in FORMS.items():
            first, second = both(tmp_path, direct, stored, coefficients={"lam": lam})
            assert weights(first) == weights(second), (lam, direct)
    for wanted in ("float32", "bfloat16"):
        options = {"path": "merged", "dtype": wanted, "rounding": "stochastic", "seed": 5}
        first, second = both(tmp_path, *next(iter(FORMS.items())), coefficients={"lam": 1.0}, output=options)
        assert weights(first) == weights(second)


@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("sft_dtype", ALL_DTYPES)
def test_dtypes_may_be_mixed(tmp_path: Path, target_dtype: torch.dtype, sft_dtype: torch.dtype) -> None:
    dtypes = {"target": target_dtype, "rl": torch.bfloat16, "sft": sft_dtype}
    for seed, (name, dtype) in enumerate(dtypes.items()):
        write_checkpoint(tmp_path / name, {"model.layers.0.mlp.weight": numbers(dtype, seed)})
    for lam, dtype in ((1.0, "float32"), (0.7, "float32"), (1.0, "bfloat16")):
        options = {"path": "merged", "dtype": dtype}
        first, second = both(tmp_path, *next(iter(FORMS.items())), coefficients={"lam": lam}, output=options)
        assert weights(first) == weights(second)


@pytest.mark.parametrize("dtype", DTYPES)
def test_skill_on_its_sft_gives_rl_back(tmp_path: Path, dtype: torch.dtype) -> None:
    rl, sft = every_kind_of_number(dtype, 1), every_kind_of_number(dtype, 2)
    write_checkpoint(tmp_path / "rl", {"model.layers.0.mlp.weight": rl})
    write_checkpoint(tmp_path / "sft", {"model.layers.0.mlp.weight": sft})
    skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), tmp_path / "math")
    models = {"sft": "sft", "math": {"skill": "math"}}
    output = skillmerge.apply(write_recipe(tmp_path, "sft + math", models=models)).output
    found = read_checkpoint(output)["model.layers.0.mlp.weight"]
    assert torch.equal(found.view(INTEGERS[dtype]), rl.view(INTEGERS[dtype]))
    ((plus, minus),) = read_skill(tmp_path / "math").values()
    assert torch.equal(plus.double() - minus.double(), rl.double() - sft.double())


def test_rules_and_depth_work_with_skills(family: Path) -> None:
    rules = [
        {"layers": "0-", "ramp": [0.2, 1.0]},
        {"modules": "norm", "value": 0.0},
        {"tensors": "*q_proj*", "value": 1.0},
    ]
    first, second = both(
        family.parent, *next(iter(FORMS.items())), coefficients={"lam": {"default": 0.5, "rules": rules}}
    )
    assert weights(first) == weights(second)


def test_two_skills_in_one_formula(tmp_path: Path) -> None:
    for seed, name in enumerate(("target", "a", "b", "sft")):
        write_checkpoint(tmp_path / name, random_tensors(tensor_shapes(), seed=seed))
    for name in ("a", "b"):
        skillmerge.extract(str(tmp_path / name), str(tmp_path / "sft"), tmp_path / f"skill-{name}")
    models = {"target": "target", "a": "a", "b": "b", "sft": "sft"}
    recipe = write_recipe(tmp_path, "target + 0.6 * (a - sft) - 0.4 * (b - sft)", models=models)
    direct = skillmerge.apply(recipe, tmp_path / "direct").output
    models = {"target": "target", "x": {"skill": "skill-a"}, "y": {"skill": "skill-b"}}
    recipe = write_recipe(tmp_path, "target + 0.6 * x - 0.4 * y", models=models)
    assert weights(skillmerge.apply(recipe, tmp_path / "stored").output) == weights(direct)


# ----------------------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize("share", [0.0, 1e-6, 1e-3, 0.03, 0.1, 0.2, 0.6, 1.0])
def test_any_reader_reads_it_and_it_takes_the_smallest_encoding(tmp_path: Path, share: float) -> None:
    """A tensor of more than one unit; sizes against the arithmetic of the four encodings."""
    count = UNIT + BLOCK + 77
    generator = torch.Generator().manual_seed(5)
    sft = torch.randn(count, generator=generator).bfloat16()
    changed = torch.rand(count, generator=generator) < share
    if share == 1e-6:
        changed[[0, 65_535, 65_536, count - 1]] = True
    rl = torch.where(changed, (sft.float() * 1.01).bfloat16(), sft)
    write_checkpoint(tmp_path / "rl", {"model.layers.0.mlp.weight": rl})
    write_checkpoint(tmp_path / "sft", {"model.layers.0.mlp.weight": sft})
    skill = skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), tmp_path / "math").output
    ((plus, minus),) = read_skill(skill).values()
    assert torch.equal(plus.float() - minus.float(), rl.float() - sft.float())
    row = json.loads((skill / "skill.json").read_text())["tensors"]["model.layers.0.mlp.weight"]
    differing = int((rl != sft).sum())
    assert row["changed"] == differing
    update = rl.double() - sft.double()
    assert row["sum_of_squares"] == pytest.approx(float((update**2).sum()), rel=1e-12)
    blocks = -(-UNIT // BLOCK) + 1 + 3
    least = min(count * 2, count / 8 + differing * 2 + 4 * blocks, differing * 3 + 8 * blocks + count / 255 / 8)
    assert row["bytes"] <= least * 1.02 + 2 * count / 255 + 100
    assert row["encoding"]["plus"][0] == {
        0.0: "zero", 1e-6: "gaps", 1e-3: "gaps", 0.03: "gaps", 0.1: "gaps", 0.2: "bitmap", 0.6: "bitmap", 1.0: "dense"
    }[share]  # fmt: skip


def test_rl_update_of_a_fifth_takes_a_third_at_most(tmp_path: Path) -> None:
    shapes = {f"model.layers.{layer}.mlp.weight": (1024, 1024) for layer in range(4)}
    sft = random_tensors(shapes, seed=1)
    generator = torch.Generator().manual_seed(2)
    rl = {}
    for name, tensor in sft.items():
        one = torch.randint(0, 2, tensor.shape, generator=generator, dtype=torch.int16) * 2 - 1
        moved = (tensor.view(torch.int16) + one).view(torch.bfloat16)
        rl[name] = torch.where(torch.rand(tensor.shape, generator=generator) < 0.2, moved, tensor)
    write_checkpoint(tmp_path / "rl", rl)
    write_checkpoint(tmp_path / "sft", sft)
    result = skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), tmp_path / "math")
    size = sum(path.stat().st_size for path in result.output.iterdir())
    assert size <= 0.35 * sum(path.stat().st_size for path in (tmp_path / "rl").glob("*.safetensors"))


@pytest.mark.parametrize("share", [0.0, 1e-3, 0.2, 1.0])
def test_compressed_skill_is_smaller_and_the_same(tmp_path: Path, share: float) -> None:
    count = UNIT + BLOCK + 77
    generator = torch.Generator().manual_seed(5)
    sft = torch.randn(count, generator=generator).bfloat16()
    changed = torch.rand(count, generator=generator) < share
    rl = torch.where(changed, (sft.float() * 1.01).bfloat16(), sft)
    target = torch.randn(count, generator=generator).bfloat16()
    for name, tensor in (("target", target), ("rl", rl), ("sft", sft)):
        write_checkpoint(tmp_path / name, {"model.layers.0.mlp.weight": tensor})
    plain = skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), tmp_path / "plain").output
    small = skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), tmp_path / "math", zstd=True).output
    for one, two in zip(read_skill(plain).values(), read_skill(small).values(), strict=True):
        assert all(torch.equal(bit_view(a), bit_view(b)) for a, b in zip(one, two, strict=True))
    sizes = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (plain, small)]
    assert sizes[1] < sizes[0] * 0.95 if share else sizes[0] == sizes[1]
    first, second = both(tmp_path, *next(iter(FORMS.items())))
    assert weights(first) == weights(second)
    skillmerge.verify(small)


def test_compressed_part_that_lies_is_refused(family: Path) -> None:
    folder = family.parent
    shapes = {"model.layers.0.mlp.weight": (300, 300)}
    for seed, name in enumerate(("target", "rl", "sft")):
        shutil.rmtree(folder / name)
        write_checkpoint(folder / name, random_tensors(shapes, seed=seed // 2))
    tensors = load_file(folder / "rl" / "model.safetensors")
    tensors["model.layers.0.mlp.weight"][::3] *= 2
    save_file(tensors, folder / "rl" / "model.safetensors")
    skill = skillmerge.extract(str(folder / "rl"), str(folder / "sft"), folder / "math", zstd=True).output
    file = next(skill.glob("*.safetensors"))
    parts = load_file(file)
    name = next(name for name in parts if name.endswith(".zst"))
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 30))
    for frame in (bomb, b"not a frame", zstandard.ZstdCompressor().compress(b"short")):
        stored = len(frame).to_bytes(8, "little") + frame + bytes(-len(frame) % 8)
        save_file({**parts, name: torch.frombuffer(bytearray(stored), dtype=torch.uint8)}, file)
        recipe = write_recipe(folder, "target + math", models=WITH_SKILL)
        with pytest.raises(InputError):
            skillmerge.apply(recipe)


def test_compression_is_for_skills(family: Path) -> None:
    with pytest.raises(UsageError, match="only a skill can be compressed"):
        skillmerge.plan(write_recipe(family.parent, output={"path": "merged", "compression": "zstd"}))


def test_encoder_takes_pieces_as_they_come() -> None:
    """However a run is cut into pieces (of whole blocks), it is encoded alike."""
    generator = torch.Generator().manual_seed(0)
    length = 5 * BLOCK + 123
    places = (torch.rand(length, generator=generator) < 0.05).nonzero().squeeze(1)
    values = torch.randn(len(places), generator=generator).bfloat16()
    encoded = []
    for step in (BLOCK, 2 * BLOCK, 8 * BLOCK):
        encoder = Encoder(torch.bfloat16)
        for start in range(0, length, step):
            inside = (places >= start) & (places < start + step)
            mask = torch.zeros(min(step, length - start), dtype=torch.bool)
            mask[places[inside] - start] = True
            encoder.add(mask, places[inside] - start, values[inside])
        encoded.append(encoder.finish())
    for other in encoded[1:]:
        assert other.encoding == encoded[0].encoding == "gaps"
        assert all(torch.equal(other.parts[name], part) for name, part in encoded[0].parts.items())


def test_threads_change_no_byte(family: Path) -> None:
    folder = family.parent
    skills = [
        skillmerge.extract(str(folder / "rl"), str(folder / "sft"), folder / f"math{count}", threads=count).output
        for count in (1, 2, 5)
    ]
    files = [{p.name: p.read_bytes() for p in skill.glob("skill*") if "merge" not in p.name} for skill in skills]
    assert files[0] == files[1] == files[2]


# ----------------------------------------------------------------------------------------------- wrong and damaged


def test_parents_are_known_by_their_digests(family: Path) -> None:
    folder = family.parent
    skillmerge.extract(str(folder / "rl"), str(folder / "sft"), folder / "math")
    for parent in ("rl", "sft"):
        process = run_cli("verify", "math", "--parent", parent, cwd=folder)
        assert process.returncode == 0, process.stderr
        assert f"is `{parent}` of this skill" in process.stdout
    process = run_cli("verify", "math", "--parent", "target", cwd=folder)
    assert process.returncode == 3
    assert "target is not a parent of math: tensor `" in process.stderr
    file = next((folder / "sft").glob("*.safetensors"))
    tensors = load_file(file)
    tensors[next(iter(tensors))].view(torch.int16).flatten()[3] ^= 1
    save_file(tensors, file)
    with pytest.raises(CheckFailed, match="differs"):
        check_parent(folder / "math", str(folder / "sft"))


def test_skill_of_another_architecture_is_refused(family: Path, tmp_path: Path) -> None:
    folder = family.parent
    skillmerge.extract(str(folder / "rl"), str(folder / "sft"), folder / "math")
    write_checkpoint(folder / "larger", random_tensors(tensor_shapes(layers=4)))
    models = {"target": "larger", "math": {"skill": "math"}}
    recipe = write_recipe(folder, "target + math", models=models)
    with pytest.raises(InputError, match="model `math` lacks 3 tensors"):
        skillmerge.apply(recipe)


def test_model_and_skill_are_not_mistaken_for_each_other(family: Path) -> None:
    folder = family.parent
    skillmerge.extract(str(folder / "rl"), str(folder / "sft"), folder / "math")
    with pytest.raises(InputError, match="is a skill, not a model"):
        skillmerge.plan(write_recipe(folder, "target + math", models={"target": "target", "math": "math"}))
    with pytest.raises(InputError, match="is not a skill"):
        skillmerge.plan(write_recipe(folder, "target + rl", models={"target": "target", "rl": {"skill": "rl"}}))
    with pytest.raises(UsageError, match="more than one of `path`, `skill`, `patch`"):
        skillmerge.plan(write_recipe(folder, "rl", models={"rl": {"skill": "rl", "path": "rl"}}))
    with pytest.raises(UsageError, match="is a skill, which has no tensors to take"):
        skillmerge.plan(
            write_recipe(folder, "target + math", models=WITH_SKILL, copy=[{"tensors": "*norm*", "from": "math"}])
        )


def damage(skill: Path, how: str) -> None:
    file = next(skill.glob("*.safetensors"))
    document = json.loads((skill / "skill.json").read_text())
    name, row = next(iter(document["tensors"].items()))
    if how == "parts":
        tensors = load_file(file)
        del tensors[next(key for key in tensors if key.endswith("values"))]
        save_file(tensors, file)
    elif how == "starts":
        tensors = load_file(file)
        key = next(key for key in tensors if key.endswith("starts"))
        tensors[key].flatten()[-1] = 10**6
        tensors[key].flatten()[1] = 10**6
        save_file(tensors, file)
    elif how == "mask":
        tensors = load_file(file)
        for key in (key for key in tensors if key.endswith(("mask", "gaps"))):
            tensors[key] |= 255
        save_file(tensors, file)
    elif how == "second file":
        shutil.copy(file, skill / "skill-00009-of-00009.safetensors")
        document["files"].append("skill-00009-of-00009.safetensors")
        (skill / "skill.json").write_text(json.dumps(document))
    elif how == "stray part":
        tensors = load_file(file)
        save_file({**tensors, "other@0.plus.values": torch.zeros(8)}, file)
    elif how == "file":
        file.unlink()
    elif how == "cut short":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        changes: dict[str, Any] = {
            "shape": {"tensors": {**document["tensors"], name: {**row, "shape": [1 << 39, 1 << 39]}}},
            "bomb": {"tensors": {**document["tensors"], "model.zero": {**row, "shape": [1 << 39, 1 << 39]}}},
            "no files": {"files": []},
            "digests": {"tensors": {**document["tensors"], name: {**row, "digests": [1]}}},
            "dtype": {"tensors": {**document["tensors"], name: {**row, "dtype": "I64"}}},
            "version": {"skill_version": 2},
            "no tensors": {"tensors": None},
            "path": {"files": ["../rl/model-00001-of-00002.safetensors"]},
            "other file": {"tensors": {**document["tensors"], name: {**row, "file": "elsewhere.safetensors"}}},
            "config": {"configs": {"plus": [], "minus": {}}},
        }
        (skill / "skill.json").write_text(json.dumps({**document, **changes[how]}))


@pytest.mark.parametrize(
    "how",
    ["parts", "starts", "stray part", "file", "cut short", "shape", "dtype", "version", "no tensors", "path",
     "other file", "config", "bomb", "no files", "digests", "mask", "second file"],
)  # fmt: skip
def test_damaged_skill_is_refused(family: Path, how: str) -> None:
    folder = family.parent
    skill = skillmerge.extract(str(folder / "rl"), str(folder / "sft"), folder / "math").output
    damage(skill, how)
    with pytest.raises(CheckFailed):
        skillmerge.verify(skill)
    recipe = write_recipe(folder, "target + math", models=WITH_SKILL)
    with pytest.raises(SkillmergeError) as error:
        skillmerge.apply(recipe)
    assert isinstance(error.value, InputError), error.value
    assert not (folder / "merged").exists()


def test_verify_notices_every_flipped_bit(family: Path) -> None:
    folder = family.parent
    skill = skillmerge.extract(str(folder / "rl"), str(folder / "sft"), folder / "math").output
    assert skillmerge.verify(skill).files == 4
    generator = random.Random(3)
    for path in skill.iterdir():
        content = path.read_bytes()
        for _ in range(5):
            changed = bytearray(content)
            changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            path.write_bytes(changed)
            with pytest.raises(CheckFailed):
                skillmerge.verify(skill)
        path.write_bytes(content)
    skillmerge.verify(skill)


def test_infinite_values_are_refused(tmp_path: Path) -> None:
    tensors = random_tensors(tensor_shapes())
    write_checkpoint(tmp_path / "sft", tensors)
    tensors["model.norm.weight"][5] = float("inf")
    write_checkpoint(tmp_path / "rl", tensors)
    with pytest.raises(InputError, match=r"holds inf in tensor `model.norm.weight` at element 5"):
        skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), tmp_path / "math")
    assert not (tmp_path / "math").exists()
