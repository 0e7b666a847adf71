"""What is said of a Hub that does not answer, or that answers with words of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import MODELS, hub_recipe, put_family, run_cli
from hub_server import TOKEN, HubServer

import skillmerge
from skillmerge.checkpoints.stores.hub_client import _said, refused
from skillmerge.errors import InputError, TemporaryError


def test_hub_that_is_away_leads_to_a_cache_that_has_everything(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants, snapshot_download

    put_family(hub, tmp_path / "local")
    recipe = hub_recipe(tmp_path / "remote")
    again = "rerun later; the same command continues where it stopped"
    hub.fail("status", "GET /api/models/acme/target", times=10**6, status=503)
    assert f"help: {again}\n" in run_cli("plan", recipe).stderr
    hub.faults.clear()
    for model in MODELS:
        snapshot_download(f"acme/{model}", cache_dir=hub.folder / "hf-home" / "hub")
    hub.fail("status", "GET /api/models/acme/target", times=10**6, status=503)
    process = run_cli("plan", recipe)
    cached = "or read it from the local cache, which has this model: set HF_HUB_OFFLINE=1"
    assert process.returncode == 75
    assert process.stderr.endswith(f"help: {again}; {cached}\n")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run_cli("plan", recipe).returncode == 0


def test_hub_cache_with_a_missing_shard_is_not_offered(hub: HubServer, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    put_family(hub, tmp_path / "local")
    recipe = hub_recipe(tmp_path / "remote")
    folder = Path(snapshot_download("acme/target", cache_dir=hub.folder / "hf-home" / "hub"))
    (folder / "model-00002-of-00002.safetensors").unlink()
    hub.fail("status", "GET /api/models/acme/target", times=10**6, status=503)
    with pytest.raises(TemporaryError) as caught:
        skillmerge.plan(recipe)
    assert "HF_HUB_OFFLINE" not in (caught.value.fix or "")


def test_what_the_hub_says_is_shown_without_secrets(hub: HubServer, tmp_path: Path) -> None:
    put_family(hub, tmp_path / "local")
    said = f"Repo is under review until Friday, says Bearer {TOKEN}"
    hub.fail("status", "GET /api/models/acme/rl", times=10**6, status=403, headers={"X-Error-Message": said})
    with pytest.raises(InputError) as caught:
        skillmerge.plan(hub_recipe(tmp_path / "remote"))
    assert caught.value.message.splitlines()[0].endswith(
        ": model `rl`: hf://acme/rl: the token may not do this (the Hub says: Repo is under review until Friday, says "
        "<token>)"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Down for maintenance.\nSecond line", "Down for maintenance"),
        ("token hf_AbCdEf123456 is bad", "token <token> is bad"),
        ("Authorization: Bearer abc.def is bad", "Authorization: <token> is bad"),
        ("see https://s3/x?X-Amz-Signature=abc now", "see https://s3/x now"),
        ("y" * 1000, "y" * 300),
        ("", ""),
    ],
)
def test_words_of_a_service_are_one_line_without_secrets(text: str, shown: str) -> None:
    assert _said({"x-error-message": text}) == shown


def test_words_come_with_what_may_pass_too() -> None:
    error = refused(503, {"x-error-message": "Down for maintenance."}, "hf://a/b")
    assert str(error) == "the server answers 503 (the Hub says: Down for maintenance)"
