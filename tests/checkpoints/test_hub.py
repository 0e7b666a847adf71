"""Models on the Hub as inputs: a loopback server, the real client, and what goes wrong between them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_tensors, read_checkpoint, run_cli, tensor_shapes, write_checkpoint, write_recipe
from hub_server import TOKEN, HubServer

import skillmerge
from skillmerge.checkpoints import hub_client
from skillmerge.errors import InputError, SkillmergeError, StalePlan, TemporaryError, UsageError

MODELS = ("target", "rl", "sft")
SINGLE = "model.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that this process uses, with waits between tries that no test has time for taken out."""
    monkeypatch.setattr(hub_client, "FIRST_WAIT", 0.001)
    with HubServer(tmp_path / "hub") as server, server.environment(monkeypatch):
        yield server


def put_family(hub: HubServer, folder: Path, *, shards: int = 2, **shapes: int) -> Path:
    """The same family as folders below `folder` and as repositories; the recipe of the folders."""
    for seed, model in enumerate(MODELS):
        tensors = random_tensors(tensor_shapes(**shapes), seed=seed)
        path = write_checkpoint(folder / model, tensors, shards=shards, config={"model_type": "odd"})
        (path / "tokenizer.json").write_text('{"x": "' + "y" * 20_000 + '"}')
        (path / "generation_config.json").write_text("{}")
        hub.create_from(f"acme/{model}", path)
    return write_recipe(folder)


def hub_recipe(folder: Path, **revisions: str) -> Path:
    folder.mkdir(exist_ok=True)
    models = {model: f"hf://acme/{model}{revisions.get(model, '')}" for model in MODELS}
    return write_recipe(folder, models=models)


def weights(folder: Path) -> dict[str, bytes]:
    """The files of an output that do not speak of where its inputs were."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith("skillmerge.")}


# ------------------------------------------------------------------------------------------------ what is merged


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("redirect", [True, False])
def test_merge_from_the_hub_has_the_bytes_of_the_merge_from_disk(
    hub: HubServer, tmp_path: Path, shards: int, redirect: bool
) -> None:
    hub.redirect = redirect
    local = skillmerge.apply(put_family(hub, tmp_path / "local", shards=shards))
    remote = skillmerge.apply(hub_recipe(tmp_path / "remote"))
    assert weights(local.output) == weights(remote.output)
    assert skillmerge.verify(remote.output).tensors == len(tensor_shapes())


def test_manifest_names_commits_and_digests(hub: HubServer, tmp_path: Path) -> None:
    put_family(hub, tmp_path / "local", shards=1)
    manifest = skillmerge.apply(hub_recipe(tmp_path / "remote")).manifest
    for item in manifest["inputs"]:
        assert item["uri"] == f"hf://acme/{item['name']}"
        assert item["revision"] == hub.repos[f"acme/{item['name']}"].refs["main"]
        (file,) = item["files"]
        assert file["stated_sha256"] == hub.tree(f"acme/{item['name']}")[SINGLE].sha256
        assert 0 < file["bytes_read"] < file["size"]


def test_a_commit_means_itself_whatever_the_branch_does(hub: HubServer, tmp_path: Path) -> None:
    local = skillmerge.apply(put_family(hub, tmp_path / "local"))
    commits = {model: "@" + hub.repos[f"acme/{model}"].refs["main"] for model in MODELS}
    hub.commit("acme/rl", {"model-00001-of-00002.safetensors": b"something else"})
    remote = skillmerge.apply(hub_recipe(tmp_path / "remote", **commits))
    assert weights(local.output) == weights(remote.output)


def test_subfolders_branches_and_pull_requests(hub: HubServer, tmp_path: Path) -> None:
    local = skillmerge.apply(put_family(hub, tmp_path / "local"))
    files: dict[str, Any] = {
        f"{model}/inner/{path.name}": path for model in MODELS for path in (tmp_path / "local" / model).iterdir()
    }
    hub.create("acme/all")
    hub.repos["acme/all"].refs["refs/pr/3"] = hub.repos["acme/all"].refs["main"]
    hub.commit("acme/all", files, "refs/pr/3")
    (tmp_path / "remote").mkdir()
    models = {model: f"hf://acme/all@refs/pr/3/{model}/inner" for model in MODELS}
    remote = skillmerge.apply(write_recipe(tmp_path / "remote", models=models))
    assert weights(local.output) == weights(remote.output)
    models["rl"] = "hf://acme/all@refs/pr/3/no/such"
    with pytest.raises(InputError, match="no such folder"):
        skillmerge.plan(write_recipe(tmp_path / "remote", models=models))


def test_folders_and_repositories_go_together(hub: HubServer, tmp_path: Path) -> None:
    local = skillmerge.apply(put_family(hub, tmp_path / "local"))
    models = {"target": "./target", "rl": "hf://acme/rl", "sft": "./sft"}
    output = {"path": "mixed"}
    mixed = skillmerge.apply(write_recipe(tmp_path / "local", models=models, output=output))
    assert weights(local.output) == weights(mixed.output)


def test_side_file_that_changed_since_the_plan_is_noticed(hub: HubServer, tmp_path: Path) -> None:
    put_family(hub, tmp_path / "local")
    blob = hub.tree("acme/target")["tokenizer.json"]
    assert blob.sha256 is not None
    store = hub.store / blob.sha256
    content = store.read_bytes()
    store.unlink()
    store.write_bytes(content.replace(b"y", b"z"))
    with pytest.raises(InputError, match=r"tokenizer\.json: does not have the digest"):
        skillmerge.apply(hub_recipe(tmp_path / "remote"))
    assert not (tmp_path / "remote" / "merged").exists()


# ------------------------------------------------------------------------------------------------------ requests


def test_plan_asks_for_little(hub: HubServer, tmp_path: Path) -> None:
    """Six requests for a repository and one for each shard's header, none for the donor's tokenizer."""
    put_family(hub, tmp_path / "local", shards=40, layers=40)
    plan = skillmerge.plan(hub_recipe(tmp_path / "remote"))
    assert len(plan.shards) > 30
    for model in MODELS:
        asked = hub.count(rf"/acme/{model}(/|$)")
        assert asked <= 6 + len(plan.shards), asked
    assert hub.count(r"GET /storage/") == 3 * len(plan.shards)
    assert hub.count("tokenizer.json") == 0
    assert all(request.range is not None for request in hub.requests if "resolve" in request.path)


def test_weights_come_in_large_pieces(hub: HubServer, tmp_path: Path) -> None:
    """16 MiB and more, across small tensors; only the end of a file is less."""
    shapes = {f"model.layers.{layer}.norm.weight": (70_001,) for layer in range(700)}
    for seed, model in enumerate(MODELS):
        hub.create_from(f"acme/{model}", write_checkpoint(tmp_path / model, random_tensors(shapes, seed=seed)))
    size = (tmp_path / "rl" / SINGLE).stat().st_size
    skillmerge.apply(hub_recipe(tmp_path / "remote"))
    ranges = [request.range for request in hub.requests if "/storage/" in request.path]
    sizes = sorted(int(text.split("-")[1]) + 1 - int(text[6:].split("-")[0]) for text in ranges if text)
    assert sum(sizes) < 3 * (size + (1 << 17))
    heads, small = sizes[:3], [count for count in sizes[3:] if count < 16 << 20]
    assert max(heads) <= 1 << 17
    assert len(small) <= 3, "one tail for each file"


def test_token_goes_to_the_hub_and_nowhere_else(hub: HubServer, tmp_path: Path) -> None:
    put_family(hub, tmp_path / "local")
    skillmerge.apply(hub_recipe(tmp_path / "remote"))
    for request in hub.requests:
        assert request.authorised == (request.host == "127.0.0.1"), request


def test_large_header_takes_one_more_request(hub: HubServer, tmp_path: Path) -> None:
    shapes = {f"model.layers.{number}.norm.weight": (2,) for number in range(3000)}
    for seed, model in enumerate(MODELS):
        hub.create_from(f"acme/{model}", write_checkpoint(tmp_path / model, random_tensors(shapes, seed=seed)))
    assert len(skillmerge.plan(hub_recipe(tmp_path / "remote")).tensors) == 3000
    assert hub.count("/storage/") == 6


# --------------------------------------------------------------------------------------------------------- cache


def test_files_in_the_local_cache_are_read_from_there(hub: HubServer, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    local = skillmerge.apply(put_family(hub, tmp_path / "local"))
    for model in MODELS:
        snapshot_download(f"acme/{model}", cache_dir=hub.folder / "hf-home" / "hub")
    hub.requests.clear()
    remote = skillmerge.apply(hub_recipe(tmp_path / "remote"))
    assert weights(local.output) == weights(remote.output)
    assert len(hub.requests) == 3, "one for each repository's commit"


def test_download_fills_the_cache(hub: HubServer, tmp_path: Path) -> None:
    local = skillmerge.apply(put_family(hub, tmp_path / "local"))
    remote = skillmerge.apply(hub_recipe(tmp_path / "remote"), hub="download")
    assert weights(local.output) == weights(remote.output)
    cached = {path.name for path in (hub.folder / "hf-home" / "hub").rglob("*.safetensors")}
    assert cached == {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}


def test_what_was_downloaded_is_enough_offline(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    put_family(hub, tmp_path / "local")
    commits = {model: "@" + hub.repos[f"acme/{model}"].refs["main"] for model in MODELS}
    recipe = hub_recipe(tmp_path / "remote", **commits)
    online = skillmerge.apply(recipe, tmp_path / "online", hub="download")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    offline = skillmerge.apply(recipe, tmp_path / "offline")
    assert hub.requests == []
    assert weights(online.output) == weights(offline.output)


def test_downloaded_file_with_another_digest_is_refused(hub: HubServer, tmp_path: Path) -> None:
    put_family(hub, tmp_path / "local", shards=1)
    oid = hub.tree("acme/rl")[SINGLE].sha256
    assert oid is not None
    content = bytearray((hub.store / oid).read_bytes())
    content[-1] ^= 1
    (hub.store / oid).unlink()
    (hub.store / oid).write_bytes(content)
    with pytest.raises(InputError, match="digest that the Hub states"):
        skillmerge.apply(hub_recipe(tmp_path / "remote"), hub="download")
    with pytest.raises(InputError, match="sha256 that the Hub states"):
        skillmerge.apply(hub_recipe(tmp_path / "remote"), hash_inputs=True)


def test_offline_takes_what_the_cache_has(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, snapshot_download

    local = skillmerge.apply(put_family(hub, tmp_path / "local"))
    for model in ("target", "sft"):
        snapshot_download(f"acme/{model}", cache_dir=hub.folder / "hf-home" / "hub")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    recipe = hub_recipe(tmp_path / "remote")
    with pytest.raises(InputError, match=r"hf://acme/rl is not in the local cache.*HF_HUB_OFFLINE") as caught:
        skillmerge.plan(recipe)
    assert "hf download acme/rl" in str(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    snapshot_download("acme/rl", cache_dir=hub.folder / "hf-home" / "hub")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    remote = skillmerge.apply(recipe)
    assert hub.requests == []
    assert weights(local.output) == weights(remote.output)
    assert {item["revision"] for item in remote.manifest["inputs"]} == {
        hub.repos[f"acme/{model}"].refs["main"] for model in MODELS
    }


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


# --------------------------------------------------------------------------------------------------- what may fail

FAULTS = {
    "too many requests": ("status", {"status": 429, "headers": {"Retry-After": "0"}}),
    "rate limit": ("status", {"status": 429, "headers": {"RateLimit": '"resolvers";r=0;t=0'}}),
    "server error": ("status", {"status": 500}),
    "gateway": ("status", {"status": 503}),
    "reset": ("reset", {}),
    "short body": ("short", {}),
    "broken body": ("broken", {}),
    "redirect to nowhere": ("status", {"status": 302}),
    "page of a proxy": ("page", {}),
}
PLACES = {
    "commit": "GET /api/models/acme/rl",
    "side file": "GET /acme/rl/resolve/.*config.json",
    "address of a shard": "GET /acme/rl/resolve/.*safetensors$",
    "storage": "GET /storage/",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_is_waited_for(hub: HubServer, tmp_path: Path, fault: str, place: str) -> None:
    local = skillmerge.apply(put_family(hub, tmp_path / "local"))
    kind, details = FAULTS[fault]
    if place == "commit" and fault in ("redirect to nowhere", "page of a proxy"):
        return  # what asks there is the general client
    hub.fail(kind, PLACES[place], times=3, **details)
    remote = skillmerge.apply(hub_recipe(tmp_path / "remote"))
    assert weights(local.output) == weights(remote.output)
    assert hub.faults[0].times == 0 or "body" in fault, "it did fail"


@pytest.mark.parametrize("fault", [name for name in FAULTS if "body" not in name])
def test_what_does_not_pass_is_a_temporary_error(hub: HubServer, tmp_path: Path, fault: str) -> None:
    put_family(hub, tmp_path / "local")
    kind, details = FAULTS[fault]
    recipe = hub_recipe(tmp_path / "remote")
    skillmerge.plan(recipe)
    hub.fail(kind, "GET /storage/", times=10**6, after=6, **details)  # the headers get through
    with pytest.raises(TemporaryError, match=r"hf://acme/\w+@"):
        skillmerge.apply(recipe)
    hub.faults.clear()
    skillmerge.apply(recipe)


@pytest.mark.parametrize("fault", ["short", "broken"])
def test_link_that_breaks_all_the_time_still_gets_there(hub: HubServer, tmp_path: Path, fault: str) -> None:
    """Every answer stops half way: what has arrived is never asked for again, but for the piece in flight."""
    shapes = {"model.layers.0.mlp.up_proj.weight": (300, 1000)}
    for seed, model in enumerate(MODELS):
        hub.create_from(
            f"acme/{model}", write_checkpoint(tmp_path / "local" / model, random_tensors(shapes, seed=seed))
        )
    local = skillmerge.apply(write_recipe(tmp_path / "local", models={name: name for name in MODELS}))
    hub.fail(fault, "GET /storage/", times=10**6)
    remote = skillmerge.apply(hub_recipe(tmp_path / "remote"))
    assert weights(local.output) == weights(remote.output)


def test_server_that_asks_for_a_long_wait_gets_an_exit(hub: HubServer, tmp_path: Path) -> None:
    put_family(hub, tmp_path / "local")
    hub.fail("status", "GET /api/models/acme/rl", status=429, headers={"Retry-After": "3600"})
    started = time.monotonic()
    with pytest.raises(TemporaryError, match="too many requests"):
        skillmerge.plan(hub_recipe(tmp_path / "remote"))
    assert time.monotonic() - started < 5


def test_wait_that_the_server_asks_for_is_kept(hub: HubServer, tmp_path: Path) -> None:
    put_family(hub, tmp_path / "local")
    hub.fail("status", "GET /api/models/acme/rl", status=503, headers={"Retry-After": "1"})
    started = time.monotonic()
    skillmerge.plan(hub_recipe(tmp_path / "remote"))
    assert time.monotonic() - started >= 1


@pytest.mark.parametrize("kind", ["moved", "wrong-range"])
def test_bytes_of_another_version_are_refused(hub: HubServer, tmp_path: Path, kind: str) -> None:
    hub.redirect = kind == "moved"
    put_family(hub, tmp_path / "local")
    hub.fail(kind, "GET /acme/rl/resolve/.*safetensors$")
    with pytest.raises(StalePlan, match="the server sent"):
        skillmerge.apply(hub_recipe(tmp_path / "remote"))


def test_storage_address_that_expired_is_asked_for_again(hub: HubServer, tmp_path: Path) -> None:
    local = skillmerge.apply(put_family(hub, tmp_path / "local"))

    def expire() -> None:
        hub.signature = "s2"

    # After the headers were read by the old addresses.
    hub.fail("call", "tokenizer.json", action=expire)
    remote = skillmerge.apply(hub_recipe(tmp_path / "remote"))
    assert hub.signature == "s2"
    assert weights(local.output) == weights(remote.output)


def refusal(recipe: Path, **options: Any) -> SkillmergeError:
    with pytest.raises(SkillmergeError) as caught:
        skillmerge.plan(recipe, **options)
    return caught.value


def test_what_is_not_there_or_not_allowed(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with a message and a next step of its own."""
    put_family(hub, tmp_path / "local")
    recipe = hub_recipe(tmp_path / "remote")
    told = set()

    hub.repos["acme/secret"] = hub.repos.pop("acme/rl")
    error = refusal(recipe)
    assert "hf://acme/rl: there is no such repository" in error.message
    assert "hf auth whoami" in (error.fix or "")
    told.add(str(error))

    hub.repos["acme/rl"] = hub.repos["acme/secret"]
    error = refusal(hub_recipe(tmp_path / "remote", rl="@v9"))
    assert "no such revision" in error.message
    told.add(str(error))
    hub_recipe(tmp_path / "remote")

    hub.repos["acme/rl"].private = True
    with hub.environment(monkeypatch, token=None):
        error = refusal(recipe)
        assert "or it is private" in error.message
        assert "hf auth login" in (error.fix or "")
        told.add(str(error))
        hub.repos["acme/rl"].private, hub.repos["acme/rl"].gated = False, True
        error = refusal(recipe)
        assert "is gated" in error.message
        assert "/acme/rl" in (error.fix or "")
        told.add(str(error))
    with hub.environment(monkeypatch, token="hf_expired"):
        error = refusal(recipe)
        assert "refuses the token" in error.message
        told.add(str(error))
    assert len(told) == 5
    assert all(isinstance(text, str) and TOKEN not in text for text in told)


def test_no_network_at_all(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", f"http://127.0.0.1:{port}")
    with pytest.raises(TemporaryError, match="the network failed"):
        skillmerge.plan(hub_recipe(tmp_path / "remote"))


def test_page_of_a_proxy_is_no_answer(hub: HubServer, tmp_path: Path) -> None:
    hub.fail("page", "GET /api/models/")
    with pytest.raises(InputError, match=r"hf://acme/\w+: "):
        skillmerge.plan(hub_recipe(tmp_path / "remote"))


@pytest.mark.parametrize(
    ("fault", "after"),
    [("status", 6), ("trickle", 0), ("trickle", 6), ("trickle", 7)],
    ids=["wait", "headers", "side files", "weights"],
)
def test_interrupt_is_heard_while_the_hub_is_waited_for(hub: HubServer, tmp_path: Path, fault: str, after: int) -> None:
    put_family(hub, tmp_path / "local")
    recipe = hub_recipe(tmp_path / "remote")
    hub.fail(fault, "GET /storage/", times=10**6, after=after, status=503, headers={"Retry-After": "60"})
    command = [sys.executable, "-m", "skillmerge", "apply", str(recipe)]
    environment = {**os.environ, **hub.variables()}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while hub.count("GET /storage/") < after + 1:
            time.sleep(0.05)
        time.sleep(0.5)
        sent = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert time.monotonic() - sent < 10
    assert process.returncode == 143


def test_pin_and_lock_that_disagree_are_told(hub: HubServer, tmp_path: Path) -> None:
    put_family(hub, tmp_path / "local")
    commit = hub.repos["acme/rl"].refs["main"]
    recipe = hub_recipe(tmp_path / "remote", rl=f"@{commit}")
    skillmerge.plan(recipe, lock=True)
    path = tmp_path / "remote" / "recipe.lock"
    path.write_text(path.read_text().replace(f'"commit": "{commit}"', f'"commit": "{"0" * 40}"'))
    with pytest.raises(StalePlan, match=f"pinned to {commit}"):
        skillmerge.apply(recipe)


def test_online_and_offline_make_one_plan(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, snapshot_download

    put_family(hub, tmp_path / "local")
    plan = skillmerge.plan(hub_recipe(tmp_path / "remote"))
    for model in MODELS:
        snapshot_download(f"acme/{model}", cache_dir=hub.folder / "hf-home" / "hub")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = skillmerge.plan(hub_recipe(tmp_path / "remote"))
    inputs = [plan.as_dict()["inputs"], offline.as_dict()["inputs"]]
    assert inputs[0] == inputs[1]


def test_repositories_that_are_no_models(hub: HubServer, tmp_path: Path) -> None:
    put_family(hub, tmp_path / "local")
    for files, message in (
        ({"pytorch_model.bin": b"x"}, "pickles"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, "PEFT adapter"),
        ({"README.md": b"x"}, r"has no \*\.safetensors"),
        ({"model.safetensors": b"short"}, "5 bytes long"),
        ({"model.safetensors.index.json": b'{"weight_map": {"x": "../up.safetensors"}}'}, "only names of"),
        ({"model.safetensors.index.json": b'{"weight_map": {"x": "gone.safetensors"}}'}, "is missing"),
    ):
        hub.create("acme/rl", dict(files))
        with pytest.raises(InputError, match=message):
            skillmerge.plan(hub_recipe(tmp_path / "remote"))


# --------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("token", [TOKEN, TOKEN + "\n", TOKEN + "é", " " + TOKEN, TOKEN + "\x00x"])
def test_token_is_never_seen(hub: HubServer, tmp_path: Path, token: str) -> None:
    """Not in results, errors, tracebacks, files; nor where it cannot even be sent."""
    put_family(hub, tmp_path / "local")
    recipe = hub_recipe(tmp_path / "remote")
    variables = {**hub.variables(token=None), "HF_TOKEN": token.replace("\x00", "")}
    (hub.folder / "hf-home").mkdir(exist_ok=True)
    (hub.folder / "hf-home" / "token").write_text(token)
    seen = []
    for fault in (None, "status", "reset"):
        if fault is not None:
            hub.fail(fault, "GET /acme/sft/resolve/", times=2, status=400)
        for arguments in (
            ["apply", recipe, "--overwrite", "-v"],
            ["plan", recipe, "--json"],
            ["plan", recipe, "--lock"],
        ):
            process = run_cli(*arguments, **variables, HF_DEBUG="1")
            seen += [process.stdout, process.stderr]
    written = [path for path in (tmp_path / "remote").rglob("*") if path.is_file()]
    seen += [path.read_bytes().decode("latin-1") for path in written]
    assert not [text for text in seen if TOKEN in text]


def test_hub_is_not_imported_where_it_is_not_used(tmp_path: Path) -> None:
    for seed, model in enumerate(MODELS):
        write_checkpoint(tmp_path / model, random_tensors(tensor_shapes(), seed=seed))
    program = f"import sys, skillmerge; skillmerge.plan({str(write_recipe(tmp_path))!r}); print(sorted(sys.modules))"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "huggingface_hub" not in process.stdout


def test_values_are_those_of_the_formula(hub: HubServer, tmp_path: Path) -> None:
    put_family(hub, tmp_path / "local")
    merged = read_checkpoint(skillmerge.apply(hub_recipe(tmp_path / "remote"), coefficients={"lam": 0.0}).output)
    target = read_checkpoint(tmp_path / "local" / "target")
    assert all(torch.equal(merged[name], target[name]) for name in target)
