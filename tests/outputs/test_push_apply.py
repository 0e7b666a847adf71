"""`apply --push`: published as it is merged, with or without a copy on the disk, whatever happens on the way."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_server import Command, Commands
from conftest import run_cli, run_process, weights, write_recipe
from hub_server import HubServer
from huggingface_hub import ModelCard
from published import MERGED, assert_is_published, put_on_the_hub

import skillmerge
from skillmerge.errors import InputError, TemporaryError, UsageError

# ---------------------------------------------------------------------------------------------------- apply --push


def test_apply_pushes_what_the_recipe_says(hub: HubServer, licensed: Path) -> None:
    document = json.loads(licensed.read_text())
    document["output"]["push"] = {"repo": MERGED, "private": True, "tags": ["math"], "message": "Hello"}
    licensed.write_text(json.dumps(document))
    result = skillmerge.apply(licensed)
    assert result.published is not None
    assert_is_published(hub, result.output)
    assert hub.repos[MERGED].private
    assert "math" in ModelCard(hub.content(MERGED, "README.md").decode()).data.tags
    again = skillmerge.apply(licensed)
    assert again.already
    assert again.published is not None
    assert again.published.already


def test_apply_with_a_push_that_fails_keeps_the_output(hub: HubServer, licensed: Path) -> None:
    hub.fail("status", "PUT /upload", times=10**6, status=503)
    with pytest.raises(TemporaryError):
        skillmerge.apply(licensed, push=MERGED)
    output = licensed.parent / "merged"
    skillmerge.verify(output)
    hub.faults.clear()
    assert skillmerge.apply(licensed, push=MERGED).already
    assert_is_published(hub, output)


def test_push_that_is_not_allowed_is_told_before_any_work(hub: HubServer, licensed: Path) -> None:
    with pytest.raises(InputError, match="may not"):
        skillmerge.apply(licensed, push="forbidden/merged")
    (licensed.parent / "rl" / "README.md").write_text("---\nlicense: other\n---\n")
    with pytest.raises(UsageError, match="parents' licenses differ"):
        skillmerge.apply(licensed, push=MERGED)
    assert not list(licensed.parent.glob("merged*"))
    assert MERGED not in hub.repos


def test_no_local_leaves_nothing_on_the_disk(hub: HubServer, licensed: Path) -> None:
    local = skillmerge.apply(licensed, licensed.parent / "local").output
    result = skillmerge.apply(licensed, push=MERGED, no_local=True)
    assert result.published is not None
    assert not list(licensed.parent.glob("merged*"))
    for path in local.iterdir():
        if not path.name.startswith("skillmerge."):
            assert hub.content(MERGED, path.name) == path.read_bytes()
    again = skillmerge.apply(licensed, push=MERGED, no_local=True)
    assert again.already
    assert again.published is not None
    assert again.published.commit == result.published.commit
    with pytest.raises(UsageError, match="would leave no output"):
        skillmerge.apply(licensed, no_local=True)


@pytest.mark.parametrize("where", ["PUT /upload", "commit/main", "#done"])
def test_no_local_is_continued(hub: HubServer, licensed: Path, where: str) -> None:
    """Whatever was sent is not sent again, and one commit comes of it."""
    hub.fail("status", where, times=10**6, after=1 if "PUT" in where else 0, status=500)
    if where == "#done":
        hub.faults[0].kind = "reset"
        hub.fail("status", "GET /api/models/acme/merged/revision", times=10**6, after=2, status=500)
    with pytest.raises(TemporaryError):
        skillmerge.apply(licensed, push=MERGED, no_local=True)
    sent = list(hub.uploads)
    hub.faults.clear()
    result = skillmerge.apply(licensed, push=MERGED, no_local=True)
    assert hub.uploads[: len(sent)] == sent
    assert len(hub.uploads) == len(set(hub.uploads)) == 3, "two shards and a manifest"
    assert len(hub.repos[MERGED].commits) == 2
    assert result.published is not None
    assert not list(licensed.parent.glob("merged*"))


def test_no_local_begins_again_where_the_hub_forgot_uploads(hub: HubServer, licensed: Path) -> None:
    hub.fail("status", "commit/main", times=10**6, status=500)
    with pytest.raises(TemporaryError):
        skillmerge.apply(licensed, push=MERGED, no_local=True)
    hub.faults.clear()
    hub.repos[MERGED].lfs.clear()
    with pytest.raises(TemporaryError, match="no longer has all files"):
        skillmerge.apply(licensed, push=MERGED, no_local=True)
    skillmerge.apply(licensed, push=MERGED, no_local=True)
    assert "model-00001-of-00002.safetensors" in hub.tree(MERGED)


def test_hub_to_hub_and_back_through_transformers(hub: HubServer, tmp_path: Path) -> None:
    """Three repositories in, one out, loaded by from_pretrained from the Hub."""
    assert run_cli("demo", tmp_path / "demo").returncode == 0
    models = {"target": "target-sft", "rl": "source-rl", "sft": "source-sft"}
    for name in models.values():
        hub.create_from(f"acme/{name}", tmp_path / "demo" / name, card={"license": "mit"})
    (tmp_path / "work").mkdir()
    document = {"models": {key: f"hf://acme/{name}" for key, name in models.items()}, "output": {"path": "merged"}}
    recipe = write_recipe(tmp_path / "work", **document)
    variables = hub.variables()
    process = run_cli("apply", recipe, "--push", MERGED, "--no-local", "--json", **variables)
    assert process.returncode == 0, process.stderr
    local = write_recipe(tmp_path / "demo", models={key: f"./{name}" for key, name in models.items()})
    merged = skillmerge.apply(local, tmp_path / "local").output
    program = (
        f"from transformers import AutoModelForCausalLM as A; there = A.from_pretrained({MERGED!r}).state_dict();"
        f"here = A.from_pretrained({str(merged)!r}).state_dict();"
        "assert there.keys() == here.keys() and all((there[key] == here[key]).all() for key in here)"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr


def test_copied_shard_is_copied_by_the_hub(hub: HubServer, licensed: Path, tmp_path: Path) -> None:
    """Blocks that lambda leaves alone, in a shard of their own, are the donor's file byte for byte."""
    models = put_on_the_hub(hub, licensed)
    rules = [{"layers": "0-", "value": 0.0}, {"tensors": ["*embed*", "model.norm*", "lm_head*"], "value": 0.0}]
    schedule = {"default": 1.0, "rules": rules}
    (tmp_path / "work").mkdir()
    work = write_recipe(tmp_path / "work", models=models, coefficients={"lam": schedule})
    skillmerge.apply(work, push=MERGED, pull_request=False)
    assert hub.count("lfs-files/duplicate") == 1
    shard = "model-00001-of-00002.safetensors"
    assert hub.tree(MERGED)[shard].sha256 == hub.tree("acme/target")[shard].sha256
    # Without a local output too; and where the Hub will not copy, the file goes through this disk once more.
    for name, fault in (("acme/second", False), ("acme/third", True)):
        if fault:
            hub.fail("status", "lfs-files/duplicate", times=10**6, status=400)
        hub.uploads.clear()
        skillmerge.apply(work, tmp_path / "none", push=name, no_local=True)
        assert hub.tree(name)[shard].sha256 == hub.tree("acme/target")[shard].sha256
        assert (hub.tree(name)[shard].sha256 in hub.uploads) == fault
    assert not list(tmp_path.glob("none*"))
    # A commit that is refused for another reason has nothing to do with copies.
    hub.faults.clear()
    hub.fail("status", "commit/main", times=10**6, status=403)
    hub.requests.clear()
    with pytest.raises(InputError):
        skillmerge.apply(work, tmp_path / "none", push="acme/fourth", no_local=True)
    assert hub.count("commit/main") == 1


def test_copy_that_comes_back_damaged_is_not_published(hub: HubServer, licensed: Path, tmp_path: Path) -> None:
    """What the Hub would not copy is fetched, and nobody downstream of us would notice a flipped bit."""
    models = put_on_the_hub(hub, licensed)
    (tmp_path / "work").mkdir()
    work = write_recipe(tmp_path / "work", models=models, merge="target + 0 * (rl - sft)", coefficients={})
    hub.fail("status", "lfs-files/duplicate", times=10**6, status=400)
    hub.fail("call", "POST .*lfs-files/duplicate", action=lambda: hub.fail("flip", "GET /storage/", times=10**6))
    hub.faults.reverse()
    with pytest.raises(InputError, match="does not have the digest"):
        skillmerge.apply(work, tmp_path / "none", push=MERGED, no_local=True)
    assert "model-00001-of-00002.safetensors" not in hub.tree(MERGED)


# --------------------------------------------------------------------------------------------------------------- xet


@pytest.mark.parametrize("how", ["push", "no-local"])
def test_xet_storage(tmp_path: Path, licensed: Path, how: str) -> None:
    """Up and down through the xet client, in processes of their own: it reads its settings once."""
    output = skillmerge.apply(licensed, tmp_path / "local").output
    with HubServer(tmp_path / "hub", xet=True) as hub:
        if how == "push":
            process = run_process("push", output, MERGED, **hub.variables())
        else:
            process = run_process("apply", licensed, "--push", MERGED, "--no-local", **hub.variables())
        assert process.returncode == 0, process.stderr
        assert hub.uploads == [], "nothing went the old way"
        shards = sorted(output.glob("*.safetensors"))
        program = (
            "import sys, hf_xet; from huggingface_hub import hf_hub_download;"
            "print(*(item.hash for item in hf_xet.hash_files(sys.argv[1:])))"
        )
        hashes = python(hub, program, *shards).split()
        for shard, xet_hash in zip(shards, hashes, strict=True):
            sha256 = hub.tree(MERGED)[shard.name].sha256
            assert sha256 is not None
            hub.xet_hashes[sha256] = xet_hash
        program = "import sys; from huggingface_hub import hf_hub_download as get; print(get(sys.argv[1], sys.argv[2]))"
        for shard in shards:
            assert Path(python(hub, program, MERGED, shard.name).strip()).read_bytes() == shard.read_bytes()


def python(hub: HubServer, program: str, *arguments: str | Path) -> str:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    process = subprocess.run(command, env={**os.environ, **hub.variables()}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


# ------------------------------------------------------------------------------------------------------------ killed


KILLS = int(os.environ.get("SKILLMERGE_TEST_KILLS", "4"))
"""How many times each; 50 before a release."""


@pytest.mark.parametrize("how", ["push", "no-local"])
def test_push_killed_at_random_instants(
    hub: HubServer, commands: Commands, licensed: Path, tmp_path: Path, how: str
) -> None:
    """Killed, then run again: one commit, all files right, and until then nothing of it is seen."""
    output = skillmerge.apply(licensed, tmp_path / "local").output
    wanted = weights(output)
    random_instant = random.Random(7)

    def start(repository: str) -> Command:
        arguments = ["push", str(output), repository]
        if how == "no-local":
            arguments = ["apply", str(licensed), "--push", repository, "--no-local"]
        return commands.start(*arguments, **hub.variables())

    hub.latency = 0.02  # so that most instants are between two requests
    began = time.monotonic()
    start("acme/first").wait()
    assert "README.md" in hub.tree("acme/first")
    duration = time.monotonic() - began
    for number in range(KILLS):
        repository = f"acme/merged-{number}"
        process = start(repository)
        time.sleep(duration * random_instant.uniform(0.3, 1.0))
        process.kill()
        process.wait()
        if repository in hub.repos:
            seen = set(hub.tree(repository))
            assert seen == {".gitattributes"} or seen >= set(wanted), seen
        ended = start(repository).wait()
        assert ended.returncode == 0, ended.stderr
        repo = hub.repos[repository]
        assert len(repo.commits) == 2, number
        assert repo.discussions == []
        for name, content in wanted.items():
            assert hub.content(repository, name) == content, (number, name)
    assert not list(licensed.parent.glob("merged*"))
