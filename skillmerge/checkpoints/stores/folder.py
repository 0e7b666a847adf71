"""The files of a checkpoint in a local folder.

Names stay inside the folder, links do not lead out (but for the Hub cache's own layout). Weights are only ever
read with `preadv` into buffers that the caller owns; nothing is mapped.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from skillmerge.checkpoints.safetensors import opened, read_range
from skillmerge.checkpoints.store import Stat, Wait, Where, license_in, nothing_to_wait_for
from skillmerge.errors import InputError, ResourceError, StalePlan, is_machine, unreadable, unusable

_MAX_DEPTH = 2
"""Depth of folders in which side files are searched."""


class FileIdentity(NamedTuple):
    """Return the version of a local file, which shows changes without rereading it.

    Not its inode: some FUSE filesystems have another number for it at every look.
    """

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        return cls(status.st_size, status.st_mtime_ns)


class Folder:
    """A folder on this machine. See `Store` for what its methods promise."""

    def __init__(self, root: Path, *, follow_links: bool = False, revision: str | None = None, doubt: str = "") -> None:
        self.root = root
        self._follow_links, self._revision, self._doubt = follow_links, revision, doubt
        self._inside: set[str] = set()
        self._first_seen: dict[str, FileIdentity] = {}
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    @cached_property
    def at(self) -> Where:
        return Where(str(self.root), self.root, self._revision, _license(self.root / "README.md"), doubt=self._doubt)

    @cached_property
    def _listed(self) -> dict[str, Stat]:
        found: dict[str, Stat] = {}
        for name in _names(self.root):
            try:
                identity = self._first_seen[name] = FileIdentity.of(os.stat(self.root / name))
                found[name] = Stat(identity.size, tuple(identity))
            except OSError:  # a broken link: reading it raises
                found[name] = Stat(0, ())
        return found

    def list(self) -> Mapping[str, Stat]:
        return self._listed

    def read_small(self, file: str, limit: int) -> bytes:
        path = resolve_inside(self.root, file, self._follow_links)
        try:
            if not path.is_file() or path.stat().st_size > limit:
                raise InputError(f"{self.root / file}: is not a regular file of acceptable size")
            return path.read_bytes()
        except OSError as error:
            raise unreadable(self.root / file, error) from error

    def peek(self, file: str, start: int, count: int) -> bytes:
        self._check_inside(file)
        with opened(str(self.root / file)) as (descriptor, status):
            if self._first_seen.setdefault(file, FileIdentity.of(status)) != FileIdentity.of(status):
                raise self._changed(file)
            return read_range(descriptor, start, count)

    def read(self, file: str, start: int, into: memoryview) -> Wait:
        """Reads at once: there is nothing to wait for."""
        descriptor = self._descriptor(file)
        while into:
            try:
                count = os.preadv(descriptor, [into], start)
            except OSError as error:
                raise unreadable(self.root / file, error) from error
            if count == 0:
                raise self._changed(file)
            start += count
            into = into[count:]
        return nothing_to_wait_for

    def hint(self, file: str, start: int, nbytes: int) -> None:
        descriptor = self._descriptor(file)
        with suppress(AttributeError, OSError):
            os.posix_fadvise(descriptor, start, nbytes, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self, files: Collection[str]) -> None:
        for file in files:
            try:
                identity = FileIdentity.of((self.root / file).stat())
            except OSError as error:
                if is_machine(error):
                    raise unusable(str(self.root / file), error) from error
                identity = None
            if identity != self._first_seen[file]:
                raise self._changed(file)

    def cancel(self) -> None:
        """Nothing is ever waited for."""

    def close(self) -> None:
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def _check_inside(self, file: str) -> None:
        if file not in self._inside:
            resolve_inside(self.root, file, self._follow_links)
            self._inside.add(file)

    def _descriptor(self, file: str) -> int:
        if (found := self._descriptors.get(file)) is not None:
            return found
        with self._lock:
            if file not in self._descriptors:
                self._check_inside(file)
                try:
                    descriptor = os.open(self.root / file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                except OSError as error:
                    if error.errno in (errno.EMFILE, errno.ENFILE):
                        raise ResourceError(
                            f"{self.root / file}: too many files are open", fix="raise the limit: ulimit -n 4096"
                        ) from error
                    if is_machine(error):
                        raise unusable(str(self.root / file), error) from error
                    raise self._changed(file) from error
                identity = FileIdentity.of(os.fstat(descriptor))
                if self._first_seen.setdefault(file, identity) != identity:
                    os.close(descriptor)
                    raise self._changed(file)
                self._descriptors[file] = descriptor
            return self._descriptors[file]

    def _changed(self, file: str) -> StalePlan:
        return StalePlan(
            f"{self.root / file} changed while it was in use",
            fix="stop everything that writes to the inputs, then rerun",
        )


def _names(root: Path) -> list[str]:
    """Return every file below a folder, sorted. Raises InputError if it is none."""
    try:
        os.listdir(root)
    except OSError as error:
        what = {errno.ENOENT: "does not exist", errno.ENOTDIR: "is not a folder"}.get(error.errno or 0)
        raise InputError(
            f"{root} {what or f'cannot be opened: {error.strerror}'}",
            fix="a model is a folder with *.safetensors and config.json",
        ) from error
    names = []
    for folder, folders, files in os.walk(root):
        inside = Path(folder).relative_to(root)
        if len(inside.parts) == _MAX_DEPTH:
            folders.clear()
        # A folder in a file's place is named too, to be refused when it is read.
        odd = [name for name in folders if name.endswith((".json", ".safetensors"))]
        names += [(inside / name).as_posix() for name in (*files, *odd)]
    return sorted(names)


def _license(card: Path) -> str | None:
    """Return the license from the metadata of a model card."""
    try:
        if not card.is_file():  # opening a FIFO would block
            return None
        with open(card, encoding="utf-8") as stream:
            head = stream.read(1 << 16)
    except (OSError, UnicodeDecodeError):
        return None
    return license_in(head)


def resolve_inside(root: Path, name: str, follow_links: bool) -> Path:
    """Return the path of `name` in `root`, with every link followed. Raises InputError if it leads out.

    The Hub cache's layout is allowed: `snapshots/<commit>/…` pointing to `blobs/…` of the same repository.
    """
    path = root / name
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{path}: is missing or a broken link", fix="the checkpoint is incomplete: fetch it again"
        ) from error
    home = root.resolve()
    if follow_links or target.is_relative_to(home):
        return target
    for folder in (home, *home.parents):
        if folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs":
            return target
    raise InputError(
        f"{path}: is a link that leaves its folder, to {target}",
        fix="if you trust it, pass `--follow-links`",
    )
