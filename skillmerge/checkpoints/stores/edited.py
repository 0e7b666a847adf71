"""The files of a checkpoint, some of which are other ones or hidden: no byte of a store is changed for that."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping

from skillmerge.checkpoints.store import Stat, Store, Wait
from skillmerge.errors import InputError


class Edited:
    """A store beneath, with the contents of small files that are written here. See `Store` for its methods' promises.

    Whose store it is closes it.
    """

    def __init__(self, store: Store, contents: Mapping[str, bytes], hidden: Callable[[str], bool]) -> None:
        self.at = store.at
        self._store, self._contents, self._hidden = store, contents, hidden

    def list(self) -> Mapping[str, Stat]:
        found = {name: stat for name, stat in self._store.list().items() if not self._hidden(name)}
        written = {
            name: Stat(len(content), (hashlib.sha256(content).hexdigest(),)) for name, content in self._contents.items()
        }
        return dict(sorted({**found, **written}.items()))

    def read_small(self, file: str, limit: int) -> bytes:
        content = self._contents.get(file)
        if content is None:
            self._refuse_hidden(file)
            return self._store.read_small(file, limit)
        if len(content) > limit:
            raise InputError(f"{self.at.path(file)}: is not a regular file of acceptable size")
        return content

    def peek(self, file: str, start: int, count: int) -> bytes:
        if file in self._contents:
            return self._contents[file][start : start + count]
        self._refuse_hidden(file)
        return self._store.peek(file, start, count)

    def read(self, file: str, start: int, into: memoryview) -> Wait:
        self._refuse_hidden(file)
        return self._store.read(file, start, into)

    def hint(self, file: str, start: int, nbytes: int) -> None:
        self._store.hint(file, start, nbytes)

    def check_unchanged(self, files: Collection[str]) -> None:
        self._store.check_unchanged([file for file in files if file not in self._contents])

    def cancel(self) -> None:
        self._store.cancel()

    def close(self) -> None:
        """The store beneath is somebody else's to close."""

    def _refuse_hidden(self, file: str) -> None:
        if self._hidden(file):
            raise InputError(f"{self.at.path(file)}: is missing")
