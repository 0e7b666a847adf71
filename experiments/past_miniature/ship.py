"""Put the four small checkpoints of one seed, in bfloat16, and the target's questions into the package, for its demo.

`python -m experiments.past_miniature.ship`, after `run`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

from skillmerge.verbs.demo.miniature import FAMILY, MODELS

from . import train
from .world import KIND_OF, VERBS, World, prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/past_miniature"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shutil.rmtree(FAMILY, ignore_errors=True)
    for name in MODELS:
        stage = "-".join(reversed(name.split("-")))  # sft-source is source-sft there
        model = train.load(arguments.work / f"seed-{arguments.seed}" / stage)
        train.save(model.to(torch.bfloat16), FAMILY / name)
    asked = [
        {"question": " ".join(prompt(person, verb)), "answer": KIND_OF[person.facts[verb]]}
        for person in World.of(arguments.seed).target
        for verb in VERBS
    ]
    lines = ",\n".join(json.dumps(item) for item in asked)
    (FAMILY / "questions.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    for path in FAMILY.rglob("*.safetensors"):
        path.chmod(0o644)
    size = sum(path.stat().st_size for path in FAMILY.rglob("*") if path.is_file())
    print(f"{FAMILY}: {size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
