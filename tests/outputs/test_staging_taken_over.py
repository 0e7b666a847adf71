"""A staging folder that a run of other gates goes on with, or another run takes over while this one works."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from test_staging import CONDITIONS, PLAN, SHARDS, WHOLE, entry, files, finish, finish_shards, put_previous

from skillmerge.errors import OutputLocked
from skillmerge.outputs.journal import Journal, Placing
from skillmerge.outputs.staging import MANIFEST_FILE, Staging


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "merged"


def die_before_the_rename(place: Path, plan_digest: str) -> None:
    """A run that has said what it publishes, and no more."""
    with closing(Staging(place)) as staging:
        staging.begin(PLAN, CONDITIONS)
        finish(staging)
        Journal(staging.folder / "journal.jsonl", "0").append(Placing(hashlib.sha256(b"{}").hexdigest(), plan_digest))
        staging.files.rename(staging.folder / "complete")


@pytest.mark.parametrize("moved_away", [False, True])
@pytest.mark.parametrize("passed", ["without gates", ""], ids=["other gates", "journal of 0.1"])
def test_recover_publishes_nothing_that_has_not_passed_these_gates(place: Path, passed: str, moved_away: bool) -> None:
    """The weights are those of this plan, so that no shard is made again; the gates are not."""
    die_before_the_rename(place, passed)
    previous = put_previous(place)
    if moved_away:
        place.rename(Staging.folder_of(place) / "previous")
    with closing(Staging(place)) as staging:
        assert not staging.recover(PLAN, CONDITIONS, replace=True, plan_digest="with gates")
        assert files(place) == previous
        staging.begin(PLAN, CONDITIONS, "with gates")
        assert list(staging.finished) == list(SHARDS)
        assert files(staging.files) == SHARDS, "the manifest is written again"
        staging.write_file(MANIFEST_FILE, b"{}")
        staging.put_in_place(replace=True, plan_digest="with gates")
    assert files(place) == WHOLE
    assert os.listdir(place.parent) == ["merged"]


def test_recover_publishes_what_passed_these_gates(place: Path) -> None:
    die_before_the_rename(place, "the same")
    with closing(Staging(place)) as staging:
        assert staging.recover(PLAN, CONDITIONS, replace=False, plan_digest="the same")
    assert files(place) == WHOLE


def test_placing_row_is_as_before_where_it_says_nothing_new() -> None:
    assert Placing("d").to_json() == {"manifest_sha256": "d"}
    for row in (Placing("d"), Placing("d", "plan"), Placing(None)):
        assert Placing.from_json(row.to_json()) == row


Step = Callable[[Staging], object]
STEPS: dict[str, Step] = {
    "begin": lambda staging: staging.begin(PLAN, CONDITIONS),
    "record": lambda staging: staging.record(entry("c.safetensors")),
    "write": lambda staging: staging.write_file("x", b"x"),
    "drop": lambda staging: staging.drop_strangers(set()),
    "seal": lambda staging: staging.seal("proof"),
    "place": lambda staging: staging.put_in_place(replace=True),
}


@pytest.mark.parametrize("step", STEPS)
def test_where_locks_lock_nothing_the_first_run_stops_and_the_second_finishes(
    place: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Whatever the first does next: it touches nothing of the second's, which keeps what was finished before."""
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: None)
    first = Staging(place)
    first.begin(PLAN, CONDITIONS)
    finish_shards(first, "a.safetensors", "b.safetensors")
    with closing(Staging(place)) as second:
        remark = second.begin(PLAN, CONDITIONS)
        assert remark == "continuing an interrupted run: 2 shards are finished already"
        finish_shards(second, "c.safetensors")
        second.write_file(MANIFEST_FILE, b"{}")
        before = {path: path.read_bytes() for path in second.folder.rglob("*") if path.is_file()}
        with pytest.raises(OutputLocked, match="another run has taken"):
            STEPS[step](first)
        first.discard()
        first.close()
        assert {path: path.read_bytes() for path in second.folder.rglob("*") if path.is_file()} == before
        second.put_in_place(replace=False)
    assert files(place) == WHOLE
    assert os.listdir(place.parent) == ["merged"]


def test_run_that_is_overtaken_while_it_publishes_gives_back_the_files(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run begins right before the first one's rename."""
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: None)
    first, real, others = Staging(place), Path.rename, []
    first.begin(PLAN, CONDITIONS)
    finish(first)

    def rename(path: Path, target: Path) -> Path:
        if path == first.files and not others:
            others.append(Staging(place))
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OutputLocked):
        first.put_in_place(replace=False)
    first.close()
    assert not place.exists()
    with closing(others[0]) as second:
        assert not second.recover(PLAN, CONDITIONS, replace=False)
        second.begin(PLAN, CONDITIONS)
        assert list(second.finished) == list(SHARDS)
        second.write_file(MANIFEST_FILE, b"{}")
        second.put_in_place(replace=False)
    assert files(place) == WHOLE


def test_folder_loses_its_name_before_it_is_removed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else another run might publish the half of it that is left."""
    with closing(Staging(place)) as staging:
        staging.begin(PLAN, CONDITIONS)
        finish(staging)
        seen: list[str] = []
        real = os.unlink

        def unlink(path: Any, **named: Any) -> None:
            seen.append(Path(path).parent.name)
            real(path, **named)

        monkeypatch.setattr(os, "unlink", unlink)
        staging.discard()
    assert "dropped" in seen
    assert not {"files", "complete"} & set(seen)


def test_folder_that_goes_while_it_is_looked_at_is_no_fault(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its run has finished in between, before this one's begin or at its end."""
    real = Path.iterdir

    def goes(path: Path) -> Any:
        monkeypatch.undo()
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    Staging.folder_of(place).mkdir()
    monkeypatch.setattr(Path, "iterdir", goes)
    staging = Staging(place)
    assert Path.iterdir is real
    staging.begin(PLAN, CONDITIONS)
    monkeypatch.setattr(Path, "iterdir", goes)
    staging.close()
    assert Path.iterdir is real
    Staging(place).close()
