"""The page of SmolLM2 from made-up figures: what the criterion says of them, tables, and worlds that lack something."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
from experiments.past_smollm import figures, results
from experiments.past_smollm.run import LAMBDAS, NARROW, OUTPUTS

pytestmark = pytest.mark.xdist_group("transformers")
GOOD = {"+ v 1": 100, "+ shuffled v 1": 40, "bf16 nearest 0.4": 50, "bf16 stochastic 0.4": 90}
"""Right answers of 120 where both claims hold; all other arms have 30."""


def ones(count: int, of: int = 120) -> list[int]:
    return [1] * count + [0] * (of - count)


def made_up(
    folder: Path, number: int = 1, right: Mapping[str, int] = GOOD, recall: Mapping[str, int] | None = None
) -> Path:
    """What a run leaves of a world, with the given right answers and recalled facts (120 unless given)."""
    place = folder / f"world-{number}"
    (place / "arms").mkdir(parents=True)
    names = [*results.ARMS, *(f"+ v {lam:g}" for lam in LAMBDAS), *(f"{arm} {x:g}" for arm in OUTPUTS for x in NARROW)]
    for name in dict.fromkeys(names):
        count, kept = right.get(name, 30), (recall or {}).get(name, 120)
        arm: dict[str, Any] = {
            "greedy": {"right": ones(count), "named": ones(min(120, count + 6))}, "recall": ones(kept),
            "perplexity": 10.0, "kl": 0.5,
        }  # fmt: skip
        main = name in results.ARMS and name != "minus v -1"
        if name.startswith("bf16"):
            arm["merge"] = {"realised_lambda": float(name.split()[-1]) / 2, "vanished": 0.25, "changed": 0.5}
        else:
            times = 8 if main else 4
            arm |= {"known": ones(3, 4), "sampled": [ones(1, times)] * 60 + [ones(0, times)] * 60}
        if main:
            arm |= {"greedy_bf16": {"right": ones(60)}, "recall_bf16": ones(108), "held_out": {"right": ones(24)}}
            arm["two_hops"] = {"right": ones(0, 40), "named": ones(4, 40)}
        write(place / "arms" / f"{name}.json", arm)
    write(place / "learnt.json", {"source": 1.0, "target": 0.975})
    curve = [{"lambda": step / 10, "realised": step / 20, "vanished": 0.0, "changed": 0.0} for step in range(1, 21)]
    v = {"changed": 0.27, "ulps": [0.2, 0.05, 0.02, 0.0], "input_rounding": 0.5}
    write(place / "forecast.json", {"curves": dict.fromkeys(figures.MODES.values(), curve), "v": v, "cosine": 0.48})
    write(place / "source.json", {name: {"right": ones(12 * (row + 1))} for row, name in enumerate(("SFT_S", "+ v"))})
    lies = {"cosine": 0.001, "cosine_z_signs": -9.5, "changed": 1.0, "norm_ratio": 0.01, "updates_ratio": 0.2}
    write(place / "geometry.json", lies)
    write(place / "sweep.json", {"first": swept([20, 80, 70]), "other": swept([10, 60, 90])})
    return place


def swept(percent: list[int]) -> dict[str, Any]:
    """A sweep over 0, 0.5 and 1 whose best is 0.5, with 1 within noise."""
    trials = [
        {"values": {"lam": lam}, "scores": {"accuracy": {"value": value / 100, "error": 0.1}}, "seconds": 7.0}
        for lam, value in zip((0.0, 0.5, 1.0), percent, strict=True)
    ]
    return {"trials": trials, "best": trials[1], "within_noise": [{"lam": 0.5}, {"lam": 1.0}]}


def write(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document))


def row(page: str, start: str, head: str) -> list[str]:
    """The cells of a row behind its beginning, in the table whose head begins so."""
    (table,) = [part for part in page.split("\n\n") if part.startswith(f"| {head} |")]
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.removeprefix(f"| {start} |").strip("|").split("|")]


@pytest.mark.parametrize(
    ("right", "recall", "transfers", "rounds"),
    [
        ({}, {}, True, True),
        ({"+ v 1": 76}, {}, True, True),  # 30 points over 40 of 120
        ({"+ v 1": 75}, {}, False, True),
        ({"SFT_T": 71}, {}, False, True),
        ({"+ noise 1": 71}, {}, False, True),
        ({"base + v 1": 71}, {}, False, True),
        ({"+ supervised v 1": 120, "RL on target": 120}, {}, True, True),  # no controls
        ({}, {"+ v 1": 114}, True, True),  # 5 points of recall
        ({}, {"+ v 1": 113}, False, True),
        ({}, {"+ v 1": 113, "SFT_T": 119}, True, True),
        ({"bf16 nearest 0.4": 54}, {}, True, True),
        ({"bf16 nearest 0.4": 55}, {}, True, False),
        ({"bf16 stochastic 0.6": 0, "bf16 nearest 0.6": 120}, {}, True, True),  # another lambda
    ],
)
def test_criterion_holds_from_thirty_points_on(
    tmp_path: Path, right: Mapping[str, int], recall: Mapping[str, int], transfers: bool, rounds: bool
) -> None:
    found = figures.verdict(figures.read(made_up(tmp_path, right=GOOD | right, recall=recall)))
    assert (found["transfers"], found["rounds"]) == (transfers, rounds)


def test_page_says_in_which_worlds_a_claim_holds(tmp_path: Path) -> None:
    made_up(tmp_path, 1)
    made_up(tmp_path, 2, GOOD | {"+ v 1": 60, "+ noise 1": 48})
    made_up(tmp_path, 3, recall={"+ v 1": 96})
    page = results.page([figures.read(tmp_path / f"world-{number}") for number in (1, 2, 3)])
    assert (
        "**Claim 1 does not hold in every world: it holds in 1 of 3. Claim 2 holds in every world (3 of 3).**" in page
    )
    found = [row(page, start, "world | 1: gain") for start in ("1 | +50.0", "2 | +10.0", "3 | +50.0")]
    assert found == [
        ["SFT_T + shuffled v", "+0.0", "holds", "+33.3", "holds"],
        ["SFT_T + noise", "+0.0", "does not hold", "+33.3", "holds"],
        ["SFT_T + shuffled v", "-20.0", "does not hold", "+33.3", "holds"],
    ]


def test_a_world_that_was_not_learned_counts_as_one_where_nothing_holds(tmp_path: Path) -> None:
    made_up(tmp_path, 1)
    place = tmp_path / "world-2"
    (place / "arms").mkdir(parents=True)
    write(place / "learnt.json", {"source": 0.94, "target": 1.0})
    page = results.page([figures.read(tmp_path / "world-1"), figures.read(place)])
    assert row(page, "2", "world | recall of SFT_S, %") == ["94.0", "100.0", "no"]
    assert "Claim 1 does not hold in every world: it holds in 1 of 2." in page
    assert (
        row(page, "**SFT_T + v**", "model | greedy | 95% interval")[0] == "83 (83)"
    )  # means are those of the world that was


def test_a_world_that_is_not_complete_is_refused(tmp_path: Path) -> None:
    place = made_up(tmp_path)
    (place / "sweep.json").unlink()
    with pytest.raises(SystemExit, match="world-1 is not complete"):
        figures.read(place)
    with pytest.raises(SystemExit, match="world-7 is not complete"):
        figures.read(tmp_path / "world-7")


def test_tables_have_the_mean_of_the_worlds_and_each(tmp_path: Path) -> None:
    made_up(tmp_path, 1)
    made_up(tmp_path, 2, GOOD | {"+ v 1": 80})
    page = results.page([figures.read(tmp_path / f"world-{number}") for number in (1, 2)])
    main, rest = (row(page, "**SFT_T + v**", head) for head in ("model | greedy | 95% interval", "model | in bfloat16"))
    assert main[0] == "75 (83, 67)"
    assert main[2:] == ["6 (6, 6)", "50 (50, 50)", "100 (100, 100)", "75 (75, 75)"]  # sampled, pass@8, recall, known
    assert rest[:5] == ["50 (50, 50)", "90 (90, 90)", "20 (20, 20)", "80 (88, 72)", "10 (10, 10)"]
    assert rest[5:] == ["10.0", "0.500"]
    assert row(page, "SFT_T - v", "model | greedy | 95% interval")[3] == "–"  # four samples are not eight
    assert row(page, "bfloat16, nearest | 0.4", "output")[:4] == ["0.200", "0.200", "25.0", "42 (42, 42)"]
    assert row(page, "1 | best", "world | choice") == ["0.5", "80", "60"]
    assert row(page, "1 | best on the other half (hindsight)", "world | choice") == ["1", "70", "90"]
    assert "gains –, – of what RL" in page  # RL on the target gains nothing here
    assert "a z of -9.5 belongs to a cosine of 0.0010" in page
    assert not re.search(r"\$\w|nan", page)


def test_share_of_the_gain_of_rl_on_the_target(tmp_path: Path) -> None:
    world = figures.read(made_up(tmp_path, right=GOOD | {"SFT_T": 40, "+ v 1": 85, "RL on target": 100}))
    assert figures.gain_share(world) == pytest.approx(75)


def test_accuracy_by_relation_counts_its_own_questions(tmp_path: Path) -> None:
    arm = {"greedy": {"right": [1, 0, 0, 1, 1, 0]}}
    assert [figures.relation(name)(arm) for name in ("city", "job", "instrument")] == [100, 50, 0]


def test_pass_at_8_counts_questions_with_one_right_answer() -> None:
    assert figures.passed({"sampled": [ones(1, 8), ones(8, 8), ones(0, 8), ones(0, 8)]}) == 50


def test_rank_correlation_is_spearmans() -> None:
    one, other = [3.0, 1.0, 5.0, 4.0, 2.0], [30.0, 20.0, 50.0, 10.0, 40.0]
    apart = sum((a - b) ** 2 for a, b in zip([3, 1, 5, 4, 2], [3, 2, 5, 1, 4], strict=True))
    assert figures.rank_correlation(one, other) == pytest.approx(1 - 6 * apart / (5 * 24))
    assert figures.rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)  # ties, by hand
    assert figures.rank_correlation([1, 2, 3], [7, 7, 7]) is None


def test_picture_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `experiments`")
    results.picture([figures.read(made_up(tmp_path))], tmp_path / "rounding.png")
    assert (tmp_path / "rounding.png").read_bytes().startswith(b"\x89PNG")
