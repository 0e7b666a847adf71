"""A model whose embedding stands for its head, beside models that store both: each matrix has its own rows of the
donor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import read_checkpoint, run_cli, weights, write_checkpoint, write_recipe
from token_rows import BASE, EMBEDDING, HEAD, Words, by_hand, by_token, past, same_bits, tokenizer_json, write_model

import skillmerge

WORDS: dict[str, Words] = {"target": [*BASE, "<x>", None], "rl": BASE[::-1], "sft": ["<x>", *BASE]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`rl` ties its head to the embedding and stores none."""
    for seed, (name, words) in enumerate(WORDS.items()):
        write_model(tmp_path / name, words, seed, tied=name == "rl", stored=name != "rl")
    return tmp_path


def rows(folder: Path, matrix: str, *names: str) -> dict[str, tuple[Words, np.ndarray]]:
    found = {}
    for name in names:
        tensors = read_checkpoint(folder / name)
        found[name] = WORDS[name], tensors[matrix if matrix in tensors else EMBEDDING].numpy()
    return found


def recipe(folder: Path, merge: str, **keys: Any) -> Path:
    coefficients = {"lam": 0.7} if "lam" in merge else None
    keys = {"coefficients": coefficients, "accept": ["ties", "update-size"], "output": {"like": "target"}, **keys}
    return write_recipe(folder, merge, **by_token(**keys))


def mean(**models: np.ndarray) -> np.ndarray:
    found: np.ndarray = sum(values.astype(np.float64) for values in models.values()) / len(models)
    return found.astype(np.float32)


@pytest.mark.parametrize(
    ("merge", "formula"),
    [
        ("target + lam * (rl - sft)", past),
        ("target + lam * (sft - rl)", lambda target, rl, sft: past(target, sft, rl)),
        ("rl + lam * (target - sft)", lambda target, rl, sft: past(rl, target, sft)),
        ("0.5 * rl + 0.5 * target", mean),
        ("rl", lambda target, rl: rl),
    ],
)
def test_rows_that_are_not_merged_are_those_of_the_matrix(
    folder: Path, merge: str, formula: Callable[..., np.ndarray]
) -> None:
    """Whichever model comes first, and where the formula does not read the donor."""
    made = read_checkpoint(skillmerge.apply(recipe(folder, merge), folder / "out").output)
    names = ["target", *(name for name in ("rl", "sft") if name in merge)]
    for matrix in (EMBEDDING, HEAD):
        assert same_bits(made[matrix], by_hand(rows(folder, matrix, *names), "target", formula)), matrix


def test_copied_head_of_a_tied_model_has_the_donors_rows_of_the_head(folder: Path) -> None:
    path = recipe(folder, "target + lam * (target - sft)", copy=[{"tensors": HEAD, "from": "rl"}])
    made = read_checkpoint(skillmerge.apply(path, folder / "out").output)
    wanted = by_hand(rows(folder, HEAD, "target", "rl"), "target", lambda target, rl: rl)
    assert same_bits(made[HEAD], wanted)


def test_methods_measure_each_matrix_with_its_own_rows(folder: Path) -> None:
    """As they do where the tied model stores its head."""
    merge = "slerp(target, rl, t=0.3)"
    first = skillmerge.apply(recipe(folder, merge), folder / "out").output
    write_model(folder / "rl", WORDS["rl"], 1, tied=True)
    again = skillmerge.apply(recipe(folder, merge), folder / "again").output
    assert weights(again) == weights(first)


def test_matrices_with_other_numbers_of_rows(folder: Path) -> None:
    tensors = read_checkpoint(folder / "target")
    shorter = {**tensors, HEAD: tensors[HEAD][:9].clone()}
    write_checkpoint(folder / "target", shorter, config={"model_type": "odd", "vocab_size": 9})
    (folder / "target" / "tokenizer.json").write_text(tokenizer_json(WORDS["target"]))
    made = read_checkpoint(skillmerge.apply(recipe(folder, "target + lam * (rl - target)"), folder / "out").output)
    found = rows(folder, HEAD, "target", "rl")
    found["target"] = WORDS["target"][:9], found["target"][1]
    wanted = by_hand(found, "target", lambda target, rl: past(target, rl, target))
    assert same_bits(made[HEAD], wanted)


def test_plans_and_tasks_and_what_is_rebuilt_are_the_same(folder: Path) -> None:
    path = recipe(folder, "target + lam * (sft - rl)")
    first = skillmerge.apply(path, folder / "out").output
    plan = folder / "plan.json"
    assert run_cli("plan", path, "-o", plan).returncode == 0
    for index in range(2):
        task = run_cli("shard", plan, "-o", folder / "tasks", "--index", str(index), "--of", "2")
        assert task.returncode == 0, task.stderr
    assert run_cli("finish", plan, "-o", folder / "tasks").returncode == 0
    assert weights(folder / "tasks") == weights(first)
    assert run_cli("rebuild", first, "--check").returncode == 0


def test_heads_that_differ_by_the_donors_rows_alone_are_no_warning(folder: Path) -> None:
    """`rl` stores its head, which is its embedding: runtimes may use either."""
    write_model(folder / "rl", WORDS["rl"], 1, tied=True)
    path = recipe(folder, "target + lam * (rl - target)", accept=["update-size"])
    found = run_cli("apply", path, "-o", folder / "out")
    assert found.returncode == 0, found.stderr
    assert "the two differ" not in found.stderr


def test_tied_head_is_still_told(folder: Path) -> None:
    found = run_cli("plan", recipe(folder, "target + lam * (rl - target)", accept=["update-size"]))
    assert "`rl` ties its head to the embedding, which is read as the head" in " ".join(found.stdout.split())
