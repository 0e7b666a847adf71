"""Merges by token against row maps made by hand: which row goes where, and that the rest is the donor's bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODELS, read_checkpoint, run_cli, write_checkpoint, write_recipe
from token_rows import BASE, BLOCK, EMBEDDING, HEAD, Words, by_hand, by_token, past, same_bits, write_model

import skillmerge

CASES: dict[str, tuple[Words, Words, Words]] = {
    "alike": (BASE, BASE, BASE),
    "added in another order": (
        [*BASE, None, None, None],
        [*BASE, "</think>", "<think>", "<tool>"],
        [*BASE, "<think>", "</think>", None],
    ),
    "the target has what one lacks": (
        ["<x>", *BASE, "<think>", None],
        [*BASE, "<think>", "<x>"],
        [*BASE, "<x>", None, None, None],
    ),
    "padding trimmed": ([*BASE, None, None, None, None], BASE, [*BASE, None]),
    "all in another order": (BASE, BASE[::-1], [*BASE[4:], *BASE[:4]]),
    "nothing in common": (BASE, [word * 2 for word in BASE], BASE),
    "one row": (["a"], ["b", "a"], [None, None, "a"]),
}


def write_models(folder: Path, words: tuple[Words, Words, Words], **settings: Any) -> None:
    for seed, (name, each) in enumerate(zip(MODELS, words, strict=True)):
        write_model(folder / name, each, seed, **settings)


def rows_of(folder: Path, words: tuple[Words, Words, Words], matrix: str) -> dict[str, tuple[Words, np.ndarray]]:
    return {
        name: (each, read_checkpoint(folder / name)[matrix].numpy()) for name, each in zip(MODELS, words, strict=True)
    }


def applied(folder: Path, **keys: Any) -> dict[str, torch.Tensor]:
    return read_checkpoint(skillmerge.apply(write_recipe(folder, **by_token(**keys)), folder / "out").output)


@pytest.mark.parametrize("words", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("shards", [1, 3])
def test_each_token_is_merged_with_its_own_row(tmp_path: Path, words: tuple[Words, Words, Words], shards: int) -> None:
    write_models(tmp_path, words, shards=shards)
    made = applied(tmp_path)
    for matrix in (EMBEDDING, HEAD):
        assert same_bits(made[matrix], by_hand(rows_of(tmp_path, words, matrix), "target", past))
    whole = {name: read_checkpoint(tmp_path / name)[BLOCK].numpy() for name in MODELS}
    assert same_bits(made[BLOCK], past(**whole))


def test_donor_that_the_formula_does_not_read_gives_order_and_rest(tmp_path: Path) -> None:
    words: tuple[Words, Words, Words] = (BASE, [*BASE[::-1], "<a>"], ["<a>", *BASE[1:], None])
    write_models(tmp_path, words)
    made = applied(tmp_path, merge="target", coefficients=None, output={"like": "sft"})
    rows = {name: it for name, it in rows_of(tmp_path, words, EMBEDDING).items() if name != "rl"}
    assert same_bits(made[EMBEDDING], by_hand(rows, "sft", lambda target, sft: target))


def test_only_models_that_a_matrix_reads_have_to_know_a_token(tmp_path: Path) -> None:
    words: tuple[Words, Words, Words] = ([*BASE, "<x>"], [*BASE, "<x>"], [*BASE, None])
    write_models(tmp_path, words)
    rules = [{"tensors": "lm_head.weight", "value": 0}]
    made = applied(
        tmp_path, merge="target + 0.5 * (rl - target) + lam * (sft - rl)",
        coefficients={"lam": {"default": 0.5, "rules": rules}},
    )  # fmt: skip
    embeddings, heads = rows_of(tmp_path, words, EMBEDDING), rows_of(tmp_path, words, HEAD)
    assert same_bits(made[EMBEDDING][-1], embeddings["target"][1][-1])

    def half(target: np.ndarray, rl: np.ndarray) -> np.ndarray:
        return (target.astype(np.float64) - 0.5 * (target.astype(np.float64) - rl)).astype(np.float32)

    del heads["sft"]
    assert same_bits(made[HEAD], by_hand(heads, "target", half))


@pytest.mark.parametrize(
    "merge",
    [
        "target + 0.7 * (rl - sft)", "(target + rl + sft) / 3", "0.3 * target + 0.6 * rl + 0.1 * sft",
        "2 * target - sft", "rl - sft + target", "target + ties(rl - sft, sft - rl, density=0.5)",
        "slerp(target, rl, t=0.3)", "multislerp(target, rl, sft)", "karcher(target, rl, sft)",
        "median(target, rl, sft)", "target + drop(rl - sft, density=0.5)",
        "target + model_stock(rl - target, sft - target)",
        "target + clip(rl - sft, at=0.1)",
    ],
)  # fmt: skip
@pytest.mark.parametrize("output", [{}, {"rounding": "stochastic"}])
def test_rows_that_are_not_merged_are_the_donors_bit_for_bit(
    tmp_path: Path, merge: str, output: dict[str, Any]
) -> None:
    """Zeros of both signs, numbers near the smallest and the largest: no formula may touch them."""
    words: tuple[Words, Words, Words] = (["a", "b", "<x>", None], ["b", "a", None, "<y>"], ["a", "b", None, "<z>"])
    write_models(tmp_path, words, dtype=torch.bfloat16)
    odd = torch.tensor([[-0.0, 0.0, 1e-40, 3e38, -3e38, 0.1], [-0.0, -1e-3, 7.7, -9e-39, 0.0, 1.0]])
    tensors = read_checkpoint(tmp_path / "target")
    for matrix in (EMBEDDING, HEAD):
        tensors[matrix][2:] = odd.to(torch.bfloat16)
    write_checkpoint(tmp_path / "target", tensors, config={"vocab_size": 4})
    recipe = write_recipe(tmp_path, merge, **by_token(coefficients=None, output={"like": "target", **output}))
    made = read_checkpoint(skillmerge.apply(recipe, tmp_path / "out").output)
    for matrix in (EMBEDDING, HEAD):
        assert torch.equal(made[matrix][2:].view(torch.int16), tensors[matrix][2:].view(torch.int16))


def test_donor_with_wider_numbers_keeps_them(tmp_path: Path) -> None:
    """The other models hold bfloat16, into which the donor's rows would not fit."""
    words: tuple[Words, Words, Words] = ([*BASE, "<x>"], [*BASE[::-1]], [*BASE, "<y>"])
    write_model(tmp_path / "target", words[0], 0)
    write_model(tmp_path / "rl", words[1], 1, dtype=torch.bfloat16)
    write_model(tmp_path / "sft", words[2], 2, dtype=torch.float16)
    made = applied(tmp_path, merge="(target + rl + sft) / 3", coefficients=None)
    rows = {
        name: (each, read_checkpoint(tmp_path / name)[EMBEDDING].float().numpy())
        for name, each in zip(MODELS, words, strict=True)
    }

    def mean(target: np.ndarray, rl: np.ndarray, sft: np.ndarray) -> np.ndarray:
        return ((target.astype(np.float64) + rl + sft) / 3).astype(np.float32)

    assert same_bits(made[EMBEDDING], by_hand(rows, "target", mean))


def test_tied_models_and_models_with_heads_go_together(tmp_path: Path) -> None:
    words: tuple[Words, Words, Words] = ([*BASE, None], BASE[::-1], ["<x>", *BASE])
    write_model(tmp_path / "target", words[0], 0, tied=True, stored=False)
    write_model(tmp_path / "rl", words[1], 1, tied=True)
    write_model(tmp_path / "sft", words[2], 2, tied=True, stored=False)
    made = applied(tmp_path)
    assert HEAD not in made
    assert same_bits(made[EMBEDDING], by_hand(rows_of(tmp_path, words, EMBEDDING), "target", past))


def test_embedding_stands_for_the_head_of_a_tied_model(tmp_path: Path) -> None:
    words: tuple[Words, Words, Words] = ([*BASE, None], BASE[::-1], ["<x>", *BASE])
    write_model(tmp_path / "target", words[0], 0)
    write_model(tmp_path / "rl", words[1], 1, tied=True, stored=False)
    write_model(tmp_path / "sft", words[2], 2)
    made = applied(tmp_path, accept=["ties"])
    heads = {
        name: (each, read_checkpoint(tmp_path / name)[EMBEDDING if name == "rl" else HEAD].numpy())
        for name, each in zip(MODELS, words, strict=True)
    }
    assert same_bits(made[HEAD], by_hand(heads, "target", past))


def test_bias_of_a_head_goes_with_its_rows(tmp_path: Path) -> None:
    words: tuple[Words, Words, Words] = ([*BASE, None], BASE[::-1], ["<x>", *BASE])
    write_models(tmp_path, words)
    bias = "lm_head.bias"
    rows = {}
    for name, each in zip(MODELS, words, strict=True):
        values = torch.randn(len(each), generator=torch.Generator().manual_seed(len(name)))
        rows[name] = each, values.numpy()
        tensors = read_checkpoint(tmp_path / name)
        write_checkpoint(tmp_path / name, {**tensors, bias: values}, config={"vocab_size": len(each)})
    assert same_bits(applied(tmp_path)[bias], by_hand(rows, "target", past))


def test_copied_matrix_comes_in_the_donors_order(tmp_path: Path) -> None:
    words: tuple[Words, Words, Words] = ([*BASE, "<x>"], BASE[::-1], BASE)
    write_models(tmp_path, words)
    made = applied(tmp_path, copy=[{"tensors": HEAD, "from": "rl"}])
    rows = rows_of(tmp_path, words, HEAD)
    del rows["sft"]
    assert same_bits(made[HEAD], by_hand(rows, "target", lambda target, rl: rl))


def test_without_the_key_rows_go_by_id(tmp_path: Path) -> None:
    write_models(tmp_path, (BASE, BASE[::-1], BASE))
    refused = run_cli("plan", write_recipe(tmp_path))
    assert refused.returncode == 4
    assert "8 ids mean different tokens" in refused.stdout
    assert "to give each token its own row, add to the recipe `vocabulary: by-token`\n" in refused.stdout
    settled = run_cli("plan", write_recipe(tmp_path, **by_token()))
    assert settled.returncode == 0, settled.stderr
