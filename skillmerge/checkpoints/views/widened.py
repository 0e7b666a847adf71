"""A checkpoint some of whose tensors are read in a wider dtype, which holds their elements exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from skillmerge.checkpoints.checkpoint import Checkpoint, Piece, View
from skillmerge.checkpoints.store import Wait
from skillmerge.tensors import DTYPES


class Widened(View):
    def __init__(self, checkpoint: Checkpoint, dtypes: Mapping[str, str]) -> None:
        """dtypes: of the tensors that have another one here."""
        tensors = {
            name: replace(spec, dtype=dtypes[name]) if name in dtypes else spec
            for name, spec in checkpoint.tensors.items()
        }
        super().__init__(checkpoint, tensors, checkpoint.files)
        self._dtypes = dtypes

    def read(self, pieces: Sequence[Piece]) -> Wait:
        narrow: list[tuple[Piece, bytearray]] = []
        wanted: list[Piece] = []
        for piece in pieces:
            if piece.tensor not in self._dtypes:
                wanted.append(piece)
                continue
            stored = DTYPES[self._checkpoint.tensors[piece.tensor].dtype]
            narrow.append((piece, bytearray(piece.count * stored.itemsize)))
            wanted.append(Piece(piece.tensor, piece.first, piece.count, memoryview(narrow[-1][1])))
        wait = self._checkpoint.read(wanted)
        if not narrow:
            return wait

        def finish() -> None:
            wait()
            for piece, content in narrow:
                if piece.count:
                    self._widen(piece, content)

        return finish

    def _widen(self, piece: Piece, content: bytearray) -> None:
        import torch

        from skillmerge.bits import torch_dtype

        stored = torch.frombuffer(content, dtype=torch_dtype(self._checkpoint.tensors[piece.tensor].dtype))
        torch.frombuffer(self.view(piece), dtype=torch_dtype(self.tensors[piece.tensor].dtype)).copy_(stored)

    def hint(self, tensor: str, first: int, count: int) -> None:
        self._checkpoint.hint(tensor, first, count)

    def cost(self, tensor: str) -> int:
        return self._checkpoint.cost(tensor)


def common_dtype(dtypes: set[str]) -> str:
    """Return the narrowest floating-point dtype that holds the numbers of all of these."""
    widest = max(dtypes, key=lambda it: DTYPES[it].itemsize)
    return "F32" if dtypes == {"BF16", "F16"} else widest
