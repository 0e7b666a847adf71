"""Figures of all worlds -> `experiments/SMOLLM.md` and its picture.

`python -m experiments.past_smollm.results`; the words around the figures are in `SMOLLM.in.md`.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template

from . import figures
from .figures import Figure, World, each, forecast, greedy, known, mean, recall, sampled, share
from .run import LAMBDAS, NARROW, OUTPUTS
from .world import LEFT_OUT, QUESTIONS, RELATIONS, answer, document
from .world import World as People

OUT = Path(__file__).parent.parent
COLORS = ("#a34f00", "#1f5f9f", "#2e7d4f")
MARKS = ("s", "o", "^")
WIDTHS = (1.6, 1.6, 5)
"""Float32 lies below stochastic rounding, and has to be seen."""

LESS = "+ v of RL without one relation 1"
ARMS: Mapping[str, tuple[str, str]] = {
    "base": ("base", "the chat model as published"),
    "SFT_T": ("SFT_T", "base, trained on the target's documents"),
    "+ v 1": ("**SFT_T + v**", "what RL taught SFT_S, added"),
    "minus v -1": ("SFT_T - v", "and taken away"),
    "+ shuffled v 1": ("SFT_T + shuffled v", "v's elements shuffled within each tensor"),
    "+ noise 1": ("SFT_T + noise", "noise with the norm of each of v's tensors"),
    "base + v 1": ("base + v", "without the target's documents"),
    "+ supervised v 1": ("SFT_T + supervised v", "from right answers about the source instead of RL"),
    LESS: (f"SFT_T + v without {LEFT_OUT}", f"from RL that never asked about one relation: {LEFT_OUT}"),
    "pre-injection": ("pre-injection", "base + v, then trained on the target's documents"),
    "RL on target": ("RL on target", "SFT_T, then RL on these very questions"),
}
"""The main arms: how the page calls each, and what it is."""

MAIN: Mapping[str, tuple[Figure, int]] = {
    "greedy": (greedy, 0),
    "sampled": (sampled, 0),
    "pass@8": (figures.passed, 0),
    "recall": (recall, 0),
    "known before": (known, 0),
}
MORE: Mapping[str, tuple[Figure, int]] = {
    "in bfloat16": (lambda arm: share(arm["greedy_bf16"]["right"]), 0),
    "recall in bfloat16": (lambda arm: share(arm["recall_bf16"]), 0),
    "held-out phrasing": (lambda arm: share(arm["held_out"]["right"]), 0),
    "in 32 tokens": (lambda arm: share(arm["greedy"]["named"]), 0),
    "two hops": (lambda arm: share(arm["two_hops"]["named"]), 0),
}
TEXT: Mapping[str, tuple[Figure, int]] = {
    "perplexity": (lambda arm: arm["perplexity"], 1),
    "KL to SFT_T": (lambda arm: arm["kl"], 3),
}
"""Columns of tables: the figure, and its digits."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def cells(worlds: Sequence[World], name: str, columns: Mapping[str, tuple[Figure, int]]) -> list[str]:
    """Figures of an arm; a dash where it was not measured."""
    found = []
    for figure, digits in columns.values():
        try:
            found.append(spread(each(worlds, name, figure), digits))
        except KeyError:
            found.append("–")
    return found


def spread(values: Sequence[float], digits: int = 0) -> str:
    """The mean of the worlds, and of a percentage each."""
    middle = f"{statistics.fmean(values):.{digits}f}"
    return middle if digits else f"{middle} ({', '.join(f'{value:.0f}' for value in values)})"


def yes(holds: bool) -> str:
    return "yes" if holds else "no"


def learned(worlds: Sequence[World]) -> str:
    return table(
        ("world", "recall of SFT_S, %", "recall of SFT_T, %", "learned"),
        (
            (f"{world['number']}", *(f"{100 * world['learnt'][side]:.1f}" for side in ("source", "target")),
             yes(figures.learned(world)))
            for world in worlds
        ),
    )  # fmt: skip


def criterion(worlds: Sequence[World]) -> str:
    head = ("world", "1: gain", "over the best other, which is", "1: recall", "claim 1", "2: gain", "claim 2")
    rows = []
    for world in worlds:
        row = figures.verdict(world)
        one, two = ("holds" if row[key] else "does not hold" for key in ("transfers", "rounds"))
        rows.append((
            f"{row['world']}", f"{row['gain']:+.1f}", ARMS[row["best"]][0], f"{row['recall']:+.1f}", one,
            f"{row['rounding']:+.1f}", two,
        ))  # fmt: skip
    return table(head, rows)


def held(worlds: Sequence[World], key: str, total: int) -> str:
    """Whether a claim holds in every world; one that was not learned counts as one where it does not."""
    count = sum(figures.verdict(world)[key] for world in worlds)
    if count == total:
        return f"holds in every world ({count} of {total})"
    return f"does not hold in every world: it holds in {count} of {total}"


def models() -> str:
    return table(("model", "what it is"), ARMS.values())


def arms(worlds: Sequence[World]) -> str:
    def row(name: str, label: str) -> Sequence[str]:
        _, low, high = figures.interval(worlds, name)
        first, *others = cells(worlds, name, MAIN)
        return label, first, f"{low:.0f} to {high:.0f}", *others

    first, *others = MAIN
    return table(("model", first, "95% interval", *others), (row(name, label) for name, (label, _) in ARMS.items()))


def more(worlds: Sequence[World]) -> str:
    columns = {**MORE, **TEXT}
    return table(("model", *columns), ((label, *cells(worlds, name, columns)) for name, (label, _) in ARMS.items()))


def lambdas(worlds: Sequence[World]) -> str:
    columns = {name: column for name, column in MAIN.items() if name != "pass@8"} | TEXT
    names = {0.0: "SFT_T", **{lam: f"+ v {lam:g}" for lam in sorted(LAMBDAS)}}
    return table(("λ", *columns), ((f"{lam:g}", *cells(worlds, name, columns)) for lam, name in names.items()))


def rounding(worlds: Sequence[World]) -> str:
    columns: Mapping[str, tuple[Figure, int]] = {
        "greedy": (greedy, 0), "recall": (recall, 0), "KL to SFT_T": TEXT["KL to SFT_T"],
    }  # fmt: skip
    rows = []
    for arm in OUTPUTS:
        for lam in sorted(NARROW):
            name = f"{arm} {lam:g}"
            before = statistics.fmean(forecast(world, arm, lam) for world in worlds)
            after, lost = mean(worlds, name, figures.effective), mean(worlds, name, figures.lost)
            row = (output(arm), f"{lam:g}", f"{before:.3f}", f"{after:.3f}", f"{lost:.1f}")
            rows.append((*row, *cells(worlds, name, columns)))
    return table(("output", "requested λ", "forecast λ", "effective λ", "lost, %", *columns), rows)


def output(arm: str) -> str:
    """How the page calls a way to round."""
    dtype, _, rule = arm.rpartition(" ")
    return "float32" if rule == "float32" else f"{dtype.replace('bf16', 'bfloat16')}, {rule}"


def forecasts(worlds: Sequence[World]) -> str:
    """Does the forecast order the arms as accuracy does, and does it do so better than the requested lambda?"""
    rows = []
    for world in worlds:
        row = [f"{world['number']}"]
        for modes in (tuple(OUTPUTS), ("bf16 nearest",)):
            places = [(arm, lam) for arm in modes for lam in NARROW]
            accuracy = [greedy(world["arms"][f"{arm} {lam:g}"]) for arm, lam in places]
            for key in ([forecast(world, *place) for place in places], [lam for _, lam in places]):
                found = figures.rank_correlation(key, accuracy)
                row.append("–" if found is None else f"{found:.2f}")
        rows.append(row)
    return table(("world", "forecast, all", "requested, all", "forecast, nearest", "requested, nearest"), rows)


def casts(worlds: Sequence[World]) -> str:
    rows = []
    for world in worlds:
        v, changed = world["forecast"]["v"], sum(world["forecast"]["v"]["ulps"])
        one, cosine = v["ulps"][0] / changed, world["forecast"]["cosine"]
        rows.append((f"{world['number']}", f"{v['changed']:.1%}", f"{one:.1%}", f"{cosine:.2f}"))
    return table(("world", "elements not zero", "of these one unit", "cosine with the float32 v"), rows)


def relations(worlds: Sequence[World]) -> str:
    columns = {name: (figures.relation(name), 0) for name in RELATIONS}
    return table(
        ("model", *columns), ((ARMS[name][0], *cells(worlds, name, columns)) for name in ("SFT_T", "+ v 1", LESS))
    )


def source(worlds: Sequence[World]) -> str:
    return table(
        ("model", "greedy"),
        (
            (name.replace("+ v", "SFT_T + v"), spread([share(world["source"][name]["right"]) for world in worlds]))
            for name in worlds[0]["source"]
        ),
    )


def geometry(worlds: Sequence[World]) -> str:
    rows = []
    for world in worlds:
        row = world["geometry"]
        rows.append((
            f"{world['number']}", f"{row['cosine']:.4f}", f"{row['cosine_z_signs']:.1f}", f"{row['changed']:.1%}",
            f"{row['norm_ratio']:.2%}", f"{row['updates_ratio']:.2f}",
        ))  # fmt: skip
    head = ("world", "cosine", "z, random signs", "elements changed", "norm / weights'", "norm / target's update")
    return table(head, rows)


def sweeps(worlds: Sequence[World]) -> str:
    rows = []
    for world in worlds:
        swept = world["sweep"]["first"]
        first, other = figures.scores(swept), figures.scores(world["sweep"]["other"])
        choices = {
            "best": swept["best"]["values"]["lam"],
            "smallest within noise of the best": min(row["lam"] for row in swept["within_noise"]),
            "1, without a sweep": 1.0,
            "best on the other half (hindsight)": max(other, key=other.__getitem__),
        }
        for choice, lam in choices.items():
            rows.append((f"{world['number']}", choice, f"{lam:g}", f"{first[lam]:.0f}", f"{other[lam]:.0f}"))
    return table(("world", "choice", "λ", "score, half that chose", "score, other half"), rows)


def numbers(worlds: Sequence[World]) -> dict[str, str]:
    """Figures that sentences have: means of the worlds."""
    means = {
        "sft": mean(worlds, "SFT_T", greedy), "sft_recall": mean(worlds, "SFT_T", recall),
        "past": mean(worlds, "+ v 1", greedy), "past_recall": mean(worlds, "+ v 1", recall),
        "shuffled": mean(worlds, "+ shuffled v 1", greedy), "noise": mean(worlds, "+ noise 1", greedy),
        "base_v": mean(worlds, "base + v 1", greedy), "supervised": mean(worlds, "+ supervised v 1", greedy),
        "sft_known": mean(worlds, "SFT_T", known), "past_known": mean(worlds, "+ v 1", known),
        "supervised_known": mean(worlds, "+ supervised v 1", known), "injected": mean(worlds, "pre-injection", greedy),
        "on_target": mean(worlds, "RL on target", greedy),
        **{key: mean(worlds, f"{arm} 0.4", greedy)
           for key, arm in zip(("nearest", "stochastic", "float32"), OUTPUTS, strict=True)},
        "lost": mean(worlds, "bf16 nearest 0.4", figures.lost),
        "stochastic_lost": mean(worlds, "bf16 stochastic 0.6", figures.lost),
    }  # fmt: skip
    lams = {
        "nearest_lambda": mean(worlds, "bf16 nearest 0.4", figures.effective),
        "stochastic_lambda": mean(worlds, "bf16 stochastic 0.4", figures.effective),
        "next_lambda": mean(worlds, "bf16 nearest 0.6", figures.effective),
        "overshot_lambda": mean(worlds, "bf16 stochastic 0.6", figures.effective),
    }
    shares = [figures.gain_share(world) for world in worlds]
    seconds = [trial["seconds"] for world in worlds for trial in world["sweep"]["first"]["trials"]]
    furthest = max((world["geometry"] for world in worlds), key=lambda row: abs(row["cosine_z_signs"]))
    return {
        **{key: f"{value:.0f}%" for key, value in means.items()},
        **{key: f"{value:.2f}" for key, value in lams.items()},
        "facts": f"{len(worlds[0]['arms']['base']['known'])}",
        "gains": ", ".join("–" if value is None else f"{value:.0f}%" for value in shares),
        "seconds": f"{statistics.median(seconds):.0f}",
        "z": f"{furthest['cosine_z_signs']:.1f}", "cosine": f"{furthest['cosine']:.4f}",
    }  # fmt: skip


def example(number: int) -> dict[str, str]:
    """What a model reads and is asked about one person of a world."""
    person = People.of(number).target[0]
    read = document(person, random.Random(0))
    return {"document": read, "question": QUESTIONS["city"][1].format(n=person.name), "answer": answer(person, "city")}


def picture(worlds: Sequence[World], path: Path) -> None:
    """Accuracy over lambda for each way to round, and below it the effective lambda."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7.5), sharex=True, height_ratios=(3, 2))
    lams = sorted(NARROW)
    for place, arm in reversed([*enumerate(OUTPUTS)]):
        names, color, width = [f"{arm} {lam:g}" for lam in lams], COLORS[place], WIDTHS[place]
        middle, low, high = zip(*(figures.interval(worlds, name) for name in ("SFT_T", *names)), strict=True)
        style = {"color": color, "marker": MARKS[place], "markersize": 5 + width / 2, "alpha": 0.45 if width > 2 else 1}
        above.plot([0.0, *lams], middle, label=output(arm), linewidth=width, **style)
        above.fill_between([0.0, *lams], low, high, color=color, alpha=0.1, linewidth=0)
        below.plot(lams, [mean(worlds, name, figures.effective) for name in names], linestyle="none", **style)
        curves = [world["forecast"]["curves"][figures.MODES[arm]] for world in worlds]
        steps = [row["lambda"] for row in curves[0] if row["lambda"] <= 1]
        before = [statistics.fmean(curve[step]["realised"] for curve in curves) for step in range(len(steps))]
        below.plot([0.0, *steps], [0.0, *before], color=color, linewidth=width / 1.6, alpha=style["alpha"])
    above.set_ylabel("questions answered correctly, %")
    above.set_ylim(0, 100)
    above.legend(title="output", frameon=False, loc="lower right", reverse=True)
    below.set_ylabel("effective λ")
    below.set_xlabel("requested λ (bfloat16 models; 0: SFT_T)")
    below.legend(
        [plt.Line2D([], [], color="gray", marker="o", linewidth=0), plt.Line2D([], [], color="gray", linewidth=1.2)],
        ["measured by apply", "forecast by inspect"], frameon=False, loc="upper left",
    )  # fmt: skip
    for axis in (above, below):
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def page(everything: Sequence[World]) -> str:
    """The text of SMOLLM.md."""
    worlds = [world for world in everything if figures.learned(world)]
    return Template((Path(__file__).parent / "SMOLLM.in.md").read_text(encoding="utf-8")).substitute(
        numbers(worlds), **example(everything[0]["number"]),
        worlds=", ".join(f"{world['number']}" for world in everything), count=len(worlds),
        held=held(worlds, "transfers", len(everything)), rounds=held(worlds, "rounds", len(everything)),
        learned=learned(everything), criterion=criterion(worlds), models=models(), arms=arms(worlds), more=more(worlds),
        lambdas=lambdas(worlds), rounding=rounding(worlds), forecasts=forecasts(worlds), casts=casts(worlds),
        relations=relations(worlds), source=source(worlds), geometry=geometry(worlds), sweeps=sweeps(worlds),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/past_smollm"))
    parser.add_argument("--worlds", nargs="+", default=["world-1", "world-2", "world-3"], help="folders in there")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    worlds = [figures.read(arguments.work / name) for name in arguments.worlds]
    picture([world for world in worlds if figures.learned(world)], arguments.out / "rounding.png")
    (arguments.out / "SMOLLM.md").write_text(page(worlds), encoding="utf-8")
    print(arguments.out / "SMOLLM.md")


if __name__ == "__main__":
    main()
