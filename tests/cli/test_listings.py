"""What terminal, page and Markdown share: classes of changes, scores, and what a group of statistics reads like."""

from __future__ import annotations

import pytest

from skillmerge.cli.show.listings import scored, ulps
from skillmerge.engine.rounding_statistics import LOSSES, Group
from skillmerge.study.scoring.scores import Score
from skillmerge.tensors import ULP_EDGES


def test_classes_of_changes_have_readable_ends() -> None:
    rows = ulps([4, 2, 0, 1, 0, 0, 0, 1])
    assert len(rows) == len(ULP_EDGES) + 1
    labels = ["1", "2", "3 to 4", "5 to 8", "9 to 16", "17 to 64", "65 to 256", "more"]
    assert [row.label(" to ") for row in rows] == labels
    assert [row.share for row in rows[:2]] == [0.5, 0.25]


@pytest.mark.parametrize("counts", [None, [], [0] * (len(ULP_EDGES) + 1)])
def test_nothing_changed_is_no_rows(counts: list[int] | None) -> None:
    assert ulps(counts) == []


def test_score_shows_its_error_where_that_is_known() -> None:
    assert scored(None) == "–"
    assert scored(Score(0.51234)) == "0.5123"
    assert scored(Score(0.5, 0.01)) == "0.5 ± 0.02"
    assert scored(Score(1534.2, 133)) == "1534 ± 260"
    assert scored(Score(12345.6, 51)) == "12350 ± 100"
    assert scored(Score(3.2e9, 1e-6)) == "3.2e+09 ± 2e-06"


def test_group_without_one_lambda_shows_the_share_of_one() -> None:
    group = Group(tensors=2, merged=2, changed=0.25, vanished=0.5, realised=0.75)
    assert dict(zip(LOSSES, group.shown, strict=True)) == {
        "requested λ": "1",
        "effective λ": "0.75",
        "lost": "50.0%",
        "changed": "25.0%",
    }
    assert Group(merged=1).shown == ("-",) * len(LOSSES)
