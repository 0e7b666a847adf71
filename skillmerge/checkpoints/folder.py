"""The files of a checkpoint in a local folder.

Names stay inside the folder, links do not lead out (but for the Hub cache's own layout). Weights are only ever
read with `preadv` into buffers that the caller owns; nothing is mapped.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from skillmerge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from skillmerge.checkpoints.safetensors import FileIdentity, Header, read_header
from skillmerge.errors import InputError, ResourceError, StalePlan

_MAX_DEPTH = 2
"""How many folders deep side files are looked for."""


class Folder:
    """A folder on this machine; see `checkpoint.Files` for what its methods promise."""

    def __init__(self, root: Path, *, follow_links: bool = False, revision: str | None = None) -> None:
        self.root: Path = root
        self.place = str(root)
        self.revision = revision
        self.remote = False
        self.follow_links = follow_links
        self._headers: dict[str, Header] = {}
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def license(self) -> str | None:
        """From the first lines of the model card: its metadata."""
        try:
            with open(self.root / "README.md", encoding="utf-8") as card:
                head = card.read(1 << 16)
        except (OSError, UnicodeDecodeError):
            return None
        metadata = re.match(r"---\n(.*?)\n---", head, re.DOTALL)
        found = re.search(r"^license: *['\"]?([\w.-]+)", metadata[1], re.MULTILINE) if metadata else None
        return found[1] if found else None

    def names(self) -> list[str]:
        try:
            os.listdir(self.root)
        except OSError as error:
            what = {errno.ENOENT: "does not exist", errno.ENOTDIR: "is not a folder"}.get(error.errno or 0)
            raise InputError(
                f"{self.root} {what or f'cannot be opened: {error.strerror}'}",
                fix="a model is a folder with *.safetensors and config.json",
            ) from error
        names = []
        for folder, folders, files in os.walk(self.root):
            inside = Path(folder).relative_to(self.root)
            if len(inside.parts) == _MAX_DEPTH:
                folders.clear()
            # A folder in a file's place is named too, to be refused when it is read.
            odd = [name for name in folders if name.endswith((".json", ".safetensors"))]
            names += [(inside / name).as_posix() for name in (*files, *odd)]
        return sorted(names)

    def path(self, name: str) -> str:
        return str(self.root / name)

    def read(self, name: str, limit: int) -> bytes:
        path = resolve_inside(self.root, name, self.follow_links)
        try:
            if not path.is_file() or path.stat().st_size > limit:
                raise InputError(f"{self.root / name}: is not a file of sane size")
            return path.read_bytes()
        except OSError as error:
            raise InputError(f"{self.root / name}: cannot be read: {error.strerror}") from error

    def headers(self, names: Sequence[str], sizes: Mapping[str, int]) -> list[Header]:
        for name in names:
            resolve_inside(self.root, name, self.follow_links)
        with ThreadPoolExecutor(min(8, len(names))) as pool:
            headers = list(pool.map(lambda name: read_header(str(self.root / name), name), names))
        self._headers |= dict(zip(names, headers, strict=True))
        return headers

    def begin(self, name: str, position: int, buffer: memoryview) -> Callable[[], None]:
        """Reads at once: there is nothing to wait for."""
        descriptor = self._descriptor(name)
        while buffer:
            try:
                count = os.preadv(descriptor, [buffer], position)
            except OSError as error:
                raise InputError(f"{self.root / name}: cannot be read: {error.strerror}") from error
            if count == 0:
                raise self._changed(name)
            position += count
            buffer = buffer[count:]
        return _nothing

    def announce(self, name: str, position: int, nbytes: int) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor(name), position, nbytes, os.POSIX_FADV_WILLNEED)

    def version(self, name: str) -> list[int | str]:
        identity = FileIdentity(*self._headers[name].identity)  # type: ignore[arg-type]
        return [identity.size, identity.mtime_ns]

    def known_digest(self, name: str) -> tuple[int, tuple[str, str]] | None:
        return None

    def check_unchanged(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                identity = FileIdentity.of((self.root / name).stat())
            except OSError:
                identity = None
            if identity != self._headers[name].identity:
                raise self._changed(name)

    def cancel(self) -> None:
        """Nothing is ever waited for."""

    def close(self) -> None:
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def _descriptor(self, name: str) -> int:
        if (found := self._descriptors.get(name)) is not None:
            return found
        with self._lock:
            if name not in self._descriptors:
                try:
                    descriptor = os.open(self.root / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                except OSError as error:
                    if error.errno in (errno.EMFILE, errno.ENFILE):
                        raise ResourceError(
                            f"{self.root / name}: too many files are open", fix="raise the limit: ulimit -n 4096"
                        ) from error
                    raise self._changed(name) from error
                if FileIdentity.of(os.fstat(descriptor)) != self._headers[name].identity:
                    os.close(descriptor)
                    raise self._changed(name)
                self._descriptors[name] = descriptor
            return self._descriptors[name]

    def _changed(self, name: str) -> StalePlan:
        return StalePlan(
            f"{self.root / name} changed while it was in use",
            fix="make sure that nothing writes to the inputs, then run the same command again",
        )


def _nothing() -> None:
    pass


def open_folder(uri: str, root: Path, *, follow_links: bool = False) -> Checkpoint:
    """Open the checkpoint in folder `root`. Raises InputError as `open_checkpoint` does."""
    return open_checkpoint(uri, Folder(root, follow_links=follow_links))


def resolve_inside(root: Path, name: str, follow_links: bool) -> Path:
    """The path of `name` in `root`, with every link followed. Raises InputError where it leads out.

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
        fix="if you trust it, allow it with --follow-links",
    )
