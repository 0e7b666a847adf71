"""A checkpoint whose weights are held in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.store import Files
from skillmerge.threads import in_threads

_PIECE = 16 << 20


class HeldFiles:
    """The weights of a checkpoint in memory; everything else is asked of its files."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._files: Files = checkpoint.files
        self._held = {file: bytearray() for file in checkpoint.shards}
        for spec in checkpoint.tensors.values():
            held = self._held[spec.file]
            held.extend(bytes(max(0, spec.end - len(held))))
        pieces = [
            (spec.file, start, min(start + _PIECE, spec.end))
            for spec in checkpoint.tensors.values()
            for start in range(spec.start, spec.end, _PIECE)
        ]

        def read(piece: tuple[str, int, int], stop: threading.Event) -> None:
            file, start, end = piece
            if not stop.is_set():
                self._files.begin(file, start, memoryview(self._held[file])[start:end])()

        for _ in in_threads(read, pieces):
            pass

    def begin(self, name: str, position: int, buffer: memoryview) -> Callable[[], None]:
        buffer[:] = memoryview(self._held[name])[position : position + len(buffer)]
        return _nothing

    def announce(self, name: str, position: int, nbytes: int) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)


def _nothing() -> None:
    pass
