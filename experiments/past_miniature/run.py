"""The experiment: train, merge with the command line, measure. `python -m experiments.past_miniature.run`

Every merge is a recipe file, `skillmerge apply`, and a folder; only training and measuring are done here. What a
stage leaves in the work folder is used again by the next run. Writes `measured.json` beside the pictures.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2ForCausalLM

from .. import common
from ..common import in_place_of, noise_like, shuffled_like
from . import measure, train
from .world import VERBS, Person, World

HERE = Path(__file__).parent
GRID = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
COARSE = (-1.0, 0.5, 1.0, 1.5, 2.0)
LEFT_OUT = VERBS[-1]
command = partial(common.command, OMP_NUM_THREADS="1")


@dataclass
class Seed:
    """One seed's world, folders and figures."""

    number: int
    folder: Path
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.world = World.of(self.number)
        self.folder.mkdir(parents=True, exist_ok=True)

    def trained(self, name: str, make: Callable[[], Qwen2ForCausalLM]) -> Path:
        """The folder of a stage, which is trained where it is not there yet."""
        folder = self.folder / name
        if not (folder / "model.safetensors").exists():
            train.save(make(), folder)
        return folder

    def merged(
        self, name: str, models: Mapping[str, Path | dict[str, str]], merge: str, lam: float | None = None
    ) -> Path:
        """The folder of a merge, which `skillmerge apply` makes."""
        folder = self.folder / name
        if not folder.exists():
            recipe = self.folder / f"{name}.yaml"
            document = {
                "skillmerge": 1,
                "models": {key: place if isinstance(place, dict) else str(place) for key, place in models.items()},
                "merge": merge,
            }
            if lam is not None:
                document["coefficients"] = {"lam": lam}
            recipe.write_text(json.dumps(document, indent=1))
            command("apply", recipe, "-o", folder, "-q", "--stats", "full")
        return folder

    def measured(self, arm: str, folder: Path, lam: float | None = None, verbs: Sequence[str] = VERBS) -> None:
        """Put an arm's figures into `arms`."""
        model = train.load(folder).eval()
        key = arm if lam is None else f"{arm} {lam:g}"
        self.arms[key] = {
            "arm": arm,
            "lambda": lam,
            "greedy": measure.correct(model, self.world.target, verbs).mean(1).tolist(),
            "sampled": measure.correct(model, self.world.target, verbs, times=4).mean(1).tolist(),
            "recall": measure.recall(model, self.world.target),
            "recall_known": measure.recall(model, self.world.in_documents_only),
        }


def run_seed(number: int, folder: Path) -> dict[str, Any]:
    """All stages and arms of one seed."""
    torch.set_num_threads(1)
    seed = Seed(number, folder / f"seed-{number}")
    world = seed.world
    base = seed.trained("base", lambda: train.pretrain(world, number))

    def documents(start: Path, people: Sequence[Person], stage: str, noisy: bool = False) -> Qwen2ForCausalLM:
        return train.learn_documents(train.load(start), people, world, stage, number, noisy)

    def reinforced(start: Path, people: Sequence[Person], stage: str, verbs: Sequence[str] = VERBS) -> Qwen2ForCausalLM:
        return train.reinforce(train.load(start), people, stage, number, verbs)

    sft = seed.trained("sft-source", lambda: documents(base, world.source, "sft source"))
    rl = seed.trained("rl-source", lambda: reinforced(sft, world.source, "rl source"))
    target = seed.trained("sft-target", lambda: documents(base, world.target, "sft target"))
    seed.measured("base", base)
    seed.measured("SFT_T", target)
    seed.measured("RL_S", rl)

    # v, and what is put in its place.
    answers = seed.trained(
        "answers-source", lambda: train.learn_answers(train.load(sft), world.source, "answers source", number)
    )
    shuffled = seed.trained("rl-shuffled", lambda: in_place_of(train.load(sft), train.load(rl), number, shuffled_like))
    gaussian = seed.trained("rl-gaussian", lambda: in_place_of(train.load(sft), train.load(rl), number, noise_like))
    for arm, after, before, onto, grid in (
        ("+ v", rl, sft, target, (*GRID, -1.0)),
        ("+ shuffled v", shuffled, sft, target, COARSE),
        ("+ Gaussian", gaussian, sft, target, COARSE),
        ("+ (SFT_S - base)", sft, base, target, COARSE),
        ("+ supervised v", answers, sft, target, COARSE),
        ("base + v", rl, sft, base, COARSE),
    ):
        for lam in grid:
            name = f"{arm} {lam:g}".replace(" ", "_").replace("(", "").replace(")", "")
            models = {"target": onto, "after": after, "before": before}
            seed.measured(arm, seed.merged(name, models, "target + lam * (after - before)", lam), lam)

    # Other ways to the same end.
    sequential = seed.trained("sequential", lambda: documents(rl, world.target, "sft target"))
    seed.measured("sequential", sequential)
    injected = seed.merged("base-and-v", {"base": base, "rl": rl, "sft": sft}, "base + (rl - sft)")
    seed.measured(
        "pre-injection", seed.trained("pre-injection", lambda: documents(injected, world.target, "sft target"))
    )
    seed.measured("RL on target", seed.trained("rl-target", lambda: reinforced(target, world.target, "rl target")))
    refine(seed, base, target, documents, reinforced)
    less = seed.trained("rl-less", lambda: reinforced(sft, world.source, "rl less", VERBS[:-1]))
    merged = seed.merged("less", {"target": target, "rl": less, "sft": sft}, "target + (rl - sft)")
    seed.measured("+ v without one verb: others", merged, verbs=VERBS[:-1])
    seed.measured("+ v without one verb: it", merged, verbs=(LEFT_OUT,))

    # Stored in bfloat16.
    narrow = {
        key: seed.trained(f"{folder.name}-bf16", lambda folder=folder: train.load(folder).to(torch.bfloat16))
        for key, folder in {"target": target, "rl": rl, "sft": sft}.items()
    }
    seed.measured("+ v, bfloat16 files", seed.merged("past-bf16", narrow, "target + (rl - sft)"))

    # With the bad habit replayed during SFT.
    noisy = seed.trained("noisy-sft-source", lambda: documents(base, world.source, "noisy sft source", True))
    noisy_rl = seed.trained("noisy-rl-source", lambda: reinforced(noisy, world.source, "noisy rl source"))
    noisy_target = seed.trained("noisy-sft-target", lambda: documents(base, world.target, "noisy sft target", True))
    seed.measured("noisy: SFT_T", noisy_target)
    models = {"target": noisy_target, "rl": noisy_rl, "sft": noisy}
    seed.measured("noisy: + v", seed.merged("noisy-past", models, "target + (rl - sft)"))
    after = seed.trained("noisy-sequential", lambda: documents(noisy_rl, world.target, "noisy sft target", True))
    seed.measured("noisy: sequential", after)
    models = {"base": base, "rl": noisy_rl, "sft": noisy}
    injected = seed.merged("noisy-base-and-v", models, "base + (rl - sft)")
    seed.measured(
        "noisy: pre-injection",
        seed.trained("noisy-pre-injection", lambda: documents(injected, world.target, "noisy sft target", True)),
    )
    return {"seed": number, "arms": seed.arms, "geometry": geometry(seed, base, target, rl, sft)}


def refine(
    seed: Seed,
    base: Path,
    target: Path,
    documents: Callable[[Path, Sequence[Person], str], Qwen2ForCausalLM],
    reinforced: Callable[[Path, Sequence[Person], str], Qwen2ForCausalLM],
) -> None:
    """Iterative refinement as published, K = 2: each round's RL starts with the skill of the round before."""
    parts = (seed.world.source[:64], seed.world.source[64:])
    skill: Path | None = None
    for number, part in enumerate(parts, start=1):
        sft = seed.trained(f"refine-{number}-sft", lambda: documents(base, part, f"refine {number} sft"))  # noqa: B023
        start = sft
        if skill is not None:
            start = seed.merged(f"refine-{number}-start", {"sft": sft, "v": {"skill": str(skill)}}, "sft + v")
        rl = seed.trained(f"refine-{number}-rl", lambda: reinforced(start, part, f"refine {number} rl"))  # noqa: B023
        skill = seed.folder / f"refine-{number}-skill"
        if not skill.exists():
            command("extract", "--from", rl, "--minus", sft, "-o", skill, "-q")
        models = {"target": target, "v": {"skill": str(skill)}}
        seed.measured(f"+ v, K = 2, after round {number}", seed.merged(f"refine-{number}-past", models, "target + v"))


def geometry(seed: Seed, base: Path, target: Path, rl: Path, sft: Path) -> dict[str, Any]:
    """How v, and the source's SFT update, lie to the target's update: from `skillmerge inspect`."""
    found = {}
    for name, after, before in (("v", rl, sft), ("SFT_S - base", sft, base)):
        recipe = seed.folder / f"inspect-{name.split()[0]}.yaml"
        models = {"target": str(target), "after": str(after), "before": str(before)}
        recipe.write_text(json.dumps({"skillmerge": 1, "models": models, "merge": "target + (after - before)"}))
        document = json.loads(command("inspect", recipe, "--base", base, "--stats", "off", "--json"))
        keys = ("cosine", "cosine_z", "cosine_z_signs", "changed", "norm_ratio", "updates_ratio")
        found[name] = {
            "all": {key: document["all"][key] for key in keys},
            "layers": {layer: {key: row[key] for key in keys} for layer, row in document["layers"].items()},
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("build/past_miniature"))
    arguments = parser.parse_args()
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        seeds = list(pool.map(run_seed, range(arguments.seeds), [arguments.work.absolute()] * arguments.seeds))
    minutes = (time.monotonic() - started) / 60
    document = {"minutes": round(minutes, 1), "torch": torch.__version__, "seeds": seeds}
    arguments.work.mkdir(parents=True, exist_ok=True)
    (arguments.work / "measured.json").write_text(json.dumps(document, indent=1) + "\n")
    print(f"{len(seeds)} seeds in {minutes:.1f} minutes: {arguments.work / 'measured.json'}")


if __name__ == "__main__":
    main()
