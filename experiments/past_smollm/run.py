"""The experiment: train, merge with the command line, measure. `python -m experiments.past_smollm.run`

Every merge is a recipe file, `skillmerge apply`, and a folder; only training and measuring are done here. A run that
stops at any moment goes on where it was: at most the stage in progress is lost. `results` reads what it leaves.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..common import Like, command, in_place_of, noise_like, shuffled_like
from . import measure, train
from .measure import Scope
from .work import TINY, Sizes, Work, base_model, known_facts, tiny_model
from .world import LEFT_OUT, RELATIONS, questions

LAMBDAS = (1.0, 0.25, 0.5, 0.75, 1.25, 1.5)
NARROW = (0.4, 0.2, 0.6, 0.8, 1.0)
OUTPUTS = {
    "bf16 nearest": {"dtype": "bfloat16", "rounding": "nearest"},
    "bf16 stochastic": {"dtype": "bfloat16", "rounding": "stochastic"},
    "bf16 to float32": {"dtype": "float32"},
}
PAST = "target + lam * (rl - sft)"


def run_world(work: Work) -> None:
    """All stages and arms of one world; those of the criterion first."""
    sizes, world, chat, number = work.sizes, work.world, work.chat, work.number

    def documents(start: Path, side: str) -> train.LlamaForCausalLM:
        people = getattr(world, side)
        return train.learn_documents(train.load(start), chat, people, f"sft {side}", number, sizes.sft_steps)

    sft = work.trained("sft-source", lambda: documents(work.base, "source"))
    target = work.trained("sft-target", lambda: documents(work.base, "target"))
    learnt = work.stored("learnt", lambda: recalled(work, sft, target))
    if min(learnt.values()) < sizes.learnt:
        print(f"world {number} was not learnt: {learnt}")
        return
    rl = work.trained("rl-source", lambda: reinforced(work, sft, "source"))
    main, light = Scope(samples=sizes.samples, more=True), Scope(samples=min(4, sizes.samples))
    work.arm("SFT_T", lambda: target, main)
    past = {"target": target, "rl": rl, "sft": sft}
    for lam in LAMBDAS:
        make = lambda lam=lam: work.merged(f"past-{lam:g}", past, PAST, lam)  # noqa: E731
        work.arm("+ v", make, main if lam == 1 else light, lam, drop=f"past-{lam:g}")
    controls(work, target, rl, sft, main)
    narrow(work, past)
    work.arm("base", lambda: work.base, main)
    work.arm("minus v", lambda: work.merged("minus", past, PAST, -1.0), light, -1.0, drop="minus")
    other_ways(work, target, rl, sft, main, documents)
    others = [relation for relation in RELATIONS if relation != LEFT_OUT]
    less = lambda: work.trained("rl-less", lambda: reinforced(work, sft, "source", "rl less", others))  # noqa: E731
    work.arm(
        "+ v of RL without one relation",
        lambda: work.merged("less", {**past, "rl": less()}, PAST, 1.0), main, 1.0, drop="less",
    )  # fmt: skip
    work.drop("rl-less")
    work.stored("source", lambda: about_source(work, past))
    work.stored("geometry", lambda: geometry(work, past))
    work.stored("sweep", lambda: swept(work, past))
    work.drop("past-1", *(f"{path.name}-bf16" for path in past.values()))


def reinforced(
    work: Work, start: Path, side: str, stage: str = "rl", relations: Sequence[str] = RELATIONS
) -> train.LlamaForCausalLM:
    people, sizes = getattr(work.world, side), work.sizes
    return train.reinforce(
        train.load(start), work.chat, people, f"{stage} {side}", work.number, relations, sizes.rl_steps, sizes.reward
    )


def recalled(work: Work, sft: Path, target: Path) -> dict[str, float]:
    """Recall of each SFT model, of the documents that it has read."""
    found = {}
    for side, folder in (("source", sft), ("target", target)):
        right = measure.recall(train.load(folder).eval(), work.chat, getattr(work.world, side))
        found[side] = sum(right) / len(right)
    return found


def controls(work: Work, target: Path, rl: Path, sft: Path, scope: Scope) -> None:
    """What is put in the place of v, and v without the target's knowledge."""
    for arm, name, like in (("+ shuffled v", "rl-shuffled", shuffled_like), ("+ noise", "rl-noise", noise_like)):

        def make(name: str = name, like: Like = like) -> Path:
            instead = work.trained(name, lambda: in_place_of(train.load(sft), train.load(rl), work.number, like))
            return work.merged(f"with-{name}", {"target": target, "rl": instead, "sft": sft}, PAST, 1.0)

        work.arm(arm, make, scope, 1.0, drop=f"with-{name}")
        work.drop(name)
    models = {"target": work.base, "rl": rl, "sft": sft}
    work.arm("base + v", lambda: work.merged("base-and-v", models, PAST, 1.0), scope, 1.0, drop="base-and-v")


def narrow(work: Work, past: dict[str, Path]) -> None:
    """The three models as bfloat16 files, merged with each way to round; forecast before."""

    def casts() -> dict[str, Path]:
        return {
            key: work.trained(f"{folder.name}-bf16", lambda folder=folder: train.load(folder, torch.bfloat16))
            for key, folder in past.items()
        }

    work.stored("forecast", lambda: forecast(work, past, casts()))
    for lam in NARROW:
        for arm, output in OUTPUTS.items():
            name = f"{arm.replace(' ', '-')}-{lam:g}"
            make = lambda: work.merged(name, casts(), PAST, lam, **output)  # noqa: B023, E731
            work.arm(arm, make, Scope(known=False), lam, drop=name)


def other_ways(
    work: Work, target: Path, rl: Path, sft: Path, scope: Scope, documents: Callable[[Path, str], Any]
) -> None:
    """Other ways to the same end."""

    def supervised() -> Path:
        steps = work.sizes.rl_steps
        answers = work.trained(
            "answers-source",
            lambda: train.learn_answers(
                train.load(sft), work.chat, work.world.source, "answers source", work.number, steps
            ),
        )
        return work.merged("past-supervised", {"target": target, "rl": answers, "sft": sft}, PAST, 1.0)

    work.arm("+ supervised v", supervised, scope, 1.0, drop="past-supervised")
    work.drop("answers-source")

    def injected() -> Path:
        start = work.merged("injected", {"target": work.base, "rl": rl, "sft": sft}, PAST, 1.0)
        return work.trained("pre-injection", lambda: documents(start, "target"))

    work.arm("pre-injection", injected, scope, drop="pre-injection")
    work.drop("injected")
    on_target = lambda: work.trained("rl-target", lambda: reinforced(work, target, "target"))  # noqa: E731
    work.arm("RL on target", on_target, scope, drop="rl-target")


def about_source(work: Work, past: dict[str, Path]) -> dict[str, Any]:
    """Questions about the source's people: does RL work there, and does v carry their facts into the target?"""
    asked = questions(work.world.source)
    merged = work.merged("past-1", past, PAST, 1.0)
    places = {"SFT_S": past["sft"], "RL_S": past["rl"], "SFT_T": past["target"], "+ v": merged}
    return {name: work.answered(folder, asked) for name, folder in places.items()}


def forecast(work: Work, past: dict[str, Path], casts: dict[str, Path]) -> dict[str, Any]:
    """What `skillmerge inspect` says of the bfloat16 files before any merge, and how they keep v."""
    recipe = work.recipe("forecast", casts, PAST, 1.0)
    found = json.loads(command("inspect", recipe, "--json"))
    curves = {mode: rows["all"] for mode, rows in found["forecast"]["curves"].items()}
    keys = ("changed", "ulps", "input_rounding", "input_rounding_added", "norm_ratio")
    return {
        "curves": curves,
        "v": {key: found["all"][key] for key in keys},
        "cosine": cosine((past["rl"], past["sft"]), (casts["rl"], casts["sft"])),
    }


def cosine(one: tuple[Path, Path], other: tuple[Path, Path]) -> float:
    """Between two differences of models."""
    files = [safe_open(folder / "model.safetensors", "pt") for folder in (*one, *other)]
    sums = torch.zeros(3, dtype=torch.float64)
    for name in files[0].keys():  # noqa: SIM118
        a, b, c, d = (file.get_tensor(name).double() for file in files)
        v, w = (a - b).flatten(), (c - d).flatten()
        sums += torch.stack([v @ w, v @ v, w @ w])
    return float(sums[0] / (sums[1] * sums[2]).sqrt())


def geometry(work: Work, past: dict[str, Path]) -> dict[str, Any]:
    """How v lies to the target's own update, in float32: from `skillmerge inspect`."""
    recipe = work.recipe("inspect", past, PAST, 1.0)
    found = json.loads(command("inspect", recipe, "--base", work.base, "--stats", "off", "--json"))
    keys = ("cosine", "cosine_z", "cosine_z_signs", "changed", "norm_ratio", "updates_ratio")
    return {key: found["all"][key] for key in keys}


def swept(work: Work, past: dict[str, Path]) -> dict[str, Any]:
    """`skillmerge sweep` in memory with the questions about half of the people; what it picks, on the other half."""
    recipe = work.recipe("sweep", past, PAST, 1.0)
    halves = {}
    for half in (0, 1):
        some = work.world.target[half::2]
        lines = [
            {
                "question": work.chat.rendered(item.text),
                "answer": item.right,
                "pattern": rf"(?i)\b({'|'.join(item.values)})\b",
            }
            for item in questions(some)
        ]
        halves[half] = work.folder / f"questions-{half}.jsonl"
        halves[half].write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def sweep(half: int) -> dict[str, Any]:
        place = work.folder / f"half-{half}.sweep"
        score = ("--set", "lam=0:1.5:0.25", "--score", f"qa:{halves[half]}", "-o", place, "--json")
        return json.loads(command("sweep", recipe, *score))

    return {"first": sweep(0), "other": sweep(1)}


def one_world(number: int, folder: Path, base: Path, tiny: bool) -> None:
    """A world from where it stopped to its end, on one core."""
    torch.set_num_threads(1)
    place = folder / (f"tiny-{number}" if tiny else f"world-{number}")
    run_world(Work(number, place, base, TINY if tiny else Sizes()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--at-once", type=int, default=2, help="worlds side by side; each takes one core and 6 GB")
    parser.add_argument("--work", type=Path, default=Path("build/past_smollm"))
    parser.add_argument("--tiny", action="store_true", help="one layer, few steps: shows that all stages run")
    arguments = parser.parse_args()
    folder = arguments.work.absolute()
    base = base_model(folder / "base")
    if arguments.tiny:
        base = tiny_model(base)
    known_facts(base)
    with ProcessPoolExecutor(arguments.at_once, mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(one_world, number, folder, base, arguments.tiny) for number in arguments.worlds]:
            done.result()


if __name__ == "__main__":
    main()
