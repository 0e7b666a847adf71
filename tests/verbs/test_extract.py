"""Skills cut from models and from skills: what they hold, resumed, bounded, pruned, on the command line."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from command_server import Commands
from conftest import (
    PEAK_MEMORY,
    random_tensors,
    read_checkpoint,
    run_cli,
    tensor_shapes,
    weights,
    write_checkpoint,
    write_family,
    write_recipe,
)
from skill_reader import read_skill
from stored_skills import both

import skillmerge
from skillmerge.bits import bit_view
from skillmerge.errors import InputError, ResourceError, SkillmergeError, UsageError
from skillmerge.outputs import shard_file
from skillmerge.tensors import UNIT

# ----------------------------------------------------------------------------------------------- skills from skills


def cut(folder: Path, merge: str, models: dict[str, Any], name: str, **output: Any) -> Path:
    recipe = write_recipe(
        folder, merge, models=models, coefficients=None, output={"kind": "skill", "path": name, **output}
    )
    return skillmerge.apply(recipe).output


def test_masked_skill_is_still_exact(family: Path) -> None:
    folder = family.parent
    skillmerge.extract(str(folder / "rl"), str(folder / "sft"), folder / "math")
    mask = {"default": 1.0, "rules": [{"modules": "mlp", "value": 0.0}]}
    recipe = write_recipe(
        folder, "mask * math", models={"math": {"skill": "math"}}, coefficients={"mask": mask},
        output={"kind": "skill", "path": "masked"},
    )  # fmt: skip
    masked = read_skill(skillmerge.apply(recipe).output)
    for name, (plus, minus) in read_skill(folder / "math").items():
        if "mlp" in name:
            assert not masked[name][0].any()
            assert not masked[name][1].any()
        else:
            assert torch.equal(bit_view(masked[name][0]), bit_view(plus))
            assert torch.equal(bit_view(masked[name][1]), bit_view(minus))


def test_blended_skill_is_the_blend_in_float32(family: Path) -> None:
    folder = family.parent
    skillmerge.extract(str(folder / "rl"), str(folder / "sft"), folder / "a")
    skillmerge.extract(str(folder / "target"), str(folder / "sft"), folder / "b")
    blend = cut(folder, "0.5 * a - 0.25 * b", {"a": {"skill": "a"}, "b": {"skill": "b"}}, "blend")
    parents = [read_checkpoint(folder / name) for name in ("rl", "target", "sft")]
    for name, (plus, minus) in read_skill(blend).items():
        rl, target, sft = (parent[name].double() for parent in parents)
        wanted = 0.5 * (rl - sft) - 0.25 * (target - sft)
        assert plus.dtype == torch.float32
        assert not minus.any()
        torch.testing.assert_close(plus.double(), wanted, rtol=2**-22, atol=1e-9)
    assert skillmerge.verify(blend).tensors == len(parents[0])


def test_rounded_skill_says_how_much_was_lost(family: Path) -> None:
    folder = family.parent
    parents = {name: {key: value.float() * 1.001 for key, value in read_checkpoint(folder / name).items()}
               for name in ("rl", "sft")}  # fmt: skip
    for name, tensors in parents.items():
        write_checkpoint(folder / f"{name}32", tensors)
    result = skillmerge.extract(str(folder / "rl32"), str(folder / "sft32"), folder / "lossy", dtype="bfloat16")
    lost = whole = 0.0
    for name, (plus, _) in read_skill(result.output).items():
        wanted = parents["rl"][name].double() - parents["sft"][name].double()
        assert torch.equal(plus, wanted.to(torch.float32).bfloat16()) or torch.equal(plus, wanted.bfloat16())
        lost += float(((wanted - plus.double()) ** 2).sum())
        whole += float((wanted**2).sum())
    document = json.loads((result.output / "skill.json").read_text())
    assert not document["exact"]
    assert document["relative_error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-9)
    assert 1e-4 < document["relative_error"] < 4e-3


def test_what_is_no_difference_is_refused(family: Path) -> None:
    for merge, message in (("target + lam * (rl - sft)", "a skill is a difference"), ("rl + sft", "a skill is a")):
        with pytest.raises(UsageError, match=message):
            skillmerge.apply(write_recipe(family.parent, merge, output={"kind": "skill", "path": "skill"}))
    with pytest.raises(UsageError, match="gives a difference"):
        skillmerge.apply(write_recipe(family.parent, "rl - sft"))


def test_integers_must_be_equal_and_are_not_stored(tmp_path: Path) -> None:
    for seed, name in enumerate(("target", "rl", "sft")):
        tensors = random_tensors(tensor_shapes(), seed=seed)
        write_checkpoint(tmp_path / name, {**tensors, "model.layers.0.attn.mask": torch.arange(70_000)})
    first, second = both(tmp_path, "target + lam * (rl - sft)", "target + lam * math")
    assert weights(first) == weights(second)
    assert "model.layers.0.attn.mask" not in read_skill(tmp_path / "math")
    tensors = {**random_tensors(tensor_shapes(), seed=1), "model.layers.0.attn.mask": torch.arange(70_000) + 1}
    write_checkpoint(tmp_path / "rl", tensors)
    with pytest.raises(InputError, match="differs between models") as error:
        skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), tmp_path / "other")
    assert error.value.fix == 'leave it out of the skill:\nignore:\n  - "model.layers.0.attn.mask"'
    ignore = ["*.attn.mask", "lm_head*"]
    other = skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), tmp_path / "other", ignore=ignore).output
    assert read_skill(other).keys() == read_skill(tmp_path / "math").keys() - {"lm_head.weight"}
    process = run_cli("extract", "--from", tmp_path / "rl", "--minus", tmp_path / "sft", "-o", tmp_path / "cli",
                      "--ignore", "*.attn.mask", "--ignore", "lm_head*")  # fmt: skip
    assert process.returncode == 0, process.stderr


def test_vocabularies_that_differ_can_be_left_out(tmp_path: Path) -> None:
    for seed, (name, words) in enumerate((("rl", 40), ("sft", 32))):
        shapes = {**tensor_shapes(), "model.embed_tokens.weight": (words, 16), "lm_head.weight": (words, 16)}
        write_checkpoint(tmp_path / name, random_tensors(shapes, seed=seed))
    with pytest.raises(InputError, match="their vocabularies seem to differ") as error:
        skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), tmp_path / "math")
    assert error.value.fix is not None
    globs = re.findall(r'--ignore "(.*?)"', error.value.fix)
    skill = skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), tmp_path / "math", ignore=globs).output
    assert len(read_skill(skill)) == len(tensor_shapes()) - 2


def test_difference_of_a_model_from_itself_is_empty(family: Path) -> None:
    for merge in ("rl - rl", "0.5 * (rl - rl)"):
        skill = cut(family.parent, merge, {"rl": "rl"}, f"empty-{len(merge)}")
        assert not any(plane.any() for planes in read_skill(skill).values() for plane in planes)
        skillmerge.verify(skill)


def test_many_tensors_get_files_whose_headers_can_be_read(tmp_path: Path) -> None:
    shapes = {f"model.layers.{number}.{'x' * 500}.weight": (2,) for number in range(2500)}
    for seed, name in enumerate(("rl", "sft")):
        write_checkpoint(tmp_path / name, random_tensors(shapes, seed=seed))
    skill = skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), tmp_path / "math").output
    assert len(list(skill.glob("*.safetensors"))) > 1
    assert len(read_skill(skill)) == 2500


def test_output_inside_a_finished_one_is_refused(family: Path) -> None:
    folder = family.parent
    skillmerge.extract(str(folder / "rl"), str(folder / "sft"), folder / "math")
    with pytest.raises(UsageError, match="is inside"):
        skillmerge.extract(str(folder / "rl"), str(folder / "sft"), folder / "math" / "inner")
    skillmerge.verify(folder / "math")


def test_large_skills_have_several_files(family: Path) -> None:
    folder = family.parent
    skill = cut(folder, "rl - sft", {"rl": "rl", "sft": "sft"}, "math", shard_size="2KB")
    names = sorted(path.name for path in skill.glob("*.safetensors"))
    assert names[0] == f"skill-00001-of-{len(names):05d}.safetensors"
    assert len(names) > 2
    first, second = both(folder, "target + lam * (rl - sft)", "target + lam * math")
    assert weights(first) == weights(second)


# ------------------------------------------------------------------------------------------------ resume and bounds


def test_interrupted_extraction_is_continued(commands: Commands, tmp_path: Path) -> None:
    """Killed at random instants, then run again: the bytes of a run that was left alone."""
    shapes = {f"model.layers.{layer}.mlp.weight": (512, 1024) for layer in range(8)}
    write_family(tmp_path, shapes, shards=8)
    models = {"rl": "rl", "sft": "sft"}
    recipe = write_recipe(
        tmp_path, "rl - sft", models=models, coefficients=None,
        output={"kind": "skill", "path": "math", "shard_size": "1MB"},
    )  # fmt: skip
    began = time.monotonic()
    commands.start("apply", recipe, "-q").wait()
    duration = time.monotonic() - began
    wanted = weights(tmp_path / "math")
    generator = random.Random(1)
    for _ in range(6):
        shutil.rmtree(tmp_path / "math")
        process = commands.start("apply", recipe, "-q")
        time.sleep(duration * generator.uniform(0.1, 1.0))
        process.kill()
        process.wait()
        assert commands.start("apply", recipe, "-q").wait().returncode == 0
        assert weights(tmp_path / "math") == wanted
        assert not (tmp_path / "math.partial").exists()


def test_finished_skill_is_left_as_it_is(family: Path) -> None:
    folder = family.parent
    first = skillmerge.extract(str(folder / "rl"), str(folder / "sft"), folder / "math")
    again = skillmerge.extract(str(folder / "rl"), str(folder / "sft"), folder / "math")
    assert (first.already, again.already) == (False, True)


def test_short_writes_are_written_on(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by letting calls of the system do less: half a header was taken for a finished one."""
    wanted = weights(cut(family.parent, "rl - sft", {"rl": "rl", "sft": "sft"}, "wanted"))

    class Dribble(FileIO):
        def write(self, content: Any) -> int:
            return super().write(memoryview(content)[:77])

    monkeypatch.setattr(shard_file, "open", lambda path, mode, buffering: Dribble(path, mode), raising=False)
    assert weights(cut(family.parent, "rl - sft", {"rl": "rl", "sft": "sft"}, "dribbled")) == wanted


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """Tensors of 60 million elements, all of them changed: the worst case."""
    for seed, name in enumerate(("rl", "sft")):
        row = random_tensors({"model.layers.0.mlp.weight": (1, 1 << 20)}, seed=seed)
        write_checkpoint(tmp_path / name, {key: value.repeat(60, 1) for key, value in row.items()})
    program = (
        "import re, skillmerge;"
        f"skillmerge.extract({str(tmp_path / 'rl')!r}, {str(tmp_path / 'sft')!r}, {str(tmp_path / 'math')!r});"
        f"print({PEAK_MEMORY})"
    )
    extracting = int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
    recipe = write_recipe(tmp_path, "sft + 0.7 * math", models={"sft": "sft", "math": {"skill": "math"}})
    program = f"import re, skillmerge; skillmerge.apply({str(recipe)!r}); print({PEAK_MEMORY})"
    applying = int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
    assert extracting < 700e6
    assert applying < 500e6
    with pytest.raises(ResourceError, match="too low"):
        skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), tmp_path / "m", memory_limit=300_000_000)


# ---------------------------------------------------------------------------------------------------- command line


def test_extract_command(family: Path) -> None:
    folder = family.parent
    process = run_cli("extract", "--from", "rl", "--minus", "sft", "-o", "math", cwd=folder)
    assert process.returncode == 0, process.stderr
    assert re.search(r"wrote .*math, [\d.]+ of the [\d.]+ KB that it would take uncompressed", process.stdout)
    process = run_cli("extract", "--from", "rl", "--minus", "rl", "-o", "none", "--json", cwd=folder)
    document = json.loads(process.stdout)
    assert document["statistics"]["all"]["changed"] == 0
    assert "this skill is empty" in document["warnings"][0]
    process = run_cli("verify", "math", "--parent", "rl", "--json", cwd=folder)
    assert json.loads(process.stdout)["parent"] == "rl"
    for arguments, status, message in (
        (("extract", "--from", "nowhere", "--minus", "sft", "-o", "x"), 4, "nowhere"),
        (("extract", "--from", "rl", "--minus", "sft", "-o", "math", "--dtype", "bfloat16"), 2, "already exists"),
        (("extract", "--from", "rl", "-o", "x"), 2, "--minus"),
    ):
        process = run_cli(*arguments, cwd=folder)
        assert process.returncode == status, process.stderr
        assert message in process.stderr


def test_plan_shows_a_skill(family: Path, edit: Callable[..., Path]) -> None:
    edit(family, merge="rl - sft", coefficients=None, output={"kind": "skill", "path": "math"})
    process = run_cli("plan", family)
    assert process.returncode == 0, process.stderr
    assert "kept exactly" in process.stdout
    assert "at most" in process.stdout


# ------------------------------------------------------------------------------------------------------------ pruned


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 1.0])
def test_kept_elements_are_the_largest_with_the_norm_restored(tmp_path: Path, share: float) -> None:
    """Against numpy on whole tensors; a large tensor has two units."""
    shapes = {"w": (UNIT // 512 + 100, 512), "norm": (300,), "one": (1,), "same": (50,)}
    tensors = {seed: random_tensors(shapes, torch.float32, seed) for seed in (1, 2)}
    tensors[2]["same"] = tensors[1]["same"]
    write_checkpoint(tmp_path / "rl", tensors[1])
    write_checkpoint(tmp_path / "sft", tensors[2])
    skill = skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), tmp_path / "skill", keep=share).output
    found, document = read_skill(skill), json.loads((skill / "skill.json").read_text())
    for name in shapes:
        update = (tensors[1][name].double() - tensors[2][name].double()).flatten()
        kept = found[name][0].double().flatten()
        stays = kept != 0
        wanted = max(1, int(share * update.numel())) if name != "same" else 0
        # Sizes are told apart to one part in 256: at the edge a bin of them is left out.
        assert wanted * 0.97 - 60 <= int(stays.sum()) <= max(wanted, 1), name
        if name != "same":
            assert update[stays].abs().min() >= update[~stays].abs().max() if bool((~stays).any()) else True
            assert float(kept.norm()) == pytest.approx(float(update.norm()), rel=1e-5)
            assert document["tensors"][name]["kept"]["share"] == pytest.approx(int(stays.sum()) / update.numel())
            ratio = kept[stays] / update[stays]
            assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-5)
    assert not document["exact"]
    assert skillmerge.verify(skill).tensors == 4


def test_keep_is_of_skills_only(tmp_path: Path) -> None:
    write_family(tmp_path)
    with pytest.raises(SkillmergeError, match="only a skill can be pruned"):
        skillmerge.plan(write_recipe(tmp_path, output={"path": "merged", "keep": 0.5}))
    for share in (0, 1.5, -1):
        with pytest.raises(SkillmergeError, match="keep"):
            skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), tmp_path / "x", keep=share)
    assert (
        run_cli("extract", "--from", "rl", "--minus", "sft", "-o", "k", "--keep", "0.1", cwd=tmp_path).returncode == 0
    )
