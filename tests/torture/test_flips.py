"""Single bits that are not what they were: every one in an output or a pinned input is noticed, and one in the
header of any other input is an error or changes nothing for the safetensors library either."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import flip, tensor_shapes, write_family, write_recipe
from safetensors import SafetensorError, deserialize

import skillmerge
from skillmerge.checkpoints.safetensors import read_header
from skillmerge.errors import CheckFailed, InputError, SkillmergeError, StalePlan
from skillmerge.plans import saved as savedplan
from skillmerge.plans.saved import describe
from skillmerge.verbs.extract import check_parent

pytestmark = pytest.mark.timeout(3600)


@pytest.fixture
def bits(request: pytest.FixtureRequest) -> int:
    """Of payloads, in each place."""
    return 2000 if request.config.getoption("--long") else 300


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small family, with an output and a skill cut from it."""
    folder = tmp_path_factory.mktemp("family")
    skillmerge.apply(write_family(folder, tensor_shapes(layers=1, hidden=8)))
    skillmerge.extract(folder / "rl", folder / "sft", folder / "math")
    return folder


def payload_bits(paths: list[Path], dice: random.Random, count: int) -> list[tuple[Path, int]]:
    starts = {path: 8 + int.from_bytes(path.read_bytes()[:8], "little") for path in paths}
    chosen = [dice.choice(paths) for _ in range(count)]
    return [(path, dice.randrange(8 * starts[path], 8 * path.stat().st_size)) for path in chosen]


def test_any_bit_of_a_header_is_an_error_or_means_the_same_to_the_library(
    artefacts: Path, tmp_path: Path, tally: Callable[..., None]
) -> None:
    path = tmp_path / "model.safetensors"
    sound = (artefacts / "target" / "model-00001-of-00002.safetensors").read_bytes()
    size = 8 + int.from_bytes(sound[:8], "little")
    refused = alike = 0
    for bit in range(8 * size):
        content = bytearray(sound)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            found = read_header(str(path), "file").tensors
        except InputError:
            refused += 1
            continue
        try:
            theirs = {name: (info["dtype"], tuple(info["shape"]), bytes(info["data"]))
                      for name, info in deserialize(bytes(content))}  # fmt: skip
        except SafetensorError:
            raise AssertionError(f"bit {bit}: accepted, and refused by the safetensors library") from None
        assert {spec.name: (spec.dtype, spec.shape, bytes(content[spec.start : spec.end])) for spec in found} == theirs
        alike += 1
    tally(bits=8 * size, refused=refused, understood_alike=alike)
    assert refused > alike > 0  # what is alike is most often another letter in a name


def test_any_bit_of_an_output_is_noticed(artefacts: Path, bits: int, tally: Callable[..., None]) -> None:
    output, dice = artefacts / "merged", random.Random(0)
    chosen = payload_bits(sorted(output.glob("*.safetensors")), dice, bits)
    header = output / "model-00001-of-00002.safetensors"
    chosen += [(header, bit) for bit in range(0, 8 * (8 + int.from_bytes(header.read_bytes()[:8], "little")), 7)]
    chosen += [(path, dice.randrange(8 * path.stat().st_size)) for path in output.glob("*.json") for _ in range(100)]
    for path, bit in chosen:
        flip(path, bit // 8, bit % 8, keep_times=True)
        with pytest.raises(CheckFailed):
            skillmerge.verify(output)
        flip(path, bit // 8, bit % 8, keep_times=True)
    skillmerge.verify(output)
    tally(bits=len(chosen), noticed=len(chosen))


def test_any_bit_of_a_stored_skill_is_noticed(artefacts: Path, bits: int, tally: Callable[..., None]) -> None:
    skill, dice = artefacts / "math", random.Random(1)
    chosen = payload_bits(sorted(skill.glob("*.safetensors")), dice, bits)
    for path, bit in chosen:
        flip(path, bit // 8, bit % 8, keep_times=True)
        with pytest.raises(CheckFailed):
            skillmerge.verify(skill)
        flip(path, bit // 8, bit % 8, keep_times=True)
    skillmerge.verify(skill)
    tally(bits=len(chosen), noticed=len(chosen))


def test_any_bit_of_a_parent_is_noticed(artefacts: Path, bits: int, tally: Callable[..., None]) -> None:
    """`verify SKILL --parent`: the weights that a skill was cut from are known by their digests."""
    chosen = payload_bits(sorted((artefacts / "rl").glob("*.safetensors")), random.Random(2), bits)
    for path, bit in chosen:
        flip(path, bit // 8, bit % 8, keep_times=True)
        with pytest.raises(CheckFailed):
            check_parent(artefacts / "math", str(artefacts / "rl"))
        flip(path, bit // 8, bit % 8, keep_times=True)
    assert check_parent(artefacts / "math", str(artefacts / "rl")) == "rl"
    tally(bits=len(chosen), noticed=len(chosen))


def test_any_bit_of_a_saved_plan_is_noticed_or_changes_nothing(
    artefacts: Path, bits: int, tally: Callable[..., None]
) -> None:
    """What is a remark for people, or white space, may differ; whatever is done is what was planned."""
    recipe = write_recipe(artefacts, output={"path": "planned"})
    path = artefacts / "plan.json"
    planned = skillmerge.plan(recipe)
    sound = (json.dumps({"ok": True, **describe(planned)}, indent=1) + "\n").encode()
    dice, noticed = random.Random(3), 0
    chosen = dice.sample(range(8 * len(sound)), min(bits, 8 * len(sound)))
    for bit in chosen:
        content = bytearray(sound)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        noticed += not _is_taken(path, planned)
    tally(bits=len(chosen), noticed=noticed, harmless=len(chosen) - noticed)
    assert noticed > 0.5 * len(chosen)


def _is_taken(path: Path, planned: Any) -> bool:
    """Whether `apply` believes a plan, in which case it has to be the one that was made."""
    if not savedplan.looks_saved(path):
        return False
    try:
        saved = savedplan.read(path)
        saved.check(skillmerge.plan(saved.recipe))
    except SkillmergeError:
        return False
    wanted = json.loads(json.dumps(describe(planned)))
    differ = {key for key in wanted if saved.document.get(key) != wanted[key]}
    assert differ <= {"recipe", "problems", "warnings", "notes", "compared", "merged_share"}
    assert saved.recipe.document.text == planned.recipe.document.text
    return True


def test_weights_written_again_under_a_saved_plan_are_noticed(artefacts: Path, tally: Callable[..., None]) -> None:
    """A plan pins its inputs by size, time and header: a bit that flips without a trace is for --hash-inputs."""
    recipe = write_recipe(artefacts, output={"path": "planned"})
    path = artefacts / "plan.json"
    path.write_text(json.dumps({"ok": True, **describe(skillmerge.plan(recipe))}, indent=1) + "\n")
    chosen = payload_bits(sorted((artefacts / "rl").glob("*.safetensors")), random.Random(4), 50)
    for number, (file, bit) in enumerate(chosen, 1):
        before = file.stat()
        flip(file, bit // 8, bit % 8, keep_times=True)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + number))
        with pytest.raises(StalePlan):
            skillmerge.apply(path)
        flip(file, bit // 8, bit % 8, keep_times=True)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not (artefacts / "planned").exists()
    tally(bits=len(chosen), noticed=len(chosen))
