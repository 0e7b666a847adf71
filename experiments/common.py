"""What the experiments share: the command line, the seeds of stages, intervals, and what is put in the place of v."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

Model = TypeVar("Model", bound=torch.nn.Module)
Like = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def command(*arguments: object, **environment: str) -> str:
    """Run `skillmerge`, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "skillmerge", *map(str, arguments)],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"skillmerge {' '.join(map(str, arguments))}\n{done.stderr}")
    return done.stdout


def seed_of(stage: str, seed: int) -> random.Random:
    """Seed torch for a stage and return its generator, so that a stage that is taken from disk changes no other."""
    number = zlib.crc32(f"{stage} {seed}".encode())
    torch.manual_seed(number)
    return random.Random(number)


def interval(worlds: Sequence[np.ndarray[Any, Any]]) -> tuple[float, float, float]:
    """The mean of the worlds' means, and a 95% bootstrap interval: worlds, and people within them, are drawn again.

    worlds: one figure of each person, world by world.
    """
    generator = np.random.default_rng(0)
    means = []
    for _ in range(1000):
        drawn = generator.integers(len(worlds), size=len(worlds))
        means.append(np.mean([generator.choice(worlds[world], worlds[world].size).mean() for world in drawn]))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(np.mean([people.mean() for people in worlds])), float(low), float(high)


def shuffled_like(update: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The elements of an update in other places."""
    return update.flatten()[torch.randperm(update.numel(), generator=generator)].view_as(update)


def noise_like(update: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gaussian noise with the norm of an update."""
    noise = torch.randn(update.shape, generator=generator)
    return noise * (update.norm() / noise.norm())


def in_place_of(sft: Model, rl: Model, seed: int, like: Like) -> Model:
    """The SFT model, which is changed, plus something like v: it takes the place of the RL model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for before, after in zip(sft.parameters(), rl.parameters(), strict=True):
            before += like(after - before, generator)
    return sft
