"""A folder that one run has for itself, on filesystems whose locks work, are refused, or lock nothing."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from skillmerge import claim as claims
from skillmerge.claim import Claim, hold, new_folder
from skillmerge.durable import disk_errors
from skillmerge.errors import CheckFailed, OutputLocked, ResourceError, SkillmergeError, UsageError
from skillmerge.reporter import Reporter


def refuses(number: int) -> Callable[[int, int], None]:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    return flock


def test_claim_holds_until_it_is_closed_and_leaves_nothing(tmp_path: Path) -> None:
    first, said = Claim(tmp_path / "a", tmp_path / "out", Reporter()), Reporter()
    with pytest.raises(OutputLocked, match=f"another run is writing {tmp_path / 'out'}"):
        Claim(tmp_path / "a", tmp_path / "out", said)
    first.check()
    first.close()
    first.close()
    assert list(tmp_path.iterdir()) == []
    Claim(tmp_path / "a", tmp_path / "out", said).close()
    assert said.warnings == []


def test_claim_keeps_what_the_folder_holds(tmp_path: Path) -> None:
    with hold(tmp_path, Reporter()):
        (tmp_path / "journal").write_text("mine")
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_filesystem_without_locks_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(fcntl, "flock", refuses(number))
    said = Reporter()
    with hold(tmp_path / "s", said) as claim:
        claim.check()
    assert said.warnings == [
        f"the filesystem of {tmp_path / 's'} has no file locks ({os.strerror(number)}), so a second run on it would "
        f"stop "
        "this one"
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES], ids=["EAGAIN", "EACCES, of CIFS"])
def test_lock_that_is_taken_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(fcntl, "flock", refuses(number))
    with pytest.raises(OutputLocked):
        Claim(tmp_path / "a", tmp_path / "out", Reporter())


def test_lock_that_fails_is_the_disks_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", refuses(errno.EIO))
    with pytest.raises(ResourceError, match="could not be written: Input/output error"):
        Claim(tmp_path / "a", tmp_path / "out", Reporter())


def test_where_locks_lock_nothing_the_first_notices_and_leaves_all_to_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: None)
    first = Claim(tmp_path / "a", tmp_path / "out", Reporter())
    second = Claim(tmp_path / "a", tmp_path / "out", Reporter())
    with pytest.raises(OutputLocked) as caught:
        first.check()
    assert caught.value.exit_status == 6
    assert caught.value.message == (
        f"another run has taken over {tmp_path / 'out'}; this one has stopped and left it alone"
    )
    first.close()
    second.check()
    second.close()
    assert list(tmp_path.iterdir()) == []


def test_file_that_another_run_removed_is_no_fault_of_the_place(tmp_path: Path) -> None:
    """A run that was late to notice this one, where locks lock nothing."""
    gone = tmp_path / "a" / "new"
    with pytest.raises(OutputLocked) as caught, hold(gone.parent, Reporter()), disk_errors(gone.parent):
        gone.replace(gone.with_name("journal"))
    assert caught.value.message == f"another run or program has removed {gone}; this run has stopped"
    assert caught.value.fix == "let that run finish, then run the same command again"
    with pytest.raises(UsageError, match="No such file"), hold(gone.parent, Reporter()), disk_errors(tmp_path):
        (tmp_path / "nowhere" / "file").touch()
    with pytest.raises(UsageError, match="No such file"), hold(gone.parent, Reporter()), disk_errors(tmp_path):
        (gone.parent / "owner").rename(tmp_path / "nowhere" / "owner")


def test_folder_that_vanishes_while_it_is_made_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, folder = os.mkdir, tmp_path / "a"

    def mkdir(path: Path, mode: int = 0o777) -> None:
        monkeypatch.setattr(os, "mkdir", real)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))

    monkeypatch.setattr(os, "mkdir", mkdir)
    with hold(folder, Reporter()):
        assert folder.is_dir()
    folder.write_text("a file")
    with pytest.raises(UsageError, match="cannot be written: File exists"):
        Claim(folder, folder, Reporter())


@pytest.mark.parametrize(
    "place", ["behind a link to nowhere", "in a folder of the system", "a lock that is such a link"]
)
def test_folder_that_never_comes_to_be_is_an_error(place: str, tmp_path: Path) -> None:
    """Found by a review: it was made again for ever."""
    (tmp_path / "link").symlink_to("/nowhere/at/all")
    folder = Path("/proc/nothing/a") if place == "in a folder of the system" else tmp_path / "link" / "a"
    if place == "a lock that is such a link":
        folder = tmp_path / "a"
        folder.mkdir()
        (folder / "lock").symlink_to("/nowhere/at/all")
    with pytest.raises(UsageError, match=r"cannot be written: (File exists|No such file)"):
        Claim(folder, tmp_path / "out", Reporter())


def test_lock_is_a_file_opened_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFSv4 refuses to lock anything else exclusively."""
    real = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with hold(tmp_path / "s", Reporter()):
        pass
    with new_folder(tmp_path / "out", Reporter()) as folder:
        (folder / "file").write_text("x")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


@pytest.mark.parametrize("replaced", [False, True])
def test_lock_is_recognised_where_inodes_change_at_every_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    """And one that its owner has removed meanwhile is not."""
    monkeypatch.setattr(os.path, "samestat", lambda one, other: False)
    if replaced:
        real, path = fcntl.flock, tmp_path / "a" / "lock"

        def flock(descriptor: int, operation: int) -> None:
            monkeypatch.setattr(fcntl, "flock", real)
            path.unlink()
            path.touch()
            real(descriptor, operation)

        monkeypatch.setattr(fcntl, "flock", flock)
    with closing(Claim(tmp_path / "a", tmp_path / "out", Reporter())), pytest.raises(OutputLocked):
        Claim(tmp_path / "a", tmp_path / "out", Reporter())


def test_new_folder_appears_when_it_is_done(tmp_path: Path) -> None:
    left = tmp_path / ".out.writing"
    left.mkdir()
    (left / "half").write_text("of a run that was killed, by an earlier version")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="stop"), new_folder(tmp_path / "out", Reporter()) as folder:
        raise ValueError("stop")
    with new_folder(tmp_path / "out", Reporter()) as folder:
        (folder / "file").write_text("x")
        assert list((tmp_path / "out").iterdir()) == []
        with pytest.raises(OutputLocked), new_folder(tmp_path / "out", Reporter()):
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]
    with pytest.raises(UsageError, match="already exists"), new_folder(tmp_path / "out", Reporter()):
        pass


def test_new_folder_of_another_run_is_never_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: None)
    writing = new_folder(tmp_path / "out", Reporter())
    folder = writing.__enter__()
    (folder / "file").write_text("x")
    second = Claim(tmp_path / ".out.writing", tmp_path / "out", Reporter())
    with pytest.raises(OutputLocked):
        writing.__exit__(None, None, None)
    assert not (tmp_path / "out").exists()
    assert (folder / "file").read_text() == "x"
    second.close()


FAILURES: list[OSError | SkillmergeError] = [
    FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)),
    OSError(errno.EIO, os.strerror(errno.EIO)),
    UsageError("cannot be written: No such file or directory"),
    ResourceError("the disk is full"),
    CheckFailed("other bytes"),
]


def fail(claim: Claim, failure: Exception, first: Callable[[], object] = lambda: None) -> None:
    """Fail while the claim's run works, after something has happened."""
    with claim.working():
        first()
        raise failure


STOPPED = "another run has taken over {}; this one has stopped and left it alone"


@pytest.mark.parametrize("gone", [False, True], ids=["the other works", "the other has finished"])
@pytest.mark.parametrize("failure", FAILURES, ids=str)
def test_whatever_fails_in_a_folder_that_another_run_took_fails_of_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, gone: bool
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: None)
    first = Claim(tmp_path / "a", tmp_path / "out", Reporter())
    second = Claim(tmp_path / "a", tmp_path / "out", Reporter())
    if gone:
        second.close()
    with pytest.raises(OutputLocked) as caught, closing(first):
        fail(first, failure)
    assert caught.value.message == STOPPED.format(tmp_path / "out")
    assert caught.value.fix == "let that run finish, or choose another folder with `--output`"
    assert caught.value.__context__ is failure
    if not gone:
        second.check()
        second.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", FAILURES, ids=str)
def test_what_fails_in_a_folder_of_ones_own_is_told_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    """Also after the folder is let go of, and where its owner cannot be read any more."""
    claim = Claim(tmp_path / "a", tmp_path / "out", Reporter())
    unreadable = partial(monkeypatch.setattr, Path, "read_bytes", lambda path: refuses(errno.EIO)(0, 0))
    for first in (lambda: None, unreadable, monkeypatch.undo, claim.close):
        with pytest.raises(type(failure)) as caught:
            fail(claim, failure, first)
        assert caught.value is failure


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE])
def test_owner_that_is_gone_is_another_runs_doing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """NFS says ESTALE of what another machine has removed."""
    with closing(Claim(tmp_path / "a", tmp_path / "out", Reporter())) as claim:
        monkeypatch.setattr(Path, "read_bytes", lambda path: refuses(number)(0, 0))
        with pytest.raises(OutputLocked):
            claim.check()
        monkeypatch.undo()


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EIO])
def test_folder_that_goes_while_it_is_taken_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """By a run that finishes at that moment; any other failure of the sync is told, and leaves nothing."""
    real, calls = claims.sync_folder, []

    def sync_folder(folder: Path) -> bool:
        calls.append(folder)
        if len(calls) == 1:
            refuses(number)(0, 0)
        return real(folder)

    monkeypatch.setattr(claims, "sync_folder", sync_folder)
    if number == errno.EIO:
        with pytest.raises(ResourceError, match="could not be written: Input/output error"):
            Claim(tmp_path / "a", tmp_path / "out", Reporter())
    else:
        with closing(Claim(tmp_path / "a", tmp_path / "out", Reporter())) as claim:
            claim.check()
        assert calls == [tmp_path / "a"] * 2
    assert list(tmp_path.iterdir()) == []


def test_new_folder_and_held_folder_that_another_run_took_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one is done and has removed it: what is missing now is no fault of the disk."""
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: None)

    def overtaken_while_held() -> None:
        with hold(tmp_path / "s", Reporter()):
            Claim(tmp_path / "s", tmp_path / "s", Reporter()).close()
            (tmp_path / "s" / "journal").write_text("mine")

    def overtaken_while_written() -> None:
        with new_folder(tmp_path / "out", Reporter()) as folder:
            with new_folder(tmp_path / "out", Reporter()) as others:
                (others / "file").write_text("the other's")
            (folder / "file").write_text("mine")

    with pytest.raises(OutputLocked, match=STOPPED.format(tmp_path / "s")):
        overtaken_while_held()
    with pytest.raises(OutputLocked, match=STOPPED.format(tmp_path / "out")):
        overtaken_while_written()
    assert {path.name: path.is_file() and path.read_text() for path in tmp_path.rglob("*")} == {
        "out": False, "file": "the other's",
    }  # fmt: skip
