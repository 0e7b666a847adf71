"""Outputs in buckets: what is there when, runs that are killed and go on elsewhere, and what is never replaced."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from bucket_server import CANARIES, S3Server, refusal
from conftest import MODELS, run_cli, tensor_shapes, weights, write_family, write_recipe

import skillmerge
from skillmerge.checkpoints.place import Bucket
from skillmerge.checkpoints.stores import object_client
from skillmerge.errors import CheckFailed, InputError, StalePlan, TemporaryError, UsageError
from skillmerge.outputs.buckets import prefix
from skillmerge.outputs.buckets.sending import work_folder
from skillmerge.outputs.manifest import Manifest, parse
from skillmerge.study.gates import GateFailed
from skillmerge.verbs.tasks import buckets

OUT = "s3://bucket/out/merged"
FIRST, SECOND = (f"out/merged/model-0000{number}-of-00002.safetensors" for number in (1, 2))
RECORDS = "out/merged/.skillmerge/"


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files of this machine."""
    return another_machine(tmp_path, monkeypatch, "scratch")


def another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture
def recipe(s3: S3Server, tmp_path: Path, scratch: Path) -> Path:
    """A recipe from a bucket to a bucket, and what it makes as a folder, `direct`."""
    write_family(tmp_path, config={"model_type": "odd"})
    skillmerge.apply(tmp_path / "recipe.yaml", tmp_path / "direct")
    models = {model: s3.put_folder(f"family/{model}", tmp_path / model) for model in MODELS}
    s3.requests.clear()
    return write_recipe(tmp_path, models=models, output={"path": OUT})


def sent(s3: S3Server, prefix: str = "out/merged") -> dict[str, bytes]:
    """What is under a prefix and does not speak of how and where it was made."""
    keys = [key for key in s3.keys(prefix + "/") if "/skillmerge." not in key]
    return {key.removeprefix(prefix + "/"): s3.get(key) for key in keys}


def manifest_of(s3: S3Server) -> Manifest:
    return parse(s3.get("out/merged/skillmerge.manifest.json"), "it")


def test_a_merge_from_bucket_to_bucket_is_the_folders(
    s3: S3Server, recipe: Path, tmp_path: Path, scratch: Path
) -> None:
    made = skillmerge.apply(recipe)
    assert made.place == OUT == made.as_dict()["output"]
    assert sent(s3) == weights(tmp_path / "direct")
    writes = [request for request in s3.requests if request.startswith(("PUT", "POST"))]
    assert writes[0] == f"PUT /bucket/{RECORDS}plan.json"
    assert [write.rpartition("/")[2] for write in writes[-7:-3]] == [
        "config.json", "model.safetensors.index.json", "skillmerge.run.json", "skillmerge.manifest.json"
    ]  # fmt: skip
    assert not s3.keys(RECORDS), "a finished output needs none"
    assert [path for path in scratch.rglob("*") if path.is_file()] == []
    assert manifest_of(s3).digest == made.manifest.digest


def test_an_output_that_is_there_is_up_to_date(s3: S3Server, recipe: Path) -> None:
    skillmerge.apply(recipe)
    s3.requests.clear()
    assert skillmerge.apply(recipe).already
    assert s3.count("PUT") == 0
    assert skillmerge.apply(recipe, full=True).already
    flip(s3, FIRST)
    with pytest.raises(CheckFailed, match=f"^s3://bucket/{FIRST}: its bytes are not those"):
        skillmerge.apply(recipe, full=True)


def flip(s3: S3Server, key: str) -> None:
    content = bytearray(s3.get(key))
    content[-1] ^= 1
    s3.put(key, bytes(content))


# What is there already.


def test_another_output_is_never_replaced(s3: S3Server, recipe: Path) -> None:
    skillmerge.apply(recipe)
    before = {key: s3.get(key) for key in s3.keys("out/")}
    with pytest.raises(UsageError, match="holds a finished output of another plan"):
        skillmerge.apply(recipe, coefficients={"lam": 0.5})
    with pytest.raises(UsageError, match="`--overwrite` cannot replace an output in a bucket"):
        skillmerge.apply(recipe, overwrite=True)
    assert {key: s3.get(key) for key in s3.keys("out/")} == before


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors", ".skillmerge-not/plan.json"])
def test_a_prefix_that_is_not_empty_is_refused(s3: S3Server, recipe: Path, name: str) -> None:
    s3.put(f"out/merged/{name}", b"precious")
    s3.put("out/merged-too/neighbor", b"")
    with pytest.raises(UsageError, match=f"is not empty: it holds {name}") as raised:
        skillmerge.apply(recipe)
    assert raised.value.fix is not None
    assert s3.keys("out/merged/") == [f"out/merged/{name}"]


def test_an_unfinished_run_of_another_plan_is_refused(s3: S3Server, recipe: Path) -> None:
    stop_at(s3, f"PUT /bucket/{SECOND}")
    with pytest.raises(InputError):
        skillmerge.apply(recipe)
    s3.faults.clear()
    with pytest.raises(UsageError, match="holds an unfinished run of another plan"):
        skillmerge.apply(recipe, coefficients={"lam": 0.5})
    assert skillmerge.apply(recipe).place == OUT


def stop_at(s3: S3Server, where: str) -> None:
    s3.fail(where, refusal("403 Forbidden", "AccessDenied"), times=99)


def test_an_object_that_came_in_between_is_not_taken_for_a_shard(s3: S3Server, recipe: Path) -> None:
    s3.fail(f"HEAD /bucket/{SECOND}", lambda environ, start: s3.put(SECOND, b"another's"))
    with pytest.raises(CheckFailed, match="is there with other content than this run made"):
        skillmerge.apply(recipe)
    assert s3.get(SECOND) == b"another's"
    assert "out/merged/skillmerge.manifest.json" not in s3.keys("out/")


def test_options_that_cannot_be_with_a_bucket_are_refused(s3: S3Server, recipe: Path) -> None:
    for options, words in (
        ({"push": "acme/merged"}, "not pushed in the same run"),
        ({"keep_failed": True}, "`keep_failed` cannot apply"),
    ):
        with pytest.raises(UsageError, match=words):
            skillmerge.apply(recipe, **options)  # type: ignore[arg-type]
    assert s3.requests == [], "before any request"
    for command in (("export", "s3://bucket/skill", "--lora-rank", "2"), ("sweep", recipe, "--set", "lam=1")):
        assert run_cli(*command, "-o", OUT, **s3.variables()).returncode == 2


# Runs that end early.


@pytest.mark.parametrize(
    "where", ["plan.json", FIRST, f"{RECORDS}done/", SECOND, "config.json", "run.json", "manifest"]
)
def test_a_killed_run_goes_on_on_another_machine(
    s3: S3Server, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Killed as a request arrives, which is carried out all the same."""
    env = {**os.environ, **s3.variables(), "PYTHONPATH": str(Path(skillmerge.__file__).parent.parent)}
    command = [sys.executable, "-m", "skillmerge", "apply", str(recipe), "-q", "--threads", "1"]
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:

        def kill(environ: dict[str, Any], start: Any) -> None:
            if environ["REQUEST_METHOD"] == "PUT":
                process.send_signal(signal.SIGKILL)
                process.wait()

        s3.fail(f"PUT /bucket/{where if '/' in where else 'out/merged/'}", kill, 99)
        if "/" not in where:
            s3.faults[0].answer = lambda environ, start: kill(environ, start) if where in environ["PATH_INFO"] else None
    assert process.returncode == -signal.SIGKILL
    s3.faults.clear()
    there = s3.keys(f"{RECORDS}done/")
    another_machine(tmp_path, monkeypatch, "other")
    s3.requests.clear()
    skillmerge.apply(recipe)
    assert sent(s3) == weights(tmp_path / "direct")
    assert skillmerge.verify(OUT).files == 6
    for record in there:
        shard = record.removesuffix(".json").rpartition("/")[2]
        assert s3.count(f"PUT /bucket/out/merged/{shard}") == 0, "what is recorded is not sent again"
        assert s3.count(f"GET /bucket/family/rl/{shard}") <= 1, "nor made again: that is its header"


def test_two_runs_at_once_make_one_output(s3: S3Server, recipe: Path, tmp_path: Path) -> None:
    env = {**os.environ, **s3.variables(), "PYTHONPATH": str(Path(skillmerge.__file__).parent.parent)}
    running = []
    for number in range(2):
        (tmp_path / f"t{number}").mkdir()
        command = [sys.executable, "-m", "skillmerge", "apply", str(recipe), "-q"]
        running.append(subprocess.Popen(command, env={**env, "TMPDIR": str(tmp_path / f"t{number}")}))
    assert [process.wait(120) for process in running] == [0, 0]
    assert sent(s3) == weights(tmp_path / "direct")
    skillmerge.verify(OUT)


def test_a_run_log_that_another_run_left_stays_and_is_in_the_manifest(s3: S3Server, recipe: Path) -> None:
    log = b'{"finished": "2026-01-01T00:00:00Z", "seconds": 1.0, "gates": []}\n'
    s3.fail("PUT /bucket/out/merged/skillmerge.run.json", lambda *_: s3.put("out/merged/skillmerge.run.json", log))
    made = skillmerge.apply(recipe)
    assert s3.get("out/merged/skillmerge.run.json") == log
    assert manifest_of(s3).digest == made.manifest.digest
    skillmerge.verify(OUT)


def test_shards_that_vanish_before_the_manifest_are_made_again(s3: S3Server, recipe: Path) -> None:
    stop_at(s3, "PUT /bucket/out/merged/config.json")
    with pytest.raises(InputError, match="access is denied"):
        skillmerge.apply(recipe)
    s3.faults.clear()
    s3.delete(FIRST)
    with pytest.raises(TemporaryError, match="shards that were sent are not there any more"):
        skillmerge.apply(recipe)
    skillmerge.apply(recipe)
    skillmerge.verify(OUT)


# Faults.


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [("403 Forbidden", "AccessDenied", InputError), ("503 Slow Down", "SlowDown", TemporaryError)],
)
@pytest.mark.parametrize("where", ["plan.json", "model-00001", "done/model-00002", "config.json", "manifest.json"])
def test_refused_writes_end_a_run_that_can_go_on(
    s3: S3Server,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    status: str,
    code: str,
    kind: type,
) -> None:
    monkeypatch.setattr(object_client, "QUICK_TRIES", 0)
    answer = refusal(status, code)

    def refuse(environ: dict[str, Any], start: Any) -> Iterable[bytes] | None:
        return answer(environ, start) if where in environ["PATH_INFO"] else None

    s3.fail("PUT /bucket/out/merged", refuse, times=999)
    with pytest.raises(kind) as raised:
        skillmerge.apply(recipe)
    assert not any(secret in str(raised.value) for secret in CANARIES.values())
    assert "out/merged/skillmerge.manifest.json" not in s3.keys("out/")
    s3.faults.clear()
    skillmerge.apply(recipe)
    assert sent(s3) == weights(tmp_path / "direct")


def test_writes_that_are_throttled_are_tried_again(s3: S3Server, recipe: Path, tmp_path: Path) -> None:
    s3.fail("PUT /bucket/out/merged", refusal("503 Slow Down", "SlowDown"), times=12)
    skillmerge.apply(recipe)
    assert sent(s3) == weights(tmp_path / "direct")


def test_an_answer_that_was_lost_is_no_other_objects(
    s3: S3Server, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a request created, whose answer did not arrive, is found there by the next try."""
    monkeypatch.setattr(object_client, "QUICK_TRIES", 0)
    lost = []

    def carried_out(environ: dict[str, Any], start: Any) -> Iterable[bytes] | None:
        if environ["REQUEST_METHOD"] != "PUT" or environ["PATH_INFO"] in lost:
            return None
        lost.append(environ["PATH_INFO"])
        s3.put(
            environ["PATH_INFO"].removeprefix("/bucket/"), environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        )
        return refusal("500 Internal Server Error", "InternalError")({**environ, "CONTENT_LENGTH": "0"}, start)

    s3.fail("PUT /bucket/out/merged", carried_out, times=999)
    skillmerge.apply(recipe)
    assert len(lost) == 9
    s3.faults.clear()
    skillmerge.verify(OUT)


@pytest.fixture
def in_parts(s3: S3Server, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose output is one file of 13 MB, which is sent in three parts."""
    monkeypatch.setattr(prefix, "_WHOLE", 1000)
    monkeypatch.setattr(prefix, "_PART", 5 << 20)
    write_family(tmp_path, tensor_shapes(layers=1, hidden=512, vocabulary=5600), shards=1)
    skillmerge.apply(tmp_path / "recipe.yaml", tmp_path / "direct")
    return write_recipe(tmp_path, output={"path": OUT})


def test_a_large_shard_is_sent_in_parts(s3: S3Server, in_parts: Path, tmp_path: Path) -> None:
    skillmerge.apply(in_parts)
    assert s3.count("partNumber=") == 3
    assert sent(s3) == weights(tmp_path / "direct")
    assert s3.unfinished() == 0


def test_a_lost_part_is_sent_again(s3: S3Server, in_parts: Path, tmp_path: Path) -> None:
    def swallow(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        start("200 OK", [("Content-Length", "0"), ("ETag", '"0123456789abcdef0123456789abcdef"')])
        return [b""]

    s3.fail("partNumber=2", swallow)
    skillmerge.apply(in_parts)
    assert sent(s3) == weights(tmp_path / "direct")
    skillmerge.verify(OUT)


def test_an_upload_that_fails_leaves_no_parts(s3: S3Server, in_parts: Path) -> None:
    stop_at(s3, "partNumber=2")
    with pytest.raises(InputError, match="access is denied"):
        skillmerge.apply(in_parts)
    assert s3.unfinished() == 0
    assert "out/merged/model.safetensors" not in s3.keys("out/")


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
