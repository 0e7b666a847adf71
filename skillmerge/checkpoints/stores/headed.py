"""A store some of whose headers are known, which nobody has to ask a network for again."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from skillmerge.checkpoints.store import Stat, Store, Wait, Where


class Headed:
    """A store, and headers of files that cannot have changed: where such a file is looked at from its beginning, its
    header is all that is given. See `Store` for what the methods promise."""

    def __init__(self, store: Store, headers: Mapping[str, bytes]) -> None:
        self._store, self._headers = store, headers

    @property
    def at(self) -> Where:
        return self._store.at

    def list(self) -> Mapping[str, Stat]:
        return self._store.list()

    def read_small(self, file: str, limit: int) -> bytes:
        return self._store.read_small(file, limit)

    def peek(self, file: str, start: int, count: int) -> bytes:
        if start == 0 and file in self._headers:
            return self._headers[file][:count]
        return self._store.peek(file, start, count)

    def read(self, file: str, start: int, into: memoryview) -> Wait:
        return self._store.read(file, start, into)

    def hint(self, file: str, start: int, nbytes: int) -> None:
        self._store.hint(file, start, nbytes)

    def check_unchanged(self, files: Collection[str]) -> None:
        self._store.check_unchanged(files)

    def cancel(self) -> None:
        self._store.cancel()

    def close(self) -> None:
        self._store.close()
