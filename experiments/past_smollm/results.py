"""Figures of all worlds -> `experiments/SMOLLM.md` and its picture.

`python -m experiments.past_smollm.results`; the words around the figures are in `SMOLLM.in.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template
from typing import Any

import matplotlib
import numpy as np

from .run import LAMBDAS, NARROW, OUTPUTS
from .world import LEFT_OUT, RELATIONS

matplotlib.use("agg")
from matplotlib import pyplot as plt

OUT = Path(__file__).parent.parent
GAIN, LOSS = 30.0, 5.0
CONTROLS = ("SFT_T", "+ shuffled v 1", "+ noise 1", "base + v 1")
COLOURS = ("#a34f00", "#1f5f9f", "#2e7d4f")
MARKS = ("s", "o", "^")
MODES = {
    "bf16 nearest": "bfloat16",
    "bf16 stochastic": "bfloat16, stochastic",
    "bf16 to float32": "float32",
}
"""Our arms, and what the forecast calls their outputs."""

LESS = "+ v of RL without one relation 1"
MEANINGS = {
    "base": "the chat model as published",
    "SFT_T": "it, trained on the target's documents: lambda 0",
    "+ v 1": "**SFT_T + v**",
    "minus v -1": "SFT_T - v",
    "+ shuffled v 1": "v's elements shuffled within each tensor",
    "+ noise 1": "noise of each tensor's norm",
    "base + v 1": "no documents of the target",
    "+ supervised v 1": "a vector from supervised training on right answers about the source",
    LESS: f"RL never asked about one relation ({LEFT_OUT})",
    "pre-injection": "base + v, then SFT on the target's documents",
    "RL on target": "SFT_T, then RL on these very questions",
}
World = dict[str, Any]


def read(folder: Path) -> World:
    """All that a run left of one world."""
    world: World = {"number": int(folder.name.rpartition("-")[2])}
    for name in ("learnt", "forecast", "source", "geometry", "sweep", "minutes"):
        path = folder / f"{name}.json"
        world[name] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    world["arms"] = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("arms/*.json")}
    return world


def right(arm: World, key: str = "greedy", what: str = "right") -> float:
    """A share of questions, in percent."""
    values = arm[key]
    return 100 * statistics.fmean(values[what] if isinstance(values, dict) else values)


def sampled(arm: World) -> float:
    return 100 * statistics.fmean(value for row in arm["sampled"] for value in row)


def passed(arm: World) -> float:
    """The share of questions that at least one sampled answer gets right, in percent."""
    return 100 * statistics.fmean(max(row) for row in arm["sampled"])


def relation(arm: World, name: str) -> float:
    """Greedy accuracy on the questions about one relation, in percent."""
    return 100 * statistics.fmean(arm["greedy"]["right"][RELATIONS.index(name) :: len(RELATIONS)])


def cell(worlds: Sequence[World], name: str, of: Callable[[World], float], digits: int = 0) -> str:
    """Mean of the worlds, and each."""
    try:
        values = [of(world["arms"][name]) for world in worlds]
    except KeyError:
        return "–"
    return f"{statistics.fmean(values):.{digits}f} ({', '.join(f'{value:.{digits}f}' for value in values)})"


def interval(worlds: Sequence[World], name: str) -> tuple[float, float, float]:
    """Mean greedy accuracy, and a 95 % bootstrap interval: worlds, and people within them, drawn anew. In percent."""
    generator = np.random.default_rng(0)
    people = [np.array(world["arms"][name]["greedy"]["right"]).reshape(-1, len(RELATIONS)).mean(1) for world in worlds]
    means = []
    for _ in range(1000):
        drawn = generator.integers(len(people), size=len(people))
        means.append(np.mean([generator.choice(people[world], people[world].size).mean() for world in drawn]))
    low, high = np.quantile(means, [0.025, 0.975])
    return 100 * float(np.mean([row.mean() for row in people])), 100 * float(low), 100 * float(high)


def verdict(world: World) -> World:
    """What the criterion compares in one world."""
    arms = world["arms"]
    best = max(CONTROLS, key=lambda name: right(arms[name]))
    gain = right(arms["+ v 1"]) - right(arms[best])
    lost = right(arms["SFT_T"], "recall") - right(arms["+ v 1"], "recall")
    rounding = right(arms["bf16 stochastic 0.4"]) - right(arms["bf16 nearest 0.4"])
    return {
        "world": world["number"], "best": best, "gain": gain, "lost": lost, "rounding": rounding,
        "holds": gain >= GAIN and lost <= LOSS, "rounds": rounding >= GAIN,
    }  # fmt: skip


def yes(holds: bool) -> str:
    return "yes" if holds else "no"


def criterion(worlds: Sequence[World]) -> str:
    lines = []
    for world in worlds:
        row = verdict(world)
        lines.append(
            f"| {row['world']} | {row['gain']:+.1f} ({row['best'].removesuffix(' 1')}) | {-row['lost']:+.1f} "
            f"| {yes(row['holds'])} | {row['rounding']:+.1f} | {yes(row['rounds'])} |"
        )
    return "\n".join(lines)


def arms(worlds: Sequence[World]) -> str:
    lines = [
        "| | greedy | 95% interval | sampled | pass@8 | recall | known before | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, meaning in MEANINGS.items():
        _, low, high = interval(worlds, name)
        eight = all(len(world["arms"][name]["sampled"][0]) == 8 for world in worlds)
        row = [
            label(name), cell(worlds, name, right), f"{low:.0f} to {high:.0f}", cell(worlds, name, sampled),
            cell(worlds, name, passed) if eight else "–", cell(worlds, name, lambda arm: right(arm, "recall")),
            cell(worlds, name, lambda arm: right(arm, "known")), meaning,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def label(name: str) -> str:
    return name.removesuffix(" -1").removesuffix(" 1")


def more(worlds: Sequence[World]) -> str:
    """What only the main arms have."""
    lines = [
        "| | bfloat16 | held-out phrasing | in 32 tokens | two hops | perplexity | KL to SFT_T |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in MEANINGS:
        row = [
            cell(worlds, name, lambda arm: right(arm, "greedy_bf16")),
            cell(worlds, name, lambda arm: right(arm, "held_out")),
            cell(worlds, name, lambda arm: right(arm, "greedy", "named")),
            cell(worlds, name, lambda arm: right(arm, "two_hops", "named")),
            cell(worlds, name, lambda arm: arm["perplexity"], 1),
            cell(worlds, name, lambda arm: arm["kl"], 3),
        ]
        lines.append(f"| {label(name)} | {' | '.join(row)} |")
    return "\n".join(lines)


def lambdas(worlds: Sequence[World]) -> str:
    lines = [
        "| lambda | greedy | sampled | recall | known before | perplexity | KL to SFT_T |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for lam in (0.0, *sorted(LAMBDAS)):
        name = f"+ v {lam:g}" if lam else "SFT_T"
        row = [
            cell(worlds, name, right), cell(worlds, name, sampled),
            cell(worlds, name, lambda arm: right(arm, "recall")), cell(worlds, name, lambda arm: right(arm, "known")),
            cell(worlds, name, lambda arm: arm["perplexity"], 1),
            cell(worlds, name, lambda arm: arm["kl"], 3),
        ]  # fmt: skip
        lines.append(f"| {lam:g} | {' | '.join(row)} |")
    return "\n".join(lines)


def rounding(worlds: Sequence[World]) -> str:
    lines = [
        "| output | requested λ | forecast λ | effective λ | lost, % | greedy | recall | KL to SFT_T |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm in OUTPUTS:
        for lam in sorted(NARROW):
            name = f"{arm} {lam:g}"
            forecasts = [forecast(world, arm, lam) for world in worlds]
            row = [
                arm.removeprefix("bf16 "), f"{lam:g}", f"{statistics.fmean(forecasts):.3f}",
                cell(worlds, name, lambda arm: arm["merge"]["realised_lambda"], 3),
                cell(worlds, name, lambda arm: 100 * arm["merge"]["vanished"], 1), cell(worlds, name, right),
                cell(worlds, name, lambda arm: right(arm, "recall")), cell(worlds, name, lambda arm: arm["kl"], 3),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def forecast(world: World, arm: str, lam: float, key: str = "realised") -> float:
    """What `inspect` said before merging."""
    return next(row[key] for row in world["forecast"]["curves"][MODES[arm]] if row["lambda"] == lam)


def ranks(values: Sequence[float]) -> np.ndarray[Any, Any]:
    """Places in order; equal values share the mean of theirs."""
    array = np.array(values)
    return np.array([(array < value).sum() + ((array == value).sum() - 1) / 2 for value in array])


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


def forecasts(worlds: Sequence[World]) -> str:
    """Does the forecast order the arms as accuracy does, and does it do so better than the requested lambda?"""
    lines = []
    for world in worlds:
        row = []
        for modes in (tuple(OUTPUTS), ("bf16 nearest",)):
            places = [(arm, lam) for arm in modes for lam in NARROW]
            accuracy = [right(world["arms"][f"{arm} {lam:g}"]) for arm, lam in places]
            for key in ([forecast(world, *place) for place in places], [lam for _, lam in places]):
                row.append(f"{rank_correlation(key, accuracy):.2f}")
        lines.append(f"| {world['number']} | {' | '.join(row)} |")
    return "\n".join(lines)


def casts(worlds: Sequence[World]) -> str:
    lines = []
    for world in worlds:
        v, changed = world["forecast"]["v"], sum(world["forecast"]["v"]["ulps"])
        lines.append(
            f"| {world['number']} | {v['changed']:.1%} | {v['ulps'][0] / changed:.1%} "
            f"| {world['forecast']['cosine']:.2f} | {v['input_rounding']:.2f} |"
        )
    return "\n".join(lines)


def relations(worlds: Sequence[World]) -> str:
    lines = []
    for name in ("SFT_T", "+ v 1", LESS):
        row = [cell(worlds, name, lambda arm, kind=kind: relation(arm, kind)) for kind in RELATIONS]
        lines.append(f"| {label(name)} | {' | '.join(row)} |")
    return "\n".join(lines)


def source(worlds: Sequence[World]) -> str:
    lines = []
    for name in worlds[0]["source"]:
        values = [100 * statistics.fmean(world["source"][name]["right"]) for world in worlds]
        lines.append(f"| {name} | {statistics.fmean(values):.0f} ({', '.join(f'{value:.0f}' for value in values)}) |")
    return "\n".join(lines)


def gains(worlds: Sequence[World]) -> str:
    """The share of the gain of RL on the target itself that v brings."""
    shares = []
    for world in worlds:
        found = [right(world["arms"][name]) for name in ("SFT_T", "+ v 1", "RL on target")]
        shares.append(f"{100 * (found[1] - found[0]) / (found[2] - found[0]):.0f}%" if found[2] > found[0] else "–")
    return ", ".join(shares)


def geometry(worlds: Sequence[World]) -> str:
    lines = []
    for world in worlds:
        row = world["geometry"]
        lines.append(
            f"| {world['number']} | {row['cosine']:.4f} | {row['cosine_z_signs']:.1f} | {row['changed']:.1%} "
            f"| {row['norm_ratio']:.2%} | {row['updates_ratio']:.2f} |"
        )
    return "\n".join(lines)


def scores(swept: World) -> dict[float, float]:
    return {row["values"]["lam"]: 100 * row["scores"]["accuracy"]["value"] for row in swept["trials"]}


def sweeps(worlds: Sequence[World]) -> str:
    lines = []
    for world in worlds:
        swept = world["sweep"]["first"]
        first, other = scores(swept), scores(world["sweep"]["other"])
        best, least = swept["best"]["values"]["lam"], min(row["lam"] for row in swept["within_noise"])
        row = [
            f"{lam:g}: {first[lam]:.0f}, {other[lam]:.0f}"
            for lam in (best, least, 1.0, max(other, key=other.__getitem__))
        ]
        seconds = statistics.median(trial["seconds"] for trial in swept["trials"])
        lines.append(f"| {world['number']} | {' | '.join(row)} | {seconds:.0f} |")
    return "\n".join(lines)


def picture(worlds: Sequence[World], path: Path) -> None:
    """Accuracy over lambda for each way to round, and below it the effective lambda."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 7), sharex=True, height_ratios=(3, 2))
    lams = sorted(NARROW)
    for arm, colour, mark in zip(OUTPUTS, COLOURS, MARKS, strict=True):
        points = np.array([interval(worlds, name) for name in ("SFT_T", *(f"{arm} {lam:g}" for lam in lams))])
        places = [0.0, *lams]
        text = arm.replace("bf16", "bfloat16")
        above.plot(places, points[:, 0], color=colour, marker=mark, label=text, linewidth=1.6, markersize=5)
        above.fill_between(places, points[:, 1], points[:, 2], color=colour, alpha=0.13, linewidth=0)
        effective = [
            statistics.fmean(world["arms"][f"{arm} {lam:g}"]["merge"]["realised_lambda"] for world in worlds)
            for lam in lams
        ]
        below.plot(places, [0.0, *effective], color=colour, marker=mark, linewidth=1.6, markersize=5)
    below.plot([0, 1], [0, 1], color="#888888", linewidth=0.8, linestyle=":")
    above.set_ylabel("target's questions answered correctly, %")
    above.set_ylim(0, 102)
    above.legend(frameon=False, fontsize=9, loc="lower right")
    below.set_ylabel("effective lambda")
    below.set_xlabel("requested lambda (bfloat16 files)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/past_smollm"))
    parser.add_argument("--worlds", nargs="+", default=["world-1", "world-2", "world-3"], help="folders in there")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    everything = [read(arguments.work / name) for name in arguments.worlds]
    worlds = [world for world in everything if world["sweep"]]
    rows = [verdict(world) for world in worlds]

    def held(key: str) -> str:
        count = sum(row[key] for row in rows)
        every = count == len(everything)
        return (
            f"holds in every world ({count} of {count})" if every else f"holds in {count} of {len(everything)} worlds"
        )

    picture(worlds, arguments.out / "rounding.png")
    text = Template((Path(__file__).parent / "SMOLLM.in.md").read_text(encoding="utf-8")).substitute(
        worlds=len(everything),
        minutes=", ".join(f"{world['minutes']:.0f}" for world in everything),
        known=len(worlds[0]["arms"]["base"]["known"]),
        learnt="\n".join(
            f"| {world['number']} | {world['learnt']['source']:.1%} | {world['learnt']['target']:.1%} "
            f"| {yes(bool(world['sweep']))} |"
            for world in everything
        ),
        held=held("holds"), rounds=held("rounds"), criterion=criterion(worlds), arms=arms(worlds), more=more(worlds),
        lambdas=lambdas(worlds), rounding=rounding(worlds), forecasts=forecasts(worlds), casts=casts(worlds),
        relations=relations(worlds), source=source(worlds), gains=gains(worlds), geometry=geometry(worlds),
        sweeps=sweeps(worlds),
    )  # fmt: skip
    (arguments.out / "SMOLLM.md").write_text(text, encoding="utf-8")
    print(arguments.out / "SMOLLM.md")


if __name__ == "__main__":
    main()
