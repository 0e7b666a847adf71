"""From the manifest alone: every byte again, under other circumstances, and every difference found."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import flip, run_cli, write_family, write_recipe

import skillmerge
from skillmerge.checkpoints.tokenizers.vocabulary import SKILL_TOKENS
from skillmerge.engine.runner import Work
from skillmerge.engine.runners import threads as runner
from skillmerge.errors import CheckFailed, InputError, StalePlan, UsageError
from skillmerge.plans.budget import Budget
from skillmerge.tensors import BLOCK
from skillmerge.verbs import rebuild as rebuilding
from skillmerge.verbs.rebuild import How, check_rebuild, rebuild_into

OTHERWISE = How(work=Work("cpu", 3, 900_000_000))


def content(folder: Path) -> dict[str, bytes]:
    """All that does not depend on when and where."""
    own = ("skillmerge.manifest.json", "skillmerge.run.json")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in own}


def test_output_is_proved_without_writing_a_byte(finished: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    made = check_rebuild(finished, how=OTHERWISE)
    assert made.tensors == made.of == 12
    assert sorted(tmp_path.rglob("*")) == before


def test_output_is_built_again_from_its_manifest_alone(finished: Path, tmp_path: Path) -> None:
    wanted = content(finished)
    for path in finished.iterdir():
        if path.name != "skillmerge.manifest.json":
            path.unlink()
    made = rebuild_into(finished, tmp_path / "again", OTHERWISE)
    assert made.output == tmp_path / "again"
    assert content(made.output) == wanted
    skillmerge.verify(made.output)


def reseal(output: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """What someone who knows the manifest's form would do: change it and make its digest fit."""
    from skillmerge.outputs import manifest
    from skillmerge.threads import hash_file

    document = json.loads((output / "skillmerge.manifest.json").read_text())
    for file in document["files"]:
        file["sha256"] = hash_file(output / file["name"])
    change(document)
    document["environment"]["run_log"]["sha256"] = hash_file(output / "skillmerge.run.json")
    del document["digest"]
    text = json.dumps(document, ensure_ascii=False, separators=(", ", ": "))
    document["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (output / "skillmerge.manifest.json").write_bytes(manifest.to_bytes(document))


def test_change_that_verify_cannot_see_is_found_and_placed(finished: Path) -> None:
    """A weight and the manifest changed together."""
    shard = sorted(finished.glob("*.safetensors"))[0]
    flip(shard, -3)
    reseal(finished, lambda document: None)
    skillmerge.verify(finished)
    with pytest.raises(CheckFailed, match=rf"{shard.name}: tensor `.*` differs from element \d+ on"):
        check_rebuild(finished)
    process = run_cli("rebuild", finished, "--check")
    assert process.returncode == 3
    assert "differs from element" in process.stderr


@pytest.mark.parametrize("key", ["statistics", "files", "expression"])
def test_change_of_what_the_manifest_says_is_found(finished: Path, key: str) -> None:
    def change(document: dict[str, Any]) -> None:
        if key == "files":
            document["files"] = document["files"][::-1]
        elif key == "statistics":
            document["statistics"]["all"]["changed"] = 0.5
        else:
            document["expression"] = "target"

    reseal(finished, change)
    with pytest.raises(CheckFailed, match=f"`{key}` differs"):
        check_rebuild(finished)


def test_side_file_that_was_changed_with_the_manifest_is_found(finished: Path) -> None:
    path = finished / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("total_size", "total_bytes"))
    sizes = {path.name: path.stat().st_size}

    def change(document: dict[str, Any]) -> None:
        for file in document["files"]:
            file["size"] = sizes.get(file["name"], file["size"])

    reseal(finished, change)
    with pytest.raises(CheckFailed, match=r"index\.json differs"):
        check_rebuild(finished, sample=0.1)


def test_sample_is_seeded_and_finds_what_it_looks_at(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    real = rebuilding._shards_of
    monkeypatch.setattr(
        rebuilding, "_shards_of", lambda plan, chosen: looked.append(sorted(chosen)) or real(plan, chosen)
    )  # fmt: skip
    for seed in (0, 0, 1):
        assert check_rebuild(finished, sample=0.25, seed=seed).tensors == 3
    assert looked[0] == looked[1] != looked[2]
    shard = sorted(finished.glob("*.safetensors"))[0]
    flip(shard, -3)
    reseal(finished, lambda document: None)
    found = 0
    for seed in range(12):
        try:
            check_rebuild(finished, sample=0.25, seed=seed)
        except CheckFailed:
            found += 1
    assert 0 < found < 12


def test_models_that_changed_are_told_and_moved_ones_are_found(finished: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("target", "rl", "sft"):
        (finished.parent / name).rename(moved / name)
    process = run_cli("rebuild", finished, "--check")
    assert process.returncode == 4
    process = run_cli("rebuild", finished, "--check", "--base-folder", moved, "--sample", "20%", "--json")
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["tensors"] == 3
    shutil.rmtree(moved / "rl")
    shutil.copytree(moved / "sft", moved / "rl")
    os.rename(moved / "rl" / "model-00001-of-00002.safetensors", moved / "rl" / "model-00001-of-00003.safetensors")
    index = moved / "rl" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("00001-of-00002", "00001-of-00003"))
    with pytest.raises(StalePlan, match="model rl: other tensors or sizes"):
        check_rebuild(finished, how=How(base=moved))


def test_weights_of_a_model_that_changed_give_another_output(finished: Path) -> None:
    shard = sorted((finished.parent / "rl").glob("*.safetensors"))[0]
    flip(shard)
    with pytest.raises(CheckFailed, match="differs from element"):
        check_rebuild(finished)


@pytest.mark.parametrize(
    "options",
    [
        {"rounding": "stochastic", "seed": 3},
        {"dtype": "float32"},
        {"shard_size": "2KB"},
        {"kind": "skill"},
        {"kind": "skill", "keep": 0.3},
    ],
    ids=str,
)
def test_every_kind_of_output_is_proved(tmp_path: Path, options: dict[str, Any]) -> None:
    write_family(tmp_path)
    merge = "rl - sft" if "kind" in options else "target + lam * (rl - sft)"
    coefficients = None if "kind" in options else {"lam": 0.4}
    recipe = write_recipe(tmp_path, merge, output={"path": "made", **options}, coefficients=coefficients)
    made = skillmerge.apply(recipe, stats="full", hash_inputs=True).output
    before = sorted(tmp_path.rglob("*"))
    assert check_rebuild(made, how=OTHERWISE).tensors == 12
    assert sorted(tmp_path.rglob("*")) == before
    assert content(rebuild_into(made, tmp_path / "again", OTHERWISE).output or made) == content(made)


def test_tiles_of_another_size_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = skillmerge.apply(write_family(tmp_path, {"model.layers.0.mlp.up_proj.weight": (700, 500)})).output
    budget = runner.budget

    def small(*arguments: Any, **options: Any) -> Budget:
        found = budget(*arguments, **options)
        return Budget(found.threads, BLOCK, found.memory)

    monkeypatch.setattr(runner, "budget", small)
    check_rebuild(output)


def test_rebuild_says_what_it_needs(finished: Path, tmp_path: Path) -> None:
    assert run_cli("rebuild", finished).returncode == 2
    assert run_cli("rebuild", finished, "--check", "--sample", "0%").returncode == 2
    assert run_cli("rebuild", finished.parent / "target", "--check").returncode == 3
    process = run_cli("rebuild", finished, "--output", tmp_path / "again", "-q")
    assert process.returncode == 0, process.stderr
    assert content(tmp_path / "again") == content(finished)


def test_rebuild_in_a_place_that_is_taken_compares_every_byte(finished: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    rebuild_into(finished, again)
    assert rebuild_into(finished, again).output == again
    shard = sorted(again.glob("*.safetensors"))[0]
    flip(shard, -3)
    with pytest.raises(UsageError, match="already exists"):
        rebuild_into(finished, again)
    with pytest.raises(UsageError, match="rebuilt in place"):
        rebuild_into(finished, finished)


def test_inputs_that_were_hashed_are_looked_at_first(tmp_path: Path) -> None:
    output = skillmerge.apply(write_family(tmp_path), hash_inputs=True).output
    shard = sorted((tmp_path / "rl").glob("*.safetensors"))[0]
    flip(shard)
    for sample in (1.0, 0.05):
        with pytest.raises(StalePlan, match=f"different weights now: rl/{shard.name}"):
            check_rebuild(output, sample=sample)


def test_rebuild_that_differs_is_not_published(finished: Path, tmp_path: Path) -> None:
    shard = sorted((finished.parent / "rl").glob("*.safetensors"))[0]
    flip(shard)
    with pytest.raises(CheckFailed, match="they were not hashed"):
        rebuild_into(finished, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_side_file_that_changed_is_named(finished: Path) -> None:
    config = finished.parent / "target" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(StalePlan, match=r"other files changed: config\.json"):
        check_rebuild(finished)


def test_messages_name_the_recipe_in_the_manifest(finished: Path) -> None:
    """It may have come from a file of any name, or from none."""
    (finished.parent / "rl").rename(finished.parent / "moved")
    with pytest.raises(InputError, match=r"^the recipe in the manifest:\d+:\d+: model `rl`") as caught:
        check_rebuild(finished)
    assert "recipe.yaml" not in caught.value.message


def test_skill_of_a_version_that_kept_no_tokens_is_built_again_as_it_was(tmp_path: Path) -> None:
    write_family(tmp_path)
    (tmp_path / "rl" / "vocab.json").write_text('{"a": 0, "b": 1}')
    skill = skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), tmp_path / "math").output
    assert check_rebuild(skill).output is None
    assert SKILL_TOKENS in content(rebuild_into(skill, tmp_path / "again").output or skill)
    kept = [
        row
        for row in json.loads((skill / "skillmerge.manifest.json").read_text())["files"]
        if row["name"] != SKILL_TOKENS
    ]
    reseal(skill, lambda document: document.update(files=kept))
    (skill / SKILL_TOKENS).unlink()
    assert check_rebuild(skill).output is None
    assert SKILL_TOKENS not in content(rebuild_into(skill, tmp_path / "as-it-was").output or skill)
