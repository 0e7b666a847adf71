"""A head that the configuration ties, and the file holds all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import random_tensors, run_cli, tensor_shapes, write_checkpoint, write_recipe

import skillmerge
from skillmerge.errors import InputError

TIED = {"model_type": "llama", "tie_word_embeddings": True}


def family(folder: Path, *, same: bool, **keys: object) -> Path:
    """Models that store their tied head, as a copy of the embedding or as another matrix."""
    for seed, name in enumerate(("target", "rl", "sft")):
        step = random_tensors(tensor_shapes(), seed=seed, scale=1e-3)
        tensors = {key: value + step[key] for key, value in random_tensors(tensor_shapes()).items()}
        if same:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        write_checkpoint(folder / name, tensors, config=TIED)
    return write_recipe(folder, **keys)


def test_stored_copy_of_the_embedding_is_no_news(tmp_path: Path) -> None:
    result = skillmerge.apply(family(tmp_path, same=True))
    assert list(result.warnings) == []


def test_stored_head_that_is_not_the_embedding_warns_as_the_weights_are_read(tmp_path: Path) -> None:
    recipe = family(tmp_path, same=False)
    assert skillmerge.plan(recipe).warnings == ()
    process = run_cli("apply", recipe, "-q")
    assert process.returncode == 0
    assert process.stderr == (
        "warning: config.json of the donor `target` ties `lm_head.weight` to `model.embed_tokens.weight`, but the two "
        "differ, so runtimes may use either\n"
        "help: set `tie_word_embeddings` to false in the donor's config.json, or remove its head from the file\n"
    )
    with pytest.raises(InputError, match="under --strict"):
        skillmerge.apply(recipe, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_accepted_ties_warn_of_nothing(tmp_path: Path) -> None:
    recipe = family(tmp_path, same=False, accept=["ties"])
    assert list(skillmerge.apply(recipe, strict=True).warnings) == []


def test_trained_head_beside_a_donor_that_ties_its_own_is_a_problem(tmp_path: Path) -> None:
    """Found by a review: runtimes tie the donor's head, and what RL taught the head was lost without a word."""
    recipe = family(tmp_path, same=True)
    for name in ("rl", "sft"):
        config = tmp_path / name / "config.json"
        config.write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    process = run_cli("plan", recipe)
    assert process.returncode == 4
    assert (
        "problem: `rl` and `sft` have a head of their own, the donor `target` stores one but ties it" in process.stdout
    )


def test_accepted_tie_is_kept_with_what_was_seen(tmp_path: Path) -> None:
    recipe = family(tmp_path, same=False, accept=["ties"])
    (kept,) = skillmerge.apply(recipe).manifest.accepted
    assert (kept.name, kept.key, kept.values) == (
        "ties",
        "lm_head.weight",
        {"target": "tied, another `lm_head.weight`"},
    )
