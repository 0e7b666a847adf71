"""Where answers stop, and the ids of padding and beginning, where the same token has other ids in other models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import MODELS, run_cli, write_recipe
from test_rows_by_hand import write_models
from token_rows import BASE, Words, by_token

ORDERS: tuple[Words, Words, Words] = (
    [*BASE, "<tool>", "<eos>", "<pad>"],
    [*BASE, "<eos>", "<pad>", "<end>"],
    [*BASE, "<pad>", "<eos>", None],
)


def planned(folder: Path, stops: dict[str, list[int]], **ids: dict[str, int]) -> dict[str, Any]:
    write_models(folder, ORDERS)
    for name in MODELS:
        (folder / name / "generation_config.json").write_text(json.dumps({"eos_token_id": stops[name]}))
        config = json.loads((folder / name / "config.json").read_text())
        config |= {key: values[name] for key, values in ids.items()}
        (folder / name / "config.json").write_text(json.dumps(config))
    found: dict[str, Any] = json.loads(run_cli("plan", write_recipe(folder, **by_token()), "--json").stdout)
    return found


def test_the_same_token_with_another_id_is_no_difference(tmp_path: Path) -> None:
    pads, stops = {"target": 10, "rl": 9, "sft": 8}, {"target": [9], "rl": [8], "sft": [9]}
    found = planned(tmp_path, stops, pad_token_id=pads, bos_token_id=stops | {"target": 9, "rl": 8, "sft": 9})
    assert found["warnings"] == []
    assert not any("differs" in note and "vocabulary" not in note for note in found["notes"]), found["notes"]


def test_another_token_with_the_same_id_is_one(tmp_path: Path) -> None:
    """`rl` stops at <eos>, whose id is that of <tool> in the target."""
    pads = {"target": 10, "rl": 10, "sft": 10}
    [warning] = planned(tmp_path, {"target": [8], "rl": [8], "sft": [9]}, pad_token_id=pads)["warnings"]
    assert "`rl` stops at 8 (`<eos>`), and the output, which has the stop tokens of `target`, does not" in warning
    shown = run_cli("plan", write_recipe(tmp_path, **by_token()))
    assert (
        "add its id to `eos_token_id` in the generation_config.json of `target`, or write"
        in shown.stderr + shown.stdout
    )
    assert "padding differs: <pad> in `target`, <end> in `rl`, 10 in `sft`; the output has that" in shown.stdout


def test_a_token_that_the_output_lacks_is_named(tmp_path: Path) -> None:
    [warning] = planned(tmp_path, {"target": [9], "rl": [8, 10], "sft": [9]})["warnings"]
    assert "`rl` stops at 10 (`<end>`), and the output" in warning
