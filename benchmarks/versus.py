"""This skillmerge against another one, in turns, on the same files.

    python benchmarks/versus.py OTHER/bin/skillmerge [--rounds 5] [--size 1.5B] [--jobs apply,extract,…]

OTHER is an environment with another version. Each round runs every job once with either, one after the other, so
that a machine that speeds up or slows down does so for both. Ratios are this one's wall time over the other's, round
by round: the median and the spread; memory is the largest resident set that was seen, and its difference.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from apply import ROOT, Sample, make, run, warm
from hub import SERVER

HERE = Path(__file__).parent
FAMILY = ROOT / "skillmerge" / "verbs" / "demo" / "family"
SPARSE = "import sys, pathlib, skill; skill.write_rl(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), 0.2)"


@dataclass(frozen=True)
class Job:
    """A command line, and what it reads from the environment. out: what it writes, removed before each run."""

    arguments: list[str]
    out: Path
    environment: dict[str, str]


def prepare(work: Path, size: str, wanted: set[str]) -> tuple[dict[str, Job], subprocess.Popen[str] | None]:
    """The jobs, over a family that is made once; and the Hub that some of them read from."""
    family, small, out = work / f"{size}-4", work / "0.5B-1", work / "versus-out"
    make(family, size, shards=4)
    recipe = str(family / "recipe.yaml")
    jobs = {
        "help": Job(["--help"], out, {}),
        "plan": Job(["plan", recipe], out, {}),
        "apply": Job(["apply", recipe, "-o", str(out), "-q"], out, {}),
        "inspect": Job(["inspect", str(family / "sft"), str(family / "rl"), "-q"], out, {}),
    }
    if wanted & {"extract", "apply from a skill"}:
        sparse, skill = work / f"{size}-rl", work / f"{size}-skill"
        if not sparse.exists():
            # In a process of its own: a child's peak memory begins with what its parent had.
            subprocess.run([sys.executable, "-c", SPARSE, str(family / "sft"), str(sparse)], check=True, cwd=HERE)
        shutil.rmtree(skill, ignore_errors=True)
        extract = ["extract", "--from", str(sparse), "--minus", str(family / "sft"), "-q", "-o"]
        subprocess.run([sys.executable, "-m", "skillmerge", *extract, str(skill)], check=True)
        text = f"skillmerge: 1\nmodels: {{target: {family / 'target'}, math: {{skill: {skill}}}}}\n"
        (work / "skill.yaml").write_text(text + "merge: target + 0.7 * math\n")
        jobs["extract"] = Job([*extract, str(out)], out, {})
        jobs["apply from a skill"] = Job(["apply", str(work / "skill.yaml"), "-o", str(out), "-q"], out, {})
    if "sweep" in wanted:
        demo = work / "versus-demo"
        shutil.rmtree(demo, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "skillmerge", "demo", str(demo)], check=True, stdout=subprocess.DEVNULL)
        questions = json.loads((FAMILY / "questions.json").read_text())
        rows = [{**question, "pattern": r"(\S+)$"} for question in questions]
        (demo / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
        score = ["--set", "lam=0.5:1.5:0.1", "--score", f"qa:{demo / 'qa.jsonl'}"]
        jobs["sweep"] = Job(["sweep", str(demo / "recipe.yaml"), *score, "-o", str(out), "-q"], out, {})
    server = None
    if wanted & {"from the Hub"}:
        make(small, "0.5B")
        script = SERVER.format(tests=str(ROOT / "tests"), work=str(work), family=str(small), latency=0.0)
        server = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        hub = json.loads(server.stdout.readline())[0]
        models = ", ".join(f"{model}: hf://bench/{model}" for model in ("target", "sft", "rl"))
        (work / "hub.yaml").write_text(f"skillmerge: 1\nmodels: {{{models}}}\nmerge: target + 0.7 * (rl - sft)\n")
        jobs["from the Hub"] = Job(["apply", str(work / "hub.yaml"), "-o", str(out), "-q"], out, hub)
    return {name: job for name, job in jobs.items() if name in wanted}, server


def measure(program: list[str], job: Job, log: Path) -> Sample:
    shutil.rmtree(job.out, ignore_errors=True)
    if "HF_HOME" in job.environment:
        shutil.rmtree(job.environment["HF_HOME"], ignore_errors=True)
    subprocess.run(["sync"], check=True)
    settings = [f"{name}={value}" for name, value in job.environment.items()]
    return run(["env", *settings, *program, *job.arguments], log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", help="the skillmerge program of the other environment")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", default="1.5B", help="a size that family.py knows")
    parser.add_argument("--jobs", default="help,plan,apply,inspect,extract,apply from a skill,sweep,from the Hub")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "skillmerge-benchmark")
    arguments = parser.parse_args()
    arguments.work.mkdir(exist_ok=True)
    jobs, server = prepare(arguments.work, arguments.size, set(arguments.jobs.split(",")))
    programs = {"this": [str(Path(sys.executable).with_name("skillmerge"))], "other": [arguments.other]}
    samples: dict[tuple[str, str], list[Sample]] = {}
    warm(arguments.work / f"{arguments.size}-4")
    for number in range(arguments.rounds + 1):
        for name, job in jobs.items():
            for which in ("this", "other") if number % 2 else ("other", "this"):
                sample = measure(programs[which], job, arguments.work / "versus.log")
                if number:  # the first round warms up
                    samples.setdefault((name, which), []).append(sample)
        print(f"round {number} of {arguments.rounds}", flush=True)
    if server is not None:
        server.kill()
    print(
        "| job | this, s | other, s | wall ratio | CPU ratio | peak memory, MB |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name in jobs:
        ours, theirs = samples[name, "this"], samples[name, "other"]
        wall = [a.wall / b.wall for a, b in zip(ours, theirs, strict=True)]
        cpu = statistics.median(a.cpu / b.cpu for a, b in zip(ours, theirs, strict=True))
        peaks = [max(sample.memory for sample in each) for each in (ours, theirs)]
        seconds = [statistics.median(sample.wall for sample in each) for each in (ours, theirs)]
        print(
            f"| {name} | {seconds[0]:.2f} | {seconds[1]:.2f} "
            f"| {statistics.median(wall):.3f} ({min(wall):.2f} to {max(wall):.2f}) | {cpu:.3f} "
            f"| {peaks[0]:.0f} against {peaks[1]:.0f} |"
        )


if __name__ == "__main__":
    main()
