"""A folder that one run has for itself, on filesystems whose locks work, are refused, or lock nothing."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from skillmerge.claim import Claim, hold, new_folder
from skillmerge.errors import OutputLocked, ResourceError, UsageError
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
        f"the filesystem of {tmp_path / 's'} has no file locks ({os.strerror(number)}): a second run on it would stop "
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
        f"another run has taken {tmp_path / 'out'} over: this one has stopped, and left it alone"
    )
    first.close()
    second.check()
    second.close()
    assert list(tmp_path.iterdir()) == []


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
    with pytest.raises(UsageError, match="exists already"), new_folder(tmp_path / "out", Reporter()):
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
