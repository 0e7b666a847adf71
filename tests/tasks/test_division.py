"""How shards are divided among tasks, and how many cores a task has."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from skillmerge.plans.tasks.division import divide
from skillmerge.threads import cores, quotas


def test_largest_first_onto_the_least_loaded() -> None:
    sizes = {"a": 1, "b": 9, "c": 5, "d": 4, "e": 5}
    assert divide(sizes, 2) == [["b", "d"], ["c", "e", "a"]]
    assert divide(sizes, 1) == [["b", "c", "e", "d", "a"]]
    assert divide(sizes, 7) == [["b"], ["c"], ["e"], ["d"], ["a"], [], []]
    assert divide({}, 2) == [[], []]


@pytest.mark.parametrize("tasks", [1, 2, 3, 7, 64])
def test_each_shard_is_one_tasks_and_loads_are_even(tasks: int) -> None:
    dice = random.Random(tasks)
    sizes = {f"shard {number}": dice.randrange(1, 1000) for number in range(163)}
    parts = divide(sizes, tasks)
    assert sorted(shard for part in parts for shard in part) == sorted(sizes)
    loads = [sum(sizes[shard] for shard in part) for part in parts]
    assert max(loads) - min(loads) <= max(sizes.values())
    assert divide(dict(sizes), tasks) == parts


def write_group(system: Path, group: str, **files: str) -> None:
    folder = system / "sys/fs/cgroup" / group
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)


def test_quotas_of_control_groups(tmp_path: Path) -> None:
    """Version 2, of the group and of those above it; version 1; none."""
    assert quotas(tmp_path) == []
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/pods/one\n4:cpu,cpuacct:/old\n3:memory:/old\n")
    assert quotas(tmp_path) == []
    write_group(tmp_path, "pods/one", cpu__max="250000 100000\n")
    write_group(tmp_path, "cpu,cpuacct/old", **{"cpu__cfs_quota_us": "50000\n", "cpu__cfs_period_us": "100000\n"})
    (tmp_path / "sys/fs/cgroup/pods/cpu.max").write_text("800000 100000\n")
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("max 100000\n")
    assert quotas(tmp_path) == [3, 8, 1]
    (tmp_path / "sys/fs/cgroup/cpu,cpuacct/old/cpu.cfs_quota_us").write_text("-1\n")
    assert quotas(tmp_path) == [3, 8]


def test_slurm_says_how_many_cores_a_task_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    every = cores()
    for given, wanted in (("1", 1), ("100000", every), ("many", every), ("0", 1)):
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", given)
        assert cores() == wanted
