"""A part of a saved plan is what the whole plan says of it, and reads no more than it needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    hub_recipe,
    put_family,
    random_tensors,
    tensor_shapes,
    write_checkpoint,
    write_family,
    write_recipe,
)
from hub_server import HubServer

import skillmerge
from skillmerge.checkpoints import safetensors
from skillmerge.errors import InputError, SkillmergeError, StalePlan, UsageError
from skillmerge.plans import saved
from skillmerge.plans.opening import Access
from skillmerge.plans.plan import DECIDING, deciding_facts, digests
from skillmerge.plans.saved import SavedPlan
from skillmerge.plans.tasks.part import part_of

RULES = {"lam": {"default": 0.7, "rules": [{"layers": [0, 0], "value": 0}, {"modules": "norm", "value": 0.25}]}}
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rules": {"coefficients": RULES},
    "shards": {"output": {"path": "merged", "shard_size": "2KB"}},
    "one shard": {"output": {"path": "merged", "shard_size": "1GB"}},
    "float32": {"output": {"path": "merged", "dtype": "float32"}},
    "copy": {"copy": [{"tensors": "lm_head.*", "from": "rl"}, {"tensors": "*norm*", "from": "sft"}]},
    "skill": {"merge": "rl - sft", "coefficients": None, "output": {"path": "merged", "kind": "skill"}},
    "skill of a sum": {
        "merge": "lam * (rl - sft)",
        "output": {"path": "merged", "kind": "skill", "keep": 0.5, "shard_size": "2KB"},
    },
}


def save(recipe: Path) -> SavedPlan:
    path = recipe.with_name("plan.json")
    skillmerge.plan(recipe, save=path)
    return saved.read(path)


def part(plan: SavedPlan, shards: list[str]) -> Any:
    return part_of(plan, plan.digests(), shards, Access(commits=plan.commits))


@pytest.mark.parametrize("name", RECIPES)
def test_a_part_is_what_the_plan_says(tmp_path: Path, name: str) -> None:
    write_family(tmp_path, shards=3)
    recipe = write_recipe(tmp_path, **RECIPES[name])
    whole, plan = skillmerge.plan(recipe), save(recipe)
    assert plan.digests() == (whole.weights_digest, whole.digest)
    assert plan.sizes == {shard.file: shard.size for shard in whole.shards}
    for number in range(len(whole.shards)):
        wanted = whole.shards[number : number + 2]
        with part(plan, [shard.file for shard in wanted]) as (found, checkpoints):
            assert found.shards == wanted
            names = [spec.name for shard in wanted for spec in shard.specs]
            assert {key: found.tensors[key] for key in names} == {key: whole.tensors[key] for key in names}
            assert set(found.tensors) == set(names)
            assert found.versions == whole.versions
            assert (found.donor, found.weights_digest, found.digest) == (whole.donor, *plan.digests())
            for tensor in found.tensors.values():
                assert all(source in checkpoints[model].tensors for model, source in tensor.sources)


@pytest.mark.parametrize("name", RECIPES)
def test_parts_read_what_the_plan_reads(tmp_path: Path, name: str) -> None:
    write_family(tmp_path, shards=3)
    recipe, read = write_recipe(tmp_path, **RECIPES[name]), 0
    whole, plan = skillmerge.plan(recipe), save(recipe)
    for shard in whole.shards:
        with part(plan, [shard.file]) as (found, _):
            read += found.bytes_read
            rows = {item.name: item for item in whole.inputs}
            for item in found.inputs:
                names = {file.name for file in item.files}
                files = [replace(file, bytes_read=0) for file in rows[item.name].files if file.name in names]
                assert [replace(file, bytes_read=0) for file in item.files] == files
                assert replace(item, files=()) == replace(rows[item.name], files=(), license=item.license)
    assert read == whole.bytes_read


def test_deciding_facts_have_a_name_each(family: Path) -> None:
    assert {*DECIDING, "recipe_sha256"} == set(deciding_facts(skillmerge.plan(family)))


def test_a_part_reads_few_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of files that have the shard's name, and only they; by the index where names say nothing."""
    plan = save(write_family(tmp_path, shards=4))
    read: list[str] = []
    header_of = safetensors.header_of

    def watched(raw: bytes, size: int, path: str, file: str) -> safetensors.Header:
        read.append(f"{Path(path).parent.name}/{file}")
        return header_of(raw, size, path, file)

    monkeypatch.setattr("skillmerge.checkpoints.store.header_of", watched)
    second = "model-00002-of-00004.safetensors"
    with part(plan, [second]) as (_, checkpoints):
        assert {file for checkpoint in checkpoints.values() for file in checkpoint.files} == {second}
    assert sorted(read) == [f"{model}/{second}" for model in ("rl", "sft", "target")]
    recipe = write_recipe(tmp_path, output={"path": "merged", "shard_size": "2KB"})
    plan = save(recipe)
    read.clear()
    with part(plan, list(plan.sizes)[-1:]):
        assert len(read) == 3


def other_model(folder: Path, seed: int = 5, **shape: int) -> None:
    write_checkpoint(folder, random_tensors(tensor_shapes(**shape), seed=seed), shards=2)


def touch(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.write_bytes(path.read_bytes() + b"")


def edited(folder: Path) -> None:
    path = folder.parent / "plan.json"
    document = json.loads(path.read_text())
    document["tensors"][0]["coefficients"] = [0.9]
    path.write_text(json.dumps(document))


def test_a_plan_whose_sources_are_not_the_formulas_is_damaged(tmp_path: Path) -> None:
    """As one of a version that orders them in another way could be."""
    plan = save(write_family(tmp_path))
    document = json.loads(plan.path.read_text())
    document["tensors"][0]["sources"].reverse()
    document["digest"] = digests(document, plan.recipe)[1]
    plan.path.write_text(json.dumps(document))
    with (
        pytest.raises(UsageError, match="has other sources than its formula"),
        part(saved.read(plan.path), list(plan.sizes)),
    ):
        pass


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda folder: other_model(folder / "rl", hidden=8), StalePlan, "model rl: other tensors or sizes in model-"),
        (lambda folder: touch(folder / "sft"), StalePlan, "model sft: rewritten since: model-0000"),
        (
            lambda folder: (folder / "rl/model-00001-of-00002.safetensors").unlink(),
            StalePlan,
            "model rl: it no longer has model-00001",
        ),
        (lambda folder: edited(folder / "rl"), StalePlan, "it was edited"),
        (lambda folder: (folder / "rl").rename(folder / "away"), InputError, "does not exist"),
    ],
    ids=["other shapes", "rewritten", "a file gone", "edited", "a model gone"],
)
def test_what_changed_is_stale(
    tmp_path: Path, change: Callable[[Path], None], error: type[SkillmergeError], message: str
) -> None:
    write_family(tmp_path)
    save(write_recipe(tmp_path))
    change(tmp_path)
    plan = saved.read(tmp_path / "plan.json")
    with pytest.raises(error, match=message), part(plan, ["model-00001-of-00002.safetensors"]):
        pass


def test_only_what_is_read_is_compared(tmp_path: Path) -> None:
    """The other shards may be on their way to this machine, or be rewritten: who finishes compares everything."""
    write_family(tmp_path)
    plan = save(write_recipe(tmp_path))
    (tmp_path / "rl/model-00002-of-00002.safetensors").unlink()
    with part(plan, ["model-00001-of-00002.safetensors"]) as (found, _):
        assert len(found.shards) == 1


def test_names_of_libraries_and_of_the_recipe_are_read_too(tmp_path: Path) -> None:
    shapes = tensor_shapes()
    for seed, model in enumerate(("target", "sft")):
        write_checkpoint(tmp_path / model, random_tensors(shapes, seed=seed), shards=2)
    tensors = random_tensors(shapes, seed=9)
    wrapped = {f"{name.replace('model.', 'model._orig_mod.lm.', 1)}": it for name, it in tensors.items()}
    write_checkpoint(tmp_path / "rl", wrapped, shards=3)
    models = {"target": "target", "sft": "sft", "rl": {"path": "rl", "rename": [{"from": "model.lm.", "to": "model."}]}}
    recipe = write_recipe(tmp_path, models=models)
    whole, plan = skillmerge.plan(recipe), save(recipe)
    assert not whole.problems
    for shard in whole.shards:
        with part(plan, [shard.file]) as (found, checkpoints):
            assert found.shards == (shard,)
            assert set(found.tensors) <= set(checkpoints["rl"].tensors)


def test_a_task_asks_the_hub_for_little(hub: HubServer, tmp_path: Path) -> None:
    """Nothing but the start of the file that its shard's tensors are in."""
    put_family(hub, tmp_path / "local", shards=4)
    plan = save(hub_recipe(tmp_path / "remote"))
    for shard in plan.sizes:
        before = len(hub.requests)
        with part(plan, [shard]):
            asked = list(hub.requests[before:])
        of_hub = [it for it in asked if "/api/" in str(it) or "/resolve/" in str(it)]
        assert 3 <= len(of_hub) <= 2 * 3, asked
        assert not any("/api/" in str(it) for it in asked)
