"""Record what the command line does today into recorded.json.gz, for `test_golden.py` to compare with.

    python tests/golden/record.py --command "path/to/skillmerge"

Run it with a version whose behavior is wanted, and only where a change of behavior is meant; the diff of the replay
shows what it will change. `--output` writes elsewhere, so that two recordings can be compared.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from playing import HERE, by_command, play
from scenarios import SCENARIOS

RECORDED = HERE / "recorded.json.gz"


def read_recorded(path: Path = RECORDED) -> dict[str, Any]:
    """Scenario -> the results of its steps."""
    return dict(json.loads(gzip.decompress(path.read_bytes())))


def write_recorded(path: Path, recorded: dict[str, Any]) -> None:
    """Write the same bytes for the same recording."""
    text = json.dumps(recorded, indent=0, ensure_ascii=False, sort_keys=True)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", default="skillmerge", help="the command line to record")
    parser.add_argument("--output", type=Path, default=RECORDED)
    parser.add_argument("--only", nargs="*", default=list(SCENARIOS), help="scenarios to record; the others are kept")
    options = parser.parse_args()
    run = by_command(shlex.split(options.command))
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda name: play(SCENARIOS[name], run), options.only)
        fresh = dict(zip(options.only, results, strict=True))
    kept = read_recorded(options.output) if options.output.exists() else {}
    kept = {name: steps for name, steps in kept.items() if name in SCENARIOS}
    write_recorded(options.output, {**kept, **fresh})
    print(f"recorded {len(fresh)} scenarios, {options.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
