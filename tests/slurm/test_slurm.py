"""A real Slurm runs the page's scripts: an array, `finish` after it, and a node that dies in the middle of its work."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clusters import SHARDS, alone, save_family
from observing import content, staging_of
from slurm_cluster import NODES, Slurm, Unavailable
from test_clusters import example

import skillmerge

PACE = 1.0
"""Seconds that each write of a task takes longer, so that it can be killed in its work."""

SLOW = """\
#!{python}
import sys, time
sys.path.insert(0, {package!r})
from skillmerge.outputs.shard_file import ShardFile
write = ShardFile.write
def slowly(self, data, offset):
    time.sleep({pace})
    write(self, data, offset)
ShardFile.write = slowly
from skillmerge.cli.main import main
main()
"""


@pytest.fixture(scope="module")
def slurm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if not request.config.getoption("--slurm"):
        pytest.skip("`make slurm` runs a real Slurm")
    packages = Path(__file__).parent.parent.parent / "build" / "slurm"
    try:
        with Slurm(packages, tmp_path_factory.mktemp("slurm")) as running:
            yield running
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def job(tmp_path: Path) -> Callable[[str], str]:
    """The page's scripts, for this folder and four tasks."""
    command = tmp_path / "bin" / "skillmerge"
    command.parent.mkdir()
    package = str(Path(skillmerge.__file__).parent.parent)
    command.write_text(SLOW.format(python=sys.executable, package=package, pace=PACE))
    command.chmod(0o755)

    def write(name: str) -> str:
        text = example(name).replace("/shared", str(tmp_path)).replace("0-63", f"0-{SHARDS - 1}")
        text = text.replace("--cpus-per-task=8", "--cpus-per-task=1")
        text = text.replace("#SBATCH --mem=8G\n", f"#SBATCH --output={tmp_path}/{name}-%j.out\n")
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def path_of(slurm: Slurm, folder: Path) -> str:
    return f"{folder / 'bin'}:{slurm.environment['PATH']}"


def outputs(folder: Path) -> str:
    return "\n".join(path.read_text() for path in folder.glob("*.out"))


def test_an_array_and_finish_after_it(slurm: Slurm, job: Callable[[str], str], tmp_path: Path) -> None:
    plan, output = save_family(tmp_path), tmp_path / "merged"
    wanted = alone(plan)
    started = time.monotonic()
    array = slurm.submit(job("merge-shards.sbatch"), PATH=path_of(slurm, tmp_path))
    after = slurm.submit(f"--dependency=afterok:{array}", job("merge-finish.sbatch"), PATH=path_of(slurm, tmp_path))
    tasks = slurm.wait(array)
    assert {row["JobState"] for row in tasks.values()} == {"COMPLETED"}, outputs(tmp_path)
    assert {row["NodeList"] for row in tasks.values()} == set(NODES)
    (end,) = slurm.wait(after).values()
    assert end["JobState"] == "COMPLETED", outputs(tmp_path)
    assert content(output) == wanted
    assert (tmp_path / "merged.result.json").exists()
    print(f"array of {len(tasks)} and finish: {time.monotonic() - started:.0f} s")


def test_a_node_that_dies_costs_only_its_shard(slurm: Slurm, job: Callable[[str], str], tmp_path: Path) -> None:
    """Its processes are gone in the middle of a write. Slurm queues the task again, and the other node makes it."""
    plan, output = save_family(tmp_path), tmp_path / "merged"
    wanted = alone(plan)
    started = time.monotonic()
    array = slurm.submit(job("merge-shards.sbatch"), PATH=path_of(slurm, tmp_path))
    after = slurm.submit(f"--dependency=afterok:{array}", job("merge-finish.sbatch"), PATH=path_of(slurm, tmp_path))
    lost = None
    while lost is None:
        assert time.monotonic() - started < 120, outputs(tmp_path)
        running = [row for row in slurm.states(array).values() if row.get("NodeList") == "n1"]
        at_work = [*(staging_of(output) / "attempts").glob("*/*.safetensors")]
        if running and running[0]["JobState"] == "RUNNING" and len(at_work) == 2:
            lost = running[0]
    killed = slurm.kill_node("n1")
    assert len(killed) >= 2, "a step, and what ran in it"
    died = time.monotonic()
    tasks = slurm.wait(array)
    assert {row["JobState"] for row in tasks.values()} == {"COMPLETED"}, outputs(tmp_path)
    again = tasks[lost["ArrayTaskId"]]
    assert (again["Restarts"], again["NodeList"]) == ("1", "n2")
    (end,) = slurm.wait(after).values()
    assert end["JobState"] == "COMPLETED", outputs(tmp_path)
    assert content(output) == wanted
    assert not staging_of(output).exists()
    print(f"{len(killed)} processes killed; the task ran again, and all was done after {time.monotonic() - died:.0f} s")
    slurm.start_node("n1")
    assert os.path.exists(output)
