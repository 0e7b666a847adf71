"""How shards are divided among tasks."""

from __future__ import annotations

import random

import pytest

from skillmerge.plans.tasks.division import divide, share_of


def test_largest_first_onto_the_least_loaded() -> None:
    sizes = {"a": 1, "b": 9, "c": 5, "d": 4, "e": 5}
    assert divide(sizes, 2) == [["b", "d"], ["c", "e", "a"]]
    assert divide(sizes, 1) == [["b", "c", "e", "d", "a"]]
    assert divide(sizes, 7) == [["b"], ["c"], ["e"], ["d"], ["a"]]
    assert divide({}, 2) == []


def test_tasks_beyond_the_shards_have_nothing_and_cost_nothing() -> None:
    sizes = {"a": 1, "b": 9}
    many = 10**12
    assert share_of(sizes, 0, many) == ("b",)
    assert share_of(sizes, 1, many) == ("a",)
    assert share_of(sizes, many - 1, many) == share_of({}, 0, 1) == ()


@pytest.mark.parametrize("tasks", [1, 2, 3, 7, 64])
def test_each_shard_is_one_tasks_and_loads_are_even(tasks: int) -> None:
    dice = random.Random(tasks)
    sizes = {f"shard {number}": dice.randrange(1, 1000) for number in range(163)}
    parts = divide(sizes, tasks)
    assert sorted(shard for part in parts for shard in part) == sorted(sizes)
    loads = [sum(sizes[shard] for shard in part) for part in parts]
    assert max(loads) - min(loads) <= max(sizes.values())
    assert divide(dict(sizes), tasks) == parts
