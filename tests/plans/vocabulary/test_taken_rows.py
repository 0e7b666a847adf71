"""`tokens`: rows that one model gives whole, and what is refused of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODELS, read_checkpoint, run_cli, write_checkpoint, write_recipe
from test_rows_by_hand import applied, rows_of, write_models
from token_rows import BASE, BLOCK, EMBEDDING, HEAD, Words, by_hand, by_token, past, same_bits, write_model

import skillmerge

THINK: tuple[Words, Words, Words] = (
    [*BASE, "<think>", "</think>", None],
    ["</think>", "<think>", *BASE],
    [*BASE, "<think>"],
)
FROM_RL = {"<think>": {"from": "rl"}, "</think>": {"from": "rl"}}


@pytest.mark.parametrize("merge", ["target + lam * (rl - sft)", "(1 - lam) * target + lam * slerp(rl, sft, t=0.5)"])
def test_token_has_the_whole_row_of_its_model(tmp_path: Path, merge: str) -> None:
    write_models(tmp_path, THINK)
    made = applied(tmp_path, merge=merge, tokens=FROM_RL)
    for matrix in (EMBEDDING, HEAD):
        theirs = rows_of(tmp_path, THINK, matrix)["rl"][1]
        assert same_bits(made[matrix][8:10], theirs[[1, 0]])
    if "slerp" not in merge:
        wanted = by_hand(rows_of(tmp_path, THINK, EMBEDDING), "target", past, {"<think>": "rl", "</think>": "rl"})
        assert same_bits(made[EMBEDDING], wanted)


def test_row_is_taken_into_a_matrix_that_is_else_the_donors(tmp_path: Path) -> None:
    write_models(tmp_path, THINK)
    rules = [{"modules": ["embedding", "head"], "value": 0}]
    made = applied(tmp_path, coefficients={"lam": {"default": 0.7, "rules": rules}}, tokens=FROM_RL)
    for matrix in (EMBEDDING, HEAD):
        ours, theirs = (rows_of(tmp_path, THINK, matrix)[name][1] for name in ("target", "rl"))
        assert same_bits(made[matrix][:8], ours[:8])
        assert same_bits(made[matrix][8:10], theirs[[1, 0]])
        assert same_bits(made[matrix][10:], ours[10:])


@pytest.mark.parametrize("dtype", ["same", "float32"])
def test_wider_row_keeps_the_donors_dtype_unless_another_is_requested(tmp_path: Path, dtype: str) -> None:
    for seed, (name, each) in enumerate(zip(MODELS, THINK, strict=True)):
        write_model(tmp_path / name, each, seed, dtype=torch.float32 if name == "rl" else torch.bfloat16)
    made = applied(tmp_path, merge="target + lam * (target - sft)", tokens=FROM_RL, output={"dtype": dtype})
    theirs = read_checkpoint(tmp_path / "rl")[EMBEDDING][[1, 0]]
    wanted = theirs if dtype == "float32" else theirs.to(torch.bfloat16)
    assert torch.equal(made[EMBEDDING][8:10], wanted)
    ours = read_checkpoint(tmp_path / "target")[EMBEDDING]
    assert torch.equal(made[EMBEDDING][10], ours[10].to(wanted.dtype))


def test_row_comes_from_the_embedding_of_a_model_that_ties_its_head(tmp_path: Path) -> None:
    write_models(tmp_path, THINK)
    write_model(tmp_path / "rl", THINK[1], 1, tied=True, stored=False)
    made = applied(tmp_path, tokens=FROM_RL, accept=["ties"])
    assert torch.equal(made[HEAD][8:10], read_checkpoint(tmp_path / "rl")[EMBEDDING][[1, 0]])


def test_model_that_only_gives_rows_may_have_any_number_of_them(tmp_path: Path) -> None:
    write_models(tmp_path, (["a", "b"], ["x", "y", "b", None, None], ["a", "b"]))
    made = applied(tmp_path, merge="target + lam * (target - sft)", tokens={"b": {"from": "rl"}})
    assert torch.equal(made[EMBEDDING][1], read_checkpoint(tmp_path / "rl")[EMBEDDING][2])


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "not in the donor": (
        {"tokens": {"<tool>": {"from": "rl"}}}, 2,
        "the donor `target` has no token `<tool>`\n"
        "help: to have it, take the tokenizer of `rl`: `output: {like: rl}`\n",
    ),
    "in neither": (
        {"tokens": {"<thing>": {"from": "rl"}}}, 2,
        "neither the donor `target` nor `rl` has the token `<thing>`\nhelp: did you mean `<think>`?\n",
    ),
    "in neither, and like none": (
        {"tokens": {"nope": {"from": "rl"}}}, 2,
        "neither the donor `target` nor `rl` has the token `nope`\n"
        "help: write it as the tokenizer of `rl` does\n",
    ),
    "not in its model": (
        {"tokens": {"</think>": {"from": "sft"}}}, 2,
        "model `sft` has no token `</think>`\nhelp: did you mean `<think>`?\n",
    ),
    "no model": (
        {"tokens": {"<think>": {"from": "lr"}}}, 2,
        "`lr` is not a model of this recipe\nhelp: models of this recipe: target, rl, sft\n",
    ),
    "by id": (
        {"tokens": FROM_RL, "vocabulary": None}, 2,
        "`tokens` takes rows by token\nhelp: add to the recipe: vocabulary: by-token\n",
    ),
    "other word": (
        {"vocabulary": "token"}, 2,
        "`vocabulary` must be `by-id` or `by-token`, not 'token'\nhelp: did you mean `by-token`?",
    ),
    "skill": (
        {"tokens": FROM_RL, "merge": "rl - sft", "coefficients": None, "output": {"path": "out", "kind": "skill"}}, 2,
        "a skill has no `tokens`\nhelp: leave it out\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_what_to_do(tmp_path: Path, case: str) -> None:
    write_models(tmp_path, (THINK[0], ["</think>", "<think>", "<tool>", *BASE], THINK[2]))
    keys, status, message = REFUSED[case]
    recipe = write_recipe(tmp_path, **{**by_token(), **keys})
    found = run_cli("apply", recipe, "-o", tmp_path / "out")
    lines = [line for line in found.stderr.splitlines() if not line.startswith(("    ", "      |"))]
    lines = [line for line in lines if "|" not in line[:8]]
    assert found.returncode == status, found.stderr
    assert message.strip() in "\n".join(lines), found.stderr
    assert not (tmp_path / "out").exists()


def test_model_without_such_a_matrix_cannot_give_a_row(tmp_path: Path) -> None:
    write_models(tmp_path, THINK)
    tensors = read_checkpoint(tmp_path / "rl")
    del tensors[HEAD]
    write_checkpoint(tmp_path / "rl", tensors, config={"vocab_size": 10, "tie_word_embeddings": False})
    recipe = write_recipe(tmp_path, "target + lam * (target - sft)", **by_token(tokens=FROM_RL))
    found = run_cli("plan", recipe)
    assert found.returncode == 2
    assert "model `rl` has no `lm_head.weight` with rows like the donor's, so a row cannot be taken" in found.stderr


def test_token_of_the_donor_without_a_row_takes_none(tmp_path: Path) -> None:
    write_models(tmp_path, ([*BASE, "<x>"], [*BASE, "<x>"], BASE))
    tensors = read_checkpoint(tmp_path / "target")
    short = {name: it[:8] if name != BLOCK else it for name, it in tensors.items()}
    write_checkpoint(tmp_path / "target", short, config={"vocab_size": 8})
    recipe = write_recipe(tmp_path, **by_token(tokens={"<x>": {"from": "rl"}}, accept=["tokenizer"]))
    found = run_cli("plan", recipe)
    assert found.returncode == 2
    assert "the embedding of the donor `target` has no token `<x>`" in found.stderr


def test_model_without_the_row_cannot_give_it(tmp_path: Path) -> None:
    write_models(tmp_path, ([*BASE, "<x>"], [*BASE, "<x>"], BASE))
    tensors = read_checkpoint(tmp_path / "rl")
    short = {name: it[:8] if name != BLOCK else it for name, it in tensors.items()}
    write_checkpoint(tmp_path / "rl", short, config={"vocab_size": 8})
    recipe = write_recipe(tmp_path, **by_token(tokens={"<x>": {"from": "rl"}}, accept=["tokenizer"]))
    found = run_cli("plan", recipe)
    assert found.returncode == 2
    assert "of model `rl` has no token `<x>`" in found.stderr


def test_taken_rows_are_shown(tmp_path: Path) -> None:
    write_models(tmp_path, THINK)
    shown = run_cli("plan", write_recipe(tmp_path, **by_token(tokens=FROM_RL))).stdout
    line = "8 of 11 rows merged by token, 1 as in `target`, 2 from `rl`: <think>, </think>"
    assert f"lm_head.weight, model.embed_tokens.weight: {line}\n" in shown
    plan = skillmerge.plan(write_recipe(tmp_path, **by_token(tokens=FROM_RL)))
    assert plan.as_dict()["vocabulary"]["matrices"][HEAD] == {
        "rows": 11, "merged": 8, "donor": 1, "taken": {"rl": ["<think>", "</think>"]}
    }  # fmt: skip
