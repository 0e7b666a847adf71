"""Figures of `measured.json` -> `experiments/RESULTS.md` and its pictures.

`python -m experiments.past_miniature.results`; the words around the figures are in `RESULTS.in.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import matplotlib
import numpy as np

from ..common import interval

matplotlib.use("agg")
from matplotlib import pyplot as plt

OUT = Path(__file__).parent.parent
CURVES = ("+ v", "+ supervised v", "+ shuffled v", "+ Gaussian", "+ (SFT_S - base)", "base + v")
COLOURS = ("#1f5f9f", "#a34f00", "#4b4f56", "#7a4fa3", "#2e7d4f", "#b03060")
MARKS = ("o", "s", "^", "v", "D", "x")
MEANINGS = {
    "base": "the pretrained model",
    "SFT_T": "it, trained on the target's documents: lambda 0",
    "RL_S": "the source's RL model, asked about the target's people",
    "+ v 1": "**SFT_T + v**",
    "+ v -1": "SFT_T - v",
    "+ shuffled v 1": "v's elements shuffled within each tensor",
    "+ Gaussian 1": "noise of each tensor's norm",
    "+ (SFT_S - base) 1": "another task vector: what the source's documents changed",
    "base + v 1": "no documents of the target: does v carry facts?",
    "+ supervised v 1": "a vector from supervised training on right answers about the source",
    "sequential": "RL_S, then SFT on the target's documents",
    "pre-injection": "base + v, then SFT on the target's documents",
    "RL on target": "SFT_T, then RL on these very questions: what is there to gain",
    "+ v, K = 2, after round 1": "v of half of the source",
    "+ v, K = 2, after round 2": "v refined on the other half (K = 2)",
    "+ v without one verb: others": "RL saw three of four verbs: questions about those",
    "+ v without one verb: it": "... and about the fourth",
    "+ v, bfloat16 files": "all three checkpoints, and the merge, in bfloat16",
    "noisy: SFT_T": "the noisy habit replayed during SFT: SFT_T",
    "noisy: + v": "... SFT_T + v",
    "noisy: sequential": "... sequential",
    "noisy: pre-injection": "... pre-injection",
}


def mean(row: dict[str, Any], key: str) -> float:
    value = row[key]
    return statistics.fmean(value) if isinstance(value, list) else float(value)


def spread(values: Sequence[float]) -> str:
    """Median of the seeds, and the least and greatest, in percent."""
    return f"{100 * statistics.median(values):.0f} ({100 * min(values):.0f} to {100 * max(values):.0f})"


def verdicts(seeds: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """What the criterion compares, by seed."""
    found = []
    for seed in seeds:
        arms = seed["arms"]
        row = {"seed": seed["seed"]}
        for key in ("greedy", "sampled"):
            control = max(mean(arms["SFT_T"], key), mean(arms["+ shuffled v 1"], key))
            row[key] = 100 * (mean(arms["+ v 1"], key) - control)
        row["recall"] = 100 * (arms["+ v 1"]["recall"] - arms["SFT_T"]["recall"])
        row["holds"] = row["greedy"] >= 20 and row["sampled"] >= 20 and row["recall"] >= -5
        found.append(row)
    return found


def curves(seeds: Sequence[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, key in zip(axes, ("greedy", "sampled"), strict=True):
        for arm, colour, mark in zip(CURVES, COLOURS, MARKS, strict=True):
            names = sorted((row["lambda"], name) for name, row in seeds[0]["arms"].items() if row["arm"] == arm)
            start = "base" if arm == "base + v" else "SFT_T"
            names = sorted([*names, (0.0, start)])
            points = np.array([interval([np.array(seed["arms"][name][key]) for seed in seeds]) for _, name in names])
            lambdas = [lam for lam, _ in names]
            axis.plot(lambdas, 100 * points[:, 0], color=colour, marker=mark, label=arm, linewidth=1.6, markersize=5)
            axis.fill_between(lambdas, 100 * points[:, 1], 100 * points[:, 2], color=colour, alpha=0.15, linewidth=0)
        axis.axhline(12.5, color="#888888", linewidth=0.8, linestyle=":")
        axis.set_title("greedy" if key == "greedy" else "sampled at temperature 1")
        axis.set_xlabel("lambda")
    axes[0].set_ylabel("target's questions answered rightly, %")
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    axes[1].annotate("a guess", (-1, 13.5), fontsize=8, color="#666666")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def orthogonality(seeds: Sequence[dict[str, Any]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6.4, 3.6))
    layers = list(seeds[0]["geometry"]["v"]["layers"])
    for shift, (name, colour, mark) in enumerate((("v", COLOURS[0], "o"), ("SFT_S - base", COLOURS[4], "D"))):
        for seed in seeds:
            values = [seed["geometry"][name]["layers"][layer]["cosine_z_signs"] for layer in layers]
            places = np.arange(len(layers)) + (shift - 0.5) * 0.12
            label = f"{name} and SFT_T - base" if seed is seeds[0] else None
            axis.plot(places, values, mark, color=colour, label=label, linestyle="none", markersize=6)
    axis.axhspan(-2, 2, color="#888888", alpha=0.2, linewidth=0)
    axis.annotate("within two deviations of chance", (0.02, 2.3), xycoords=("axes fraction", "data"), fontsize=8)
    axis.set_xticks(range(len(layers)), layers)
    axis.set_ylabel("z of the cosine\n(against random signs)")
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def recalls(seeds: Sequence[dict[str, Any]], path: Path) -> None:
    arms = (
        "base",
        "SFT_T",
        "+ v 1",
        "+ v 2",
        "+ supervised v 1",
        "+ shuffled v 1",
        "sequential",
        "pre-injection",
        "RL on target",
    )
    figure, axis = plt.subplots(figsize=(9, 3.6))
    for shift, (key, colour, label) in enumerate(
        (("recall", COLOURS[0], "the target's documents"), ("recall_known", COLOURS[1], "documents known before"))
    ):
        values = [[100 * seed["arms"][arm][key] for seed in seeds] for arm in arms]
        middle = [statistics.median(row) for row in values]
        errors = [[m - min(row) for m, row in zip(middle, values, strict=True)],
                  [max(row) - m for m, row in zip(middle, values, strict=True)]]  # fmt: skip
        bars = axis.bar(
            np.arange(len(arms)) + (shift - 0.5) * 0.38, middle, 0.36, yerr=errors, color=colour, label=label,
            hatch=("", "//")[shift], edgecolor="white", error_kw={"linewidth": 1},
        )  # fmt: skip
        axis.bar_label(bars, [f"{value:.0f}" for value in middle], fontsize=7, padding=1)
    axis.set_xticks(range(len(arms)), arms, fontsize=8, rotation=12)
    axis.set_ylabel("facts recalled, %")
    axis.set_ylim(0, 118)
    axis.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(seeds: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| | greedy | sampled | recall, target | recall, known before | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, meaning in MEANINGS.items():
        rows = [seed["arms"][name] for seed in seeds]
        cells = [spread([mean(row, key) for row in rows]) for key in ("greedy", "sampled", "recall", "recall_known")]
        lam = rows[0]["lambda"]
        label = name if lam is None else f"{rows[0]['arm']}, lambda {lam:g}"
        lines.append(f"| {label} | {' | '.join(cells)} | {meaning} |")
    return "\n".join(lines)


def lambdas(seeds: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| lambda | greedy | sampled | recall, target | recall, known before |",
        "| --- | --- | --- | --- | --- |",
    ]
    names = sorted((row["lambda"], name) for name, row in seeds[0]["arms"].items() if row["arm"] == "+ v")
    for lam, name in sorted([*names, (0.0, "SFT_T")]):
        rows = [seed["arms"][name] for seed in seeds]
        cells = [spread([mean(row, key) for row in rows]) for key in ("greedy", "sampled", "recall", "recall_known")]
        lines.append(f"| {lam:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def geometry(seeds: Sequence[dict[str, Any]], name: str) -> str:
    """One row: an update against the target's own, seed by seed."""
    rows = [seed["geometry"][name]["all"] for seed in seeds]
    cells = [
        ", ".join(format(row[key], how) for row in rows)
        for key, how in (("cosine", ".3f"), ("cosine_z_signs", ".1f"), ("changed", ".0%"), ("updates_ratio", ".2f"))
    ]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/past_miniature"))
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    measured = json.loads((arguments.work / "measured.json").read_text())
    seeds = measured["seeds"]
    curves(seeds, arguments.out / "accuracy.png")
    orthogonality(seeds, arguments.out / "orthogonality.png")
    recalls(seeds, arguments.out / "recall.png")
    held = verdicts(seeds)
    count = sum(bool(row["holds"]) for row in held)
    text = Template((Path(__file__).parent / "RESULTS.in.md").read_text(encoding="utf-8")).substitute(
        seeds=len(seeds),
        minutes=f"{measured['minutes']:g}",
        torch=measured["torch"],
        held="holds on every seed" if count == len(held) else f"holds on {count} of {len(held)} seeds",
        criterion="\n".join(
            f"| {row['seed']} | {row['greedy']:.1f} | {row['sampled']:.1f} | {row['recall']:+.1f} "
            f"| {'yes' if row['holds'] else 'no'} |"
            for row in held
        ),
        arms=table(seeds),
        lambdas=lambdas(seeds),
        geometry="\n".join(geometry(seeds, name) for name in ("v", "SFT_S - base")),
    )
    (arguments.out / "RESULTS.md").write_text(text, encoding="utf-8")
    print(arguments.out / "RESULTS.md")


if __name__ == "__main__":
    main()
