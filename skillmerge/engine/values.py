"""Stored elements in memory, as they are: for whoever wants one tensor and no stream of tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from skillmerge.bits import torch_dtype
from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.tensors import DTYPES


def read_values(checkpoint: Checkpoint, name: str, first: int = 0, count: int | None = None) -> Tensor:
    """`count` elements of a tensor from element `first` on, flat; by default all of them."""
    spec = checkpoint.tensors[name]
    count, size = spec.elements if count is None else count, DTYPES[spec.dtype].itemsize
    if not count:
        return torch.empty(0, dtype=torch_dtype(spec.dtype))
    content = bytearray(count * size)
    checkpoint.read_into(spec, first * size, memoryview(content))
    return torch.frombuffer(content, dtype=torch_dtype(spec.dtype))
