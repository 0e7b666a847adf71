"""A merge to the Hub alone: how much of it is on the disk at once, for models and skills, and when uploads fail."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import write_family, write_recipe
from hub_server import HubServer
from huggingface_hub import HfApi
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

import skillmerge
from skillmerge.checkpoints.stores.hub_client import Quiet
from skillmerge.engine.destination import ShardRecord
from skillmerge.errors import InputError, SkillmergeError
from skillmerge.outputs.hub.push import MergePush
from skillmerge.outputs.staging import Staging
from skillmerge.threads import Crew, in_threads

pytestmark = pytest.mark.timeout(120, method="thread")
"""A thread that waits for ever also keeps an exception from leaving the run."""

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


class Commit:
    """The Hub, as far as an upload sees it: `upload` is what the test wants."""

    def __init__(self, upload: Callable[[str], None]) -> None:
        self._upload = upload

    def upload(self, name: str, path: Path, size: int, sha256: str) -> None:
        self._upload(name)


@contextmanager
def pushing(recipe: Path, upload: Callable[[str], None]) -> Iterator[tuple[MergePush, Staging, list[ShardRecord]]]:
    """The push of a merge to the Hub alone, the folder that it sends from, and the shards that are in it."""
    plan = skillmerge.plan(recipe)
    local = skillmerge.apply(recipe, recipe.parent / "local").output
    push = MergePush(plan, MERGED, True, {})
    push._connected = Commit(upload)  # type: ignore[assignment]
    with closing(Staging(recipe.parent / "merged")) as staging:
        staging.begin("digest", {})
        rows = []
        for shard in plan.shards:
            (staging.files / shard.file).write_bytes((local / shard.file).read_bytes())
            rows.append(ShardRecord(shard.file, shard.size, "0" * 64, {}))
        push.attach(staging)
        yield push, staging, rows


def refuse(name: str) -> None:
    raise InputError(f"{name} was refused")


def test_upload_that_failed_is_raised_by_the_next_one(no_network: None, model: Path) -> None:
    with pushing(model, refuse) as (push, _, rows):
        push.send(rows[0])
        with pytest.raises(InputError, match="refused"):
            push._sent[0].result()
        with pytest.raises(InputError, match=f"^{rows[0].file} was refused$"):
            push.send(rows[1])
        push.settle(failed=True)


def test_upload_that_failed_is_raised_at_the_end(no_network: None, model: Path) -> None:
    with pushing(model, refuse) as (push, _, rows):
        push.send(rows[0])
        with pytest.raises(InputError, match=f"^{rows[0].file} was refused$"):
            push.settle(failed=False)


def test_upload_that_goes_on_after_a_failed_merge_touches_nothing(no_network: None, model: Path) -> None:
    """By then another run may hold the folder."""
    begun, free = threading.Event(), threading.Event()

    def wait(name: str) -> None:
        begun.set()
        assert free.wait(20)

    with pushing(model, wait) as (push, staging, rows):
        push.send(rows[0])
        assert begun.wait(20)
        push.settle(failed=True)
        free.set()
        push._sent[0].result(20)
        assert (staging.files / rows[0].file).exists()
        assert not staging.finished


def test_threads_of_an_upload_leave_signals_to_the_main_thread() -> None:
    """Found by a review: a signal that was to wait for the import of torch came through one of them."""
    crew = Crew(1)
    blocked = crew.submit(lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [])).result(20)
    crew.end(wait=True, cancel=False)
    assert {signal.SIGINT, signal.SIGTERM} <= set(blocked)


def test_threads_do_all_in_order_and_end() -> None:
    before = set(threading.enumerate())
    assert list(in_threads(lambda item, stop: item * item, range(50))) == [item * item for item in range(50)]
    assert set(threading.enumerate()) <= before


def test_failure_in_a_thread_cancels_what_is_not_begun() -> None:
    begun: list[int] = []

    def fail(item: int, stop: threading.Event) -> None:
        begun.append(item)
        if item == 0:
            raise ValueError("the first")
        assert stop.wait(20)

    with pytest.raises(ValueError, match="the first"):
        list(in_threads(fail, range(1000)))
    assert len(begun) < 10


def test_script_ends_after_an_interrupt_while_uploads_go_on() -> None:
    """Found by a review: Python joined the threads of the uploads at its end."""
    script = """
import os, signal, threading, time
from skillmerge.threads import Crew, in_threads
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job begins with it ignored
begun = threading.Event()
def hang(*given):
    begun.set()
    time.sleep(100)
def interrupt():
    begun.wait()
    os.kill(os.getpid(), signal.SIGINT)
Crew(2).submit(hang)  # as of a merge
begun.wait()
threading.Thread(target=interrupt, daemon=True).start()
list(in_threads(hang, [1]))  # as of a push
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert run.stderr.splitlines()[-1] == "KeyboardInterrupt"


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Python session in which the Hub's client may draw."""
    for module in ("huggingface_hub.constants", "huggingface_hub.utils.tqdm"):
        monkeypatch.setattr(sys.modules[module], "HF_HUB_DISABLE_PROGRESS_BARS", None)
    enable_progress_bars()
    yield
    enable_progress_bars()


def test_client_draws_no_bars_while_any_thread_uploads(bars: None) -> None:
    quiet = Quiet()
    with quiet:
        with quiet:
            assert are_progress_bars_disabled()
        assert are_progress_bars_disabled()
    assert not are_progress_bars_disabled()
    disable_progress_bars()
    with quiet:
        pass
    assert are_progress_bars_disabled()


def test_push_from_python_draws_no_bars(
    hub: HubServer, model: Path, bars: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def noted(real: Any) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            seen.append(are_progress_bars_disabled())
            return real(*given, **options)

        return call

    for name in ("preupload_lfs_files", "create_commit"):
        monkeypatch.setattr(HfApi, name, noted(getattr(HfApi, name)))
    skillmerge.apply(model, push=MERGED)
    assert len(seen) > SHARDS
    assert all(seen)
    assert not are_progress_bars_disabled()
