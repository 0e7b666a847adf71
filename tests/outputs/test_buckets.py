"""Outputs in buckets: what is there when, runs that are killed and go on elsewhere, and what is never replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from bucket_merges import another_machine, bucket_to_bucket, flip, one_file_in_parts, sent
from bucket_server import CANARIES, S3Server, refusal
from conftest import run_cli, weights

import skillmerge
from skillmerge.checkpoints.stores import object_client
from skillmerge.errors import CheckFailed, InputError, TemporaryError, UsageError
from skillmerge.outputs.manifest import Manifest, parse

OUT = "s3://bucket/out/merged"
FIRST, SECOND = (f"out/merged/model-0000{number}-of-00002.safetensors" for number in (1, 2))
RECORDS = "out/merged/.skillmerge/"


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files of this machine."""
    return another_machine(tmp_path, monkeypatch, "scratch")


@pytest.fixture
def recipe(s3: S3Server, tmp_path: Path, scratch: Path) -> Path:
    return bucket_to_bucket(s3, tmp_path, OUT)


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
def in_parts(tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return one_file_in_parts(tmp_path, monkeypatch, OUT)


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


def test_a_large_shard_without_a_record_is_compared_over_a_link_that_breaks(
    s3: S3Server, in_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has arrived counts: a shard may take longer than a request may."""
    monkeypatch.setattr(object_client, "QUICK_TRIES", 0)
    stop_at(s3, f"PUT /bucket/{RECORDS}done/")
    with pytest.raises(InputError, match="access is denied"):
        skillmerge.apply(in_parts)
    s3.faults.clear()
    whole = s3._app

    def cut(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        yield b"".join(whole(environ, start))[:1_500_000]

    s3.fail("GET /bucket/out/merged/model.safetensors", cut, times=999)
    s3.requests.clear()
    skillmerge.apply(in_parts)
    assert s3.count("partNumber=") == 0
    s3.faults.clear()
    assert sent(s3) == weights(tmp_path / "direct")


def test_an_upload_that_fails_leaves_no_parts(s3: S3Server, in_parts: Path) -> None:
    stop_at(s3, "partNumber=2")
    with pytest.raises(InputError, match="access is denied"):
        skillmerge.apply(in_parts)
    assert s3.unfinished() == 0
    assert "out/merged/model.safetensors" not in s3.keys("out/")
