"""The line that says what was compared, and what of it was not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_checkpoint, write_recipe
from pair_cases import WORDS, tokenizer

import skillmerge

NAMES = ("target", "rl", "sft")
CONFIG = {"model_type": "llama", "vocab_size": 16}
STAYS = {"rules": [{"modules": "embedding", "value": 0}]}
SWAPPED = ["b", "a", *WORDS[2:]]
REST = ", chat template, stop tokens: "
WHOLE_CONFIG = "compared target, rl, sft: configuration, tokenizer "


def family(
    folder: Path, *, configs: str = "target rl sft", files: str = "target rl sft", words: Any = WORDS, lam: Any = 0.5
) -> Path:
    """Three models, of which these have a config.json, and these a tokenizer; words: those of `rl`."""
    tensors = {"model.embed_tokens.weight": torch.zeros(16, 4), "model.layers.0.mlp.up_proj.weight": torch.ones(4, 4)}
    for name in NAMES:
        write_checkpoint(folder / name, tensors, config=CONFIG if name in configs.split() else None)
        if name in files.split():
            text = json.dumps(tokenizer(words if name == "rl" else WORDS))
            (folder / name / "tokenizer.json").write_text(text)
    return write_recipe(folder, coefficients={"lam": lam}, accept=["merged-share"])


CASES: dict[str, tuple[Mapping[str, Any], str, list[str]]] = {
    "all": ({}, "compared target, rl, sft: configuration, tokenizer" + REST + "no differences", []),
    "no config": (
        {"configs": "target sft"},
        "compared target, rl, sft: configuration (not of `rl`: no config.json), tokenizer" + REST + "1 note",
        ["model `rl` has no config.json: its configuration is not compared"],
    ),
    "no config of the donor": (
        {"configs": "rl sft"},
        "compared target, rl, sft: tokenizer" + REST
        + "no differences; not compared: configuration (no config.json in `target`)",
        ["the donor has no config.json: no runtime can load the output"],
    ),
    "no configs": (
        {"configs": ""},
        "compared target, rl, sft: tokenizer" + REST + "no differences; not compared: configuration (no config.json)",
        ["the donor has no config.json: no runtime can load the output"],
    ),
    "ids swapped below a coefficient of 0": (
        {"words": SWAPPED, "lam": STAYS},
        WHOLE_CONFIG + "(ids not compared: embedding and head stay)" + REST + "no differences",
        [],
    ),
    "no tokenizer": (
        {"files": "target sft"},
        WHOLE_CONFIG + "(not of `rl`: no tokenizer files)" + REST + "1 note",
        ["model `rl` has no tokenizer files: its ids are taken to be those of the other models"],
    ),
    "no tokenizer below a coefficient of 0": (
        {"files": "target sft", "lam": STAYS},
        WHOLE_CONFIG + "(not of `rl`: no tokenizer files; ids not compared: embedding and head stay)" + REST
        + "no differences",
        [],
    ),
    "one tokenizer": (
        {"files": "target", "lam": STAYS},
        "compared target, rl, sft: configuration" + REST
        + "no differences; not compared: tokenizer (no tokenizer files in `rl` and `sft`)",
        [],
    ),
    "no tokenizers": (
        {"files": ""},
        "compared target, rl, sft: configuration" + REST
        + "no differences; not compared: tokenizer (no tokenizer files)",
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_line_says_what_was_not_compared(case: str, tmp_path: Path) -> None:
    """Found by a newcomer: `no differences` stood where nothing had been compared."""
    given, line, notes = CASES[case]
    plan = skillmerge.plan(family(tmp_path, **given))
    assert plan.problems == ()
    assert plan.compared.line == line
    assert [note for note in plan.notes if "settles nothing" not in note and "rules" not in note] == notes


def test_line_names_nothing_that_another_architecture_keeps_from_being_compared(tmp_path: Path) -> None:
    recipe = family(tmp_path)
    (tmp_path / "rl" / "config.json").write_text(json.dumps({**CONFIG, "model_type": "gpt2"}))
    assert skillmerge.plan(recipe).compared.line == "compared target, rl, sft: configuration: 1 problem"
