"""The small files of several models: each content is fetched and parsed once, whichever models hold it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from skillmerge.checkpoints.foreign import disguised
from skillmerge.checkpoints.store import Store, digest_of
from skillmerge.errors import InputError

MAX_BYTES = 64 << 20
"""Vocabularies of 260,000 tokens take 35 MB."""

MOST_FETCHED = 5
"""Most files of a remote model that are fetched for the comparison."""

T = TypeVar("T")


class SmallFiles:
    """What the small files of models hold, by their digests: what the donor has as well is the same object."""

    def __init__(self) -> None:
        self._parsed: dict[tuple[Callable[[bytes], Any], tuple[str, str]], Any] = {}
        self._fetched: dict[str, int] = {}
        self._by_path: dict[tuple[Callable[[bytes], Any], str, tuple[int | str, ...]], tuple[str, str]] = {}
        self.pointers: set[str] = set()
        """Files that are pointers to what was never fetched."""

    def read(self, store: Store, file: str, parse: Callable[[bytes], T]) -> T | None:
        """Return what `parse` makes of a file; None if it is not there, or as many were fetched as may be.

        Raises InputError if it is too large, a pointer, or `parse` raises ValueError; StalePlan, TemporaryError.
        """
        stat, path = store.list().get(file), store.at.path(file)
        if stat is None:
            return None
        digest = stat.digest or self._by_path.get((parse, path, stat.version))
        if digest is not None and (parse, digest) in self._parsed:
            return self._known(parse, digest)
        if stat.size > MAX_BYTES:
            raise InputError(f"{path}: is larger than {MAX_BYTES >> 20} MB")
        if store.at.remote and self._fetched.get(store.at.place, 0) >= MOST_FETCHED:
            return None
        self._fetched[store.at.place] = self._fetched.get(store.at.place, 0) + 1
        content = store.read_small(file, MAX_BYTES)
        if (known := disguised(content[:32], text=True)) is not None:
            self.pointers.add(path)
            raise InputError(f"{path}: {known[0]}", fix=known[1])
        digests = [digest_of(kind, content) for kind in ("sha256", "git_sha1")]
        if (parse, digests[0]) not in self._parsed:
            try:
                self._parsed |= dict.fromkeys([(parse, digest) for digest in digests], parse(content))
            except (ValueError, RecursionError) as error:
                reason = "nested too deeply" if isinstance(error, RecursionError) else error
                raise InputError(f"{path}: cannot be read: {reason}") from error
        self._by_path[parse, path, stat.version] = digests[0]
        return self._known(parse, digests[0])

    def _known(self, parse: Callable[[bytes], T], digest: tuple[str, str]) -> T:
        found: T = self._parsed[parse, digest]
        return found
