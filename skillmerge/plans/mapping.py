"""The sources of a tensor's elements in a model. Knows names and positions, not bytes, files or values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.model_config import tied_source
from skillmerge.tensors import TensorSpec


class Run(NamedTuple):
    """Elements first..last of one tensor of a model, `last` excluded."""

    model: str
    tensor: str
    first: int
    last: int


class Source(NamedTuple):
    """A whole tensor of a model. A pair, because most readers of a plan need the two names and nothing else."""

    model: str
    tensor: str

    def runs(self, first: int, last: int) -> Iterator[Run]:
        """Yield the runs that elements first..last of the output tensor are made of, in their order."""
        yield Run(self.model, self.tensor, first, last)


def find_source(spec: TensorSpec, model: str, checkpoint: Checkpoint) -> Source | None:
    """Return the tensor of `checkpoint` for `spec`: the one with its name, or the one that its config ties it to."""
    if spec.name in checkpoint.tensors:
        return Source(model, spec.name)
    tied = tied_source(spec.name, spec.shape, checkpoint.config, checkpoint.tensors)
    return Source(model, tied) if tied is not None else None
