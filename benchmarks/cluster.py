"""Tasks against one process: what is lost where the shards of one merge are divided among processes of this machine.

    python benchmarks/cluster.py [--size 1.5B] [--shards 8] [--rounds 5] [--output benchmarks/CLUSTER.md]

Each round runs every way once, one after the other, on the same files, with a warm page cache:

    apply        one process with two threads
    1 task       `shard` with two threads, then `finish`
    2 tasks      two times `shard` with one thread, at the same time, then `finish`

What each way costs at least (starts of processes, imports, plans, `finish`) is measured in the same round, as the same
way with a family that is too small to be work. The aim is that two tasks take at most 10 % longer than `apply` beyond
that.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from apply import make, warm  # benchmarks/apply.py

ROOT = Path(__file__).parent.parent
WAYS = ("apply", "1 task", "2 tasks")


def skillmerge(*words: object) -> list[str]:
    return [sys.executable, "-m", "skillmerge", *map(str, words), "-q"]


def together(*commands: list[str]) -> None:
    running = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    for process, (_, said) in [(process, process.communicate()) for process in running]:
        if process.returncode:
            sys.exit(f"{' '.join(commands[0])} failed with {process.returncode}:\n{said}")


def measured(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and CPU seconds of the children that ended meanwhile."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before, started = used(), time.monotonic()
    work()
    return time.monotonic() - started, used() - before


class Ways:
    """The ways to make the same output from the same plan."""

    def __init__(self, plan: Path, output: Path) -> None:
        self._plan, self._output = plan, output

    def apply(self) -> None:
        together(skillmerge("apply", self._plan, "-o", self._output, "--threads", 2))

    def tasks(self, tasks: int) -> None:
        given = ("shard", self._plan, "-o", self._output, "--threads", 2 // tasks, "--of", tasks, "--index")
        together(*(skillmerge(*given, index) for index in range(tasks)))
        together(skillmerge("finish", self._plan, "-o", self._output))

    def clear(self) -> None:
        for folder in (self._output, self._output.with_name(f"{self._output.name}.partial")):
            shutil.rmtree(folder, ignore_errors=True)

    def round(self) -> dict[str, tuple[float, float]]:
        """Seconds and CPU seconds of every way."""
        found = {}
        for way, work in zip(WAYS, (self.apply, lambda: self.tasks(1), lambda: self.tasks(2)), strict=True):
            self.clear()
            os.sync()
            found[way] = measured(work)
        self.clear()
        return found


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def report(rounds: list[dict[str, tuple[float, float]]], least: list[dict[str, tuple[float, float]]]) -> str:
    """A table of medians, and how much longer tasks take than `apply`: in all, and beyond the least of each way."""
    lines = [
        "| | wall s | CPU s | wall s of the least | longer than `apply` | beyond the least |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for way in WAYS:
        walls, cpus = zip(*(found[way] for found in rounds), strict=True)
        starts = [found[way][0] for found in least]
        longer = [100 * (found[way][0] / found["apply"][0] - 1) for found in rounds]
        beyond = [
            100 * ((found[way][0] - small[way][0]) / (found["apply"][0] - small["apply"][0]) - 1)
            for found, small in zip(rounds, least, strict=True)
        ]
        row = [way, spread(list(walls)), spread(list(cpus)), spread(starts)]
        row += [f"{spread(values, 0)} %" if way != "apply" else "" for values in (longer, beyond)]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.5B")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the family is, or is to be")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    folder = options.folder or Path(tempfile.mkdtemp(prefix="skillmerge-cluster-"))
    try:
        ways = []
        for size in (options.size, "tiny"):
            family = folder / size
            make(family, size, options.shards)
            together(skillmerge("plan", family / "recipe.yaml", "-o", family / "plan.json"))
            ways.append(Ways(family / "plan.json", family / "merged"))
        rounds, least = [], []
        for number in range(options.rounds):
            warm(folder / options.size)
            rounds.append(ways[0].round())
            least.append(ways[1].round())
            print(number + 1, {name: round(found[0], 2) for name, found in rounds[-1].items()}, flush=True)
        text = report(rounds, least)
        print(text)
        if options.output is not None:
            options.output.write_text(text + "\n")
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
