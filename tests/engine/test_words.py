"""What arguments may say, in Python as on the command line: anything else is a UsageError before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_cli

import skillmerge
from skillmerge.errors import UsageError

DEVICE = "auto, cpu, cuda or cuda:N"
COUNT = "a number from 1"
WRONG: dict[str, tuple[str, list[Any]]] = {
    "device": (DEVICE, ["gpu", torch.device("cpu"), "cuda:\u0663", "cuda:", "cpu\n", "CPU", None, 0]),
    "threads": ("a number from 1 to 256", [0, 257, -1, 2.0, "2", True, float("nan"), [1]]),
    "memory_limit": ("bytes, more than 0", [0, -1, 1e9, "1GB", True]),
    "stats": ("full, sampled or off", ["Full", None, "", ["full"], np.zeros(2)]),
    "hub": ("stream or download", ["x", None, "stream ", True, ["stream"], np.zeros(2)]),
    "seed": ("a number from 0", ["q", -1, 1.5, None, True]),
    "trials": (COUNT, ["a", 0, 1.5, None]),
    "repeats": (COUNT, ["a", 0, 1.5, None]),
    "sample": ("a share above 0, at most 1", ["a", 0, 1.01, float("nan"), None, True]),
    "keep": ("a share above 0, at most 1", ["a", 0, 1.01, float("nan"), True]),
    "spectral": ("a number from 1 to 64", ["a", 0, 65, 1.5]),
    "lora_rank": ("a number from 1 to 4096", ["a", 0, 4097, 1.5]),
}
VERBS: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[str, ...]]] = {
    "apply": (("recipe.yaml",), {}, ("device", "threads", "memory_limit", "stats", "hub")),
    "plan": (("recipe.yaml",), {}, ("threads", "memory_limit")),
    "extract": (("rl", "sft", "skill"), {}, ("keep", "threads", "memory_limit", "hub")),
    "inspect": (("sft", "rl"), {}, ("threads", "stats", "spectral", "hub")),
    "rebuild": (("merged",), {"check": True}, ("sample", "seed", "device", "threads", "memory_limit", "hub")),
    "export": (("skill", "lora"), {"lora_rank": 2}, ("lora_rank", "seed")),
    "sweep": (
        ("recipe.yaml", ["lam=0:1:0.5"], "python score.py"),
        {},
        ("repeats", "trials", "seed", "device", "hub"),
    ),
}


@pytest.mark.parametrize(("verb", "word"), [(verb, word) for verb, (_, _, words) in VERBS.items() for word in words])
def test_wrong_word_is_refused_before_any_work(
    family: Path, monkeypatch: pytest.MonkeyPatch, verb: str, word: str
) -> None:
    """Found by a review: some came to light late, as a crash, and one was taken for another."""
    monkeypatch.chdir(family.parent)
    before = sorted(family.parent.rglob("*"))
    arguments, options, _ = VERBS[verb]
    what, values = WRONG[word]
    for value in values:
        if value is None and word == "lora_rank":
            continue
        with pytest.raises(UsageError) as caught:
            getattr(skillmerge, verb)(*arguments, **{**options, word: value})
        assert caught.value.message == f"{word} {value!r}: {what}"
    assert sorted(family.parent.rglob("*")) == before


def test_numbers_of_numpy_are_numbers(family: Path) -> None:
    folder = family.parent
    made = skillmerge.apply(family, threads=np.int8(60), memory_limit=np.int32(2_000_000_000))  # type: ignore[arg-type]
    checked = skillmerge.rebuild(made.output, check=True, sample=np.float32(0.5), seed=np.int32(3), threads=np.int8(1))  # type: ignore[arg-type]
    assert 0 < checked.tensors < checked.of
    skill = skillmerge.extract(str(folder / "rl"), str(folder / "sft"), folder / "skill", keep=np.float64(0.5))
    assert skill.output.is_dir()


def test_sweep_takes_numbers_of_numpy(family: Path) -> None:
    """They are written into its journal."""
    score = """python -c 'print("{\\"score\\": 1}")'"""
    swept = skillmerge.sweep(family, ["lam=0:1:0.5"], score, seed=np.int64(1), repeats=np.int64(2))  # type: ignore[arg-type]
    assert len(swept.trials) == 3
    assert skillmerge.sweep(family, ["lam=0:1:0.5"], score, seed=1, repeats=2).resumed == 3


def test_device_of_other_digits_is_none_on_the_command_line(family: Path) -> None:
    assert run_cli("apply", family, "--device", "cuda:\u0663").returncode == 2
