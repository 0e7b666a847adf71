"""Real limits: disks with a page of room less than a run needs, and memory that ends somewhere in its midst."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_family
from observing import MergeServer, assert_finished, content, discard, put_previous, reference, visible, wide_shapes

pytestmark = pytest.mark.timeout(3600)
PAGE = 4096


@pytest.mark.parametrize("overwrite", [False, True], ids=["fresh", "overwrite"])
def test_disk_of_any_size_ends_a_run_that_can_be_continued(
    server: MergeServer,
    sharded: Path,
    tmp_path: Path,
    mount_disk: Callable[..., Path],
    overwrite: bool,
    request: pytest.FixtureRequest,
    tally: Callable[..., None],
) -> None:
    """From no room to enough (quick: of a small model), without the check that would refuse beforehand."""
    family, step = ("wide", 7) if request.config.getoption("--long") else ("small", 1)
    recipe = Path(shutil.copytree(sharded / family, tmp_path, dirs_exist_ok=True)) / "recipe.yaml"
    wanted, disk = reference(server, recipe), mount_disk("size=8m")
    output = disk / "merged"
    full = sizes = 0
    for pages in range(1, 2000, step):
        previous = put_previous(output) if overwrite else None
        used = shutil.disk_usage(disk).used // PAGE
        _resize(disk, (used + pages) * PAGE)
        answer = server.run(recipe, output=output, overwrite=overwrite, unchecked=True, kill_after=60)
        assert answer["status"] in (0, 5), (pages, answer)
        assert visible(output) in (previous, wanted), pages
        assert answer["status"] == 5 or content(output) == wanted
        _resize(disk, 8 << 20)
        again = server.run(recipe, output=output, overwrite=overwrite)
        assert again["status"] == 0, (pages, again)
        assert_finished(output, wanted)
        discard(output)
        sizes += 1
        full += answer["status"] == 5
        if answer["status"] == 0:
            break
    tally(disks=sizes, full=full)
    assert answer["status"] == 0
    assert full > 3


def _resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of address space are Linux's")
def test_memory_of_any_size_ends_a_run_that_can_be_continued(
    server: MergeServer, tmp_path: Path, request: pytest.FixtureRequest, tally: Callable[..., None]
) -> None:
    """From where a thread can be started at all: below that CPython itself waits for ever for one that never ran."""
    recipe = write_family(tmp_path, wide_shapes(6, 1 << 18), shards=2)
    output, wanted = tmp_path / "merged", reference(server, recipe)
    short = runs = 0
    for kilobytes in range(9 << 10, 120 << 10, 1 << 10 if request.config.getoption("--long") else 7 << 10):
        answer = server.run(recipe, threads=2, memory=kilobytes << 10, kill_after=60)
        assert answer["status"] in (0, 5), (kilobytes, answer)
        assert visible(output) in (None, wanted)
        again = server.run(recipe, threads=2)
        assert again["status"] == 0, again
        assert_finished(output, wanted)
        discard(output)
        runs += 1
        short += answer["status"] == 5
    tally(runs=runs, short_of_memory=short)
    assert 0 < short < runs
