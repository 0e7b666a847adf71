"""What a full, odd or broken disk means."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from skillmerge.durable import disk_errors, remove_tree, rename_folder, sync_folder, write_whole
from skillmerge.errors import ResourceError, SkillmergeError, UsageError

# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, ResourceError),
        (errno.EDQUOT, ResourceError),
        (errno.EIO, ResourceError),
        (errno.EACCES, UsageError),
        (errno.EPERM, UsageError),
        (errno.EROFS, UsageError),
        (errno.ENOTDIR, UsageError),
        (errno.ENAMETOOLONG, UsageError),
    ],
    ids=lambda value: errno.errorcode.get(value, "") if isinstance(value, int) else "",
)
def test_disk_error_says_where_and_what_to_do(number: int, kind: type[SkillmergeError]) -> None:
    with pytest.raises(kind, match="some/file") as caught, disk_errors(Path("some/file")):
        raise OSError(number, os.strerror(number))
    assert caught.value.fix


@pytest.mark.parametrize(
    ("number", "message", "fix"),
    [
        (errno.EDQUOT, "the disk quota is used up: some/file could not be written", "free disk space"),
        (errno.EFBIG, "some/file could not be written: no file may be that large here", "`output.shard_size`"),
        (errno.EXDEV, "some/file cannot be written: Invalid cross-device link", "choose another folder"),
        (errno.ESTALE, "some/file could not be written: Stale file handle", "`skillmerge doctor some`"),
    ],
    ids=["quota", "file size", "lower layer of an overlay", "NFS"],
)
def test_odd_disks_are_told_in_words(number: int, message: str, fix: str) -> None:
    with pytest.raises(SkillmergeError) as caught, disk_errors(Path("some/file")):
        raise OSError(number, os.strerror(number))
    assert caught.value.message == message
    assert fix in str(caught.value.fix)


# -------------------------------------------------------------------------------------------------- odd filesystems


def refuse(monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    def refused(*arguments: object, **named: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refused)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.EACCES])
def test_folder_that_cannot_be_synced_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    assert sync_folder(tmp_path)
    refuse(monkeypatch, "fsync", number)
    assert not sync_folder(tmp_path)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_sync_that_fails_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    refuse(monkeypatch, "fsync", number)
    with pytest.raises(OSError, match=os.strerror(number)):
        sync_folder(tmp_path)
    with pytest.raises(OSError, match=os.strerror(number)):
        write_whole(tmp_path / "file", b"x")


def test_empty_folder_is_replaced_where_rename_refuses_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.rename

    def rename(old: str, new: str, **named: object) -> None:
        if os.path.lexists(new):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        real(old, new)

    monkeypatch.setattr(os, "rename", rename)
    (tmp_path / "new" / "inside").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    rename_folder(tmp_path / "new", tmp_path / "out")
    assert (tmp_path / "out" / "inside").is_dir()
    (tmp_path / "other").mkdir()
    with pytest.raises(OSError, match="File exists"):
        rename_folder(tmp_path / "other", tmp_path / "out")
    assert (tmp_path / "out" / "inside").is_dir()


def test_tree_is_removed_where_inodes_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`shutil.rmtree` gives up there; links are removed, and not followed."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").touch()
    folder = tmp_path / "a"
    (folder / "b" / "c").mkdir(parents=True)
    (folder / "b" / "file").touch()
    (folder / "link").symlink_to(tmp_path / "outside")
    monkeypatch.setattr(os.path, "samestat", lambda one, other: False)
    with pytest.raises(OSError):  # noqa: PT011 - what Python says differs by version
        shutil.rmtree(folder)
    remove_tree(folder)
    remove_tree(folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["outside", "precious"]
