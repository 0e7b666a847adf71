"""How the shards of a plan are divided among tasks: alike in every process, and without asking anybody."""

from __future__ import annotations

import heapq
from collections.abc import Mapping


def divide(sizes: Mapping[str, int], tasks: int) -> list[list[str]]:
    """Return each task's shards: the largest first, each to the task with the least so far.

    sizes: bytes by shard, in the plan's order, which decides between shards of one size. Between tasks with as much to
    do the first gets it.
    """
    parts: list[list[str]] = [[] for _ in range(tasks)]
    loads = [(0, index) for index in range(min(tasks, len(sizes)))]
    for shard in sorted(sizes, key=lambda shard: -sizes[shard]):
        load, index = loads[0]
        parts[index].append(shard)
        heapq.heapreplace(loads, (load + sizes[shard], index))
    return parts
