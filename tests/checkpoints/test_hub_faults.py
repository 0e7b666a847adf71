"""What goes wrong between the Hub and its client: waited for, told as temporary, or refused."""

from __future__ import annotations

import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from command_server import Commands, wait_for
from conftest import (
    MODELS,
    hub_recipe,
    put_family,
    random_tensors,
    run_cli,
    weights,
    write_checkpoint,
    write_recipe,
)
from hub_server import TOKEN, HubServer

import skillmerge
from skillmerge.errors import InputError, SkillmergeError, StalePlan, TemporaryError

SINGLE = "model.safetensors"


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
    shown: list[str] = []
    monkeypatch.setattr("skillmerge.cli.messages.show_status", shown.append)
    process = run_cli("plan", hub_recipe(tmp_path / "remote"))
    assert process.returncode == 75
    assert re.search(rf"the network failed \(\w+\) between here and http://127.0.0.1:{port}\n", process.stderr)
    assert any(re.search(r": trying again \(2 of \d\), waiting \d+ s$", text) for text in shown)


def test_page_of_a_proxy_is_no_answer(hub: HubServer, tmp_path: Path) -> None:
    hub.fail("page", "GET /api/models/")
    with pytest.raises(InputError, match=r"hf://acme/\w+: "):
        skillmerge.plan(hub_recipe(tmp_path / "remote"))


@pytest.mark.parametrize(
    ("fault", "after"),
    [("status", 6), ("trickle", 0), ("trickle", 6), ("trickle", 7)],
    ids=["wait", "headers", "side files", "weights"],
)
def test_interrupt_is_heard_while_the_hub_is_waited_for(
    hub: HubServer, commands: Commands, tmp_path: Path, fault: str, after: int
) -> None:
    put_family(hub, tmp_path / "local")
    recipe = hub_recipe(tmp_path / "remote")
    hub.fail(fault, "GET /storage/", times=10**6, after=after, status=503, headers={"Retry-After": "60"})
    process = commands.start("apply", recipe, **hub.variables())
    wait_for(lambda: hub.count("GET /storage/") >= after + 1, process)
    time.sleep(0.2)  # to be in the midst of it
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    ended = process.wait()
    assert time.monotonic() - sent < 10
    assert ended.returncode == 143


def test_pin_and_lock_that_disagree_are_told(hub: HubServer, tmp_path: Path) -> None:
    put_family(hub, tmp_path / "local")
    commit = hub.repos["acme/rl"].refs["main"]
    recipe = hub_recipe(tmp_path / "remote", rl=f"@{commit}")
    skillmerge.plan(recipe, lock=True)
    path = tmp_path / "remote" / "recipe.lock"
    path.write_text(path.read_text().replace(f'"commit": "{commit}"', f'"commit": "{"0" * 40}"'))
    with pytest.raises(StalePlan, match=f"pinned to {commit}"):
        skillmerge.apply(recipe)


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
