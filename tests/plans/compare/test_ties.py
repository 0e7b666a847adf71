"""Heads that are tied to the embedding, or stored, or both: each way of the donor beside each way of another model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import random_tensors, run_cli, tensor_shapes, write_checkpoint, write_recipe

import skillmerge
from skillmerge.errors import InputError
from skillmerge.plans.compare.roles import heads, token_matrices
from skillmerge.tensors import TensorSpec

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WAYS = ["tied, absent", "tied, equal", "tied, other", "own, absent", "own, equal", "own, other"]
"""What config.json says of the head, and what the file holds of it, beside the embedding."""

SAID = {
    "none": "the donor `target` has no head, and config.json does not tie it",
    "read": "`rl` and `sft` tie their head to the embedding, which is read as the head that the donor `target` has",
    "spare": "`rl` and `sft` tie their head to the embedding and store one all the same, which is read as the head",
    "lost": "the donor `target` stores one but ties it to the embedding: runtimes use the embedding",
    "no place": "the donor `target` ties its head to the embedding: what the head learned has no place",
    "no head": "the donor `target` has none: what the head learned has no place",
    "lacks": "lacks 1 tensor that the formula needs",
    "extra": "has 1 tensor that the donor `target` lacks",
    "refused": "but the two differ, and the donor has no `lm_head.weight`",
    "apart": "config.json of `rl` and `sft` ties `lm_head.weight` to `model.embed_tokens.weight`, but the two differ",
    "donor apart": "config.json of the donor `target` ties `lm_head.weight` to `model.embed_tokens.weight`, but the",
}
"""A word for each finding, and a part of its message."""

MATRIX = {
    "tied, absent": ["-", "-", "refused", "-", "no place, extra", "no place, extra"],
    "tied, equal": ["-", "-", "apart", "lacks", "lost", "lost"],
    "tied, other": ["donor apart", "donor apart", "donor apart", "lacks", "lost", "lost"],
    "own, absent": ["none", "extra, none", "extra, none", "none", "no head, extra, none", "no head, extra, none"],
    "own, equal": ["read", "-", "apart", "lacks", "-", "-"],
    "own, other": ["read", "-", "apart", "lacks", "-", "-"],
}
"""The donor's way -> what is found for each way of the other models."""


def write_model(folder: Path, way: str, seed: int) -> None:
    step = random_tensors(tensor_shapes(), seed=seed, scale=1e-3)
    tensors = {name: value + step[name] for name, value in random_tensors(tensor_shapes()).items()}
    said, held = way.split(", ")
    if held == "equal":
        tensors[HEAD] = tensors[EMBEDDING].clone()
    elif held == "absent":
        del tensors[HEAD]
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": said == "tied"}
    write_checkpoint(folder, tensors, config=config)


def found(folder: Path, donor: str, other: str) -> str:
    """Words for the problems and warnings of a merge of a donor with two models of another way."""
    for seed, (name, way) in enumerate([("target", donor), ("rl", other), ("sft", other)]):
        write_model(folder / name, way, seed)
    recipe = write_recipe(folder)
    plan = skillmerge.plan(recipe)
    messages = [problem.message for problem in plan.problems] + [remark.message for remark in plan.warnings]
    if not plan.problems:
        try:
            messages = list(skillmerge.apply(recipe).warnings)
        except InputError as error:
            messages.append(error.message)
    words = [next((word for word, part in SAID.items() if part in message), message) for message in messages]
    return ", ".join(dict.fromkeys(words)) or "-"


@pytest.mark.parametrize("donor", WAYS)
@pytest.mark.parametrize("other", WAYS)
def test_what_is_said_of_heads(donor: str, other: str, tmp_path: Path) -> None:
    assert found(tmp_path, donor, other) == MATRIX[donor][WAYS.index(other)]


def test_spare_head_is_told_before_weights_are_read_and_can_be_accepted(tmp_path: Path) -> None:
    """The donor has its own head; the other models store one that their configuration leaves alone."""
    for seed, (name, way) in enumerate([("target", "own, other"), ("rl", "tied, other"), ("sft", "own, other")]):
        write_model(tmp_path / name, way, seed)
    recipe = write_recipe(tmp_path)
    [told] = skillmerge.plan(recipe).compared.found
    assert (told.name, told.level, told.values) == (
        "ties",
        "warning",
        {"target": "not tied, has a head", "rl": "tied, has a head", "sft": "not tied, has a head"},
    )
    process = run_cli("apply", recipe, "-q")
    assert process.returncode == 0
    assert process.stderr == (
        "warning: config.json of `rl` ties `lm_head.weight` to `model.embed_tokens.weight`, but the two differ; the "
        "formula reads the stored head, which runtimes may ignore\n"
        "help: set `tie_word_embeddings` to false there if the stored head is the trained one; otherwise remove it "
        "from the file\n"
    )
    accepted = write_recipe(tmp_path, accept=["ties"])
    assert list(skillmerge.apply(accepted, tmp_path / "accepted", strict=True).warnings) == []
    with pytest.raises(InputError, match="1 warning under --strict"):
        skillmerge.apply(write_recipe(tmp_path), tmp_path / "strict", strict=True)


def test_spare_heads_that_are_their_embeddings_are_no_news_once_read(tmp_path: Path) -> None:
    for seed, (name, way) in enumerate([("target", "own, other"), ("rl", "tied, equal"), ("sft", "tied, equal")]):
        write_model(tmp_path / name, way, seed)
    recipe = write_recipe(tmp_path)
    [told] = skillmerge.plan(recipe).warnings
    assert "`rl` and `sft` tie their head to the embedding and store one all the same" in told.message
    assert list(skillmerge.apply(recipe, strict=True).warnings) == []
    process = run_cli("apply", write_recipe(tmp_path, accept=["ties"]), "--overwrite")
    assert "settles nothing" not in process.stderr, "it settles what `plan` says"


def test_spare_head_that_the_formula_does_not_read_is_no_news(tmp_path: Path) -> None:
    for seed, (name, way) in enumerate([("target", "tied, equal"), ("rl", "tied, other"), ("sft", "tied, equal")]):
        write_model(tmp_path / name, way, seed)
    rules = {"lam": {"default": 0.7, "rules": [{"modules": ["head", "embedding"], "value": 0}]}}
    assert list(skillmerge.apply(write_recipe(tmp_path, coefficients=rules)).warnings) == []


def test_differences_of_several_models_are_one_row(tmp_path: Path) -> None:
    for seed, (name, way) in enumerate([("target", "own, other"), ("rl", "tied, absent"), ("sft", "tied, absent")]):
        write_model(tmp_path / name, way, seed)
    [told] = skillmerge.plan(write_recipe(tmp_path)).compared.found
    assert told.message == (
        "`rl` and `sft` tie their head to the embedding, which is read as the head that the donor `target` has"
    )
    for name, kind in [("rl", "qwen2"), ("sft", "mistral")]:
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": kind}))
    row, ties = skillmerge.plan(write_recipe(tmp_path)).compared.found
    assert (row.name, row.values) == ("architecture", {"target": "llama", "rl": "qwen2", "sft": "mistral"})
    assert row.message == "`rl` is qwen2 and `sft` is mistral, the donor `target` llama: are they the right models?"
    assert ties == told


def test_wrappers_of_one_language_model_are_one_row(tmp_path: Path) -> None:
    for seed, (name, kind) in enumerate([("target", "qwen2"), ("rl", "qwen2_vl"), ("sft", "qwen2_5_vl")]):
        write_model(tmp_path / name, "own, other", seed)
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind}))
    [note] = [it for it in skillmerge.plan(write_recipe(tmp_path)).compared.found if it.key == "model_type"]
    assert (note.level, note.values) == ("note", {"target": "qwen2", "rl": "qwen2_vl", "sft": "qwen2_5_vl"})
    assert note.message == (
        "`rl` (qwen2_vl) and `sft` (qwen2_5_vl) and the donor `target` (qwen2) hold the same language model"
    )


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("lm_head.weight", True),
        ("language_model.lm_head.weight", True),
        ("embed_out.weight", True),
        ("output.weight", True),
        ("language_model.output.weight", True),
        ("transformer.output_layer.weight", True),
        ("model.layers.0.attention.output.weight", False),
        ("vision_tower.output.weight", False),
        ("model.layers.61.shared_head.head.weight", True),
        ("model.layers.61.gate.head.weight", False),
        ("lm_head.additional_fc.weight", True),
        ("output.bias", False),
        ("model.embed_tokens.weight", False),
    ],
)
def test_heads_are_known_by_their_names(name: str, head: bool) -> None:
    tensors = [TensorSpec(name, "BF16", (32, 8), "model.safetensors")]
    assert heads(tensors, {}) == ({name} if head else set())
    assert token_matrices(tensors, {}) == ({name} if head or name == EMBEDDING else set())


@pytest.mark.parametrize(
    ("name", "rows", "found"),
    [
        ("head.weight", 32, "head"),
        ("lm_loss.weight", 32, "head"),
        ("lm_head.decoder.weight", 40, "head"),
        ("proj_out.weight", 32, "head"),
        ("backbone.embeddings.weight", 32, "embedding"),
        ("transformer.tokens_embed.weight", 33, "embedding"),
        ("backbone.embeddings.weight", 31, "nothing"),
        ("score.weight", 2, "nothing"),
        ("lm_head.dense.weight", 8, "nothing"),
        ("transformer.wpe.weight", 64, "nothing"),
        ("decoder.embed_positions.weight", 64, "nothing"),
        ("bert.embeddings.token_type_embeddings.weight", 64, "nothing"),
        ("vision_tower.embeddings.weight", 64, "nothing"),
        ("projector.linear.weight", 64, "nothing"),
        ("model.layers.0.embeddings.weight", 32, "nothing"),
    ],
)
def test_matrices_of_tokens_are_known_by_their_rows(name: str, rows: int, found: str) -> None:
    """Of several vocabularies the largest is that of the text."""
    tensors = [TensorSpec(name, "BF16", (rows, 8), "model.safetensors")]
    config = {"audio_config": {"vocab_size": 16}, "text_config": {"vocab_size": 32}}
    assert heads(tensors, config) == ({name} if found == "head" else set())
    assert token_matrices(tensors, config) == (set() if found == "nothing" else {name})
    assert token_matrices([replace(tensors[0], shape=(rows, 8, 1))], config) == set()


@pytest.mark.parametrize("name", ["output.weight", "transformer.output_layer.weight"])
def test_heads_of_other_names_are_compared(name: str, tmp_path: Path) -> None:
    """InternLM2's and ChatGLM's: a donor that has one starts no random one, and a tie beside it is told."""
    for seed, (model, tied) in enumerate([("target", False), ("rl", True), ("sft", True)]):
        tensors = random_tensors(tensor_shapes())
        tensors[name] = tensors.pop(HEAD) + seed * 1e-3
        config = {"model_type": "odd", "architectures": ["OddForCausalLM"], "tie_word_embeddings": tied}
        write_checkpoint(tmp_path / model, tensors, config=config)
    [told] = skillmerge.plan(write_recipe(tmp_path)).warnings
    assert SAID["spare"] in told.message


def test_head_that_the_formula_does_not_use_is_no_loss(tmp_path: Path) -> None:
    """Found by a review: nothing of their heads is used, and yet the plan had a problem."""
    for seed, name in enumerate(("target", "rl", "sft")):
        write_model(tmp_path / name, "tied, equal" if name == "target" else "own, other", seed)
    lam = {"default": 0.5, "rules": [{"modules": "head", "value": 0}]}
    plan = skillmerge.plan(write_recipe(tmp_path, coefficients={"lam": lam}))
    assert plan.problems == ()
    assert [it.name for it in plan.compared.found] == []
    lam = {"default": 0, "rules": [{"modules": "head", "value": 0.5}]}
    (problem,) = skillmerge.plan(write_recipe(tmp_path, coefficients={"lam": lam})).problems
    assert SAID["lost"] in problem.message


def test_line_of_the_comparison_counts_what_only_the_weights_show(tmp_path: Path) -> None:
    """Found by a review: `no differences` stood beside a difference."""
    for seed, name in enumerate(("target", "rl", "sft")):
        write_model(tmp_path / name, "tied, other", seed)
    plan = skillmerge.apply(write_recipe(tmp_path)).plan
    assert plan is not None
    assert [(it.name, it.level) for it in plan.compared.found] == [("ties", "warning")]
    assert plan.compared.line == (
        "compared target, rl, sft: configuration, chat template, stop tokens: 1 warning; "
        "not compared: tokenizer (no tokenizer files)"
    )
