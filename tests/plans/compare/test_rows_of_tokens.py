"""Other tokens in matrices of any name: what takes these out of the formula, and that it does when it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODELS, random_tensors, run_cli, write_checkpoint, write_recipe
from pair_cases import tokenizer

import skillmerge

WORDS = [*"abcdefgh", "ab", "cd", "abcd"]
CLASH = "2 ids mean different tokens in models whose embedding or head is merged"
USUAL = ("model.embed_tokens.weight", "lm_head.weight")
INTERNLM = ("model.tok_embeddings.weight", "output.weight")
BLOCK = "model.layers.0.attention.key.weight"
PLAIN: dict[str, Any] = {"coefficients": None}
SKILL = PLAIN | {"merge": "rl - sft", "output": {"path": "skill", "kind": "skill"}}
RULE = {"default": 0.7, "rules": []}


def write_models(
    folder: Path, matrices: tuple[str, ...], rows: int = 32, added: dict[str, int] | None = None, swapped: int = 0
) -> None:
    """Models of which `rl` has two tokens, of ids from `swapped` on, in the other order."""
    shapes = {**dict.fromkeys(matrices, (rows, 16)), BLOCK: (400, 16)}
    shapes |= {name: (count, 16) for name, count in (added or {}).items()}
    for seed, name in enumerate(MODELS):
        step = random_tensors(shapes, torch.float32, seed, 1e-3)
        tensors = {key: (value + step[key]).bfloat16() for key, value in random_tensors(shapes).items()}
        write_checkpoint(folder / name, tensors, config={"model_type": "odd", "vocab_size": rows})
        words = list(WORDS)
        if name == "rl":
            words[swapped : swapped + 2] = reversed(words[swapped : swapped + 2])
        (folder / name / "tokenizer.json").write_text(json.dumps(tokenizer(words, {})))


def advice(folder: Path, **keys: Any) -> str | None:
    """What a plan advises; None where it has no problem."""
    problems = skillmerge.plan(write_recipe(folder, **keys)).problems
    assert all(problem.message.startswith(CLASH) for problem in problems)
    return problems[0].help if problems else None


@pytest.mark.parametrize(
    ("matrices", "keys", "said", "written"),
    [
        (USUAL, {}, "in the donor, add the rule `{modules: [embedding, head], value: 0}` to the coefficient",
         {"coefficients": {"lam": RULE | {"rules": [{"modules": ["embedding", "head"], "value": 0}]}}}),
        (INTERNLM, {}, 'add the rule `{tensors: ["model.tok_embeddings.weight", "output.weight"], value: 0}`',
         {"coefficients": {"lam": RULE | {"rules": [{"tensors": list(INTERNLM), "value": 0}]}}}),
        (USUAL, PLAIN | {"merge": "target + (rl - sft)"},
         'add to the recipe `copy: [{tensors: ["lm_head.weight", "model.embed_tokens.weight"], from: target}]`',
         {"copy": [{"tensors": list(USUAL), "from": "target"}]}),
        (USUAL, {"merge": "lam * rl + (1 - lam) * sft"}, "to take those rows from the donor, add to the recipe `copy:",
         {"copy": [{"tensors": list(USUAL), "from": "rl"}]}),
        (USUAL, SKILL,
         'out of the skill, add to the recipe `ignore: ["lm_head.weight", "model.embed_tokens.weight"]`',
         {"ignore": list(USUAL)}),
    ],
    ids=["kinds", "names", "no coefficient", "no coefficient of the donor's", "skill"],
)  # fmt: skip
def test_advice_for_other_tokens_settles_them(
    matrices: tuple[str, ...], keys: dict[str, Any], said: str, written: dict[str, Any], tmp_path: Path
) -> None:
    """Found by a review: heads that a rule cannot select by kind, and formulas that no coefficient can keep out."""
    write_models(tmp_path, matrices)
    found = advice(tmp_path, **keys)
    assert found is not None
    assert said in found
    assert advice(tmp_path, **(keys | written)) is None


def test_extract_says_which_option_leaves_other_tokens_out(tmp_path: Path) -> None:
    write_models(tmp_path, USUAL)
    models = ("--from", tmp_path / "rl", "--minus", tmp_path / "sft", "--output", tmp_path / "skill")
    refused = run_cli("extract", *models)
    assert refused.returncode == 4
    options = "--ignore lm_head.weight --ignore model.embed_tokens.weight"
    assert f"to leave those rows out, pass: {options}\n" in refused.stderr
    assert run_cli("extract", *models, *options.split()).returncode == 0


def test_inspect_advises_no_rule_of_a_recipe(tmp_path: Path) -> None:
    write_models(tmp_path, USUAL)
    shown = run_cli("inspect", tmp_path / "sft", tmp_path / "rl")
    assert CLASH in shown.stderr
    assert "to leave those rows" not in shown.stderr


def test_tokens_in_rows_that_are_stored_apart_are_compared(tmp_path: Path) -> None:
    """Idefics keeps the rows of the tokens that it adds in a matrix of their own."""
    added = {"model.embed_tokens.additional_embedding.weight": 3, "lm_head.additional_fc.weight": 3}
    write_models(tmp_path, USUAL, rows=8, added=added, swapped=8)
    assert advice(tmp_path) is not None
    rest = [*USUAL, "lm_head.additional_fc.weight"]
    assert advice(tmp_path, copy=[{"tensors": rest, "from": "target"}]) is not None
    assert advice(tmp_path, copy=[{"tensors": [*rest, *added], "from": "target"}]) is None


def test_what_is_accepted_is_said_in_the_words_of_the_command(tmp_path: Path) -> None:
    """Found by a review: `extract` spoke of a recipe and of its output, `inspect` of something to accept."""
    write_models(tmp_path, USUAL)
    for name, normalizer in (("sft", None), ("rl", {"type": "NFKC"})):
        document = tokenizer(WORDS, {}, normalizer=normalizer)
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(document))
    warning = f"warning: `{tmp_path / 'sft'}` cuts text in another way than `{tmp_path / 'rl'}`: another normalizer\n"
    models = ("--from", tmp_path / "rl", "--minus", tmp_path / "sft", "--output", tmp_path / "skill")
    advice = "help: if that is meant, pass `--accept tokenization`\n"
    assert run_cli("extract", *models, "-q").stderr == warning + advice
    assert run_cli("inspect", tmp_path / "sft", tmp_path / "rl", "-q").stderr == warning


def test_models_of_a_skill_may_stop_and_talk_as_they_like(tmp_path: Path) -> None:
    write_models(tmp_path, USUAL)
    for name in MODELS:
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokenizer(WORDS, {})))
        (tmp_path / name / "tokenizer_config.json").write_text(
            json.dumps({"chat_template": name, "eos_token": "abc"[MODELS.index(name)]})
        )
    keys: dict[str, Any] = {"merge": "rl + target - 2 * sft", "accept": ["donor"]}
    skill = skillmerge.plan(write_recipe(tmp_path, **(SKILL | keys)))
    assert skill.warnings == ()
    model = skillmerge.plan(write_recipe(tmp_path, **(PLAIN | keys | {"merge": "rl + target - sft"})))
    assert [it.name for it in model.warnings] == ["stop-tokens", "chat-template"]
