"""Models on the Hub as inputs: a loopback server, the real client, and what goes wrong between them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    MODELS,
    hub_recipe,
    put_family,
    random_tensors,
    read_checkpoint,
    run_cli,
    run_process,
    tensor_shapes,
    weights,
    write_checkpoint,
    write_recipe,
)
from hub_server import TOKEN, HubServer

import skillmerge
from skillmerge.checkpoints.stores import hub as hub_store
from skillmerge.errors import InputError, TemporaryError

SINGLE = "model.safetensors"


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
    for item in manifest.inputs:
        assert item.uri == f"hf://acme/{item.name}"
        assert item.revision == hub.repos[f"acme/{item.name}"].refs["main"]
        (file,) = item.files
        assert file.stated_sha256 == hub.tree(f"acme/{item.name}")[SINGLE].sha256
        assert 0 < file.bytes_read < file.size


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
    shapes = {f"model.layers.{layer}.norm.weight": (70_001,) for layer in range(300)}
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


def test_what_was_downloaded_is_found_without_its_branch(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    put_family(hub, tmp_path / "local")
    recipe = hub_recipe(tmp_path / "remote")
    online = skillmerge.apply(recipe, tmp_path / "online", hub="download")
    cache = hub.folder / "hf-home" / "hub"
    assert not list(cache.glob("*/refs/main"))
    with monkeypatch.context() as away:
        away.setattr(hub_store, "Repository", _away)
        with pytest.raises(TemporaryError) as caught:
            skillmerge.plan(recipe)
        assert "set HF_HUB_OFFLINE=1" in str(caught.value.fix)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    offline = skillmerge.apply(recipe, tmp_path / "offline")
    assert hub.requests == []
    assert weights(online.output) == weights(offline.output)
    commit = hub.repos["acme/rl"].refs["main"]
    assert offline.plan is not None
    assert [found.message for found in offline.plan.warnings if "`rl`" in found.message] == [
        f"model `rl`: the local cache does not say of which branch its one commit is: {commit}"
    ]
    (cache / "models--acme--rl" / "snapshots" / ("0" * 40)).mkdir()
    with pytest.raises(InputError, match="hf://acme/rl is not in the local cache"):
        skillmerge.plan(recipe)


def test_snapshot_of_another_branch_is_not_taken_for_the_main_one(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by a review: `hf download --revision` leaves one snapshot, which was read without a word."""
    from huggingface_hub import constants

    put_family(hub, tmp_path / "local")
    skillmerge.apply(hub_recipe(tmp_path / "remote"), tmp_path / "online", hub="download")
    cache = hub.folder / "hf-home" / "hub" / "models--acme--rl"
    (cache / "refs" / "refs" / "pr").mkdir(parents=True, exist_ok=True)
    (cache / "refs" / "refs" / "pr" / "1").write_text(hub.repos["acme/rl"].refs["main"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as caught:
        skillmerge.plan(hub_recipe(tmp_path / "remote"))
    assert "hf://acme/rl is not in the local cache, which has its revision `refs/pr/1`, and HF_HUB_OFFLINE is set" in (
        caught.value.message
    )
    assert str(caught.value.fix) == (
        "unset HF_HUB_OFFLINE, or where there is a network: hf download acme/rl; "
        "to read what the cache has, name its revision: hf://acme/rl@refs/pr/1"
    )


def _away(*_: Any, **__: Any) -> Any:
    raise TemporaryError("the Hub is away", fix="try again later")


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
    assert {item.revision for item in remote.manifest.inputs} == {
        hub.repos[f"acme/{model}"].refs["main"] for model in MODELS
    }


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


# --------------------------------------------------------------------------------------------------------- tokens


def with_token(hub: HubServer, token: str) -> dict[str, str]:
    """The environment of somebody who has this token, in a variable and in the file of the Hub's client."""
    (hub.folder / "hf-home").mkdir(exist_ok=True)
    (hub.folder / "hf-home" / "token").write_text(token)
    return {**hub.variables(token=None), "HF_TOKEN": token.replace("\x00", "")}


def written(folder: Path) -> list[str]:
    return [path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("token", [TOKEN, TOKEN + "\n", TOKEN + "é", " " + TOKEN, TOKEN + "\x00x"])
def test_token_is_never_seen(hub: HubServer, tmp_path: Path, token: str) -> None:
    """Not in results, errors, tracebacks, files; nor where it cannot even be sent."""
    put_family(hub, tmp_path / "local")
    recipe = hub_recipe(tmp_path / "remote")
    variables = with_token(hub, token)
    seen = []
    for fault in (None, "status", "reset"):
        if fault is not None:
            hub.fail(fault, "GET /acme/sft/resolve/", times=2, status=400)
        for arguments in (
            ["apply", recipe, "--overwrite", "-v"],
            ["plan", recipe, "--json"],
            ["plan", recipe, "--lock"],
        ):
            process = run_cli(*arguments, **variables)
            seen += [process.stdout, process.stderr]
    seen += written(tmp_path / "remote")
    assert not [text for text in seen if TOKEN in text]


def test_token_is_never_seen_where_the_client_reports_what_it_does(hub: HubServer, tmp_path: Path) -> None:
    put_family(hub, tmp_path / "local")
    process = run_process("apply", hub_recipe(tmp_path / "remote"), "-v", **with_token(hub, TOKEN), HF_DEBUG="1")
    assert process.returncode == 0, process.stderr
    seen = [process.stdout, process.stderr, *written(tmp_path / "remote")]
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
