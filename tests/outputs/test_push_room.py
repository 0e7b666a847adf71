"""A merge to the Hub alone: how much of it is on the disk at once, for models and skills, and when uploads fail."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import write_family, write_recipe
from hub_server import HubServer

import skillmerge
from skillmerge.errors import InputError, SkillmergeError

MERGED = "acme/merged"
SHARDS = 6


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A recipe whose output has several shards."""
    recipe = write_family(
        tmp_path, {f"model.layers.{layer}.mlp.weight": (32, 64) for layer in range(SHARDS)}, shards=SHARDS
    )
    return write_recipe(recipe.parent, output={"path": "merged", "license": "mit"})


@pytest.fixture
def skill(model: Path) -> Path:
    """A recipe of a skill of several files."""
    output = {"path": "merged", "license": "mit", "kind": "skill", "shard_size": "4KB"}
    return write_recipe(model.parent, "rl - sft", models={"rl": "rl", "sft": "sft"}, coefficients=None, output=output)


@contextmanager
def watching(folder: Path) -> Iterator[list[int]]:
    """How many weight files there were in the staging folder, look by look."""
    seen, over = [0], threading.Event()

    def look() -> None:
        while not over.wait(0.001):
            seen.append(len(list(folder.glob("merged.partial/files/*.safetensors"))))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def test_skill_goes_to_the_hub_alone(hub: HubServer, skill: Path) -> None:
    """Found by a review: a skill's parts were taken for tensors that do not belong there."""
    local = skillmerge.apply(skill, skill.parent / "local").output
    with watching(skill.parent) as seen:
        skillmerge.apply(skill, push=MERGED, no_local=True)
    assert len(list(local.glob("*.safetensors"))) > 2
    assert max(seen) <= 2
    for path in local.glob("*.safetensors"):
        assert hub.content(MERGED, path.name) == path.read_bytes()
    assert not list(skill.parent.glob("merged*"))


@pytest.mark.parametrize("what", ["model", "skill"])
def test_failing_uploads_leave_no_more_on_the_disk(hub: HubServer, what: str, request: pytest.FixtureRequest) -> None:
    """Found by a review: a shard that could not be sent gave back the room that it still took."""
    recipe: Path = request.getfixturevalue(what)
    hub.fail("status", "PUT /upload", times=10**6, status=403)
    with watching(recipe.parent) as seen, pytest.raises(InputError, match="may not do this") as caught:
        skillmerge.apply(recipe, push=MERGED, no_local=True)
    assert isinstance(caught.value, SkillmergeError)
    assert max(seen) <= 2
    hub.faults.clear()
    assert skillmerge.apply(recipe, push=MERGED, no_local=True).published is not None
