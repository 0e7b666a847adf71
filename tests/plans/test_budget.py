"""Memory and disk: what is predicted, what is obeyed, what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PEAK_MEMORY, run_cli

import skillmerge
from skillmerge.errors import ResourceError, memory_errors
from skillmerge.plans import budget as resources
from skillmerge.plans.budget import budget, check_disk, free_disk


def test_memory_limit_shrinks_tiles_then_threads(family: Path) -> None:
    plan = skillmerge.plan(family)
    free = budget(plan, threads=8, memory_limit=None)
    tight = budget(plan, threads=None, memory_limit=free.memory)
    assert tight.memory <= free.memory
    small = budget(plan, threads=8, memory_limit=free.memory - 1)
    assert small.tile < free.tile
    assert small.memory < free.memory


def test_memory_limit_that_nothing_fits_is_refused_before_work(family: Path) -> None:
    with pytest.raises(ResourceError, match="this merge needs"):
        skillmerge.apply(family, memory_limit=10_000_000)
    assert sorted(path.name for path in family.parent.iterdir()) == ["recipe.yaml", "rl", "sft", "target"]


def test_output_larger_than_the_disk_is_refused_before_work(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "free_disk", lambda path: 1000)
    with pytest.raises(ResourceError, match=r"1\.0 KB free"):
        skillmerge.apply(family)
    assert not (family.parent / "merged").exists()


def test_free_disk_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert free_disk(tmp_path / "not" / "yet" / "there") > 0
    check_disk(tmp_path / "not" / "there", 1, "nothing")


def test_size_options_are_read_and_checked(family: Path) -> None:
    process = run_cli("plan", family, "--memory-limit", "lots")
    assert process.returncode == 2
    assert "is not a size" in process.stderr
    assert run_cli("apply", family, "--memory-limit", "1MB").returncode == 5


def test_resident_memory_stays_within_the_prediction(tmp_path: Path) -> None:
    """A model several times larger than the prediction's buffers, merged in a process of its own."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        from family import SIZES, make
    finally:
        sys.path.pop(0)
    SIZES["memory"] = (1024, 4, 4096, 128, 32_000)
    recipe = make(tmp_path, "memory")
    program = (
        "import re, skillmerge;"
        f"plan = skillmerge.plan({str(recipe)!r}); from skillmerge.plans.budget import budget;"
        "limit = budget(plan, threads=2, memory_limit=None).memory;"
        f"skillmerge.apply({str(recipe)!r}, {str(tmp_path / 'out')!r}, threads=2, device='cpu');"
        f"print(limit, {PEAK_MEMORY})"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    limit, used = map(int, process.stdout.split())
    assert used <= limit
    assert used < 700_000_000


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_memory_that_is_not_to_be_had_is_told(error: Exception) -> None:
    """Found by limiting memory: all of these were taken for bugs."""
    with pytest.raises(ResourceError, match="not enough memory or threads") as caught, memory_errors():
        raise error
    assert caught.value.exit_status == 5
    assert "then rerun" in str(caught.value.fix)


def test_other_errors_of_the_runtime_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="a bug"), memory_errors():
        raise RuntimeError("a bug")
