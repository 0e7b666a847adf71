"""Low-rank approximations of matrices: the truncated singular value decomposition, exact or randomised, seeded.

Halko, Martinsson and Tropp 2011 (arXiv 0909.4061), with power iterations; where the rank asked for is near the
matrix's own the exact decomposition is cheaper, and is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

_OVERSAMPLE, _ITERATIONS = 10, 6


def truncated_svd(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [rows, k], S [k] falling, V [columns, k] of the best approximation of rank k = min(rank, rows, columns).

    Works in the matrix's dtype (float32 or float64). The same seed gives the same result on one machine.
    """
    rows, columns = matrix.shape
    rank = min(rank, rows, columns)
    width = rank + _OVERSAMPLE
    if width >= min(rows, columns) // 2:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank].T
    generator = torch.Generator().manual_seed(seed)
    basis = matrix @ torch.randn(columns, width, generator=generator, dtype=matrix.dtype)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(basis).Q
        basis = matrix @ torch.linalg.qr(matrix.T @ basis).Q
    basis = torch.linalg.qr(basis).Q
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vh[:rank].T
