"""Merging from the Hub against reading the same bytes with the plain client, from a Hub on loopback.

    python benchmarks/hub.py [--rounds 5] [--latency 0.02]

Each round runs every command once: `read` (the plain client, one file after the other, to nowhere), `download`
(hf_hub_download of the three, into an empty cache), and `skillmerge apply`, streaming three checkpoints of 1 GB
and writing one; then the same merge from a Hub that waits before each answer. The server is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SERVER = """
import json, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from hub_server import HubServer
hubs = []
for latency in (0.0, {latency}):
    hub = HubServer(Path({work!r}) / f"hub-{{latency}}", latency=latency)
    hub.__enter__()
    for model in ("target", "sft", "rl"):
        hub.create_from(f"bench/{{model}}", Path({family!r}) / model)
    hubs.append(hub.variables())
print(json.dumps(hubs), flush=True)
time.sleep(10**6)
"""
READ = """
from huggingface_hub import hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session
for model in ("target", "sft", "rl"):
    url = hf_hub_url(f"bench/{model}", "model.safetensors")
    with get_session().stream("GET", url, headers=build_hf_headers(), follow_redirects=True) as response:
        for piece in response.iter_raw():
            pass
"""
DOWNLOAD = """
from huggingface_hub import hf_hub_download
for model in ("target", "sft", "rl"):
    hf_hub_download(f"bench/{model}", "model.safetensors")
"""


def run(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds, and peak resident megabytes."""
    started = time.monotonic()
    process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command} failed")
    return time.monotonic() - started, usage.ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="0.5B", help="a size that family.py knows; 0.5B is 1 GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--latency", type=float, default=0.02, help="seconds before each answer")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "skillmerge-benchmark")
    arguments = parser.parse_args()
    family = arguments.work / f"{arguments.size}-1"
    subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "family.py"), str(family), "--size", arguments.size], check=True
    )
    recipe = arguments.work / "hub.yaml"
    models = ", ".join(f"{model}: hf://bench/{model}" for model in ("target", "sft", "rl"))
    recipe.write_text(f"skillmerge: 1\nmodels: {{{models}}}\nmerge: target + 0.7 * (rl - sft)\n")
    script = SERVER.format(
        tests=str(ROOT / "tests"), work=str(arguments.work), family=str(family), latency=arguments.latency
    )
    server = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    plain, slow = json.loads(server.stdout.readline())
    out = arguments.work / "hub-out"
    apply = [sys.executable, "-m", "skillmerge", "apply", str(recipe), "-o", str(out), "-q"]
    commands = {
        "skillmerge": (apply, plain),
        "read": ([sys.executable, "-c", READ], plain),
        "download": ([sys.executable, "-c", DOWNLOAD], plain),
        "skillmerge, latency": (apply, slow),
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    memory = 0.0
    for number in range(arguments.rounds + 1):
        for name, (command, environment) in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(environment["HF_HOME"], ignore_errors=True)
            os.sync()
            seconds, peak = run(command, environment)
            if number:
                times[name].append(seconds)
                memory = max(memory, peak) if name.startswith("skillmerge") else memory
                print(f"round {number} {name:20} {seconds:6.2f} s {peak:6.0f} MB", flush=True)
    server.kill()
    for name, other in (("skillmerge", "read"), ("skillmerge", "download"), ("skillmerge, latency", "skillmerge")):
        ratios = [ours / theirs for ours, theirs in zip(times[name], times[other], strict=True)]
        median = statistics.median(ratios)
        print(f"{name} / {other}: {median:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"skillmerge's peak memory: {memory:.0f} MB")


if __name__ == "__main__":
    main()
