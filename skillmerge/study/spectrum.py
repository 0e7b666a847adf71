"""Low-rank approximations of matrices: the truncated singular value decomposition, exact or randomized, seeded.

Halko, Martinsson and Tropp 2011 (arXiv 0909.4061), with power iterations; where the rank asked for is near the
matrix's own the exact decomposition is cheaper, and is taken.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from skillmerge.engine.values import read_values
from skillmerge.errors import UsageError
from skillmerge.plans.plan import TensorPlan
from skillmerge.reporter import Reporter
from skillmerge.study.subjects import Subject
from skillmerge.threads import in_threads

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def measure_spectra(
    subject: Subject, tasks: Sequence[TensorPlan], rank: int, reporter: Reporter
) -> dict[str, dict[str, float | None]]:
    """Measure every matrix, one at a time, in float32, or in float64 if a model has it.

    Runs in a thread of its own, which the caller's torch settings (default device, autocast) do not reach.
    """
    import torch

    def settle() -> None:
        torch.set_flush_denormal(False)

    measured = in_threads(lambda task, stop: _measure(subject, tasks, rank, reporter, stop), [None], settle)
    return next(iter(measured))


def _measure(
    subject: Subject, tasks: Sequence[TensorPlan], rank: int, reporter: Reporter, stop: threading.Event
) -> dict[str, dict[str, float | None]]:
    import torch

    def read(model: str, source: str, wide: torch.dtype) -> Tensor:
        checkpoint = subject.checkpoints[model]
        return read_values(checkpoint, source).view(checkpoint.tensors[source].shape).to(wide)

    matrices = [task for task in tasks if len(task.shape) == 2 and min(task.shape) > 1]
    spectra = {}
    with reporter.bar(sum(math.prod(task.shape) for task in matrices)) as progress:
        done = 0
        for task in matrices:
            if stop.is_set():
                break
            sources = dict(task.sources)
            dtypes = {subject.checkpoints[model].tensors[source].dtype for model, source in task.sources}
            wide = torch.float64 if "F64" in dtypes else torch.float32
            update = torch.zeros(task.shape, dtype=wide)
            for model, factor in subject.factors(task.name).items():
                update.add_(read(model, sources[model], wide), alpha=factor)
            against = read(subject.against, sources[subject.against], wide) if subject.against else None
            if not all(bool(matrix.isfinite().all()) for matrix in (update, against) if matrix is not None):
                raise UsageError(
                    f"--spectral: tensor `{task.name}` is too large for {str(wide).removeprefix('torch.')}",
                    fix="leave `--spectral` out",
                )
            spectra[task.name] = describe_spectrum(update, against, rank, zlib.crc32(task.name.encode()))
            done += math.prod(task.shape)
            progress(done)
    return spectra


_OVERSAMPLE, _ITERATIONS = 10, 6
_LARGE = 1e12


def truncated_svd(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [rows, k], S [k] falling, V [columns, k] of the best approximation of rank k = min(rank, rows, columns).

    Works in the matrix's dtype (float32 or float64). The same seed gives the same result on one machine.
    """
    import torch

    rows, columns = matrix.shape
    rank = min(rank, rows, columns)
    largest = float(matrix.abs().max())
    if largest > _LARGE:  # its squares would be infinite
        u, s, v = truncated_svd(matrix / largest, rank, seed)
        return u, s * largest, v
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


def describe_spectrum(update: Tensor, weights: Tensor | None, rank: int, seed: int) -> dict[str, float | None]:
    """Return how an update spreads over directions, and over those of the weights. Keys as in docs/metrics.md.

    update, weights: [rows, columns] in float32 or float64. rank: how many leading directions are looked at.
    """
    import torch

    rows, columns = update.shape
    rank = min(rank, rows, columns)
    squares = float((update.double() ** 2).sum())
    if squares == 0:
        return dict.fromkeys(SPECTRUM_KEYS)
    u, s, _ = truncated_svd(update, rank, seed)
    energies = s.double() ** 2 / squares
    shares = energies / energies.sum()
    entropy = -float(torch.xlogy(shares, shares).sum())
    result: dict[str, float | None] = {
        "stable_rank": squares / float(s[0]) ** 2,
        "effective_rank": float(torch.tensor(entropy, dtype=torch.float64).exp()),
        "leading_energy": float(energies.sum()),
    }
    if weights is None or not bool(weights.any()):
        return {**dict.fromkeys(SPECTRUM_KEYS), **result}
    left, _, right = truncated_svd(weights, rank, seed)
    cosines = torch.linalg.svdvals(u.double().T @ left.double()).clamp_(max=1)
    return {
        **result,
        "principal_left": float(((left.double().T @ update.double()) ** 2).sum()) / squares,
        "principal_left_chance": rank / rows,
        "principal_right": float(((update.double() @ right.double()) ** 2).sum()) / squares,
        "principal_right_chance": rank / columns,
        "subspace_overlap": float((cosines**2).mean()),
        "least_angle": float(torch.rad2deg(torch.arccos(cosines[0]))),
    }


SPECTRUM_KEYS = (
    "stable_rank", "effective_rank", "leading_energy", "principal_left", "principal_left_chance", "principal_right",
    "principal_right_chance", "subspace_overlap", "least_angle",
)  # fmt: skip
"""The figures of `describe_spectrum`."""
