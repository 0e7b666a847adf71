"""The tokens that a stored skill's rows belong to: kept when it is made, compared when it is merged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_checkpoint, write_recipe
from pair_cases import WORDS, tokenizer

import skillmerge
from skillmerge.checkpoints.tokenizers.vocabulary import SKILL_TOKENS, skill_tokens, skill_tokens_text
from skillmerge.errors import StalePlan
from skillmerge.plans.plan import Plan
from skillmerge.reporter import Reporter

EMBEDDING, UP = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
SWAPPED = ["b", "a", *WORDS[2:]]
MODELS = {"target": "target", "math": {"skill": "math"}}


def model(folder: Path, seed: int, words: Sequence[str] | None = WORDS, *, rows: int = 16, still: bool = False) -> Path:
    """A model with this vocabulary. still: with the embedding that all such models have."""
    torch.manual_seed(0 if still else seed)
    embedding = torch.randn(rows, 4)
    torch.manual_seed(seed)
    tensors = {EMBEDDING: embedding, UP: torch.randn(4, 4)}
    write_checkpoint(folder, tensors, config={"model_type": "llama", "vocab_size": rows})
    if words is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer(list(words), {})))
    return folder


def skill(folder: Path, words: Sequence[str] | None = WORDS, **how: Any) -> Path:
    """The difference of two models with this vocabulary, as `math`."""
    extracting = {key: how.pop(key) for key in ("ignore", "accept") if key in how}
    rl, sft = (model(folder / name, seed, words, **how) for seed, name in enumerate(("rl", "sft"), 1))
    return skillmerge.extract(str(rl), str(sft), folder / "math", **extracting).output


def planned(folder: Path, words: Sequence[str] | None = WORDS, *, lam: Any = 0.5, **keys: Any) -> Plan:
    model(folder / "target", 3, words)
    return skillmerge.plan(
        write_recipe(folder, "target + lam * math", models=MODELS, coefficients={"lam": lam}, **keys)
    )


def test_skill_on_other_tokens_is_the_problem_that_its_models_would_be(tmp_path: Path) -> None:
    """Found by a newcomer: rows of one token were added to those of another without a word."""
    skill(tmp_path)
    plan = planned(tmp_path, SWAPPED)
    assert [(it.name, it.message, it.help) for it in plan.problems] == [
        (
            "tokenizer",
            "2 ids mean different tokens in models whose embedding or head is merged: `b` is 0 in `target`, 1 in "
            "`math`; `a` is 1 in `target`, 0 in `math`",
            "to leave those rows as they are in the donor, add the rule `{modules: [embedding, head], value: 0}` to "
            "the coefficient\nto give each token its own row, add to the recipe `vocabulary: by-token`",
        )
    ]
    accepted = planned(tmp_path, SWAPPED, accept=["tokenizer"])
    assert (accepted.problems, accepted.warnings) == ((), ())
    without = planned(tmp_path, SWAPPED, lam={"default": 0.5, "rules": [{"modules": "embedding", "value": 0.0}]})
    assert without.problems == ()


def test_skill_on_the_same_tokens_is_no_difference(tmp_path: Path) -> None:
    skill(tmp_path)
    plan = planned(tmp_path)
    assert (plan.problems, plan.warnings, plan.notes) == ((), (), ())
    assert plan.compared.line == (
        "compared target, math: configuration, token ids of `math`: no differences; "
        "not compared: tokenization, chat template, stop tokens of `math`"
    )


def test_target_with_more_tokens_at_the_end_is_a_note(tmp_path: Path) -> None:
    skill(tmp_path)
    plan = planned(tmp_path, [*WORDS, "<tool>"])
    assert (plan.problems, plan.warnings) == ((), ())
    assert plan.notes == (
        "a token is not in every model, and the rows follow the formula: `<tool>` is 11 in `target` only",
    )


def test_skill_of_a_free_token_is_judged_as_its_models_would_be(tmp_path: Path) -> None:
    skill(tmp_path, [*WORDS, "<unused7>"])
    plan = planned(tmp_path, [*WORDS, "<tool>"])
    assert (plan.problems, plan.warnings) == ((), ())
    assert [note for note in plan.notes if "kept free" in note]


@pytest.mark.parametrize("how", [{"ignore": [EMBEDDING]}, {"still": True}], ids=["ignored", "unchanged"])
def test_skill_without_rows_of_tokens_fits_any_tokens(how: Mapping[str, Any], tmp_path: Path) -> None:
    skill(tmp_path, **how)
    plan = planned(
        tmp_path, SWAPPED, **({"copy": [{"tensors": EMBEDDING, "from": "target"}]} if "ignore" in how else {})
    )
    assert plan.problems == ()
    assert (tmp_path / "math" / SKILL_TOKENS).exists() == ("still" in how)


def test_skill_of_an_earlier_version_is_merged_as_before(tmp_path: Path) -> None:
    (skill(tmp_path) / SKILL_TOKENS).unlink()
    plan = planned(tmp_path, SWAPPED)
    assert (plan.problems, plan.warnings, plan.notes) == ((), (), ())
    assert plan.compared.line == (
        "compared target, math: configuration: no differences; "
        "not compared: token ids (unknown in `math`); tokenization, chat template, stop tokens of `math`"
    )


def test_models_without_a_tokenizer_make_a_skill_without_tokens(tmp_path: Path) -> None:
    assert not (skill(tmp_path, None) / SKILL_TOKENS).exists()
    assert planned(tmp_path).problems == ()


def test_skill_of_a_skill_keeps_the_tokens(tmp_path: Path) -> None:
    kept = (skill(tmp_path) / SKILL_TOKENS).read_bytes()
    assert list(skill_tokens(kept).tokens.values()) == WORDS
    half = write_recipe(
        tmp_path, "half * math", models={"math": {"skill": "math"}}, coefficients={"half": 0.5},
        output={"kind": "skill", "path": "half"},
    )  # fmt: skip
    assert (skillmerge.apply(half).output / SKILL_TOKENS).read_bytes() == kept
    mixed = {**MODELS, "math": {"skill": "half"}}
    model(tmp_path / "target", 3, SWAPPED)
    plan = skillmerge.plan(write_recipe(tmp_path, "target + math", models=mixed, coefficients=None))
    assert [it.name for it in plan.problems] == ["tokenizer"]


def test_two_skills_of_other_tokens_are_compared_with_each_other(tmp_path: Path) -> None:
    skill(tmp_path)
    skill(tmp_path / "other", SWAPPED)
    models = {"a": {"skill": "math"}, "b": {"skill": "other/math"}}
    recipe = write_recipe(tmp_path, "a + b", models=models, coefficients=None, output={"kind": "skill", "path": "sum"})
    assert [it.name for it in skillmerge.plan(recipe).problems] == ["tokenizer"]


def test_rows_past_those_of_the_matrices_are_not_kept(tmp_path: Path) -> None:
    kept = skill(tmp_path, [*WORDS, *(f"w{number}" for number in range(9))]) / SKILL_TOKENS
    assert len(skill_tokens(kept.read_bytes()).tokens) == 16


@pytest.mark.parametrize("words", [SWAPPED, None], ids=["changed", "removed"])
def test_rebuild_names_tokenizer_files_that_changed(words: Sequence[str] | None, tmp_path: Path) -> None:
    """The weights, which are the same, were named as the cause."""
    stored = skill(tmp_path)
    skillmerge.rebuild(stored, check=True)
    for name in ("rl", "sft"):
        (tmp_path / name / "tokenizer.json").unlink()
        if words is not None:
            (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokenizer(list(words), {})))
    for how in ({"check": True}, {"output": tmp_path / "again"}):
        with pytest.raises(StalePlan, match="the tokenizer files of its models name other tokens than "):
            skillmerge.rebuild(stored, **how)
    assert not (tmp_path / "again").exists()


def test_skill_is_extracted_again_for_its_tokens(tmp_path: Path) -> None:
    """It was called up to date, with `overwrite` too: the plan, of the weights, is the same."""
    stored = skill(tmp_path, None)
    heard: list[str] = []
    reporter = Reporter()
    reporter.note = heard.append  # type: ignore[method-assign]
    for name in ("rl", "sft"):
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokenizer(list(WORDS), {})))
    again = skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), stored, reporter=reporter)
    assert again.already
    assert heard == [
        f"the tokens that {stored} keeps are not those that its models' tokenizer files name now; to make it again, "
        "pass `--overwrite`"
    ]
    assert not skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), stored, overwrite=True).already
    assert list(skill_tokens((stored / SKILL_TOKENS).read_bytes()).tokens.values()) == WORDS
    heard.clear()
    assert skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), stored, reporter=reporter).already
    assert heard == []


def test_damaged_tokens_are_a_note(tmp_path: Path) -> None:
    (skill(tmp_path) / SKILL_TOKENS).write_text('{"a": 0}')
    plan = planned(tmp_path)
    assert plan.problems == ()
    assert [note.partition(f"{SKILL_TOKENS}: ")[2] for note in plan.notes] == [
        "cannot be read: it is not a JSON list; its tokenizer is compared as far as other files say it"
    ]


def test_tokens_are_read_as_they_were_written() -> None:
    tokens = {0: "a", 2: 'Ġ"quoted"\n', 3: "a", 5: "\ud800"}
    assert skill_tokens(skill_tokens_text(tokens).encode()).tokens == tokens
    assert skill_tokens(skill_tokens_text({}).encode()).tokens == {}


def test_skill_whose_factors_are_all_zero_is_planned(tmp_path: Path) -> None:
    """The donor is a skill that has no part in the formula."""
    skill(tmp_path)
    models, output = {"math": {"skill": "math"}}, {"kind": "skill", "path": "zero"}
    recipe = write_recipe(tmp_path, "lam * math", models=models, coefficients={"lam": 0}, output=output)
    assert {it.action for it in skillmerge.plan(recipe).tensors.values()} == {"zero"}
