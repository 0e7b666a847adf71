"""Read elements of one tensor into memory, as they are stored."""

from __future__ import annotations

import torch
from torch import Tensor

from skillmerge.bits import torch_dtype
from skillmerge.checkpoints.checkpoint import Checkpoint, read_bytes


def read_values(checkpoint: Checkpoint, name: str, first: int = 0, count: int | None = None) -> Tensor:
    """`count` elements of a tensor from element `first` on, flat; by default all of them."""
    dtype = torch_dtype(checkpoint.tensors[name].dtype)
    content = read_bytes(checkpoint, name, first, count)
    return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
