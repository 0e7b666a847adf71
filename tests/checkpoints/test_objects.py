"""Models in buckets: the same bytes as from folders, changes, faults, credentials; see also `test_store_promises`."""

from __future__ import annotations

import io
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bucket_server import CANARIES, S3Server, refusal
from conftest import MODELS, run_cli, weights, write_family, write_recipe

import skillmerge
from skillmerge.checkpoints.place import Bucket, PlaceError
from skillmerge.checkpoints.schemes import local_folder, open_store, parse_place
from skillmerge.checkpoints.stores import object_client, objects
from skillmerge.errors import InputError, SkillmergeError, StalePlan, TemporaryError, UsageError


@pytest.fixture
def recipe(s3: S3Server, tmp_path: Path) -> Path:
    """A recipe over a family in a bucket, whose folders are gone."""
    write_family(tmp_path)
    skillmerge.apply(tmp_path / "recipe.yaml", tmp_path / "direct")
    models = {model: s3.put_folder(f"family/{model}", tmp_path / model) for model in MODELS}
    for model in MODELS:
        shutil.rmtree(tmp_path / model)
    s3.requests.clear()
    return write_recipe(tmp_path, models=models)


def place(uri: str) -> Bucket:
    found = parse_place(uri)
    assert isinstance(found, Bucket)
    return found


# Places.


@pytest.mark.parametrize(
    ("uri", "bucket", "prefix"),
    [
        ("s3://bucket", "bucket", ""),
        ("s3://bucket/", "bucket", ""),
        ("gs://a.b-c_d/run/step 5/", "a.b-c_d", "run/step 5"),
        ("az://container/m", "container", "m"),
    ],
)
def test_a_bucket_and_a_prefix_are_a_place(uri: str, bucket: str, prefix: str) -> None:
    found = place(uri)
    assert (found.bucket, found.prefix) == (bucket, prefix)
    assert str(found) == uri.rstrip("/")
    assert parse_place(str(found)) == found


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://", "does not begin with a bucket's name"),
        ("s3:///m", "does not begin with a bucket's name"),
        ("s3://Bucket/m", "does not begin with a bucket's name"),
        ("s3://bucket//m", "has a prefix that cannot be"),
        ("s3://bucket/a/../m", "has a prefix that cannot be"),
        ("s3://bucket/a\nb", "has a prefix that cannot be"),
        ("s3://bucket/m/model.safetensors", "is a file, not a model"),
        ("s3a://bucket/m", "did you mean `s3://bucket/m`?"),
        ("hf://buckets/me/m", "is a storage bucket, not a model"),
    ],
)
def test_what_is_no_place_in_a_bucket_is_refused(uri: str, words: str) -> None:
    with pytest.raises(PlaceError) as raised:
        parse_place(uri)
    assert words in f"{raised.value}\n{raised.value.fix}"


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("gcs://bucket/m", "did you mean `gs://bucket/m`?"),
        ("S3://bucket/m", "did you mean `s3://bucket/m`?"),
        ("s3:/bucket/m", "did you mean `s3://bucket/m`?"),
        (Path("s3://bucket/m"), "did you mean `s3://bucket/m`?"),
        ("hf://acme/merged", "pass `--push org/name`"),
        ("https://bucket.s3.amazonaws.com/m", "`https://` is not a place"),
        ("file:///tmp/m", "write the path alone: `/tmp/m`"),
    ],
)
def test_an_output_with_another_address_becomes_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str | Path, words: str
) -> None:
    """It would be on this disk, in a folder `gcs:`, and nobody would look for it there."""
    monkeypatch.chdir(tmp_path)
    recipe = write_family(tmp_path)
    before = sorted(tmp_path.iterdir())
    for given in ((recipe, output), (write_recipe(tmp_path, output={"path": str(output)}),)):
        with pytest.raises(UsageError) as raised:
            skillmerge.apply(*given)
        assert words in str(raised.value)
    assert sorted(tmp_path.iterdir()) == before
    assert skillmerge.apply(write_recipe(tmp_path), "C:/merged").output == tmp_path / "C:" / "merged", "which is a path"


@pytest.mark.parametrize(
    "uri", ["s3://AKIACANARY:CANARY@bucket/m", "s3://AKIA:CANARY/1@bucket/m", "az://bucket/m?sv=1&sig=CANARY"]
)
def test_credentials_in_an_address_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(PlaceError) as raised:
        parse_place(uri)
    assert "CANARY" not in f"{raised.value}\n{raised.value.fix}"


@pytest.mark.parametrize(
    "output", ["S3://AKIACANARY:CANARY@bucket/m", "gcs://b/m?sig=CANARY", Path("s3://AKIACANARY:CANARY@bucket/m")]
)
def test_credentials_in_an_address_that_is_none_are_not_repeated(tmp_path: Path, output: str | Path) -> None:
    with pytest.raises(UsageError) as raised:
        skillmerge.apply(write_family(tmp_path), output)
    assert "CANARY" not in f"{raised.value}\n{raised.value.fix}"


# Reading.


def test_a_merge_from_buckets_has_the_bytes_of_one_from_folders(s3: S3Server, recipe: Path, tmp_path: Path) -> None:
    made = skillmerge.apply(recipe, tmp_path / "merged")
    assert weights(made.output) == weights(tmp_path / "direct")
    assert [item.uri for item in made.manifest.inputs] == [f"s3://bucket/family/{model}" for model in MODELS]
    assert skillmerge.apply(recipe, tmp_path / "merged").already
    assert skillmerge.rebuild(made.output, check=True).tensors == len(made.manifest.tensors)


def test_a_plan_asks_once_for_a_listing_and_once_for_each_small_file(s3: S3Server, recipe: Path) -> None:
    skillmerge.plan(recipe)
    assert s3.count("list-type=2") == len(MODELS)
    assert s3.count("GET /bucket/family/rl/model-") == 2
    assert len(s3.requests) <= len(MODELS) * 5 + 1


def test_tasks_read_only_what_their_shards_need(s3: S3Server, recipe: Path, tmp_path: Path) -> None:
    assert run_cli("plan", recipe, "-o", tmp_path / "plan.json", **s3.variables()).returncode == 0
    s3.requests.clear()
    first = skillmerge.shard(tmp_path / "plan.json", tmp_path / "merged", index=0, of=2)
    assert first.as_dict()["made"]
    assert s3.count("list-type=2") == len(MODELS), "at the end: the plan has every object's size and ETag"
    assert s3.count("model-00002") == 0
    skillmerge.shard(tmp_path / "plan.json", tmp_path / "merged", index=1, of=2)
    made = skillmerge.finish(tmp_path / "plan.json", tmp_path / "merged")
    assert weights(made.output) == weights(tmp_path / "direct")


def test_a_large_tensor_is_read_in_pieces_within_the_budget(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_PIECE", 1000)
    monkeypatch.setattr(objects, "_FLIGHT", objects._Flight(3000))
    content = os.urandom(50_001)
    s3.put("model/a.safetensors", content)
    running, most = 0, 0
    lock = threading.Lock()

    def count(environ: dict[str, Any], start: Any) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.005)
        with lock:
            running -= 1

    store = open_store(place("s3://bucket/model"))
    s3.fail("GET /bucket/model/a.safetensors", count, times=999)
    buffer = bytearray(len(content))
    store.read("a.safetensors", 0, memoryview(buffer))()
    assert buffer == content
    assert s3.count("GET /bucket/model/a.safetensors") == 51
    assert 2 <= most <= 3
    store.close()


def test_what_a_runtime_loads_is_fetched_into_a_folder_that_goes_again(s3: S3Server, tmp_path: Path) -> None:
    s3.put("model/config.json", b"{}")
    s3.put("model/inner/empty.txt", b"")
    with local_folder(place("s3://bucket/model")) as folder:
        assert sorted(path.name for path in folder.rglob("*")) == ["config.json", "empty.txt", "inner"]
        assert (folder / "config.json").read_bytes() == b"{}"
    assert not folder.exists()


def test_records_of_an_output_in_the_making_are_no_part_of_it(s3: S3Server) -> None:
    s3.put("model/config.json", b"{}")
    s3.put("model/.skillmerge/plan.json", b"{}")
    store = open_store(place("s3://bucket/model"))
    assert list(store.list()) == ["config.json"]
    store.close()


def test_the_license_is_read_off_the_card(s3: S3Server) -> None:
    s3.put("model/README.md", b"---\nlicense: mit\n---\n\xff")
    store = open_store(place("s3://bucket/model"))
    assert store.at.license == "mit"
    store.close()


# Changes.


def test_weights_that_changed_since_the_plan_are_stale(s3: S3Server, recipe: Path, tmp_path: Path) -> None:
    assert run_cli("plan", recipe, "-o", tmp_path / "plan.json", **s3.variables()).returncode == 0
    shard = "family/rl/model-00001-of-00002.safetensors"
    content = bytearray(s3.get(shard))
    content[-1] ^= 1
    s3.put(shard, bytes(content))
    process = run_cli("apply", tmp_path / "plan.json", "-o", tmp_path / "merged", **s3.variables())
    assert process.returncode == 7, process.stderr
    assert "rewritten since: model-00001-of-00002.safetensors" in process.stderr


def test_weights_that_change_while_they_are_read_are_stale(s3: S3Server, recipe: Path, tmp_path: Path) -> None:
    shard = "family/rl/model-00001-of-00002.safetensors"
    content = s3.get(shard)[:-1] + b"x"
    with_headers = skillmerge.plan(recipe)
    assert with_headers.shards
    seen = 0

    def change(environ: dict[str, Any], start: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 2:  # the first is the header's
            s3.put(shard, content)

    s3.fail(f"GET /bucket/{shard}", change, times=99)
    with pytest.raises(StalePlan, match="changed while it was in use"):
        skillmerge.apply(recipe, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_object_that_vanishes_is_a_changed_one(s3: S3Server) -> None:
    s3.put("model/a.safetensors", b"abc")
    s3.put("model/b.safetensors", b"abc")
    store = open_store(place("s3://bucket/model"))
    s3.delete("model/a.safetensors")
    for look in (lambda: store.peek("a.safetensors", 0, 3), lambda: store.check_unchanged(["a.safetensors"])):
        with pytest.raises(StalePlan, match=r"a\.safetensors changed while it was in use"):
            look()
    store.close()


# Faults.

REFUSALS = {
    "403": (refusal("403 Forbidden", "AccessDenied"), InputError, "access is denied (AccessDenied)"),
    "bad key": (refusal("403 Forbidden", "InvalidAccessKeyId"), InputError, "the credentials are refused"),
    "401": (refusal("401 Unauthorized", "AuthFailure"), InputError, "the credentials are refused"),
    "expired": (refusal("400 Bad Request", "ExpiredToken"), InputError, "the credentials have expired"),
    "region": (refusal("301 Moved Permanently", "PermanentRedirect"), InputError, "in another region"),
    "429": (refusal("429 Too Many Requests", "TooManyRequests"), TemporaryError, "S3 answers TooManyRequests"),
    "503": (refusal("503 Slow Down", "SlowDown"), TemporaryError, "S3 answers SlowDown"),
    "500": (refusal("500 Internal Server Error", "InternalError"), TemporaryError, "S3 answers InternalError"),
    "418": (refusal("418 Teapot", "Odd"), InputError, "S3 refuses the request (Odd)"),
}


@pytest.mark.parametrize("where", ["list-type=2", "GET /bucket/model/a.safetensors"])
@pytest.mark.parametrize("fault", REFUSALS)
def test_what_a_refusal_means_is_told_without_its_text(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, fault: str, where: str
) -> None:
    monkeypatch.setattr(object_client, "QUICK_TRIES", 0)
    s3.put("model/a.safetensors", b"abc")
    answer, kind, words = REFUSALS[fault]
    s3.fail(where, answer, times=99)
    with pytest.raises(kind) as raised:
        open_store(place("s3://bucket/model")).peek("a.safetensors", 0, 3)
    assert words in raised.value.message
    assert raised.value.fix
    assert not any(secret in str(raised.value) for secret in CANARIES.values())
    assert raised.value.__cause__ is None or "CANARY" not in str(raised.value.__cause__)


def test_what_passes_is_tried_again(s3: S3Server, recipe: Path, tmp_path: Path) -> None:
    for where in ("list-type=2", "GET /bucket/family/rl/model-00001", "GET /bucket/family/sft/model-00002"):
        s3.fail(where, refusal("503 Slow Down", "SlowDown"), times=6)
    assert weights(skillmerge.apply(recipe, tmp_path / "merged").output) == weights(tmp_path / "direct")


def test_a_body_that_breaks_off_is_gone_on_with(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_client, "QUICK_TRIES", 0)
    content = os.urandom(3_000_000)
    s3.put("model/a.safetensors", content)
    store = open_store(place("s3://bucket/model"))
    whole, asked = s3._app, []

    def cut(environ: dict[str, Any], start: Any) -> Iterator[bytes]:
        asked.append(environ["HTTP_RANGE"])
        body = io.BytesIO(b"".join(whole(environ, start)))
        yield body.read(1_500_000)

    s3.fail("GET /bucket/model/a.safetensors", cut, times=2)
    assert store.peek("a.safetensors", 0, len(content)) == content
    assert asked[0] == "bytes=0-2999999"
    assert int(asked[1].removeprefix("bytes=").split("-")[0]) > 0
    store.close()


@pytest.mark.parametrize("uri", ["s3://bucket/nothing", "s3://nobucket/model"])
def test_what_is_not_there_is_an_input_error(s3: S3Server, uri: str) -> None:
    with pytest.raises(InputError, match=r"does not exist|there is no bucket"):
        open_store(place(uri))


def test_a_server_that_is_not_there_is_a_temporary_error(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_client, "QUICK_TRIES", 0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(TemporaryError, match="the network failed between here and S3"):
        open_store(place("s3://bucket/model"))


# Settings.


def test_settings_that_cannot_be_are_refused_and_not_shown(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value, words in (
        ("AWS_ENDPOINT_URL", "CANARY", "AWS_ENDPOINT_URL is not an address"),
        ("AWS_SECRET_ACCESS_KEY", "CANARY\n", "AWS_SECRET_ACCESS_KEY has invalid characters"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(UsageError) as raised:
                open_store(place("s3://bucket/model"))
        assert words in str(raised.value)
        assert "CANARY" not in str(raised.value)


def test_the_package_is_an_extra(hide: Callable[[str], None]) -> None:
    hide("obstore")
    with pytest.raises(UsageError) as raised:
        open_store(place("s3://bucket/model"))
    assert raised.value.fix == "install it: `pip install 'skillmerge[stores]'`"


def test_an_older_python_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    with pytest.raises(UsageError, match=r"need Python 3\.11 or later; this is 3\.10"):
        open_store(place("gs://bucket/model"))


@pytest.fixture
def profile(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CANARIES:
        monkeypatch.delenv(name)
    folder = Path.home() / ".aws"
    folder.mkdir(parents=True)
    (folder / "credentials").write_text("[team]\naws_access_key_id=AKIACANARY\naws_secret_access_key=CANARY\n")
    monkeypatch.setenv("AWS_PROFILE", "team")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3.put("model/config.json", b"{}")


@pytest.mark.usefixtures("profile")
def test_profiles_are_read_with_boto3() -> None:
    pytest.importorskip("boto3")
    store = open_store(place("s3://bucket/model"))
    assert store.read_small("config.json", 9) == b"{}"
    store.close()


@pytest.mark.usefixtures("profile")
def test_a_profile_needs_boto3(hide: Callable[[str], None]) -> None:
    hide("boto3")
    with pytest.raises(UsageError, match="the AWS profile `team` is read with the package boto3") as raised:
        open_store(place("s3://bucket/model"))
    assert "CANARY" not in str(raised.value)


@pytest.mark.usefixtures("profile")
def test_a_profile_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("boto3")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UsageError, match="`nobody` could not be used"):
        open_store(place("s3://bucket/model"))


# Nothing of it is a secret.


def test_nothing_that_is_printed_or_written_has_a_secret(s3: S3Server, recipe: Path, tmp_path: Path) -> None:
    secrets, env = list(CANARIES.values()), s3.variables()
    shown = ""
    for command in (
        ("plan", recipe, "-o", tmp_path / "plan.json"),
        ("apply", tmp_path / "plan.json", "-o", tmp_path / "merged", "--report", tmp_path / "r.html", "-v"),
        ("inspect", "s3://bucket/family/sft", "s3://bucket/family/rl", "--json"),
        ("doctor",),
    ):
        process = run_cli(*command, **env)
        assert process.returncode == 0, process.stderr
        shown += process.stdout + process.stderr
    s3.fail("GET /bucket", refusal("403 Forbidden", "AccessDenied"), times=999)
    process = run_cli("apply", recipe, "-v", "--json", **env)
    assert process.returncode == 4
    shown += process.stdout + process.stderr
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 8
    for secret in secrets:
        assert secret not in shown
        assert not any(secret.encode() in content for content in written)


def test_an_error_is_one_of_ours_whatever_the_client_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    with pytest.raises(InputError, match="could not make the request"), object_client.object_errors("s3://bucket"):
        raise PanicException("CANARY")
    assert issubclass(InputError, SkillmergeError)
