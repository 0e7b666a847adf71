"""Lock files: what they hold, and that a model that changed since is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    MODELS,
    hub_recipe,
    put_family,
    run_cli,
    weights,
)
from hub_server import HubServer

import skillmerge
from skillmerge.errors import StalePlan, UsageError

SINGLE = "model.safetensors"


# ---------------------------------------------------------------------------------------------------------- lock


def test_floating_revision_is_told_with_its_pinned_form(hub: HubServer, tmp_path: Path) -> None:
    put_family(hub, tmp_path / "local")
    commit = hub.repos["acme/rl"].refs["main"]
    process = run_cli("plan", hub_recipe(tmp_path / "remote", rl=f"@{commit}", sft="@main"), **hub.variables())
    assert process.returncode == 0, process.stderr
    assert f"  target: hf://acme/target@{hub.repos['acme/target'].refs['main']}\n" in process.stderr
    assert f"  sft: hf://acme/sft@{hub.repos['acme/sft'].refs['main']}\n" in process.stderr
    assert "model `rl`" not in process.stderr


def test_locked_refuses_what_can_change_and_takes_what_was_locked(hub: HubServer, tmp_path: Path) -> None:
    local = skillmerge.apply(put_family(hub, tmp_path / "local"))
    recipe = hub_recipe(tmp_path / "remote")
    with pytest.raises(UsageError, match="--locked"):
        skillmerge.apply(recipe, locked=True)
    skillmerge.plan(recipe, lock=True)
    for model in MODELS:  # the branches move on
        hub.commit(f"acme/{model}", {"model-00001-of-00002.safetensors": b"something else"})
    remote = skillmerge.apply(recipe, locked=True)
    assert weights(local.output) == weights(remote.output)


def test_lock_holds_commits_sizes_and_digests(hub: HubServer, tmp_path: Path) -> None:
    put_family(hub, tmp_path / "local")
    skillmerge.plan(hub_recipe(tmp_path / "remote"), lock=True)
    lock = json.loads((tmp_path / "remote" / "recipe.lock").read_text())
    target = lock["models"]["target"]
    assert target["commit"] == hub.repos["acme/target"].refs["main"]
    files = {file.pop("name"): file for file in target["files"]}
    shard = hub.tree("acme/target")["model-00001-of-00002.safetensors"]
    assert files["model-00001-of-00002.safetensors"] == {"size": shard.size, "sha256": shard.sha256}
    assert "git_sha1" in files["generation_config.json"]
    assert "tokenizer.json" in files
    assert "tokenizer.json" not in {file["name"] for file in lock["models"]["rl"]["files"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lock: lock["models"].pop("rl"), "does not hold it"),
        (lambda lock: lock["models"]["rl"].update(uri="hf://acme/other"), "hf://acme/other"),
        (lambda lock: lock["models"]["rl"]["files"][0].update(size=1), "not the file that was locked"),
        (lambda lock: lock["models"]["rl"]["files"][0].update(name="gone"), "not the file that was locked"),
    ],
)
def test_stale_lock_is_refused(hub: HubServer, tmp_path: Path, change: Any, message: str) -> None:
    put_family(hub, tmp_path / "local")
    recipe = hub_recipe(tmp_path / "remote")
    skillmerge.plan(recipe, lock=True)
    path = tmp_path / "remote" / "recipe.lock"
    lock = json.loads(path.read_text())
    change(lock)
    path.write_text(json.dumps(lock))
    with pytest.raises(StalePlan, match=message):
        skillmerge.apply(recipe)
    skillmerge.plan(recipe, lock=True)
    skillmerge.apply(recipe)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b'{"lock_version": 1, "models": {"rl": {}}}', b"\xff", b"[" * 99]
)
def test_damaged_lock_is_refused(hub: HubServer, tmp_path: Path, content: bytes) -> None:
    recipe = hub_recipe(tmp_path / "remote")
    (tmp_path / "remote" / "recipe.lock").write_bytes(content)
    with pytest.raises(UsageError, match=r"recipe\.lock: is not a lock file"):
        skillmerge.plan(recipe)
