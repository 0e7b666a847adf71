"""Matrices of tokens beside embedding and head: with other numbers of rows, and biases of tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import MODELS, random_tensors, read_checkpoint, run_cli, write_checkpoint, write_recipe
from test_rows_by_hand import applied, rows_of, write_models
from token_rows import BASE, BLOCK, EMBEDDING, HEAD, Words, by_hand, by_token, past, same_bits, tokenizer_json

IMAGE: tuple[Words, Words, Words] = (
    [*BASE, "<tool>", "<think>", "<image>"],
    [*BASE, "<think>", "<tool>", "<image>"],
    [*BASE, "<tool>", "<think>", "<image>"],
)


def test_head_without_the_rows_of_images_is_no_problem(tmp_path: Path) -> None:
    """As in Llama 3.2 Vision: what is no answer has a row in the embedding alone."""
    write_models(tmp_path, IMAGE)
    for name in MODELS:
        tensors = read_checkpoint(tmp_path / name)
        write_checkpoint(tmp_path / name, {**tensors, HEAD: tensors[HEAD][:10].clone()}, config={"vocab_size": 10})
    shown = run_cli("plan", write_recipe(tmp_path, **by_token()))
    assert shown.returncode == 0, shown.stdout
    made = applied(tmp_path)
    assert same_bits(made[EMBEDDING], by_hand(rows_of(tmp_path, IMAGE, EMBEDDING), "target", past))
    heads = {name: (words[:10], rows) for name, (words, rows) in rows_of(tmp_path, IMAGE, HEAD).items()}
    assert same_bits(made[HEAD], by_hand(heads, "target", past))


def test_rows_for_all_layers_are_fewer(tmp_path: Path) -> None:
    """As in Gemma 3n: tokens of images have none there."""
    write_models(tmp_path, IMAGE)
    name = "model.language_model.embed_tokens_per_layer.weight"
    for seed, model in enumerate(MODELS):
        tensors = read_checkpoint(tmp_path / model)
        tensors[name] = random_tensors({name: (10, 4)}, torch.float32, 7 + seed)[name]
        write_checkpoint(tmp_path / model, tensors, config={"vocab_size": 11, "vocab_size_per_layer_input": 10})
    made = applied(tmp_path)
    for matrix, count in ((EMBEDDING, 11), (name, 10)):
        rows = {model: (words[:count], it) for model, (words, it) in rows_of(tmp_path, IMAGE, matrix).items()}
        assert same_bits(made[matrix], by_hand(rows, "target", past)), matrix


ADDED: tuple[Words, Words, Words] = (
    [*BASE, "<tool>", None, None],
    [*BASE, "</think>", "<think>", "<tool>"],
    [*BASE, "<think>", "<tool>", None],
)


def write_beside(folder: Path, name: str, shape: tuple[int, ...], embedding: str = EMBEDDING) -> None:
    """Three models with one more tensor, and no head: their configs tie it to the embedding."""
    for seed, (model, words) in enumerate(zip(MODELS, ADDED, strict=True)):
        shapes = {embedding: (11, 6), BLOCK: (5, 6), name: shape}
        tensors = random_tensors(shapes, torch.float32, seed)
        config = {"vocab_size": 11, "tie_word_embeddings": True}
        write_checkpoint(folder / model, tensors, config=config)
        (folder / model / "tokenizer.json").write_text(tokenizer_json(words))


@pytest.mark.parametrize(
    ("embedding", "bias"),
    [
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"),
        ("roberta.embeddings.word_embeddings.weight", "lm_head.bias"),
        ("albert.embeddings.word_embeddings.weight", "predictions.bias"),
        ("distilbert.embeddings.word_embeddings.weight", "vocab_projector.bias"),
        ("electra.embeddings.word_embeddings.weight", "generator_lm_head.bias"),
        ("model.embeddings.tok_embeddings.weight", "decoder.bias"),
        ("transformer.word_embedding.weight", "lm_loss.bias"),
        ("transformer.embeddings.weight", "pred_layer.proj.bias"),
        ("model.decoder.embed_tokens.weight", "proj_out.bias"),
    ],
)
def test_bias_of_a_tied_head_goes_with_the_rows(tmp_path: Path, embedding: str, bias: str) -> None:
    write_beside(tmp_path, bias, (11,), embedding)
    made = applied(tmp_path)
    for matrix in (embedding, bias):
        assert same_bits(made[matrix], by_hand(rows_of(tmp_path, ADDED, matrix), "target", past)), matrix


@pytest.mark.parametrize(
    "name", ["norm.bias", "cls.predictions.transform.dense.bias", "vision_tower.head.bias", "model.layers.0.fc.bias",
             "multi_modal_projector.linear.bias"]
)  # fmt: skip
def test_other_vectors_of_that_length_do_not(tmp_path: Path, name: str) -> None:
    write_beside(tmp_path, name, (11,))
    made = applied(tmp_path)
    assert same_bits(made[name], past(**{model: read_checkpoint(tmp_path / model)[name].numpy() for model in MODELS}))


@pytest.mark.parametrize(
    ("head", "rows"), [("model.transformer.ff_out.weight", 11), ("model.decoder.output_projection.weight", 11)]
)
def test_heads_of_other_names_go_with_the_rows(tmp_path: Path, head: str, rows: int) -> None:
    write_beside(tmp_path, head, (rows, 6))
    made = applied(tmp_path)
    assert same_bits(made[head], by_hand(rows_of(tmp_path, ADDED, head), "target", past))


@pytest.mark.parametrize(("name", "shape"), [("final_logits_bias", (1, 11)), ("cls.predictions.dense.weight", (4, 11))])
def test_columns_of_tokens_are_refused_unless_they_are_the_donors(
    tmp_path: Path, name: str, shape: tuple[int, int]
) -> None:
    write_beside(tmp_path, name, shape)
    found = run_cli("apply", write_recipe(tmp_path, **by_token()), "-o", tmp_path / "out")
    assert found.returncode == 4
    said = f"model `target`: `{name}` [{shape[0]}, 11] has a column for each token, and `by-token` reads rows\n"
    assert said in found.stderr
    which = f'tensors: ["{name}"]' if name.startswith("final") else "modules: [embedding, head]"
    assert f"help: to leave those rows as they are in the donor, add the rule `{{{which}, value: 0}}`" in found.stderr
    made = applied(tmp_path, copy=[{"tensors": name, "from": "target"}], tokens={"<tool>": {"from": "rl"}})
    assert torch.equal(made[name], read_checkpoint(tmp_path / "target")[name])


def test_scalars_under_names_of_matrices_are_no_matrices(tmp_path: Path) -> None:
    for seed, (model, words) in enumerate(zip(MODELS, ADDED, strict=True)):
        tensors = random_tensors({EMBEDDING: (), HEAD: (11, 6), "lm_head.bias": (), BLOCK: (5, 6)}, torch.float32, seed)
        write_checkpoint(tmp_path / model, tensors, config={"vocab_size": 11})
        (tmp_path / model / "tokenizer.json").write_text(tokenizer_json(words))
    made = applied(tmp_path)
    assert same_bits(made[HEAD], by_hand(rows_of(tmp_path, ADDED, HEAD), "target", past))
    vocabulary = json.loads((tmp_path / "out" / "skillmerge.manifest.json").read_text())["vocabulary"]
    assert set(vocabulary["matrices"]) == {HEAD}
