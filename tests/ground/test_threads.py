"""How many cores a process may use."""

from __future__ import annotations

from pathlib import Path

import pytest

from skillmerge.threads import cores, quotas


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
