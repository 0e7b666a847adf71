"""Whatever happens to a run, nothing is lost and nothing half-made is ever seen.

Runs are killed at random instants and before every step that changes the disk, interrupted, raced, and given
full and failing disks; the same command again must end in the same bytes as a run that nothing happened to.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import run_cli
from observing import (
    SHARDS,
    MergeServer,
    Reader,
    assert_finished,
    content,
    discard,
    fill,
    finished_shards,
    identities,
    journaled,
    put_previous,
    reference,
    staging_of,
    visible,
    wait_until,
)

import skillmerge
from skillmerge.engine.destination import ShardRecord
from skillmerge.errors import CheckFailed, ResourceError, SkillmergeError
from skillmerge.outputs import staging as writer
from skillmerge.outputs.journal import Journal, Row
from skillmerge.outputs.staging import MANIFEST_FILE, Staging

FAILURES = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR]

# ---------------------------------------------------------------------------------------------------- killed


@pytest.mark.parametrize("way", ["fresh", "overwrite", "overwrite without exchange"])
def test_kill_at_every_step_loses_nothing(
    server: MergeServer, small: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, wanted, dice = small.parent / "merged", reference(server, small), random.Random(1)
    request = {"overwrite": way != "fresh", "no_exchange": way == "overwrite without exchange"}
    if request["no_exchange"]:
        monkeypatch.setattr(writer, "exchange", lambda first, second: False)
    for step in range(1, 1000):
        previous = put_previous(output) if way != "fresh" else None
        first = server.run(small, **request, kill_at=step)
        seen = visible(output)
        if way == "overwrite without exchange" and seen is None:
            assert content(staging_of(output) / "previous") == previous
        else:
            assert seen in (previous, wanted)
        before = finished_shards(output)
        # The second attempt dies too, anywhere; the third, in this process, is let live.
        server.run(small, **request, kill_at=dice.randrange(1, 60))
        skillmerge.apply(small, overwrite=request["overwrite"])
        assert_finished(output, wanted)
        assert {name: identities(output)[name] for name in before} == before, step
        discard(output)
        if first["status"] == 0:
            break
        assert first["status"] == -signal.SIGKILL, first
    assert step > 30, "the steps of a run were not seen"


def test_kill_at_publication_leaves_room_for_another_recipe(server: MergeServer, small: Path) -> None:
    """What a dead run had finished stands in nobody's way."""
    output = small.parent / "merged"
    other = small.with_name("other.yaml")
    other.write_text(small.read_text().replace("0.7", "0.25"))
    wanted, others = reference(server, small), reference(server, other)
    steps = server.run(small)["steps"]
    discard(output)
    published = 0
    for step in range(steps - 25, steps + 1):
        assert server.run(small, kill_at=step)["status"] == -signal.SIGKILL
        refused = server.run(other)
        assert refused["status"] in (0, 2), refused
        published += refused["status"] == 2
        assert content(output) == (others if refused["status"] == 0 else wanted)
        answer = server.run(other, overwrite=True)
        assert answer["status"] == 0, answer
        assert_finished(output, others)
        discard(output)
    assert 0 < published < 25


def test_kill_during_an_overwrite_keeps_the_previous_output_whole(server: MergeServer, wide: Path) -> None:
    output, wanted, dice = wide.parent / "merged", reference(server, wide), random.Random(2)
    previous = put_previous(output)
    with Reader(output, [previous, wanted]) as reader:
        for _ in range(10):
            server.run(wide, overwrite=True, pace=0.004, kill_after=dice.uniform(0.02, 0.2))
            assert visible(output) in (previous, wanted)
        assert server.run(wide, overwrite=True)["status"] == 0
    assert reader.wrong == []
    assert_finished(output, wanted)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="asks /proc which file a descriptor is")
def test_nothing_is_believed_before_it_is_durable(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill leaves what was written in the page cache, a power cut does not: only the order of calls can tell."""
    durable: set[str] = set()
    fsync, pwrite, append, put = os.fsync, os.pwrite, Journal.append, writer._put_in_place
    believed = []
    one_at_a_time = threading.Lock()

    def path_of(descriptor: int) -> str:
        return os.readlink(f"/proc/self/fd/{descriptor}")

    def watched_fsync(descriptor: int) -> None:
        fsync(descriptor)
        durable.add(path_of(descriptor))

    def watched_pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        durable.discard(path_of(descriptor))
        return pwrite(descriptor, data, offset)

    def watched_append(journal: Journal, row: Row) -> None:
        if isinstance(row, ShardRecord):
            believed.append(row.file)
            assert str(journal.path.parent / "files" / row.file) in durable
        with one_at_a_time:  # else another thread's line takes back what this one's has proved
            durable.discard(str(journal.path))
            append(journal, row)
            assert str(journal.path) in durable

    def watched_put(finished: Path, output: Path, replace: bool) -> None:
        believed.append(output.name)
        staged = str(staging_of(output) / "files")
        wanted = {staged, *(f"{staged}/{path.relative_to(finished)}" for path in finished.rglob("*"))}
        assert wanted <= durable
        assert str(staging_of(output)) in durable
        durable.discard(str(output.parent))
        put(finished, output, replace)
        assert str(output.parent) in durable

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "pwrite", watched_pwrite)
    monkeypatch.setattr(Journal, "append", watched_append)
    monkeypatch.setattr(writer, "_put_in_place", watched_put)
    (small.parent / "target" / "1_Pooling").mkdir()
    (small.parent / "target" / "1_Pooling" / "config.json").write_text("{}")
    skillmerge.apply(small)
    assert len(believed) == 4


# ----------------------------------------------------------------------------------------------- interrupted

SLOW_CLI = """
import sys, time
from skillmerge.cli import main
from skillmerge.outputs import shard_file
write = shard_file.ShardFile.write
def slowly(self, data, offset):
    time.sleep(0.5)
    write(self, data, offset)
shard_file.ShardFile.write = slowly
main.main()
"""

DEAF_CLI = """
import os, signal, sys
class Deaf:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            try:
                os.kill(os.getpid(), signal.{name})
            except {swallows}:
                pass
sys.meta_path.insert(0, Deaf())
from skillmerge.cli import main
main.main()
"""


def start_cli(program: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """The command line in a process of its own, with something done to it before.

    Tests that run in the background have SIGINT ignored, and so would their children.
    """
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    return subprocess.Popen(
        [sys.executable, "-c", heard + program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_a_run_that_can_be_continued(server: MergeServer, wide: Path, number: signal.Signals) -> None:
    output, wanted = wide.parent / "merged", reference(server, wide)
    with start_cli(SLOW_CLI, "apply", wide) as process:
        wait_until(lambda: journaled(output))
        process.send_signal(number)
        sent = time.monotonic()
        _, told = process.communicate(timeout=60)
    assert time.monotonic() - sent < 10
    assert process.returncode == 128 + number
    assert number.name in told
    assert "rerun to continue" in told
    assert "Traceback" not in told
    assert visible(output) is None
    before = finished_shards(output)
    assert 0 < len(before) < SHARDS
    answer = server.run(wide)
    assert any(f": {len(before)} shard" in remark for remark in answer["said"])
    assert_finished(output, wanted)
    assert {name: identities(output)[name] for name in before} == before


@pytest.mark.parametrize(
    ("module", "swallows"), [("pydantic", "Exception"), ("torch", "BaseException")], ids=["import", "torch"]
)
def test_signal_is_heard_while_libraries_swallow_exceptions(small: Path, module: str, swallows: str) -> None:
    """Imports catch what a handler raises: so a signal during torch's import was once lost."""
    with start_cli(DEAF_CLI.format(module=module, name="SIGTERM", swallows=swallows), "apply", small) as process:
        _, told = process.communicate(timeout=60)
    assert process.returncode == 143, told
    assert not (small.parent / "merged").exists()


# ------------------------------------------------------------------------------------------------------ raced


def test_locked_output_is_refused_at_once_and_left_alone(small: Path) -> None:
    staging = Staging(small.parent / "merged")
    try:
        staging.begin("another plan", {})
        before = identities(staging.folder)
        refused = run_cli("apply", small)
        assert refused.returncode == 6
        assert "another run" in refused.stderr
        assert identities(staging.folder) == before
    finally:
        staging.close()
    assert run_cli("apply", small).returncode == 0


def test_race_of_four_processes_is_won_by_one(small: Path) -> None:
    processes = [start_cli(SLOW_CLI, "apply", small, "--json") for _ in range(4)]
    results = [(process.communicate(timeout=120), process.returncode) for process in processes]
    for process in processes:
        process.__exit__(None, None, None)
    statuses = sorted(status for _, status in results)
    workers = [told for (told, _), status in results if status == 0 and not json.loads(told)["already"]]
    assert len(workers) == 1, results
    assert statuses[0] == 0
    assert set(statuses) <= {0, 6}


def test_race_started_at_the_same_instant_is_won_by_one(server: MergeServer, small: Path) -> None:
    output, wanted = small.parent / "merged", reference(server, small)
    lost = 0
    for attempt in range(15):
        request = {"recipe": small, "pace": 0.02 * (attempt % 2)}
        answers = server.run_all(*([request] * 4))
        assert {answer["status"] for answer in answers} <= {0, 6}, answers
        assert sum(answer["status"] == 0 and not answer["already"] for answer in answers) == 1, answers
        lost += sum(answer["status"] == 6 for answer in answers)
        assert_finished(output, wanted)
        discard(output)
    assert lost > 0


# ------------------------------------------------------------------------------------------------ full, broken


def test_disk_too_small_is_known_before_work(wide: Path, mount_disk: Callable[..., Path]) -> None:
    disk = mount_disk("size=2m")
    previous = put_previous(disk / "merged")
    refused = run_cli("apply", wide, "--output", disk / "merged", "--overwrite")
    assert refused.returncode == 5
    assert re.search(r"needs 3\.\d MB.* has 2\.\d MB free", refused.stderr)
    assert content(disk / "merged") == previous
    assert os.listdir(disk) == ["merged"], "something was left on a disk that is too small"


def test_disk_filled_midway_keeps_what_is_finished(
    server: MergeServer, wide: Path, mount_disk: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, disk = reference(server, wide), mount_disk("size=8m")
    output = disk / "merged"
    previous = put_previous(output)
    record = Staging.record

    def record_and_fill(staging: Staging, done: ShardRecord) -> None:
        record(staging, done)
        fill(disk)

    monkeypatch.setattr(Staging, "record", record_and_fill)
    with pytest.raises(ResourceError, match="disk is full") as caught:
        skillmerge.apply(wide, output, overwrite=True, threads=1)
    monkeypatch.undo()
    assert caught.value.exit_status == 5
    assert "same command" in str(caught.value.fix)
    assert content(output) == previous
    before = finished_shards(output)
    assert 0 < len(before) < SHARDS
    (disk / "filler").unlink()
    skillmerge.apply(wide, output, overwrite=True)
    assert_finished(output, wanted)
    assert {name: identities(output)[name] for name in before} == before


def test_unfinished_shards_of_a_dead_run_do_not_take_the_room_of_the_next(
    server: MergeServer, wide: Path, mount_disk: Callable[..., Path]
) -> None:
    wanted, output = reference(server, wide), mount_disk("size=3800k") / "merged"
    steps = server.run(wide, output=output)["steps"]
    discard(output)
    for step in range(steps // 3, steps // 2, 5):
        assert server.run(wide, output=output, kill_at=step)["status"] == -signal.SIGKILL
        assert server.run(wide, output=output)["status"] == 0
        assert_finished(output, wanted)
        discard(output)


def error_of(run: Callable[[], object]) -> SkillmergeError | None:
    try:
        run()
    except SkillmergeError as error:
        return error
    return None


@pytest.mark.parametrize("number", FAILURES, ids=errno.errorcode.get)
@pytest.mark.parametrize("function", ["pwrite", "fsync", "ftruncate"])
def test_failing_call_ends_the_run_and_loses_nothing(
    small: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int
) -> None:
    output = small.parent / "merged"
    skillmerge.apply(small)
    wanted = content(output)
    discard(output)
    previous = put_previous(output)
    real = getattr(os, function)
    for nth in range(1, 100):
        calls = iter(range(1, 1000))

        def fails(*arguments: Any, nth: int = nth, calls: Iterator[int] = calls) -> Any:
            if next(calls) == nth:
                raise OSError(number, os.strerror(number))
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, function, fails)
            error = error_of(lambda: skillmerge.apply(small, overwrite=True, threads=1))
        if error is None:
            break
        assert error.exit_status == 5
        assert "same command" in str(error.fix)
        assert visible(output) in (previous, wanted)
        before = finished_shards(output)
        skillmerge.apply(small, overwrite=True)
        assert_finished(output, wanted)
        assert {name: identities(output)[name] for name in before} == before
        discard(output)
        put_previous(output)
    assert nth > 3, "the failures were never met"


def test_thread_that_cannot_be_started_ends_the_run_and_loses_nothing(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by limiting memory: threads that were never started were waited for, in an error of its own."""
    output, real = small.parent / "merged", threading.Thread.start
    for nth in range(1, 100):
        starts = iter(range(1, 1000))

        def start(thread: threading.Thread, nth: int = nth, starts: Iterator[int] = starts) -> None:
            if next(starts) == nth:
                raise RuntimeError("can't start new thread")
            real(thread)

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            error = error_of(lambda: skillmerge.apply(small, threads=2))
        if error is None:
            break
        assert error.exit_status == 5
        assert visible(output) is None
    assert nth > 4, "the threads were never met"


def test_short_writes_are_written_on(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = small.parent / "merged"
    skillmerge.apply(small)
    wanted = content(output)
    discard(output)
    real, lengths = os.pwrite, []

    def short(descriptor: int, data: memoryview, offset: int) -> int:
        lengths.append(real(descriptor, data[:777], offset))
        return lengths[-1]

    monkeypatch.setattr(os, "pwrite", short)
    skillmerge.apply(small)
    assert lengths.count(777) > 5
    assert_finished(output, wanted)


def test_shard_damaged_before_publication_is_never_published(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = small.parent / "merged"
    drop_strangers = Staging.drop_strangers

    def damage(staging: Staging, names: set[str]) -> None:
        drop_strangers(staging, names)
        if MANIFEST_FILE in names:
            os.truncate(staging.files / "model-00002-of-00003.safetensors", 100)

    monkeypatch.setattr(Staging, "drop_strangers", damage)
    with pytest.raises(CheckFailed):
        skillmerge.apply(small)
    assert not output.exists()
    monkeypatch.undo()
    skillmerge.apply(small)
    skillmerge.verify(output)
