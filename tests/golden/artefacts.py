"""Make artefacts.tar.gz: what an older version has left behind, and newer ones must read and continue.

    python tests/golden/artefacts.py --command "path/to/skillmerge"

The archive was made once, with version 0.1.0, and is kept: making it again with newer code would prove nothing. One
folder for each scenario that names it in `artefact`.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from playing import ARTEFACTS, HERE, Scenario, clean_environment
from playing import prepare as put
from scenarios import OTHER_DONOR, SCENARIOS

Files = dict[str, bytes]


def run(words: list[str], line: str, work: Path, **environment: str) -> None:
    """Run one command that has to succeed."""
    env = {**clean_environment(), "NO_COLOR": "1", **environment}
    subprocess.run([*words, *shlex.split(line)], cwd=work, env=env, check=True)


def half_done(words: list[str], line: str, work: Path) -> None:
    """Run a merge and kill it when it has finished its first shard. Raises RuntimeError where it was too fast."""
    pipe = work / "pipe"
    os.mkfifo(pipe)
    argv = [*words, *shlex.split(line), "--events", str(pipe)]
    with subprocess.Popen(argv, cwd=work, env=clean_environment(), stderr=subprocess.DEVNULL) as process:
        with open(pipe) as events:
            for event in map(json.loads, events):
                if event["event"] == "shard_finished":
                    process.send_signal(signal.SIGKILL)
                    break
        process.wait()
    pipe.unlink()
    if process.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the run was not killed: {line}")


def is_half_done(staging: Path) -> bool:
    """Whether the journal has some shards and a shard is missing."""
    journal = staging / "journal.jsonl"
    entries = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    return any("shard" in entry for entry in entries) and not any("manifest_sha256" in entry for entry in entries)


def collected(work: Path, *names: str) -> Files:
    """The files below these names, with the work folder's path taken out of saved plans."""
    found = {}
    for name in names:
        top = work / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file():
                data = path.read_bytes()
                data = data.replace(str(work).encode(), b"<work>") if path.name == "plan.json" else data
                found[path.relative_to(work).as_posix()] = data
    return found


@contextmanager
def workplace(scenario: Scenario) -> Iterator[Path]:
    """A folder with the models and files of a scenario."""
    with tempfile.TemporaryDirectory(prefix="golden-", dir="/tmp") as name:
        work = Path(name).resolve()
        put(Scenario((), scenario.models, scenario.files), work)
        yield work


def output(words: list[str]) -> Files:
    with workplace(SCENARIOS["old output"]) as work:
        run(words, "apply recipe.yaml --threads 2 --device cpu -q", work)
        return collected(work, "merged")


def skill(words: list[str]) -> Files:
    with workplace(SCENARIOS["old skill"]) as work:
        run(words, "extract --from rl --minus sft -o skill --threads 2 -q", work)
        run(words, "extract --from rl --minus sft -o packed --zstd --dtype float32 --keep 0.3 --threads 2 -q", work)
        return collected(work, "skill", "packed")


def plan(words: list[str]) -> Files:
    with workplace(SCENARIOS["old plan"]) as work:
        run(words, "plan recipe.yaml --set lam=0.45 --threads 2 -o plan.json --json", work)
        return collected(work, "plan.json")


def lock(words: list[str]) -> Files:
    """A lock of two models on the test suite's own Hub."""
    sys.path.insert(0, str(HERE.parent))
    from hub_server import HubServer

    with workplace(SCENARIOS["past"]) as work, HubServer(work / "hub") as hub:
        for model in ("rl", "sft"):
            hub.create_from(f"acme/{model}", work / model)
        text = SCENARIOS["past"].files["recipe.yaml"].replace("./rl", "hf://acme/rl@main")
        (work / "recipe.yaml").write_text(text.replace("./sft", "hf://acme/sft@main"))
        run(words, "plan recipe.yaml --lock", work, HF_HUB_OFFLINE="0", **hub.variables())
        return collected(work, "recipe.yaml", "recipe.lock")


def staging(scenario: Scenario, folder: str, *then: str) -> Callable[[list[str]], Files]:
    """How to make the staging folder of a run that was killed. then: a further command, and a file that it writes."""

    def make(words: list[str]) -> Files:
        for _ in range(50):
            with workplace(scenario) as work:
                half_done(words, "apply recipe.yaml --threads 1 --device cpu", work)
                if is_half_done(work / folder):
                    for line in then[:1]:
                        run(words, line, work)
                    return collected(work, folder, *then[1:])
        raise RuntimeError("the runs were always too fast to be killed halfway")

    return make


MAKERS: Mapping[str, Callable[[list[str]], Files]] = {
    "output": output,
    "skill": skill,
    "plan": plan,
    "lock": lock,
    "staging": staging(SCENARIOS["old staging"], "merged.partial"),
    "skill-staging": staging(SCENARIOS["old staging of a skill"], "blend.partial"),
    "donor-staging": staging(OTHER_DONOR, "merged.partial", "plan recipe.yaml -o plan.json", "plan.json"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", required=True, help="the command line of the old version")
    words = shlex.split(parser.parse_args().command)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for folder, make in MAKERS.items():
            for name, data in make(words).items():
                member = tarfile.TarInfo(f"{folder}/{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    ARTEFACTS.write_bytes(gzip.compress(stream.getvalue(), mtime=0))
    print(f"{ARTEFACTS.name}: {ARTEFACTS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
