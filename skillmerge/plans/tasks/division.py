"""How the shards of a plan are divided among tasks: alike in every process, and without asking anybody."""

from __future__ import annotations

import heapq
from collections.abc import Mapping


def divide(sizes: Mapping[str, int], tasks: int) -> list[list[str]]:
    """Return each task's shards: the largest first, each to the task with the least so far.

    sizes: bytes by shard, in the plan's order, which decides between shards of one size. Between tasks with as much to
    do the first gets it. Tasks beyond the number of shards get nothing, and are not listed.
    """
    parts: list[list[str]] = [[] for _ in range(min(tasks, len(sizes)))]
    loads = [(0, index) for index in range(len(parts))]
    for shard in sorted(sizes, key=lambda shard: -sizes[shard]):
        load, index = loads[0]
        parts[index].append(shard)
        heapq.heapreplace(loads, (load + sizes[shard], index))
    return parts


def share_of(sizes: Mapping[str, int], index: int, tasks: int) -> tuple[str, ...]:
    """Return the shards of one task, counted from 0."""
    parts = divide(sizes, tasks)
    return tuple(parts[index]) if index < len(parts) else ()
