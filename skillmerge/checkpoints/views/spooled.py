"""Checkpoints over a network, some of whose tensors are kept on this disk while they are read again."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from skillmerge.checkpoints.checkpoint import Checkpoint, Piece, View
from skillmerge.checkpoints.store import Wait
from skillmerge.durable import disk_errors
from skillmerge.tensors import DTYPES


class Spool:
    """A nameless file with room for tensors, which is used again when they are forgotten. Its space is given back when
    it is closed, and when the process dies."""

    def __init__(self, folder: Path) -> None:
        """folder: on whose disk it is. Raises ResourceError, UsageError."""
        self.folder = folder
        with disk_errors(folder):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`
        self._end = 0
        self._free: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def room(self, size: int) -> int:
        """Return where `size` bytes may go."""
        with self._lock:
            for index, (start, free) in enumerate(self._free):
                if free >= size:
                    self._free[index] = (start + size, free - size)
                    return start
            self._end += size
            return self._end - size

    def give_back(self, start: int, size: int) -> None:
        with self._lock:
            self._free = [(at, free) for at, free in self._free if free] + [(start, size)]

    def write(self, data: memoryview, at: int) -> None:
        with disk_errors(self.folder):
            while data:
                count = os.pwrite(self._file.fileno(), data, at)
                data, at = data[count:], at + count

    def read(self, into: memoryview, at: int) -> None:
        with disk_errors(self.folder):
            while into:
                if not (count := os.preadv(self._file.fileno(), [into], at)):
                    raise OSError(f"{self.folder}: what was spooled is gone")
                into, at = into[count:], at + count

    def close(self) -> None:
        self._file.close()


class _Kept:
    """One tensor in a spool, and the elements of it that are there."""

    def __init__(self, start: int, size: int) -> None:
        self.start, self.size = start, size
        self.runs: list[tuple[int, int]] = []

    def holds(self, first: int, last: int) -> bool:
        return any(start <= first and last <= stop for start, stop in self.runs)

    def add(self, first: int, last: int) -> None:
        runs: list[tuple[int, int]] = []
        for start, stop in sorted([*self.runs, (first, last)]):
            if runs and start <= runs[-1][1]:
                runs[-1] = (runs[-1][0], max(runs[-1][1], stop))
            else:
                runs.append((start, stop))
        self.runs = runs


class Spooled(View):
    """A checkpoint of which some tensors are read over the network once, and then from a spool, until `forget` was
    called as often as `tensors` says: one may be read for several tensors of the output."""

    def __init__(self, checkpoint: Checkpoint, tensors: Mapping[str, int], spool: Spool) -> None:
        super().__init__(checkpoint, checkpoint.tensors, checkpoint.files)
        self._left, self._spool = dict(tensors), spool
        self._kept: dict[str, _Kept] = {}
        self._lock = threading.Lock()

    def read(self, pieces: Sequence[Piece]) -> Wait:
        here: list[Piece] = []
        far: list[Piece] = []
        for piece in pieces:
            (here if self._holds(piece) else far).append(piece)
        wait = self._checkpoint.read(far) if far else None

        def wait_and_keep() -> None:
            for piece in here:
                self._spool.read(self.view(piece), self._place(piece))
            if wait is not None:
                wait()
                for piece in far:
                    self._keep(piece)

        return wait_and_keep

    def hint(self, tensor: str, first: int, count: int) -> None:
        if tensor not in self._left:
            self._checkpoint.hint(tensor, first, count)

    def cost(self, tensor: str) -> int:
        return self._checkpoint.cost(tensor)

    def forget(self, tensor: str) -> None:
        """Give back the room of a tensor, if it is not read again for another one of the output."""
        with self._lock:
            self._left[tensor] -= 1
            kept = self._kept.pop(tensor, None) if not self._left[tensor] else None
        if kept is not None:
            self._spool.give_back(kept.start, kept.size)

    def _holds(self, piece: Piece) -> bool:
        with self._lock:
            kept = self._kept.get(piece.tensor)
            return kept is not None and kept.holds(piece.first, piece.first + piece.count)

    def _place(self, piece: Piece) -> int:
        itemsize = DTYPES[self.tensors[piece.tensor].dtype].itemsize
        return self._kept[piece.tensor].start + piece.first * itemsize

    def _keep(self, piece: Piece) -> None:
        if piece.tensor not in self._left:
            return
        with self._lock:
            if piece.tensor not in self._kept:
                size = self.tensors[piece.tensor].nbytes
                self._kept[piece.tensor] = _Kept(self._spool.room(size), size)
        self._spool.write(self.view(piece), self._place(piece))
        with self._lock:
            self._kept[piece.tensor].add(piece.first, piece.first + piece.count)


def spooled(
    checkpoints: Mapping[str, Checkpoint], again: Mapping[str, Mapping[str, int]], folder: Path
) -> tuple[dict[str, Checkpoint], Spool | None]:
    """Return the checkpoints with those over a network spooled, and the spool to close, if there is one.

    again: the tensors of each model that are read more than once, and for how many tensors of the output. folder: on
    whose disk they are kept.
    """
    far = {name: tensors for name, tensors in again.items() if checkpoints[name].at.remote}
    if not far:
        return dict(checkpoints), None
    spool = Spool(folder)
    found = {name: Spooled(it, far[name], spool) if name in far else it for name, it in checkpoints.items()}
    return found, spool
