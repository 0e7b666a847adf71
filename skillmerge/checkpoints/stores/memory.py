"""Files in memory, as a store; and checkpoints whose tensors are kept in memory."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence

from skillmerge.checkpoints.checkpoint import Checkpoint, Piece, View
from skillmerge.checkpoints.store import Stat, Wait, Where, nothing_to_wait_for
from skillmerge.errors import InputError, StalePlan
from skillmerge.tensors import DTYPES, UNIT
from skillmerge.threads import in_threads


class Memory:
    """Files in memory, by name. See `Store` for what its methods promise."""

    def __init__(self, contents: Mapping[str, bytes], place: str = "memory") -> None:
        """contents: may change, which is then noticed."""
        self.at = Where(place)
        self._contents = contents
        self._first_seen: dict[str, bytes] = {}

    def list(self) -> Mapping[str, Stat]:
        return {file: Stat(len(self._content(file)), (len(self._content(file)),)) for file in sorted(self._contents)}

    def read_small(self, file: str, limit: int) -> bytes:
        content = self._content(file)
        if len(content) > limit:
            raise InputError(f"{self.at.path(file)}: is not a regular file of acceptable size")
        return content

    def peek(self, file: str, start: int, count: int) -> bytes:
        self.check_unchanged([file])
        return self._content(file)[start : start + count]

    def read(self, file: str, start: int, into: memoryview) -> Wait:
        self.check_unchanged([file])
        into[:] = memoryview(self._content(file))[start : start + len(into)]
        return nothing_to_wait_for

    def hint(self, file: str, start: int, nbytes: int) -> None:
        """There is nothing to fetch."""

    def check_unchanged(self, files: Collection[str]) -> None:
        for file in files:
            if self._contents.get(file) is not self._content(file):
                raise StalePlan(f"{self.at.path(file)} changed while it was in use")

    def cancel(self) -> None:
        """Nothing is ever waited for."""

    def close(self) -> None:
        """Nothing is held that is not the caller's."""

    def _content(self, file: str) -> bytes:
        if file not in self._first_seen:
            if file not in self._contents:
                raise InputError(f"{self.at.path(file)}: is missing")
            self._first_seen[file] = self._contents[file]
        return self._first_seen[file]


class Held(View):
    """A checkpoint whose tensors are read once, here, and held."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint, checkpoint.tensors, checkpoint.files)
        self._held = {name: memoryview(bytearray(spec.nbytes)) for name, spec in checkpoint.tensors.items()}
        pieces = [
            Piece(name, first, min(UNIT, spec.elements - first), self._held[name], first * DTYPES[spec.dtype].itemsize)
            for name, spec in checkpoint.tensors.items()
            for first in range(0, spec.elements, UNIT)
        ]

        def read(piece: Piece, stop: threading.Event) -> None:
            if not stop.is_set():
                checkpoint.read([piece])()

        for _ in in_threads(read, pieces):
            pass

    def read(self, pieces: Sequence[Piece]) -> Wait:
        for piece in pieces:
            view, first = self.view(piece), piece.first * DTYPES[self.tensors[piece.tensor].dtype].itemsize
            view[:] = self._held[piece.tensor][first : first + len(view)]
        return nothing_to_wait_for

    def hint(self, tensor: str, first: int, count: int) -> None:
        """There is nothing to fetch."""

    def cost(self, tensor: str) -> int:
        return self._checkpoint.cost(tensor)
