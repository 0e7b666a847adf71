"""A head that the configuration ties, and the file holds all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import MODELS, random_tensors, read_checkpoint, run_cli, tensor_shapes, write_checkpoint, write_recipe

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


@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        ("model.tok_embeddings.weight", "output.weight"),
        ("gpt_neox.embed_in.weight", "embed_out.weight"),
        ("backbone.embeddings.weight", "lm_head.weight"),
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    ],
)
def test_stored_heads_of_other_names_are_read_as_well(embedding: str, head: str, tmp_path: Path) -> None:
    """Found by a review: of these nothing was said, whatever their heads were."""
    for same in (True, False):
        recipe = family(tmp_path, same=same)
        for name in MODELS:
            tensors = read_checkpoint(tmp_path / name)
            tensors[embedding], tensors[head] = tensors.pop("model.embed_tokens.weight"), tensors.pop("lm_head.weight")
            write_checkpoint(tmp_path / name, tensors, config=TIED | {"vocab_size": 32})
        told = list(skillmerge.apply(recipe, overwrite=True).warnings)
        assert told == [] if same else [it.partition(" ties ")[2] for it in told] == [
            f"`{head}` to `{embedding}`, but the two differ, so runtimes may use either"
        ]  # fmt: skip


def test_advice_for_a_tied_head_that_no_rule_selects_by_kind_names_it(tmp_path: Path) -> None:
    rules = {"lam": {"default": 0.7, "rules": [{"modules": "embedding", "value": 0}]}}
    recipe = family(tmp_path, same=True, coefficients=rules)
    for name in MODELS:
        tensors = read_checkpoint(tmp_path / name)
        tensors["output.weight"] = tensors.pop("lm_head.weight")
        write_checkpoint(tmp_path / name, tensors, config=TIED)
    [told] = skillmerge.plan(recipe).warnings
    assert told.fix == (
        'give both the same coefficient: {tensors: ["model.embed_tokens.weight", "output.weight"], value: …}'
    )


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
