"""What verbs do with outputs in buckets: verify, rebuild, gate, push, tasks; and what they refuse by name."""

from __future__ import annotations

import json
import os
import socket
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from bucket_merges import another_machine, bucket_to_bucket, flip, one_file_in_parts, sent
from bucket_server import S3Server
from conftest import run_cli, weights, write_recipe

import skillmerge
from skillmerge.checkpoints.place import Bucket
from skillmerge.checkpoints.stores.objects import Objects
from skillmerge.errors import CheckFailed, StalePlan, TemporaryError, UsageError
from skillmerge.outputs.buckets.sending import work_folder
from skillmerge.outputs.staging import Staging
from skillmerge.study.gates import GateFailed
from skillmerge.verbs.tasks import buckets

OUT = "s3://bucket/out/merged"
FIRST, SECOND = (f"out/merged/model-0000{number}-of-00002.safetensors" for number in (1, 2))


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files of this machine."""
    return another_machine(tmp_path, monkeypatch, "scratch")


@pytest.fixture
def recipe(s3: S3Server, tmp_path: Path, scratch: Path) -> Path:
    return bucket_to_bucket(s3, tmp_path, OUT)


@pytest.fixture
def in_parts(tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return one_file_in_parts(tmp_path, monkeypatch, OUT)


# Reading it.


def test_a_changed_output_does_not_verify(s3: S3Server, recipe: Path) -> None:
    skillmerge.apply(recipe)
    verdict = skillmerge.verify(OUT)
    assert (verdict.as_dict()["folder"], verdict.tensors) == (OUT, 12)
    flip(s3, SECOND)
    with pytest.raises(CheckFailed, match=f"^s3://bucket/{SECOND}: its bytes are not those that were written"):
        skillmerge.verify(OUT)
    content = s3.get(FIRST)
    s3.put(FIRST, content[:-1])
    with pytest.raises(CheckFailed, match=f"^s3://bucket/{FIRST}: is not {len(content)} bytes long"):
        skillmerge.verify(OUT)
    s3.delete(FIRST)
    with pytest.raises(CheckFailed, match=f"^{OUT}: files are missing: model-00001-of-00002"):
        skillmerge.verify(OUT)
    s3.put(FIRST, content)
    s3.put("out/merged/inner/extra.bin", b"")
    with pytest.raises(CheckFailed, match=r"files do not belong to the output: inner/extra\.bin"):
        skillmerge.verify(OUT)


def test_verifying_holds_no_weights_on_the_disk(
    s3: S3Server, in_parts: Path, monkeypatch: pytest.MonkeyPatch, scratch: Path
) -> None:
    skillmerge.apply(in_parts)
    most = 0

    def look(environ: dict[str, Any], start: Any) -> None:
        nonlocal most
        files = [path for path in scratch.rglob("*") if path.is_file()]
        most = max(most, sum(path.stat().st_blocks * 512 for path in files))

    s3.fail("GET /bucket/out/merged/model.safetensors", look, times=99)
    skillmerge.verify(OUT)
    assert 0 < most < 200_000
    assert list(scratch.rglob("*.safetensors")) == []


def test_an_output_that_changes_while_it_is_verified_is_stale(s3: S3Server, recipe: Path) -> None:
    skillmerge.apply(recipe)
    gets = 0

    def change(environ: dict[str, Any], start: Any) -> None:
        nonlocal gets
        gets += environ["REQUEST_METHOD"] == "GET"
        if gets == 3:
            flip(s3, SECOND)

    s3.fail(SECOND, change, times=99)
    with pytest.raises(StalePlan, match="changed while it was in use"):
        skillmerge.verify(OUT)


def test_an_output_is_rebuilt_gated_and_inspected_where_it_is(s3: S3Server, recipe: Path, tmp_path: Path) -> None:
    skillmerge.apply(recipe)
    rebuilt = skillmerge.rebuild(OUT, check=True)
    assert (rebuilt.as_dict()["folder"], rebuilt.tensors) == (OUT, 12)
    skillmerge.rebuild(OUT, tmp_path / "again")
    assert weights(tmp_path / "again") == sent(s3)
    skillmerge.rebuild(tmp_path / "again", "s3://bucket/copy")
    assert sent(s3, "copy") == sent(s3)
    gates = tmp_path / "gates.yaml"
    gates.write_text("gates: {changed: {min: 0.01}, finite: true}\n")
    assert skillmerge.gate(OUT, gates).ok
    assert skillmerge.inspect(OUT, "s3://bucket/family/target").as_dict()


def test_a_skill_goes_into_a_bucket_and_comes_from_there(s3: S3Server, recipe: Path, tmp_path: Path) -> None:
    made = skillmerge.extract("s3://bucket/family/rl", "s3://bucket/family/sft", "s3://bucket/skill")
    assert made.place == "s3://bucket/skill"
    skillmerge.verify("s3://bucket/skill")
    models = {"target": "s3://bucket/family/target", "skill": {"skill": "s3://bucket/skill"}}
    through = write_recipe(tmp_path, "target + lam * skill", models=models, output={"path": "through"})
    assert weights(skillmerge.apply(through).output) == weights(tmp_path / "direct")


def test_a_push_from_a_bucket_is_rehearsed(s3: S3Server, recipe: Path) -> None:
    skillmerge.apply(recipe)
    rehearsed = skillmerge.rehearse_push(OUT, "acme/merged", license="mit")
    assert rehearsed.as_dict()["folder"] == OUT
    assert rehearsed.files["model-00001-of-00002.safetensors"] == len(s3.get(FIRST))


def test_gates_that_need_files_are_refused_before_any_work(s3: S3Server, recipe: Path) -> None:
    document = json.loads(recipe.read_text())
    recipe.write_text(json.dumps({**document, "gates": {"finite": True}}))
    with pytest.raises(UsageError, match="an output in a bucket keeps none here"):
        skillmerge.apply(recipe)
    assert s3.keys("out/") == []


def test_an_output_that_fails_its_gates_gets_no_manifest(s3: S3Server, recipe: Path) -> None:
    document = json.loads(recipe.read_text())
    recipe.write_text(json.dumps({**document, "gates": {"changed": {"max": 0.01}}}))
    with pytest.raises(GateFailed):
        skillmerge.apply(recipe)
    assert "out/merged/skillmerge.manifest.json" not in s3.keys("out/")
    recipe.write_text(json.dumps({**document, "gates": {"changed": {"min": 0.01}}}))
    s3.requests.clear()
    skillmerge.apply(recipe)
    assert s3.count("PUT /bucket/out/merged/model-") == 0, "its weights are the same"


# Tasks.


@pytest.fixture
def saved(recipe: Path, tmp_path: Path) -> Path:
    skillmerge.plan(recipe, save=tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_tasks_share_an_output_in_a_bucket(s3: S3Server, saved: Path, tmp_path: Path, scratch: Path) -> None:
    with pytest.raises(TemporaryError, match="2 of 2 shards are missing"):
        skillmerge.finish(saved)
    first = skillmerge.shard(saved, index=0, of=2, threads=1)
    assert (first.as_dict()["output"], len(first.made)) == (OUT, 1)
    assert skillmerge.shard(saved, index=0, of=2).made == (), "its shard is recorded"
    with pytest.raises(TemporaryError, match="1 of 2 shards is missing"):
        skillmerge.finish(saved)
    assert s3.count("PUT /bucket/out/merged/model-") == 1, "finish makes none"
    skillmerge.shard(saved, index=1, of=2)
    made = skillmerge.finish(saved, verify=True)
    assert made.place == OUT
    assert sent(s3) == weights(tmp_path / "direct")
    skillmerge.verify(OUT)
    assert skillmerge.finish(saved).already
    assert skillmerge.shard(saved, index=1, of=2).made == (), "the output is finished"
    assert [path for path in scratch.rglob("*") if path.is_file()] == []


def test_finish_takes_what_apply_began_and_apply_what_tasks_began(s3: S3Server, saved: Path, tmp_path: Path) -> None:
    skillmerge.shard(saved, index=0, of=2)
    s3.requests.clear()
    skillmerge.apply(saved)
    assert s3.count("PUT /bucket/out/merged/model-") == 1
    assert sent(s3) == weights(tmp_path / "direct")


def test_finish_waits_for_tasks(s3: S3Server, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "_LOOK", 0.05)
    process = threading.Thread(target=lambda: [skillmerge.shard(saved, index=index, of=2) for index in range(2)])
    process.start()
    made = skillmerge.finish(saved, wait=True)
    process.join()
    assert made.place == OUT
    skillmerge.verify(OUT)


def test_asking_too_early_leaves_the_prefix_to_the_tasks(s3: S3Server, saved: Path, tmp_path: Path) -> None:
    """They say how rounding is measured, and the first of them may still be to come."""
    for options in ({}, {"wait_limit": 0.01}):
        with pytest.raises(TemporaryError, match="2 of 2 shards are missing"):
            skillmerge.finish(saved, **options)  # type: ignore[arg-type]
    assert s3.keys("out/") == []
    for index in range(2):
        skillmerge.shard(saved, index=index, of=2, stats="full")
    assert skillmerge.finish(saved).manifest.environment.conditions["stats"] == "full"
    assert skillmerge.finish(saved).already
    assert skillmerge.finish(saved, wait=True).already


def test_a_wait_for_tasks_has_an_end(s3: S3Server, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "_LOOK", 0.05)
    skillmerge.shard(saved, index=0, of=2)
    with pytest.raises(TemporaryError, match=r"1 of 2 shards is missing after 0 s: model-0000\d-of-00002") as caught:
        skillmerge.finish(saved, wait_limit=0.2)
    assert "--wait-limit" in str(caught.value.fix)


def test_records_that_were_read_are_not_read_again(s3: S3Server, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait of hours looks at what is missing, not at everything."""
    monkeypatch.setattr(buckets, "_LOOK", 0.01)
    skillmerge.shard(saved, index=0, of=2)
    s3.requests.clear()
    with pytest.raises(TemporaryError):
        skillmerge.finish(saved, wait_limit=1)
    assert s3.count("list-type=2") > 5
    assert s3.count("GET /bucket/out/merged/.skillmerge/done/") <= 2


def test_a_task_that_is_late_is_done(s3: S3Server, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have made its shards and published them, after it has looked: the prefix holds an output now."""
    find, once = buckets.find_output, []

    def overtaken(*given: Any) -> Any:
        found = find(*given)
        if not once:
            once.append(True)
            for index in range(2):
                skillmerge.shard(saved, index=index, of=2)
            skillmerge.finish(saved)
        return found

    monkeypatch.setattr(buckets, "find_output", overtaken)
    assert skillmerge.shard(saved, index=0, of=1).made == ()
    skillmerge.verify(OUT)


def test_what_finish_would_refuse_tasks_refuse_before_any_work(s3: S3Server, recipe: Path, tmp_path: Path) -> None:
    document = json.loads(recipe.read_text())
    push = {**document["output"], "push": {"repo": "acme/merged"}}
    for keys, words in (
        ({"gates": {"finite": True}}, "an output in a bucket keeps none here"),
        ({"output": push}, "is not pushed in the same run"),
    ):
        recipe.write_text(json.dumps({**document, **keys}))
        skillmerge.plan(recipe, save=tmp_path / "plan.json")
        with pytest.raises(UsageError, match=words):
            skillmerge.shard(tmp_path / "plan.json", index=0, of=2)
    assert s3.keys("out/") == []


def test_what_killed_tasks_left_here_is_removed(s3: S3Server, saved: Path, scratch: Path) -> None:
    """Not what one that lives has, nor what has only just begun, nor another machine's, whose locks may not be seen."""
    home, host = work_folder(Bucket("s3", "bucket", "out/merged")).parent, socket.gethostname()
    dead, living, new = (home / f"task-{name}@{host}.partial" for name in ("dead", "living", "new"))
    elsewhere = home / f"task-dead@not-{host}.partial"
    for folder in (dead, new, elsewhere):
        (folder / "files").mkdir(parents=True)
        (folder / "lock").touch()
        (folder / "files" / "model.safetensors").write_bytes(bytes(100))
    with closing(Staging(home / f"task-living@{host}")) as staging:
        staging.begin("plan", {})
        staging.write_file("model.safetensors", b"its own")
        for folder in (dead, living, elsewhere):
            os.utime(folder, (1, 1))
        skillmerge.shard(saved, index=0, of=2)
        assert {*home.iterdir()} == {living, new, elsewhere}
        assert (living / "files" / "model.safetensors").read_bytes() == b"its own"


def test_a_shard_that_is_sent_again_while_it_is_compared_may_pass(
    s3: S3Server, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the same bytes: no status that tells a scheduler to give up."""
    for index in range(2):
        skillmerge.shard(saved, index=index, of=2)
    peek = Objects.peek

    def changed(self: Objects, *given: Any) -> bytes:
        if self.place.prefix == "out/merged":
            raise StalePlan("it changed while it was in use")
        return peek(self, *given)

    monkeypatch.setattr(Objects, "peek", changed)
    with pytest.raises(TemporaryError, match="changed while it was compared"):
        skillmerge.finish(saved, verify=True)


def test_a_damaged_shard_is_found_by_finish(s3: S3Server, saved: Path) -> None:
    for index in range(2):
        skillmerge.shard(saved, index=index, of=2)
    flip(s3, FIRST)
    with pytest.raises(CheckFailed, match="is there with other content than this run made"):
        skillmerge.finish(saved, verify=True)


def test_tasks_of_another_plan_are_refused(s3: S3Server, saved: Path) -> None:
    skillmerge.shard(saved, index=0, of=2)
    for run in (skillmerge.shard, skillmerge.apply):
        options = {"index": 1, "of": 2} if run is skillmerge.shard else {}
        with pytest.raises(UsageError, match="another plan, or with other options"):
            run(saved, stats="full", **options)  # type: ignore[operator]


# What is refused by name, and the work folder.


@pytest.mark.parametrize("command", [("sign", OUT, "--private-key", "key"), ("attest", OUT)])
def test_commands_that_write_beside_an_output_need_a_folder(s3: S3Server, command: tuple[str, ...]) -> None:
    process = run_cli(*command, **s3.variables())
    assert (process.returncode, "this command needs a folder" in process.stderr) == (2, True)


def test_the_work_folder_is_this_users_alone(scratch: Path) -> None:
    place = Bucket("s3", "bucket", "out/merged")
    folder = work_folder(place)
    assert folder == work_folder(place) != work_folder(Bucket("s3", "bucket", "out/other"))
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    folder.parent.rmdir()
    folder.parent.symlink_to(scratch)
    with pytest.raises(UsageError, match="is not this user's folder"):
        work_folder(place)


def test_one_run_at_a_time_on_one_machine(s3: S3Server, recipe: Path) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def stall(environ: dict[str, Any], start: Any) -> None:
        reached.set()
        go_on.wait(20)

    s3.fail(f"PUT /bucket/{FIRST}", stall)
    running = threading.Thread(target=skillmerge.apply, args=(recipe,))
    running.start()
    assert reached.wait(20)
    process = run_cli("apply", recipe, **s3.variables())
    go_on.set()
    running.join(20)
    assert process.returncode == 6, process.stderr
