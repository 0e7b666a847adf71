"""Seconds per candidate of a sweep, in memory and by command, on the built-in family.

    python benchmarks/sweep.py [--rounds 3]

Both ways answer the same questions with transformers; the command is a process of its own, as a user's would be.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from skillmerge.verbs.demo.miniature import questions

SCORE = """\
import sys, transformers
from skillmerge.study.scoring.scorers import find_scorer
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
print(find_scorer(sys.argv[2]).function(model, tokenizer, 0)["accuracy"].value)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    tool = [sys.executable, "-m", "skillmerge"]
    ratios = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "demo"
        subprocess.run([*tool, "demo", str(folder)], check=True, stdout=subprocess.DEVNULL)
        rows = [
            {"question": " ".join(question.words), "answer": question.wanted, "pattern": r"(\S+)$"}
            for question in questions()
        ]
        measure = f"qa:{folder / 'qa.jsonl'}"
        (folder / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / "score.py").write_text(SCORE)
        command = f"{shlex.quote(sys.executable)} {folder / 'score.py'} {{}} {measure}"
        for number in range(1, arguments.rounds + 1):
            seconds = {}
            scores = {}
            for name, score in (("in memory", measure), ("by command", command)):
                sweep = [*tool, "sweep", str(folder / "recipe.yaml"), "--set", "lam=0.5:1.5:0.25", "--score", score]
                sweep += ["-o", str(folder / f"{name.split()[-1]}-{number}"), "--json", "-q"]
                done = subprocess.run(sweep, check=True, capture_output=True, text=True)
                trials = json.loads(done.stdout)["trials"]
                seconds[name] = [trial["seconds"] for trial in trials]
                scores[name] = [next(iter(trial["scores"].values()))["value"] for trial in trials]
            assert scores["in memory"] == scores["by command"]
            both = [statistics.median(seconds[name]) for name in ("in memory", "by command")]
            ratios.append(both[1] / both[0])
            print(f"round {number}: in memory {both[0]:.2f} s, by command {both[1]:.2f} s", flush=True)
    print(f"by command / in memory: {statistics.median(ratios):.0f} ({min(ratios):.0f} to {max(ratios):.0f})")


if __name__ == "__main__":
    main()
