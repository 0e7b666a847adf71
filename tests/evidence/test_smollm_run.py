"""The experiment on SmolLM2 from its first stage to its page, with a model of one layer and four people a side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_cli

pytest.importorskip("transformers")
import small_chat

from experiments.past_smollm import figures, results, run, work
from experiments.past_smollm.work import TINY, Work, known_facts

pytestmark = pytest.mark.xdist_group("transformers")


def command(*arguments: Any) -> str:
    """`skillmerge` in this process, which has paid for its imports."""
    done = run_cli(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_tiny_world_runs_to_its_page_and_makes_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (run, work):
        monkeypatch.setattr(module, "command", command)
    for module in (run, results):  # fewer of them: all are alike
        monkeypatch.setattr(module, "LAMBDAS", (1.0, 0.25))
        monkeypatch.setattr(module, "NARROW", (0.4, 0.6))
    base, place = tmp_path / "base", tmp_path / "world-1"
    small_chat.write(base)
    assert known_facts(base)
    run.run_world(Work(1, place, base, TINY))
    world = figures.read(place)
    assert len(world["arms"]) == len(results.ARMS) + 1 + 3 * 2  # a second lambda; outputs and lambdas of bfloat16
    merged = world["arms"]["bf16 to float32 0.4"]["merge"]
    assert merged["realised_lambda"] == pytest.approx(0.4, abs=1e-3)
    assert world["arms"]["SFT_T"]["kl"] == 0
    assert sorted(path.name for path in (place / "models").iterdir()) == ["rl-source", "sft-source", "sft-target"]
    page = results.page([world])
    assert "| 1 | best |" in page

    made = {path: path.read_bytes() for path in place.rglob("*.json")}
    for name in ("arms/+ v 0.25.json", "geometry.json"):
        (place / name).unlink()
    capsys.readouterr()
    run.run_world(Work(1, place, base, TINY))
    again = capsys.readouterr().out
    assert [line.split(", ")[0] for line in again.splitlines()] == ["world 1: arms/+ v 0.25", "world 1: geometry"]
    figure = figures.read(place)["arms"]["+ v 0.25"]
    assert figure["greedy"] == world["arms"]["+ v 0.25"]["greedy"]
    assert (place / "geometry.json").read_bytes() == made[place / "geometry.json"]


def test_a_world_that_was_not_learned_goes_no_further(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, place = tmp_path / "base", tmp_path / "world-2"
    small_chat.write(base)
    torch.manual_seed(0)
    run.run_world(Work(2, place, base, work.Sizes(people=2, sft_steps=1)))
    assert "world 2 was not learnt" in capsys.readouterr().out
    assert not figures.learned(figures.read(place))
    assert not (place / "models" / "rl-source").exists()
