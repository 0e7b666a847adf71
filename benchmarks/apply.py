"""`skillmerge apply` against the copy floor and against mergekit, in turns, on the same files.

    python benchmarks/apply.py [--size 1.5B] [--rounds 5] [--mergekit PATH/TO/mergekit-yaml] [--cold]
                               [--device cpu|cuda] [--memory 0.5B,3B] [--output benchmarks/RESULTS.md]

The floors move the same bytes and do nothing else, and leave one model durably on disk:

    cat     cat of the three inputs to nowhere, cat of one model to a file, sync of that file
    direct  the same with dd and direct I/O, past the page cache

Each round runs every command once, one after the other, so that a machine that speeds up or slows down does
so for all of them. Figures are medians over rounds; ratios are taken round by round, and their spread is
shown. Digests and fsync are included in skillmerge's time. mergekit runs from an environment of its own.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Sample:
    wall: float
    cpu: float
    memory: float


def run(command: list[str], log: Path) -> Sample:
    """One run of a command: seconds, CPU seconds and peak resident megabytes of its largest process."""
    started = time.monotonic()
    with open(log, "ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.monotonic() - started
    if process.returncode:
        sys.exit(f"{command[0]} failed with {process.returncode}; see {log}")
    return Sample(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3)


def make(folder: Path, size: str, shards: int = 1) -> None:
    """Write a family, in a process of its own: this one has to stay small, because a child's peak memory
    begins with what its parent had when it was started."""
    script = str(ROOT / "benchmarks" / "family.py")
    subprocess.run([sys.executable, script, str(folder), "--size", size, "--shards", str(shards)], check=True)


def shell(script: str) -> list[str]:
    return ["sh", "-ec", script]


def commands(family: Path, out: Path, mergekit: str | None, device: str) -> dict[str, list[str]]:
    """Every command writes one model at `out`."""
    inputs = [str(path) for model in ("target", "sft", "rl") for path in sorted((family / model).glob("*.safetensors"))]
    one = [str(path) for path in sorted((family / "target").glob("*.safetensors"))]
    merge = [
        sys.executable,
        "-m",
        "skillmerge",
        "apply",
        str(family / "recipe.yaml"),
        "--output",
        str(out),
        "-q",
    ]
    direct = "dd bs=4M iflag=direct status=none"
    result = {
        "skillmerge": [*merge, "--device", device],
        "cat": shell(f"mkdir {out}; cat {' '.join(inputs)} > /dev/null; cat {' '.join(one)} > {out}/f; sync {out}/f"),
        "direct": shell(
            f"mkdir {out}; "
            + "".join(f"{direct} if={path} of=/dev/null; " for path in inputs)
            + "".join(
                f"dd bs=4M oflag=direct conv=fsync status=none if={path} of={out}/{index}; "
                for index, path in enumerate(one)
            )
        ),
    }
    if mergekit is not None:
        config = family / "mergekit.yaml"
        models = "".join(
            f"  - {{model: {family / model}, parameters: {{weight: {weight}}}}}\n"
            for model, weight in (("target", 1.0), ("rl", 0.7), ("sft", -0.7))
        )
        config.write_text(f"merge_method: linear\nmodels:\n{models}parameters: {{normalize: false}}\ndtype: bfloat16\n")
        result["mergekit"] = [mergekit, str(config), str(out)]
    return result


def warm(family: Path) -> None:
    for path in family.glob("*/*.safetensors"):
        with open(path, "rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def drop_caches() -> bool:
    """Forget clean pages; True where that was allowed."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def measure(
    family: Path, work: Path, arguments: argparse.Namespace, cold: bool, names: list[str] | None = None
) -> dict[str, list[Sample]]:
    out = work / "out"
    todo = commands(family, out, arguments.mergekit, arguments.device)
    samples: dict[str, list[Sample]] = {name: [] for name in todo if names is None or name in names}
    for round_number in range(arguments.rounds + 1):
        order = list(samples)
        if round_number % 2:
            order.reverse()
        for name in order:
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            if cold:
                drop_caches()
            else:
                warm(family)
            sample = run(todo[name], work / "log.txt")
            if round_number:  # the first round warms up and is not counted
                samples[name].append(sample)
                print(
                    f"round {round_number} {name:10} {sample.wall:6.2f} s  {sample.memory:6.0f} MB",
                    flush=True,
                )
    shutil.rmtree(out, ignore_errors=True)
    return samples


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(samples: dict[str, list[Sample]]) -> str:
    lines = [
        "| command | wall s | CPU s | peak MB | skillmerge's wall / its wall |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, rows in samples.items():
        ratios = [ours.wall / other.wall for ours, other in zip(samples["skillmerge"], rows, strict=True)]
        cells = (
            spread([row.wall for row in rows]),
            spread([row.cpu for row in rows]),
            f"{max(row.memory for row in rows):.0f}",
            spread(ratios) if name != "skillmerge" else "",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ceilings(device: str) -> str:
    """Pinned copies to and from the GPU in GB/s, the ceiling of the CUDA path beside the disk."""
    import torch

    host = torch.empty(1 << 28, dtype=torch.uint8).pin_memory()
    there = torch.empty_like(host, device=device)
    rates = []
    for target, source in ((there, host), (host, there)):
        torch.cuda.synchronize()
        started = time.monotonic()
        for _ in range(10):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        rates.append(10 * host.numel() / (time.monotonic() - started) / 1e9)
    return f"{torch.cuda.get_device_name(0)}: {rates[0]:.1f} GB/s to the device, {rates[1]:.1f} GB/s back (pinned)."


def machine() -> str:
    with open("/proc/meminfo") as stream:
        memory = int(stream.readline().split()[1]) / 1e6
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), {memory:.0f} GB memory, "
        f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}, torch {version('torch')}."
    )


def in_turns(todo: dict[str, list[str]], family: Path, out: Path, rounds: int) -> dict[str, list[Sample]]:
    """Run every command once a round, in turns, with a warm page cache. The first of several rounds does not count."""
    samples: dict[str, list[Sample]] = {name: [] for name in todo}
    for number in range(rounds + 1):
        for name in list(todo) if number % 2 else reversed(list(todo)):
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            warm(family)
            sample = run(todo[name], out.with_name("log.txt"))
            if number or rounds == 0:
                samples[name].append(sample)
                print(f"  {name:20} {sample.wall:6.1f} s  {sample.cpu:6.1f} s CPU  {sample.memory:6.0f} MB", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.5B", help="a size that family.py knows")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mergekit", help="the mergekit-yaml program of an environment that has mergekit")
    parser.add_argument("--cold", action="store_true", help="also with an empty page cache (needs root)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", default="", help="sizes to measure the peak memory of, such as 0.5B,3B")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "skillmerge-benchmark")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "RESULTS.md")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    arguments.work.mkdir(parents=True, exist_ok=True)
    family = arguments.work / f"{arguments.size}-{arguments.shards}"
    make(family, arguments.size, arguments.shards)
    moved = sum(path.stat().st_size for path in family.glob("*/*.safetensors"))
    parts = [
        "# Benchmark: apply\n",
        f"`python benchmarks/apply.py {' '.join(sys.argv[1:])}` on {time.strftime('%Y-%m-%d')}\n",
        f"{machine()} Family of the shape of Qwen2.5-{arguments.size}, bfloat16: {moved / 1e9:.1f} GB in, "
        f"{moved / 3e9:.1f} GB out. Medians of {arguments.rounds} interleaved rounds (least to greatest).\n",
        f"## Warm page cache, --device {arguments.device}\n",
        table(measure(family, arguments.work, arguments, cold=False)) + "\n",
    ]
    if arguments.device.startswith("cuda"):
        parts.append(ceilings(arguments.device) + "\n")
    if arguments.cold and drop_caches():
        samples = measure(family, arguments.work, arguments, cold=True, names=["skillmerge", "cat", "direct"])
        parts += ["## Empty page cache\n", table(samples) + "\n"]
    if arguments.memory:
        lines = ["## Peak memory\n", "| family | peak MB |", "| --- | --- |"]
        for size in arguments.memory.split(","):
            make(arguments.work / f"{size}-1", size)
            samples = measure(arguments.work / f"{size}-1", arguments.work, arguments, cold=False, names=["skillmerge"])
            lines.append(f"| {size} | {max(row.memory for row in samples['skillmerge']):.0f} |")
        parts.append("\n".join(lines) + "\n")
    text = "\n".join(parts)
    arguments.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
