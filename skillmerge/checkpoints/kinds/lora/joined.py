"""An adapter as its share of another one, in which the matrices of several adapters stand side by side.

    A' = [A1; A2; …]    B' = [f1 B1 | f2 B2 | …]    so that B' A' = f1 B1 A1 + f2 B2 A2 + …

Every tensor here has the shape that it has in the output. Where another adapter's matrices stand, it holds -0: added
to any number it changes nothing, the sign of a zero included. Elements are float64, factors multiplied in, so that
the only rounding is that of the output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from skillmerge.checkpoints.checkpoint import Piece, View
from skillmerge.checkpoints.kinds.lora.adapter import Adapter
from skillmerge.checkpoints.store import Wait, nothing_to_wait_for
from skillmerge.tensors import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from skillmerge.checkpoints.views.low_rank import Matrices


@dataclass(frozen=True, slots=True)
class Block:
    """A stored tensor's place in one of the output: a matrix of `rows`, of which it fills columns from `at` on.

    factor: what it is multiplied by.
    """

    stored: StoredTensor
    rows: int
    at: int = 0
    factor: float = 1.0

    @property
    def width(self) -> int:
        """How many columns it fills."""
        return self.stored.elements // self.rows


class Joined(View):
    """An adapter's share of the output's tensors, by the output's names."""

    def __init__(self, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], blocks: Mapping[str, Block]) -> None:
        """shapes, blocks: of the tensors that it has a share in."""
        tensors = {name: TensorSpec(name, "F64", shapes[name], adapter.file) for name in blocks}
        file = replace(adapter.files[adapter.file], tensors=tuple(tensors))
        super().__init__(adapter, tensors, {adapter.file: file})
        self.adapter, self._blocks, self.trained_on = adapter, blocks, adapter.lora.base

    @cached_property
    def _matrices(self) -> Matrices:
        from skillmerge.checkpoints.views.low_rank import Matrices

        return Matrices(self.adapter)

    def read(self, pieces: Sequence[Piece]) -> Wait:
        """Reads at once: there is nothing to wait for."""
        for piece in pieces:
            self._fill(piece)
        return nothing_to_wait_for

    def hint(self, tensor: str, first: int, count: int) -> None:
        """Matrices are small."""

    def cost(self, tensor: str) -> int:
        return self._blocks[tensor].stored.nbytes

    def costs(self, tensor: str) -> Mapping[str, int]:
        return {self.adapter.file: self.cost(tensor)}

    def _fill(self, piece: Piece) -> None:
        import torch

        from skillmerge.checkpoints.views.low_rank import areas

        block = self._blocks[piece.tensor]
        out = torch.frombuffer(self.view(piece), dtype=torch.float64)
        for area in areas(piece.first, piece.count, block.rows, self.tensors[piece.tensor].elements // block.rows):
            part = torch.full(area.shape, -0.0, dtype=torch.float64)
            # Whole rows, or a part of one: either way its own elements follow each other.
            left, right = max(area.columns.start, block.at), min(area.columns.stop, block.at + block.width)
            if left < right:
                height = area.shape[0]
                first = area.rows.start * block.width + left - block.at
                own = self._matrices.stored(block.stored, first, (height - 1) * block.width + right - left)
                here = slice(left - area.columns.start, right - area.columns.start)
                part[:, here] = own.to(torch.float64).view(height, right - left) * block.factor
            out[area.start : area.start + area.count] = part.view(-1)[area.inside]
