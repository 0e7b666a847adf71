"""Adapters of several ranks against the dense merge that they stand for, in turns.

    python benchmarks/adapters.py [--size 1.5B] [--ranks 8,16,64] [--rounds 3]

`target + 0.7 * (rl - sft)` from whole checkpoints, against `target + 0.7 * v` with an adapter on every projection of
every layer. Both read the target and write the same number of bytes. Each round runs every command once; figures are
medians over rounds, ratios are taken round by round. The first round warms up.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
from apply import in_turns, machine, make, spread
from safetensors import safe_open
from safetensors.torch import save_file

_TARGETED = re.compile(r"(.*_proj)\.weight")


def write_adapter(model: Path, folder: Path, rank: int) -> None:
    """An adapter in bfloat16 on every projection of a model, random and small."""
    draw = torch.Generator().manual_seed(rank)
    tensors = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 - not a dict
                if (found := _TARGETED.fullmatch(name)) is None:
                    continue
                rows, columns = reader.get_slice(name).get_shape()
                for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                    value = torch.randn(shape, generator=draw) * 0.003
                    tensors[f"base_model.model.{found[1]}.lora_{part}.weight"] = value.to(torch.bfloat16)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def commands(family: Path, out: Path, ranks: list[int]) -> dict[str, list[str]]:
    found = {}
    recipes = {"dense": (f"rl: {family / 'rl'}, sft: {family / 'sft'}", "target + 0.7 * (rl - sft)")}
    for rank in ranks:
        folder = family / f"adapter-{rank}"
        if not folder.exists():
            write_adapter(family / "target", folder, rank)
        recipes[f"rank {rank}"] = f"v: {{adapter: {folder}}}", "target + 0.7 * v"
    for name, (models, merge) in recipes.items():
        recipe = family / f"{name.replace(' ', '-')}.yaml"
        recipe.write_text(
            f"skillmerge: 1\nmodels: {{target: {family / 'target'}, {models}}}\nmerge: {merge}\n"
            "accept: [update-size]\n"
        )  # fmt: skip
        found[name] = [sys.executable, "-m", "skillmerge", "apply", str(recipe), "-o", str(out), "-q",
                       "--device", "cpu"]  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.5B", help="a size that family.py knows")
    parser.add_argument("--ranks", default="8,16,64")
    parser.add_argument("--rounds", type=int, default=3, help="0: the first run counts")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "skillmerge-benchmark")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    family = arguments.work / f"{arguments.size}-1"
    make(family, arguments.size)
    ranks = [int(rank) for rank in arguments.ranks.split(",")]
    print(f"{machine()} {arguments.size}, {arguments.rounds} rounds, {time.strftime('%Y-%m-%d')}\n")
    out = arguments.work / "out"
    samples = in_turns(commands(family, out, ranks), family, out, arguments.rounds)
    print("\n| merge | wall s | CPU s | peak MB | wall / dense |\n| --- | --- | --- | --- | --- |")
    for name, found in samples.items():
        ratios = [it.wall / dense.wall for dense, it in zip(samples["dense"], found, strict=True)]
        cells = (
            name, spread([it.wall for it in found], 1), spread([it.cpu for it in found], 1),
            f"{max(it.memory for it in found):.0f}", spread(ratios, 2) if name != "dense" else "",
        )  # fmt: skip
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
