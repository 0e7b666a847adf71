"""The demo's own forward pass against transformers; the family that ships with the package."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from command_server import Commands

from skillmerge.study.scoring.scorers import find_scorer, run_command
from skillmerge.verbs.demo.demo import examples, run, score_files, write_family
from skillmerge.verbs.demo.miniature import FAMILY, MODELS, Miniature, questions

pytestmark = pytest.mark.xdist_group("transformers")


@pytest.mark.parametrize("name", MODELS)
def test_forward_pass_is_that_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(FAMILY / name, dtype=torch.float32)
    model = Miniature(FAMILY / name)
    tokens = torch.randint(0, 84, (16, 13), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.allclose(model.logits(tokens), reference(tokens).logits, atol=1e-4, rtol=1e-4)


def test_tokenizer_reads_the_words_as_the_demo_does() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(FAMILY / "base")
    model = Miniature(FAMILY / "base")
    for question in questions()[:5]:
        expected = [model._numbers[word] for word in question.words]
        assert tokenizer(" ".join(question.words))["input_ids"] == expected


def test_greedy_answers_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(FAMILY / "source-rl", dtype=torch.float32)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(FAMILY / "source-rl")
    asked = questions()[:64]
    inputs = tokenizer([" ".join(question.words) for question in asked], return_tensors="pt")
    with torch.inference_mode():
        generated = reference.generate(**inputs, max_new_tokens=5, do_sample=False)
    for row, words in zip(generated, Miniature(FAMILY / "source-rl").answer(asked, greedy=True).words, strict=True):
        assert tokenizer.decode(row[6:]).replace(" END", "").replace(" _", "").split() == list(words)


def test_family_is_small() -> None:
    assert sum(path.stat().st_size for path in FAMILY.rglob("*") if path.is_file()) < 750_000


def test_sampling_follows_its_seed(tmp_path: Path) -> None:
    asked = questions()[:100]
    model = Miniature(FAMILY / "source-sft")
    first, again, other = (model.answer(asked, greedy=False, seed=seed).words for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_control_has_the_sizes_of_the_skill_in_other_places(tmp_path: Path) -> None:
    write_family(tmp_path)
    sft, rl, control = (Miniature(tmp_path / name)._weights for name in ("source-sft", "source-rl", "source-shuffled"))
    for name in sft:
        update, shuffled = rl[name] - sft[name], control[name] - sft[name]
        assert not torch.equal(update, shuffled)
        assert math.isclose(float(update.norm()), float(shuffled.norm()), rel_tol=0.25)


def test_demo_writes_a_score_command_that_agrees_with_the_built_in_score(
    demo: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    for name, text in score_files().items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    command = find_scorer(f"{commands.python} eval.py {{}}")
    asked = find_scorer("qa:questions.jsonl")
    assert asked.function is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(demo / "source-rl", dtype="auto").eval()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(demo / "source-rl")
    scores = run_command(command, demo / "source-rl", 0)
    assert scores == asked.function(model, tokenizer, 0)
    assert 0 < scores["accuracy"].value < 1


def test_examples_are_of_different_people(tmp_path: Path) -> None:
    before, after = run("a", FAMILY / "base"), run("b", FAMILY / "target-sft")
    found = examples(before, after)
    assert len({question.words[1:4] for question, *_ in found}) == len(found) == 4
