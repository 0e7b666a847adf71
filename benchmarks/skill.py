"""Cutting a skill and merging with it, against the copy floor of each: the same bytes in and out with `cat`.

    python benchmarks/skill.py [--size 1.5B] [--rounds 5] [--share 0.2]

The family is `family.py`'s, with an RL model in which `share` of the elements have moved by one unit in the last
place, which is what RL updates of bfloat16 checkpoints look like. Each round runs every command once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open

from skillmerge.checkpoints.safetensors import read_header

ROOT = Path(__file__).parent.parent


def write_rl(sft: Path, rl: Path, share: float) -> None:
    """A copy of `sft` with `share` of the elements moved by one unit, a tensor at a time."""
    rl.mkdir()
    shutil.copy(sft / "config.json", rl)
    generator = torch.Generator().manual_seed(1)
    for file in sorted(sft.glob("*.safetensors")):
        header = read_header(str(file), file.name)
        with safe_open(file, framework="pt") as reader, open(rl / file.name, "wb") as stream:
            stream.write(header.raw)
            for spec in header.tensors:
                values = reader.get_tensor(spec.name).flatten()
                moved = torch.rand(values.numel(), generator=generator) < share
                bits = values.view(torch.int16) + moved.to(torch.int16)
                stream.write(memoryview(bits.numpy()))
    for file in sft.glob("*.index.json"):
        shutil.copy(file, rl)


def run(command: list[str]) -> tuple[float, float]:
    """Seconds, and peak resident megabytes."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command} failed")
    return time.monotonic() - started, usage.ru_maxrss / 1e3


def forget(*folders: Path) -> None:
    """Drop the files of folders from the page cache."""
    for file in (file for folder in folders for file in folder.glob("*.safetensors")):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.5B")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--cold", action="store_true", help="with an empty page cache")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "skillmerge-benchmark")
    arguments = parser.parse_args()
    family = arguments.work / f"{arguments.size}-1"
    make = [sys.executable, str(ROOT / "benchmarks" / "family.py"), str(family), "--size", arguments.size]
    subprocess.run(make, check=True)
    rl = family / f"rl-{arguments.share}"
    if not rl.exists():  # in a process of its own, whose memory the timed ones do not begin with
        fork = multiprocessing.get_context("spawn")
        writer = fork.Process(target=write_rl, args=(family / "sft", rl, arguments.share))
        writer.start()
        writer.join()
    skill, out, copy = (arguments.work / name for name in ("skill", "skill-out", "skill-copy"))
    recipe, direct = arguments.work / "skill.yaml", arguments.work / "direct.yaml"
    models = f"target: {family / 'target'}, math: {{skill: {skill}}}"
    recipe.write_text(f"skillmerge: 1\nmodels: {{{models}}}\nmerge: target + 0.7 * math\n")
    models = f"target: {family / 'target'}, sft: {family / 'sft'}, rl: {rl}"
    direct.write_text(f"skillmerge: 1\nmodels: {{{models}}}\nmerge: target + 0.7 * (rl - sft)\n")
    tool = [sys.executable, "-m", "skillmerge"]
    extract = [*tool, "extract", "--from", str(rl), "--minus", str(family / "sft"), "-o", str(skill), "-q"]
    run([*extract, "--overwrite"])

    def cat(inputs: str, output: str) -> list[str]:
        return ["sh", "-c", f"cat {inputs} > /dev/null; cat {output} > {copy}; sync {copy}"]

    weights = "*.safetensors"
    commands = {
        "extract": extract,
        "extract, floor": cat(f"{rl}/{weights} {family}/sft/{weights}", f"{skill}/{weights}"),
        "apply": [*tool, "apply", str(recipe), "-o", str(out), "-q"],
        "apply, floor": cat(f"{skill}/{weights}", f"{family}/target/{weights}"),
        "apply, two checkpoints": [*tool, "apply", str(direct), "-o", str(out), "-q"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(arguments.rounds + 1):
        for name, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            copy.unlink(missing_ok=True)
            if name == "extract":
                shutil.rmtree(skill)
            os.sync()
            if arguments.cold:
                forget(family / "target", family / "sft", rl, skill)
            seconds, peak = run(command)
            if number:
                times[name].append(seconds)
                print(f"round {number} {name:24} {seconds:6.2f} s {peak:6.0f} MB", flush=True)
    for name, other in (
        ("extract, floor", "extract"),
        ("apply, floor", "apply"),
        ("apply, two checkpoints", "apply"),
    ):
        ratios = [theirs / ours for theirs, ours in zip(times[name], times[other], strict=True)]
        print(f"{name} / {other}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    stored = sum(path.stat().st_size for path in skill.iterdir())
    whole = sum(path.stat().st_size for path in rl.glob(weights))
    print(f"the skill takes {stored / whole:.3f} of the checkpoint")


if __name__ == "__main__":
    main()
