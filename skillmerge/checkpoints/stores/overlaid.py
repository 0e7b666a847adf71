"""The files of a checkpoint, but for those that another place has instead: a model's with an adapter's tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from skillmerge.checkpoints.store import Stat, Store, Wait, Where


@dataclass(frozen=True, kw_only=True)
class _Both(Where):
    """The place of what is laid over, which knows where the other files are."""

    beneath: Where
    is_over: Callable[[str], bool] = field(compare=False)

    def path(self, file: str) -> str:
        return super().path(file) if self.is_over(file) else self.beneath.path(file)


class Overlaid:
    """A store beneath, and another one's files over it. See `Store` for its methods' promises.

    Whose stores they are closes them.
    """

    def __init__(self, store: Store, over: Store, is_over: Callable[[str], bool]) -> None:
        """is_over: which files are the other store's, by their names, whether it has them or not."""
        here, there = store.at, over.at
        self.at: Where = _Both(
            place=there.place, root=there.root, revision=there.revision, license=here.license,
            remote=here.remote or there.remote, doubt=there.doubt, beneath=here, is_over=is_over,
        )  # fmt: skip
        self._store, self._over, self._is_over = store, over, is_over

    def list(self) -> Mapping[str, Stat]:
        kept = {name: stat for name, stat in self._store.list().items() if not self._is_over(name)}
        over = {name: stat for name, stat in self._over.list().items() if self._is_over(name)}
        return dict(sorted({**kept, **over}.items()))

    def read_small(self, file: str, limit: int) -> bytes:
        return self._of(file).read_small(file, limit)

    def peek(self, file: str, start: int, count: int) -> bytes:
        return self._of(file).peek(file, start, count)

    def read(self, file: str, start: int, into: memoryview) -> Wait:
        return self._of(file).read(file, start, into)

    def hint(self, file: str, start: int, nbytes: int) -> None:
        self._of(file).hint(file, start, nbytes)

    def check_unchanged(self, files: Collection[str]) -> None:
        for store in (self._store, self._over):
            store.check_unchanged([file for file in files if self._of(file) is store])

    def cancel(self) -> None:
        self._store.cancel()
        self._over.cancel()

    def close(self) -> None:
        """The stores are somebody else's to close."""

    def _of(self, file: str) -> Store:
        return self._over if self._is_over(file) else self._store
