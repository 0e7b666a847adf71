"""Tasks that keep no shard: each is uploaded as it is finished, and `finish` makes the one commit."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from clusters import SHARDS, record_of, save
from conftest import MODELS, put_family, run_cli, write_family, write_recipe
from hub_server import HubServer
from observing import staging_of
from published import MERGED, put_on_the_hub

import skillmerge
from skillmerge.errors import InputError, TemporaryError, UsageError
from skillmerge.outputs.attempts import Attempt, conditions_of
from skillmerge.outputs.hub.push import MergePush
from skillmerge.verbs.tasks import collect, shard

FIRST = "model-00001-of-00004.safetensors"
AHEAD: dict[str, Any] = {"push": MERGED, "no_local": True}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "PATIENCE", 0.0)


@pytest.fixture
def plan(hub: HubServer, tmp_path: Path) -> Path:
    """Of a family on the Hub. Its license is that of the models' cards, which no task reads."""
    local = write_family(tmp_path / "family", shards=SHARDS, config={"model_type": "odd"})
    return save(write_recipe(tmp_path, models=put_on_the_hub(hub, local)))


def send(plan: Path, tasks: int = 2, **options: Any) -> list[str]:
    made = [skillmerge.shard(plan, index=index, of=tasks, **{**AHEAD, **options}).made for index in range(tasks)]
    return [name for part in made for name in part]


def assert_merged(hub: HubServer, plan: Path) -> None:
    """The repository has what `apply` makes, by one commit."""
    alone = skillmerge.apply(plan, plan.parent / "alone").output
    for path in alone.iterdir():
        if not path.name.startswith("skillmerge."):
            assert hub.content(MERGED, path.name) == path.read_bytes(), path.name
    assert len(hub.repos[MERGED].commits) == 2, "the first, and the model"


def test_shards_go_ahead_and_one_commit_follows(hub: HubServer, plan: Path) -> None:
    output = plan.parent / "merged"
    assert len(send(plan)) == SHARDS
    assert [*staging_of(output).rglob("*.safetensors")] == []
    assert len([*staging_of(output).glob("done/*.json")]) == SHARDS
    assert set(hub.tree(MERGED)) == {".gitattributes"}, "nothing can be seen before the commit"
    sent = list(hub.uploads)
    assert send(plan) == []
    assert hub.uploads == sent
    result = skillmerge.finish(plan, **AHEAD)
    assert result.published is not None
    assert not list(plan.parent.glob("merged*"))
    assert_merged(hub, plan)
    again = skillmerge.finish(plan, wait=True, wait_limit=20, **AHEAD)
    assert again.already
    assert again.seconds < 15, "nobody waits for tasks of a model that is on the Hub"
    assert again.published is not None
    assert again.published.commit == result.published.commit
    assert send(plan) == [], "a late task finds the model on the Hub"
    assert not list(plan.parent.glob("merged*"))


def test_from_the_command_line(hub: HubServer, plan: Path) -> None:
    variables = hub.variables()
    for index in ("0", "1"):
        words = ("shard", plan, "--index", index, "--of", "2", "--push", MERGED, "--no-local", "--private")
        process = run_cli(*words, **variables)
        assert process.returncode == 0, process.stderr
        assert ": 2 made in " in process.stdout
    process = run_cli("finish", plan, "--push", MERGED, "--no-local", "--json", **variables)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["published"]["repository"] == MERGED
    assert hub.repos[MERGED].private
    assert_merged(hub, plan)


def test_the_recipe_may_name_the_repository(hub: HubServer, plan: Path) -> None:
    recipe = plan.with_name("recipe.yaml")
    document = json.loads(recipe.read_text())
    document["output"]["push"] = {"repo": MERGED}
    recipe.write_text(json.dumps(document))
    save(recipe)
    send(plan, push=None)
    skillmerge.finish(plan, no_local=True)
    assert FIRST in hub.tree(MERGED)
    assert not list(plan.parent.glob("merged*"))


def test_a_skill_goes_ahead_too(hub: HubServer, tmp_path: Path) -> None:
    models = put_on_the_hub(hub, write_family(tmp_path / "family", shards=SHARDS))
    output = {"path": "merged", "license": "mit", "kind": "skill"}
    keys: dict[str, Any] = {"merge": "rl - sft", "coefficients": None, "output": output}
    plan = save(write_recipe(tmp_path, models={name: models[name] for name in ("rl", "sft")}, **keys))
    send(plan)
    skillmerge.finish(plan, **AHEAD)
    alone = skillmerge.apply(plan, tmp_path / "alone").output
    for name in (path.name for path in alone.iterdir() if not path.name.startswith("skillmerge.")):
        assert hub.content(MERGED, name) == (alone / name).read_bytes(), name


@pytest.mark.parametrize("where", ["PUT /upload", "info/lfs/objects/batch", "/preupload/"])
def test_an_upload_that_fails_exits_75_and_is_continued(hub: HubServer, plan: Path, where: str) -> None:
    hub.fail("status", where, times=10**6, after=2 if "PUT" in where else 0, status=503)
    with pytest.raises(TemporaryError):
        send(plan, tasks=1)
    assert list((staging_of(plan.parent / "merged") / "attempts").iterdir()) == []
    sent = list(hub.uploads)
    hub.faults.clear()
    send(plan, tasks=1)
    assert hub.uploads[: len(sent)] == sent
    assert len(hub.uploads) == len(set(hub.uploads)) == SHARDS
    skillmerge.finish(plan, **AHEAD)
    assert_merged(hub, plan)


def test_a_commit_that_fails_is_made_later(hub: HubServer, plan: Path) -> None:
    send(plan)
    hub.fail("status", "commit/main", times=10**6, status=500)
    with pytest.raises(TemporaryError):
        skillmerge.finish(plan, **AHEAD)
    hub.faults.clear()
    skillmerge.finish(plan, **AHEAD)
    assert_merged(hub, plan)
    assert len(hub.uploads) == len(set(hub.uploads))


def test_uploads_that_the_hub_forgot_are_made_again(hub: HubServer, plan: Path) -> None:
    send(plan)
    hub.repos[MERGED].lfs.clear()
    with pytest.raises(TemporaryError, match="no longer has all files"):
        skillmerge.finish(plan, **AHEAD)
    assert len(send(plan)) == SHARDS
    skillmerge.finish(plan, **AHEAD)
    assert_merged(hub, plan)


def test_two_tasks_with_the_same_shards_upload_once(
    hub: HubServer, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower finds the record, and its own file is gone."""
    take, first = MergePush._take, []

    def overtaken(self: MergePush, done: Any) -> None:
        if not first and done.file == FIRST:
            first.append(done)
            send(plan, tasks=1)
        take(self, done)

    monkeypatch.setattr(MergePush, "_take", overtaken)
    assert FIRST not in send(plan, tasks=1)
    assert len(hub.uploads) == len(set(hub.uploads)) == SHARDS
    skillmerge.finish(plan, **AHEAD)
    assert_merged(hub, plan)


def test_what_a_killed_task_left_goes_with_the_record(hub: HubServer, plan: Path) -> None:
    output = plan.parent / "merged"
    skillmerge.shard(plan, index=0, of=SHARDS, **AHEAD)
    header = conditions_of(staging_of(output))
    assert header is not None
    dead = Attempt(output, header)
    dead.open_shard(skillmerge.plan(plan.with_name("recipe.yaml")).shards[1]).finish()
    send(plan)
    assert [*staging_of(output).rglob("*.safetensors")] == []


def test_mixtures_are_refused(hub: HubServer, plan: Path) -> None:
    """Shards that are kept, and shards that are only on the Hub, or on another repository of it."""
    with pytest.raises(UsageError, match="a task publishes nothing"):
        skillmerge.shard(plan, index=0, of=2, push=MERGED)
    with pytest.raises(UsageError, match="would leave no output"):
        skillmerge.shard(plan, index=0, of=2, no_local=True)
    skillmerge.shard(plan, index=0, of=2, **AHEAD)
    with pytest.raises(UsageError, match="which sends shards to acme/merged alone"):
        skillmerge.shard(plan, index=1, of=2)
    with pytest.raises(UsageError, match="which sends shards to acme/merged alone"):
        skillmerge.shard(plan, index=1, of=2, push="acme/other", no_local=True)
    with pytest.raises(UsageError, match="which sends shards to acme/merged alone"):
        skillmerge.finish(plan, push=MERGED)
    with pytest.raises(UsageError, match="keep_failed"):
        skillmerge.finish(plan, keep_failed=True, **AHEAD)
    with pytest.raises(TemporaryError, match="2 of 4 shards are missing"):
        skillmerge.finish(plan, **AHEAD)
    assert record_of(plan.parent / "merged", "model-00001-of-00004.safetensors").exists()


def test_gates_that_no_finish_could_measure_are_refused_by_tasks(tmp_path: Path) -> None:
    gates = {"loads": True, "norm_ratio": {"max": 1}}
    write_family(tmp_path)
    plan = save(write_recipe(tmp_path, gates=gates))
    with pytest.raises(UsageError, match="the gate `loads` needs the model's files"):
        skillmerge.shard(plan, index=0, of=2, **AHEAD)
    with pytest.raises(UsageError, match="needs statistics"):
        skillmerge.shard(plan, index=0, of=2, stats="off")
    assert not staging_of(tmp_path / "merged").exists()


def test_without_a_right_to_write_nothing_is_computed(
    hub: HubServer, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "runner_for", None)
    with pytest.raises(InputError, match="may not"):
        skillmerge.shard(plan, index=0, of=2, push="forbidden/merged", no_local=True)


def test_shards_that_the_hub_has_are_copied_there(hub: HubServer, plan: Path) -> None:
    """What the expression leaves alone is the donor's file: no task uploads it only for `finish` to copy it."""
    recipe = plan.with_name("recipe.yaml")
    rules = [{"layers": "0-", "value": 0.0}, {"tensors": ["*embed*", "model.norm*", "lm_head*"], "value": 0.0}]
    document = {**json.loads(recipe.read_text()), "coefficients": {"lam": {"default": 1.0, "rules": rules}}}
    recipe.write_text(json.dumps(document))
    save(recipe)
    assert len(send(plan)) == SHARDS
    assert hub.uploads == []
    skillmerge.finish(plan, **AHEAD)
    assert hub.tree(MERGED)[FIRST].sha256 == hub.tree("acme/target")[FIRST].sha256
    assert_merged(hub, plan)


@pytest.mark.parametrize("way", ["other", "torn", "gone", "pipe"])
def test_headers_that_are_not_those_of_the_plan_are_asked_for(hub: HubServer, plan: Path, way: str) -> None:
    """What others have put there is read as if it came from an enemy."""
    send(plan)
    kept = sorted((staging_of(plan.parent / "merged") / "headers").iterdir())
    whole = [path.read_bytes() for path in kept]
    assert len(whole) == len({*whole}) == SHARDS, "the models of a family have the same"
    for path, content in zip(kept, [*whole[1:], whole[0]], strict=True):
        if way in ("other", "torn"):
            path.write_bytes(content if way == "other" else content[:-1])
        else:
            path.unlink()
        if way == "pipe":
            os.mkfifo(path)
    before = len(hub.requests)
    skillmerge.finish(plan, **AHEAD)
    asked = [
        request.path for request in hub.requests[before:] if "-of-" in request.path and "/resolve/" in request.path
    ]
    assert len(asked) == SHARDS * len(MODELS)
    assert_merged(hub, plan)


def test_the_whole_job_asks_the_hub_for_little(hub: HubServer, tmp_path: Path) -> None:
    """Beyond the bytes of the weights two requests for each shard of each model: for the plan, and by the task that
    reads it; `finish` has the headers that tasks have kept. And two to announce each upload. The rest does not grow."""
    local = put_family(hub, tmp_path / "local", shards=6)
    files = sorted(path.name for path in (local.parent / "rl").glob("model-*"))
    models = {model: f"hf://acme/{model}" for model in MODELS}
    recipe = write_recipe(tmp_path, models=models, output={"path": "merged", "license": "mit"})
    tasks = 4
    plan = save(recipe)
    planned = len(hub.requests)
    assert len(send(plan, tasks=tasks)) == len(files)
    sent = len(hub.requests)
    skillmerge.finish(plan, **AHEAD)
    of_files: Counter[str] = Counter()
    other: Counter[str] = Counter()
    for number, request in enumerate(hub.requests):
        path = f"{request.method} {request.path}"
        if re.match(r"GET /storage/|PUT /upload/|POST /api/verify/", path):
            continue  # the bytes
        if "-of-" in path:
            of_files[re.sub(r"/resolve/[0-9a-f]+", "", path)] += 1
        elif re.search("preupload|/lfs/", path):
            other["announced"] += 1
        else:
            other["by tasks" if planned <= number < sent else "once"] += 1
    assert set(of_files) == {f"GET /acme/{model}/{file}" for model in MODELS for file in files}
    assert set(of_files.values()) == {2}
    assert other["announced"] <= 2 * (len(files) + 1), "the manifest is one more"
    assert other["by tasks"] <= 4 * tasks
    assert other["once"] <= 40
