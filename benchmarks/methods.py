"""Merge methods against mergekit, in turns, on the same files.

    python benchmarks/methods.py --mergekit PATH/TO/mergekit-yaml [--size 1.5B] [--rounds 3] [--methods ties,slerp]

Two experts of one base, bfloat16. mergekit runs twice: as it does by default, computing in bfloat16, and with
`dtype: float32`, which is how exactly skillmerge computes. Each round runs every command once; figures are medians
over rounds, ratios are taken round by round. The first round warms up. mergekit runs from an environment of its own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from apply import in_turns, machine, make, spread

METHODS = {
    "slerp": ("slerp(target, rl, t=0.4)", "slerp", "", "", {"t": 0.4}),
    "model_stock": ("sft + model_stock(target - sft, rl - sft)", "model_stock", "", "", {}),
    "dare_ties": (
        "sft + elect(drop(target - sft, density=0.5, rescale=l1), drop(rl - sft, density=0.5, rescale=l1))",
        "dare_ties", "weight: 1.0", "density: 0.5", {},
    ),
    "ties": ("sft + ties(target - sft, rl - sft, density=0.3)", "ties", "weight: 1.0", "density: 0.3", {}),
    "sce": ("sft + sce(target - sft, rl - sft)", "sce", "", "", {"select_topk": 1.0}),
}  # fmt: skip
"""Ours, mergekit's method, what it has for each model, and for all."""


def commands(name: str, family: Path, out: Path, mergekit: str) -> dict[str, list[str]]:
    expression, method, weight, density, parameters = METHODS[name]
    models = ", ".join(f"{model}: {family / model}" for model in ("target", "rl", "sft"))
    recipe = family / f"{name}.yaml"
    recipe.write_text(f"skillmerge: 1\nmodels: {{{models}}}\nmerge: {expression}\naccept: [update-size]\n")
    ours = [sys.executable, "-m", "skillmerge", "apply", str(recipe), "-o", str(out), "-q", "--device", "cpu"]
    base = family / ("target" if method == "slerp" else "sft")
    given = ", ".join(filter(None, (weight, density)))
    lines = [f"merge_method: {method}", f"base_model: {base}", "models:"]
    lines += [f"  - {{model: {family / model}, parameters: {{{given}}}}}" for model in ("target", "rl")]
    if parameters:
        lines.append(f"parameters: {{{', '.join(f'{key}: {value}' for key, value in parameters.items())}}}")
    theirs = {}
    for label, dtype in (("bfloat16", "dtype: bfloat16"), ("float32", "dtype: float32\nout_dtype: bfloat16")):
        config = family / f"{name}-{label}.mergekit.yaml"
        config.write_text("\n".join([*lines, dtype, ""]))
        theirs[f"mergekit, {label}"] = [mergekit, str(config), str(out)]
    return {"skillmerge": ours, **theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", required=True)
    parser.add_argument("--size", default="1.5B", help="a size that family.py knows")
    parser.add_argument("--rounds", type=int, default=3, help="0: the first run counts")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "skillmerge-benchmark")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    family = arguments.work / f"{arguments.size}-1"
    make(family, arguments.size)
    print(f"{machine()} {arguments.size}, {arguments.rounds} rounds, {time.strftime('%Y-%m-%d')}\n")
    rows = [
        "| method | command | wall s | CPU s | peak MB | its wall / skillmerge's |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in arguments.methods.split(","):
        print(name)
        samples = in_turns(commands(name, family, arguments.work / "out", arguments.mergekit), family,
                          arguments.work / "out", arguments.rounds)  # fmt: skip
        for command, found in samples.items():
            ratios = [other.wall / ours.wall for ours, other in zip(samples["skillmerge"], found, strict=True)]
            cells = (
                name, command, spread([it.wall for it in found], 1), spread([it.cpu for it in found], 1),
                f"{max(it.memory for it in found):.0f}", spread(ratios, 1) if command != "skillmerge" else "",
            )  # fmt: skip
            rows.append(f"| {' | '.join(cells)} |")
    print("\n" + "\n".join(rows))


if __name__ == "__main__":
    main()
