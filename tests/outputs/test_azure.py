"""Azure, with its own emulator: what its answers say in another way than S3's. `make stores` installs Azurite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from bucket_server import Azurite
from conftest import MODELS, weights, write_family, write_recipe

import skillmerge
from skillmerge.checkpoints.stores import retries
from skillmerge.errors import CheckFailed, InputError, StalePlan, UsageError
from skillmerge.outputs.buckets import prefix

OUT = "az://bucket/out/merged"


@pytest.fixture(scope="module")
def server() -> Iterator[Azurite]:
    with Azurite() as server:
        yield server


@pytest.fixture
def azure(server: Azurite, monkeypatch: pytest.MonkeyPatch) -> Azurite:
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)
    for name, value in server.variables().items():
        monkeypatch.setenv(name, value)
    return server


def family(azure: Azurite, folder: Path, output: str = OUT) -> Path:
    """A recipe from a bucket to a bucket, and what it makes as a folder, `direct`."""
    write_family(folder)
    skillmerge.apply(folder / "recipe.yaml", folder / "direct")
    models = {model: azure.put_folder(f"{folder.name}/{model}", folder / model) for model in MODELS}
    return write_recipe(folder, models=models, output={"path": output})


def test_a_merge_from_bucket_to_bucket(azure: Azurite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "_WHOLE", 1000)  # in parts, as large shards are sent
    recipe = family(azure, tmp_path)
    assert skillmerge.apply(recipe).place == OUT
    direct = weights(tmp_path / "direct")
    assert {name: azure.get(f"out/merged/{name}") for name in direct} == direct
    assert skillmerge.apply(recipe).already
    assert skillmerge.verify(OUT).files == 6
    with pytest.raises(UsageError, match="holds a finished output of another plan"):
        skillmerge.apply(recipe, coefficients={"lam": 0.5})
    shard = "out/merged/model-00001-of-00002.safetensors"
    azure.put(shard, azure.get(shard)[:-1] + b"x")
    with pytest.raises(CheckFailed, match="its bytes are not those that were written"):
        skillmerge.verify(OUT)


def test_a_changed_object_is_stale(azure: Azurite, tmp_path: Path) -> None:
    recipe = family(azure, tmp_path)
    skillmerge.plan(recipe, save=tmp_path / "plan.json")
    shard = f"{tmp_path.name}/rl/model-00001-of-00002.safetensors"
    azure.put(shard, azure.get(shard)[:-1] + b"x")
    with pytest.raises(StalePlan, match="rewritten since: model-00001"):
        skillmerge.apply(tmp_path / "plan.json", tmp_path / "merged")


@pytest.mark.parametrize(
    ("uri", "words"), [("az://bucket/nothing", "does not exist"), ("az://nothing/m", "there is no bucket")]
)
def test_what_is_not_there(azure: Azurite, uri: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        skillmerge.inspect(uri)


def test_a_wrong_key_is_refused_and_not_shown(azure: Azurite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "Q0FOQVJZ")
    with pytest.raises(InputError, match="the credentials are refused") as raised:
        skillmerge.inspect("az://bucket/m")
    assert "Q0FOQVJZ" not in str(raised.value)
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
    with pytest.raises(InputError, match="no usable credentials or settings were found"):
        skillmerge.inspect("az://bucket/m")
