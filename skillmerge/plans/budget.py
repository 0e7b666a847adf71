"""The memory and disk that a run needs, and the thread count and tile size that stay within bounds.

Predictions, from the plan alone. The figures for the runtime itself were measured (`benchmarks/`).
"""

from __future__ import annotations

import math
import operator
import os
from dataclasses import dataclass
from pathlib import Path

from skillmerge.checkpoints.views.bands import BAND
from skillmerge.errors import ResourceError
from skillmerge.naming import module_kind
from skillmerge.plans.plan import Plan
from skillmerge.tensors import BLOCK, CHUNK, DTYPES, UNIT, format_bytes
from skillmerge.threads import cores

RUNTIME_BYTES = 300_000_000
"""Resident memory of Python with torch imported, before any work, with room for headers and tables."""

_CUDA_RUNTIME_BYTES = 1_500_000_000
"""The same with a CUDA context and its libraries; a conservative estimate."""

TILE_BYTES = 2 << 20
"""Bytes of a tile on the CPU, if memory allows."""
_CUDA_TILE_BYTES = 8 << 20
_REMOTE_TILE_BYTES = 17 << 20
"""A request over a network costs a round trip: at least 16 MiB are asked for at once."""
_REMOTE_THREADS = 4
_MAX_THREADS = 16
WRITERS = 2
OUTPUT_BUFFERS = 3
"""Per worker: one to fill while another is written and a third waits for its turn in the digest."""
_SPARE_DISK = 64 << 20
_SKILL_MEMORY = 700_000_000
_KEPT = 64 << 20
"""What a compressed skill, and an adapter, keep in memory (`views.low_rank.KEPT_BYTES`)."""


@dataclass(frozen=True, slots=True)
class Budget:
    """threads: workers. tile: elements per tile. memory: predicted peak of host memory in bytes."""

    threads: int
    tile: int
    memory: int


def budget(plan: Plan, *, threads: int | None, memory_limit: int | None, cuda: bool = False) -> Budget:
    """Choose threads and tile size within `memory_limit` bytes. Raises ResourceError if nothing fits."""
    threads = operator.index(threads) if threads is not None else None  # numpy's numbers overflow
    memory_limit = operator.index(memory_limit) if memory_limit is not None else None
    if plan.makes_skill:
        return _skill_budget(plan, threads, memory_limit)
    itemsize = max((DTYPES[tensor.dtype].itemsize for tensor in plan.tensors.values()), default=2)
    element = sum(plan.input_itemsizes) + OUTPUT_BUFFERS * itemsize
    programs = (piece.program for tensor in plan.tensors.values() for piece in tensor.pieces)
    registers = max((program.registers for program in programs if program is not None), default=1)
    remote = any(item.remote for item in plan.inputs)
    # Over a network workers wait more than they compute, and their buffers are large.
    wanted = threads or (min(_REMOTE_THREADS, max(2, cores())) if remote else min(_MAX_THREADS, cores()))
    entries = [plan.recipe.entries[name] for name in plan.recipe.used_models()]
    # What is kept of a compressed skill, and of each adapter's matrices.
    kept = _KEPT * (any(it.kind == "skill" for it in entries) + sum(it.kind == "adapter" for it in entries))
    kept = 0 if plan.recipe.makes_adapter else kept  # whose matrices are copied by pieces
    crossed = _crossed(plan)
    tables = 1200 * len(plan.tensors) * (1 + len(plan.input_itemsizes))

    def need(count: int, tile: int) -> int:
        return (
            (_CUDA_RUNTIME_BYTES if cuda else RUNTIME_BYTES)
            + tables
            + kept
            + count * crossed
            + count * (element * tile + (registers + 6) * CHUNK * 8)
        )

    tile_bytes = _REMOTE_TILE_BYTES if remote else _CUDA_TILE_BYTES if cuda else TILE_BYTES
    tile = max(BLOCK, tile_bytes // itemsize)
    while memory_limit is not None and need(wanted, tile) > memory_limit and (tile > BLOCK or wanted > 1):
        if tile > 8 * BLOCK or wanted == 1 or threads:
            if tile == BLOCK:
                break
            tile = max(BLOCK, tile // 2)
        else:
            wanted -= 1
    if memory_limit is not None and need(wanted, tile) > memory_limit:
        raise ResourceError(
            f"memory limit {format_bytes(memory_limit)} is too low: this merge needs "
            f"{format_bytes(need(wanted, tile))}",
            fix="raise `--memory-limit`" + (" or lower `--threads`" if threads and threads > 1 else ""),
        )
    return Budget(wanted, tile, need(wanted, tile))


def _crossed(plan: Plan) -> int:
    """Return the bytes that a thread keeps of matrices which models store transposed: two of each model."""
    turned = sum(any("transposed" in word for word in item.naming.layout) for item in plan.inputs)
    sizes = (
        math.prod(tensor.shape[-2:]) * DTYPES[tensor.dtype].itemsize
        for tensor in plan.tensors.values()
        if module_kind(tensor.name) == "expert"
    )
    return turned * 2 * min(BAND, 2 * max(sizes, default=0))


def _skill_budget(plan: Plan, threads: int | None, memory_limit: int | None) -> Budget:
    """Choose the number of workers for a skill, whose units have a fixed size."""
    itemsize = max((DTYPES[tensor.dtype].itemsize for tensor in plan.tensors.values()), default=2)
    # Its inputs; two planes in parts, put together, and waiting to be written; and the masks.
    worker = UNIT * (sum(plan.input_itemsizes) + 10 * itemsize + 2)
    worker += _crossed(plan)
    adapters = sum(plan.recipe.entries[name].kind == "adapter" for name in plan.recipe.used_models())
    fixed = RUNTIME_BYTES + _KEPT * adapters + 2000 * len(plan.tensors) * (1 + len(plan.input_itemsizes))
    limit = memory_limit or _SKILL_MEMORY
    count = threads or max(1, min(_MAX_THREADS, cores(), (limit - fixed) // worker))
    if memory_limit is not None and fixed + count * worker > memory_limit:
        raise ResourceError(
            f"memory limit {format_bytes(memory_limit)} is too low: this skill needs "
            f"{format_bytes(fixed + count * worker)}",
            fix="raise `--memory-limit`" + (" or lower `--threads`" if count > 1 else ""),
        )
    return Budget(count, UNIT, fixed + count * worker)


def free_memory() -> int | None:
    """Return the bytes of memory available without swapping, or None if the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            rows = dict(line.split(":") for line in stream)
        return int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def free_disk(path: Path) -> int | None:
    """Return bytes free on the disk that `path`, or its nearest existing parent, is on; None if the disk does not
    say."""
    path = path.absolute()
    while not os.path.exists(path):
        path = path.parent
    try:
        status = os.statvfs(path)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize if status.f_blocks else None  # FUSE may answer with zeros


def check_disk(path: Path, needed: int, what: str) -> None:
    """Raise ResourceError if the disk of `path` cannot take `needed` bytes and a little more."""
    free = free_disk(path)
    if free is not None and free < needed + min(_SPARE_DISK, needed // 20):
        raise ResourceError(
            f"{what} needs {format_bytes(needed)}, but the disk of {path} has {format_bytes(free)} free",
            fix="free disk space, or choose another folder for the output",
        )
