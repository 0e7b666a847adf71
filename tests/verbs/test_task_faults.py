"""What goes wrong around tasks: other plans, late and dead tasks, full disks, damaged files, wrong arguments."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from clusters import SHARDS, alone, record_of, run_tasks, save, save_family
from conftest import run_cli, write_recipe
from observing import content, identities, staging_of

import skillmerge
from skillmerge.engine.destination import ShardRecord
from skillmerge.errors import OutputLocked, ResourceError, TemporaryError, UsageError
from skillmerge.outputs import attempts
from skillmerge.outputs.attempts import Attempt, conditions_of
from skillmerge.outputs.staging import Staging
from skillmerge.reporter import Reporter
from skillmerge.verbs.tasks import collect, shard

FIRST = "model-00001-of-00004.safetensors"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "PATIENCE", 0.0)
    monkeypatch.setattr(attempts, "_PATIENCE", 0.1)


def join(output: Path) -> Attempt:
    header = conditions_of(staging_of(output))
    assert header is not None
    return Attempt(output, header)


def test_finish_of_another_plan_drops_nothing(tmp_path: Path) -> None:
    """It makes no shards, so it must not cost any."""
    plan, output = save_family(tmp_path), tmp_path / "merged"
    wanted = alone(plan)
    run_tasks(plan, output, tasks=2)
    before = identities(staging_of(output) / "files")
    (tmp_path / "other").mkdir()
    models = {name: str(tmp_path / name) for name in ("target", "rl", "sft")}
    other = save(write_recipe(tmp_path / "other", models=models, coefficients={"lam": 0.25}))
    with pytest.raises(UsageError, match="holds an unfinished run of another plan") as caught:
        skillmerge.finish(other, output)
    assert "remove the folder" in str(caught.value.fix)
    assert identities(staging_of(output) / "files") == before
    skillmerge.finish(plan)
    assert content(output) == wanted


def test_finish_that_cannot_tell_whose_shards_they_are_drops_nothing(tmp_path: Path) -> None:
    plan, output = save_family(tmp_path), tmp_path / "merged"
    run_tasks(plan, output, stats="off")
    (staging_of(output) / "skillmerge.tasks.json").write_text("{")
    before = identities(staging_of(output) / "files")
    with pytest.raises(UsageError, match="it cannot be seen of which plan"):
        skillmerge.finish(plan)
    assert skillmerge.shard(plan, index=0, of=1, stats="off").made == ()
    (staging_of(output) / "skillmerge.tasks.json").unlink()
    with pytest.raises(UsageError):
        skillmerge.finish(plan)
    assert identities(staging_of(output) / "files") == before


def test_a_task_that_begins_after_the_end_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has seen that shards were missing; before it takes its place others have made them, and all is published."""
    plan, output = save_family(tmp_path), tmp_path / "merged"
    check, once = shard.budget, []

    def overtaken(*given: Any, **options: Any) -> Any:
        if not once:
            once.append(True)
            run_tasks(plan, output)
            skillmerge.finish(plan)
        return check(*given, **options)

    monkeypatch.setattr(shard, "budget", overtaken)
    assert skillmerge.shard(plan, index=0, of=1).made == ()
    assert not staging_of(output).exists()
    skillmerge.verify(output)


def test_a_task_that_finish_leaves_out_has_not_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shard has a record. That a third task has put the same bytes there once more, and was left out before it
    could record that, is no reason to make it again."""
    plan, output = save_family(tmp_path), tmp_path / "merged"
    record, once = Attempt.record, []

    def overtaken(self: Attempt, done: Any) -> None:
        if not once:
            once.append(True)
            run_tasks(plan, output)
            for path in (staging_of(output) / "files").iterdir():
                os.utime(path, ns=(1, 1))
            with closing(Staging(output)) as staging:
                staging.leave_tasks_out()
        record(self, done)

    monkeypatch.setattr(Attempt, "record", overtaken)
    assert skillmerge.shard(plan, index=0, of=1).made == ()
    skillmerge.finish(plan)
    skillmerge.verify(output)


def test_two_late_tasks_leave_nothing(tmp_path: Path) -> None:
    plan, output = save_family(tmp_path), tmp_path / "merged"
    run_tasks(plan, output)
    header = conditions_of(staging_of(output))
    assert header is not None
    skillmerge.finish(plan)
    first, second = Attempt(output, header), Attempt(output, header)
    first.withdraw()
    assert staging_of(output).exists(), "the second has not noticed yet"
    second.withdraw()
    assert not staging_of(output).exists()


def test_what_killed_tasks_left_goes_when_the_shard_is_there(tmp_path: Path) -> None:
    """Else many restarts would fill the disk. A slower task that lives loses nothing by it."""
    plan, output = save_family(tmp_path), tmp_path / "merged"
    preview = skillmerge.plan(tmp_path / "recipe.yaml")
    skillmerge.shard(plan, index=0, of=SHARDS)
    dead, slow = join(output), join(output)
    dead.open_shard(preview.shards[1])
    file = slow.open_shard(preview.shards[1])
    skillmerge.shard(plan, index=1, of=SHARDS)
    assert [path.name for path in (staging_of(output) / "attempts").rglob("*.safetensors")] == []
    seen = identities(staging_of(output) / "files")
    file.write(memoryview(bytes(16)), 64)
    file.finish()
    slow.record(ShardRecord(preview.shards[1].file, preview.shards[1].size, "", {}))
    assert identities(staging_of(output) / "files") == seen


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    with open(folder / "lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def test_tasks_do_not_come_between_a_run_alone_and_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`apply` writes where tasks rename: it would stumble over a shard of theirs. Who is gone is in nobody's way."""
    plan, output = save_family(tmp_path), tmp_path / "merged"

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("skillmerge.verbs.apply._Merge._describe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            skillmerge.apply(plan)
    (staging_of(output) / "files" / FIRST).unlink()
    with locked(staging_of(output)), pytest.raises(OutputLocked, match=r"another run is writing .* by itself"):
        skillmerge.shard(plan, index=0, of=1)
    assert skillmerge.shard(plan, index=0, of=1).made == (FIRST,)


def test_a_record_without_an_end_is_none(tmp_path: Path) -> None:
    plan, output = save_family(tmp_path), tmp_path / "merged"
    run_tasks(plan, output)
    record_of(output, FIRST).write_text("[" * 200_000)
    (staging_of(output) / "done" / "notes.txt").write_text("[]")
    (staging_of(output) / "done" / ".nfs0001").write_bytes(b"\xff")
    with pytest.raises(TemporaryError, match=f"1 of 4 shards is missing: {FIRST}"):
        skillmerge.finish(plan)
    assert run_tasks(plan, output) == [FIRST]
    (staging_of(output) / "skillmerge.tasks.json").write_text("[" * 200_000)
    skillmerge.finish(plan)
    skillmerge.verify(output)


def test_an_output_that_is_in_the_way_is_told_before_the_work(tmp_path: Path) -> None:
    plan, output, reporter = save_family(tmp_path), tmp_path / "merged", Reporter()
    output.mkdir()
    (output / "model.safetensors").write_bytes(b"of before")
    skillmerge.shard(plan, index=0, of=2, reporter=reporter)
    assert reporter.warnings == [f"output `{output}` already exists"]
    (output / "model.safetensors").rename(output / "notes.txt")
    with pytest.raises(UsageError, match="holds no model"):
        skillmerge.shard(plan, index=1, of=2)
    (output / "notes.txt").unlink()
    skillmerge.shard(plan, index=1, of=2, reporter=(silent := Reporter()))
    assert silent.warnings == []


def failing(number: int) -> Any:
    def write(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    return write


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [(errno.ENOSPC, ResourceError, "the disk is full"), (errno.EDQUOT, ResourceError, "quota"),
     (errno.EROFS, UsageError, "cannot be written: Read-only file system")],
)  # fmt: skip
def test_a_disk_that_takes_no_more_leaves_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception], message: str
) -> None:
    plan, output = save_family(tmp_path), tmp_path / "merged"
    skillmerge.shard(plan, index=0, of=SHARDS)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing(number))
        with pytest.raises(error, match=message):
            skillmerge.shard(plan, index=0, of=1)
    assert list((staging_of(output) / "attempts").iterdir()) == []
    assert len(skillmerge.shard(plan, index=0, of=1).made) == SHARDS - 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    plan = save_family(tmp_path)
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(UsageError, match=r"closed/merged\.partial cannot be written: Permission denied"):
        skillmerge.shard(plan, tmp_path / "closed/merged", index=0, of=1)


@pytest.mark.parametrize("where", ["merged.partial", "merged.partial/done", "merged.partial/files"])
def test_a_file_where_a_folder_must_be_is_named(tmp_path: Path, where: str) -> None:
    plan = save_family(tmp_path)
    (tmp_path / where).parent.mkdir(exist_ok=True)
    (tmp_path / where).write_text("")
    with pytest.raises(UsageError, match=r"cannot be written: (File exists|Not a directory)"):
        skillmerge.shard(plan, index=0, of=1)


@pytest.mark.parametrize("given", [{"index": "0", "of": 2}, {"index": 0, "of": 2.0}, {"index": True, "of": 2},
                                   {"index": 0, "of": 0}, {"index": -1, "of": 2}, {"index": 2, "of": 2}])  # fmt: skip
def test_an_index_that_is_none_is_refused(tmp_path: Path, given: dict[str, Any]) -> None:
    plan = save_family(tmp_path)
    with pytest.raises(UsageError, match=r"number from|no task 2 of 2"):
        skillmerge.shard(plan, **given)


def test_a_trillion_tasks_are_no_work(tmp_path: Path) -> None:
    save_family(tmp_path)
    process = run_cli("shard", "plan.json", "--index", "999999999999", "--of", str(10**12), "--json", cwd=tmp_path)
    assert (process.returncode, json.loads(process.stdout)["shards"]) == (0, []), process.stderr
    process = run_cli("shard", "plan.json", cwd=tmp_path, JOB_COMPLETION_INDEX="9" * 5000, SKILLMERGE_OF="2")
    assert process.returncode == 2
    assert "JOB_COMPLETION_INDEX is '9999" in process.stderr
    assert len(process.stderr) < 300


def test_only_one_finish_goes_on(tmp_path: Path) -> None:
    plan, output = save_family(tmp_path), tmp_path / "merged"
    run_tasks(plan, output)
    with closing(Staging(output)):
        process = run_cli("finish", "plan.json", "--wait", cwd=tmp_path)
    assert process.returncode == 6
    skillmerge.finish(plan)
    assert skillmerge.finish(plan, wait=True).already
