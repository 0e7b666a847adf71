"""The staging folder, its journal and its lock."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from skillmerge.engine.destination import ShardRecord
from skillmerge.errors import OutputLocked, UsageError
from skillmerge.outputs.journal import Journal, Placing
from skillmerge.outputs.shard_file import ShardFile, WriteMode
from skillmerge.outputs.staging import MANIFEST_FILE, Staging

PLAN = "plan digest"
CONDITIONS: dict[str, Any] = {"stats": "sampled", "inputs": {"target": {"model.safetensors": [10, 20]}}}
SHARDS = {"a.safetensors": b"first shard", "b.safetensors": b"second", "c.safetensors": b"the third of them"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "merged"


def entry(name: str) -> ShardRecord:
    return ShardRecord(name, len(SHARDS[name]), hashlib.sha256(SHARDS[name]).hexdigest(), {})


def finish_shards(staging: Staging, *names: str) -> None:
    for name in names:
        staging.write_file(name, SHARDS[name])
        staging.record(entry(name))


def finish(staging: Staging) -> None:
    """All that stands in an output, so that it can be published."""
    finish_shards(staging, *SHARDS)
    staging.write_file(MANIFEST_FILE, b"{}")


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WHOLE = {**SHARDS, MANIFEST_FILE: b"{}"}


# ---------------------------------------------------------------------------------------------- staging folder


def test_staging_publishes_everything_and_leaves_nothing(place: Path) -> None:
    with closing(Staging(place)) as staging:
        staging.begin(PLAN, CONDITIONS)
        finish(staging)
        assert not place.exists()
        staging.put_in_place(replace=False)
    assert files(place) == WHOLE
    assert os.listdir(place.parent) == ["merged"]


def test_staging_is_locked_until_it_is_closed(place: Path) -> None:
    first = Staging(place)
    with pytest.raises(OutputLocked) as caught:
        Staging(place)
    assert caught.value.exit_status == 6
    first.close()
    Staging(place).close()


@pytest.mark.parametrize("taken", [False, True], ids=["free", "taken again"])
def test_staging_lock_that_its_owner_removes_meanwhile_is_not_taken_for_one(
    place: Path, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """Who opened the lock before it was removed, and locks it afterwards, holds nothing and looks again."""
    first, others, real = Staging(place), [], fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        first.close()
        if taken:
            others.append(Staging(place))
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    if taken:
        with pytest.raises(OutputLocked):
            Staging(place)
    else:
        others.append(Staging(place))
        with pytest.raises(OutputLocked):
            Staging(place)
    others[0].close()


def test_staging_closed_without_work_leaves_nothing(place: Path) -> None:
    for _ in range(2):
        with closing(Staging(place)) as staging:
            staging.begin(PLAN, CONDITIONS)
        assert os.listdir(place.parent) == []


def test_staging_closed_twice_is_closed_once(place: Path) -> None:
    staging = Staging(place)
    staging.close()
    other = os.open(place.parent, os.O_RDONLY)  # takes the number of the lock's descriptor
    staging.close()
    os.fstat(other)
    os.close(other)


def test_staging_files_are_as_readable_as_any_other(place: Path) -> None:
    before = os.umask(0o027)
    try:
        with closing(Staging(place)) as staging:
            staging.begin(PLAN, CONDITIONS)
            shard = ShardFile(staging.files / "a.safetensors", 10, b"head", WriteMode())
            shard.finish()
            staging.write_file("sub/config.json", b"{}")
            staging.write_file(MANIFEST_FILE, b"{}")
            staging.put_in_place(replace=False)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [place, *place.rglob("*")]}
    assert modes == {
        "merged": 0o750,
        "sub": 0o750,
        "a.safetensors": 0o640,
        "config.json": 0o640,
        MANIFEST_FILE: 0o640,
    }


def test_drop_strangers_removes_all_that_does_not_belong(place: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    with closing(Staging(place)) as staging:
        staging.begin(PLAN, CONDITIONS)
        for name in ("a.safetensors", "stray.txt", "old/stray.txt", "old/deeper/stray.txt", "kept/config.json"):
            staging.write_file(name, b"x")
        (staging.files / "link").symlink_to(outside)
        staging.drop_strangers({"a.safetensors", "kept/config.json"})
        assert files(staging.files) == {"a.safetensors": b"x", "kept/config.json": b"x"}
        assert sorted(os.listdir(staging.files)) == ["a.safetensors", "kept"]
    assert (outside / "precious").read_text() == "precious"


# ----------------------------------------------------------------------------------------------------- journal


def test_journal_keeps_what_is_finished_and_nothing_else(place: Path) -> None:
    with closing(Staging(place)) as staging:
        assert staging.begin(PLAN, CONDITIONS) is None
        finish_shards(staging, "a.safetensors", "b.safetensors")
        staging.write_file("c.safetensors", b"in flight")
    with closing(Staging(place)) as staging:
        remark = staging.begin(PLAN, CONDITIONS)
        assert remark is not None
        assert "2 shards" in remark
        assert staging.finished == {name: entry(name) for name in ("a.safetensors", "b.safetensors")}
        assert staging.finished_bytes == len(SHARDS["a.safetensors"]) + len(SHARDS["b.safetensors"])
        assert sorted(files(staging.files)) == ["a.safetensors", "b.safetensors"], "the room of what is lost"


@pytest.mark.parametrize(
    ("plan", "conditions"),
    [("another plan", CONDITIONS), (PLAN, {**CONDITIONS, "stats": "full"}), (PLAN, {**CONDITIONS, "inputs": {}})],
    ids=["plan", "option", "input"],
)
def test_journal_of_other_circumstances_is_dropped(place: Path, plan: str, conditions: dict[str, Any]) -> None:
    with closing(Staging(place)) as staging:
        staging.begin(PLAN, CONDITIONS)
        finish_shards(staging, *SHARDS)
    with closing(Staging(place)) as staging:
        remark = staging.begin(plan, conditions)
        assert remark is not None
        assert "dropped" in remark
        assert staging.finished == {}
        assert files(staging.files) == {}


def test_journal_torn_at_any_byte_keeps_the_lines_before(place: Path) -> None:
    with closing(Staging(place)) as staging:
        staging.begin(PLAN, CONDITIONS)
        finish_shards(staging, *SHARDS)
        journal = staging.folder / "journal.jsonl"
        whole = journal.read_bytes()
    for length in range(len(whole)):
        for tail in (b"", b"\xff\x00 garbage\n"):
            with closing(Staging(place)) as staging:
                # Reading and continuing drops what is not journaled: put it back for the next turn.
                staging.files.mkdir(exist_ok=True)
                for name, data in SHARDS.items():
                    (staging.files / name).write_bytes(data)
                journal.write_bytes(whole[:length] + tail)
                staging.begin(PLAN, CONDITIONS)
                lines = max(0, whole[:length].count(b"\n") - 1)
                assert list(staging.finished) == list(SHARDS)[:lines], length
                staging.record(replace(entry("c.safetensors"), uploaded=True))  # appended to whole lines only
                assert [json.loads(line) for line in journal.read_text().splitlines()][-1]["uploaded"]


def test_journal_is_not_believed_where_the_shard_is_missing_or_short(place: Path) -> None:
    with closing(Staging(place)) as staging:
        staging.begin(PLAN, CONDITIONS)
        finish_shards(staging, *SHARDS)
        (staging.files / "a.safetensors").unlink()
        os.truncate(staging.files / "b.safetensors", 3)
    with closing(Staging(place)) as staging:
        staging.begin(PLAN, CONDITIONS)
        assert list(staging.finished) == ["c.safetensors"]


def test_journal_lines_of_many_threads_stay_whole(place: Path) -> None:
    with closing(Staging(place)) as staging:
        staging.begin(PLAN, CONDITIONS)
        rows = [ShardRecord(f"{n}", n, "x" * 9000, {}) for n in range(40)]
        threads = [threading.Thread(target=staging.record, args=(row,)) for row in rows]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        lines = [json.loads(line) for line in (staging.folder / "journal.jsonl").read_text().splitlines()]
        assert sorted(line["size"] for line in lines[1:]) == list(range(40))


# ------------------------------------------------------------------------------------------- publish, recover


def put_previous(output: Path) -> dict[str, bytes]:
    output.mkdir()
    (output / "old").write_bytes(b"of before")
    (output / MANIFEST_FILE).write_bytes(b"manifest of before")
    return files(output)


@pytest.mark.parametrize("exchange", [True, False])
def test_publish_replaces_an_output_when_asked(place: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr("skillmerge.outputs.staging.exchange", lambda first, second: False)
    put_previous(place)
    with closing(Staging(place)) as staging:
        staging.begin(PLAN, CONDITIONS)
        finish(staging)
        staging.put_in_place(replace=True)
    assert files(place) == WHOLE
    assert os.listdir(place.parent) == ["merged"]


def test_what_was_replaced_and_could_not_be_removed_is_removed_by_the_next_run(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by letting calls of the system fail: without the journal the rest of a large model lay there for ever."""
    put_previous(place)
    real = os.unlink

    def fails(path: Any, **keys: Any) -> None:
        if Path(path).name == "old":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(path, **keys)

    with closing(Staging(place)) as staging:
        staging.begin(PLAN, CONDITIONS)
        finish(staging)
        monkeypatch.setattr(os, "unlink", fails)
        staging.put_in_place(replace=True)
        monkeypatch.undo()
    assert files(place) == WHOLE
    assert (Staging.folder_of(place) / "dropped" / "old").exists()
    with closing(Staging(place)) as staging:
        assert staging.recover(PLAN, CONDITIONS, replace=True)
    assert os.listdir(place.parent) == ["merged"]


def test_publish_takes_the_place_of_an_empty_folder(place: Path) -> None:
    place.mkdir()
    with closing(Staging(place)) as staging:
        staging.begin(PLAN, CONDITIONS)
        finish(staging)
        staging.put_in_place(replace=False)
    assert files(place) == WHOLE


def test_publish_unasked_touches_nothing_and_can_be_done_later(place: Path) -> None:
    previous = put_previous(place)
    with closing(Staging(place)) as staging:
        staging.begin(PLAN, CONDITIONS)
        finish(staging)
        with pytest.raises(UsageError):
            staging.put_in_place(replace=False)
    assert files(place) == previous
    with closing(Staging(place)) as staging:
        assert not staging.recover(PLAN, CONDITIONS, replace=False)
    assert files(place) == previous
    with closing(Staging(place)) as staging:
        assert staging.recover(PLAN, CONDITIONS, replace=True)
    assert files(place) == WHOLE
    assert os.listdir(place.parent) == ["merged"]


def test_recover_leaves_a_folder_that_can_be_used_at_once(place: Path) -> None:
    """A publication is finished for another run, which then goes on with its own work under the same lock."""
    put_previous(place)
    with closing(Staging(place)) as staging:
        staging.begin(PLAN, CONDITIONS)
        finish(staging)
        with pytest.raises(UsageError):
            staging.put_in_place(replace=False)
    with closing(Staging(place)) as staging:
        assert staging.recover(PLAN, CONDITIONS, replace=True)
        with pytest.raises(OutputLocked):
            Staging(place)
        assert staging.begin("another plan", CONDITIONS) is None
        staging.write_file(MANIFEST_FILE, b"another")
        staging.put_in_place(replace=True)
    assert files(place) == {MANIFEST_FILE: b"another"}
    assert os.listdir(place.parent) == ["merged"]


def test_recover_never_publishes_what_was_replaced(place: Path) -> None:
    """After the swap the staging folder holds the previous output, for as long as its removal takes."""
    with closing(Staging(place)) as staging:
        staging.begin(PLAN, CONDITIONS)
        finish(staging)
        staging.put_in_place(replace=False)
        staging.folder.mkdir()
        (staging.folder / "journal.jsonl").write_text('{"manifest_sha256": "that of a run long gone"}\n')
        put_previous(staging.folder / "complete")
    with closing(Staging(place)) as staging:
        assert not staging.recover(PLAN, CONDITIONS, replace=True)
    assert files(place) == WHOLE


def test_staging_below_a_file_or_of_a_name_too_long_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for place in (tmp_path / "file" / "merged", tmp_path / ("x" * 250)):
        with pytest.raises(UsageError):
            Staging(place)


def test_recover_leaves_another_plans_publication_alone(place: Path) -> None:
    """It is that plan's to finish: this one has not been merged yet."""
    put_previous(place)
    with closing(Staging(place)) as staging:
        staging.begin(PLAN, CONDITIONS)
        finish(staging)
        Journal(staging.folder / "journal.jsonl", "0").append(Placing(hashlib.sha256(b"{}").hexdigest()))
        staging.files.rename(staging.folder / "complete")
    before = files(place)
    with closing(Staging(place)) as staging:
        assert not staging.recover("another plan", CONDITIONS, replace=True)
        assert files(place) == before


def test_recover_gives_back_an_output_that_another_plan_had_moved_away(place: Path) -> None:
    with closing(Staging(place)) as staging:
        staging.begin(PLAN, CONDITIONS)
        finish(staging)
        Journal(staging.folder / "journal.jsonl", "0").append(Placing(hashlib.sha256(b"{}").hexdigest()))
        staging.files.rename(staging.folder / "complete")
        put_previous(staging.folder / "previous")
    with closing(Staging(place)) as staging:
        assert staging.recover("another plan", CONDITIONS, replace=True)
    assert files(place) == WHOLE


def test_journal_is_not_believed_where_a_shard_was_damaged(place: Path) -> None:
    with closing(Staging(place)) as staging:
        staging.begin(PLAN, CONDITIONS)
        finish_shards(staging, "a.safetensors", "b.safetensors")
        (staging.files / "a.safetensors").write_bytes(b"First shard")
    with closing(Staging(place)) as staging:
        remark = staging.begin(PLAN, CONDITIONS)
        assert remark is not None
        assert "1 were damaged" in remark
        assert list(staging.finished) == ["b.safetensors"]
        assert not (staging.files / "a.safetensors").exists()


def test_two_runs_never_write_the_journal_under_one_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by a review: where locks lock nothing, one run renamed what the other had just written."""
    written, real = set(), Path.replace

    def watched(path: Path, to: Path) -> Path:
        written.add(path.name)
        return real(path, to)

    monkeypatch.setattr(Path, "replace", watched)
    left = Staging.folder_of(place) / "journal.jsonl.0a1b.new"
    for _ in range(2):
        with closing(Staging(place)) as staging:
            left.write_text("half of a journal, of a run that was killed")
        with closing(Staging(place)) as staging:
            staging.begin(PLAN, CONDITIONS)
            assert not left.exists()
    assert len(written) == 2


def test_run_of_this_plan_with_other_options_is_not_called_another_plan(place: Path) -> None:
    for conditions in (CONDITIONS, {**CONDITIONS, "stats": "full"}):
        with closing(Staging(place)) as staging:
            remark = staging.begin(PLAN, conditions)
            finish_shards(staging, "a.safetensors")
    assert remark == "dropped an unfinished run of this plan with other options or inputs"
