"""Scores of every kind: commands, functions, questions and answers, perplexity, lm-evaluation-harness."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import qa

from skillmerge.errors import UsageError
from skillmerge.study.scoring.built_in import generate, perplexity
from skillmerge.study.scoring.scorers import find_scorer
from skillmerge.study.scoring.scores import NotFinite, Score, as_scores, of_items, together
from skillmerge.verbs.demo.miniature import questions

pytestmark = pytest.mark.xdist_group("transformers")

transformers = pytest.importorskip("transformers")


# ---------------------------------------------------------------------------------------------------------- scores


def test_scores_are_what_commands_and_functions_give() -> None:
    assert as_scores(0.5) == {"score": Score(0.5)}
    assert as_scores({"skill": 1, "kept": {"value": 0.5, "error": 0.1}}) == {"skill": Score(1), "kept": Score(0.5, 0.1)}
    found = as_scores([0, 1, 1, 1])["score"]
    share = 5 / 8  # Agresti and Coull: two more of each
    assert (found.value, found.error) == (0.75, pytest.approx(math.sqrt(share * (1 - share) / 8)))
    assert of_items([1.0] * 40).error == pytest.approx(math.sqrt((42 / 44) * (2 / 44) / 44))
    assert of_items([1.0, 2.0, 6.0]).error == pytest.approx(math.sqrt(7) / math.sqrt(3))
    for wrong in ("0.5", {}, {"a": None}, {"a\nmerge": 1}, {"": 1}, {"a": {"b": 1}}, True):
        with pytest.raises((TypeError, ValueError, KeyError)):
            as_scores(wrong)
    for wrong in (float("nan"), float("inf"), [1.0, float("nan")], {"a": {"value": 1.0, "error": float("inf")}}):
        with pytest.raises(NotFinite):
            as_scores(wrong)


def test_repeats_show_the_noise() -> None:
    found = together([{"a": Score(value)} for value in (1.0, 2.0, 3.0)])["a"]
    assert (found.value, found.error) == (2.0, pytest.approx(1 / math.sqrt(3)))
    # The same questions asked again say nothing new.
    assert together([{"a": Score(0.5, 0.1)}, {"a": Score(0.5, 0.1)}])["a"] == Score(0.5, 0.1)
    assert found.interval == (pytest.approx(2 - 1.959964 / math.sqrt(3)), pytest.approx(2 + 1.959964 / math.sqrt(3)))


def independent_accuracy(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> float:
    """One question at a time, one word at a time, without `generate`."""
    right = 0
    for row in rows:
        tokens = tokenizer(row["question"], return_tensors="pt")["input_ids"]
        start = tokens.shape[1]
        for _ in range(8):
            with torch.no_grad():
                tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
            if int(tokens[0, -1]) == tokenizer.eos_token_id:
                break
        words = [w for w in tokenizer.decode(tokens[0, start:]).split() if w not in ("END", "_")]
        right += words[-1:] == [row["answer"]]
    return right / len(rows)


@pytest.fixture(scope="module")
def loaded(demo: Path) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(demo / "source-sft", dtype=torch.float32).eval()
    return model, transformers.PreTrainedTokenizerFast.from_pretrained(demo / "source-sft")


def test_qa_against_an_evaluation_of_its_own(demo: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(demo / "source-rl", dtype="auto").eval()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(demo / "source-rl")
    rows = [json.loads(line) for line in (demo / "choose.jsonl").read_text().splitlines()[::2]]
    scorer = find_scorer(qa(tmp_path, rows))
    assert scorer.function is not None
    found = scorer.function(model, tokenizer, 0)["accuracy"]
    assert found.value == independent_accuracy(model, tokenizer, rows)
    assert found.error == pytest.approx(math.sqrt(found.value * (1 - found.value) / len(rows)), rel=0.1)


def test_qa_takes_lists_case_and_patterns(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = loaded
    said = tokenizer.decode(
        model.generate(**tokenizer("Q li be na eats A", return_tensors="pt"), max_new_tokens=5, do_sample=False)[0, 6:],
        skip_special_tokens=True,
    )
    rows = [
        {"question": "Q li be na eats A", "answer": ["no", f"  {said.upper()} "]},
        {"question": "Q li be na eats A", "answer": said.split()[0], "pattern": r"^(\S+)"},
        {"question": "Q li be na eats A", "answer": "nothing of the kind"},
    ]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scorer = find_scorer(f"qa:{tmp_path / 'qa.jsonl'}")
    assert scorer.function is not None
    assert scorer.function(model, tokenizer, 0)["accuracy"].value == pytest.approx(2 / 3)


def test_perplexity_against_its_definition(loaded: tuple[Any, Any]) -> None:
    """In one window, and in several: the model reads 32 words at once."""
    model, tokenizer = loaded
    for count in (3, 20):
        text = " ".join("D li be na eats gold owns silk END" for _ in range(count))
        tokens = tokenizer(text, return_tensors="pt")["input_ids"]
        losses = []
        for start in range(0, tokens.shape[1], 32):
            piece = tokens[:, start : start + 32]
            logits = model(input_ids=piece).logits[0].double().log_softmax(-1)
            losses += [-float(logits[i, piece[0, i + 1]].detach()) for i in range(piece.shape[1] - 1)]
        found = perplexity(model, tokenizer, text)["perplexity"]
        assert found.value == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-5)
    assert find_scorer(f"perplexity:{__file__}").minimise


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is empty"), ("{}", "is not a question"), ('{"question": "x"}', "is not a question"),
     ("[1]", "is not a question"), ('{"question": "x", "answer": 3}', "is not a question"),
     ('{"question": "x", "answer": "y", "pattern": "("}', "is not a question")],
)  # fmt: skip
def test_questions_without_sense_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "qa.jsonl").write_text(content)
    with pytest.raises(UsageError, match=message):
        find_scorer(f"qa:{tmp_path / 'qa.jsonl'}")


def test_files_of_scores_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("Grüße".encode("latin-1"))
    (tmp_path / "empty").write_text("")
    told = {
        "qa:nothere.jsonl": (
            "`--score`: file `nothere.jsonl` does not exist",
            "check the path; paths start at the folder where you run the command",
        ),
        f"perplexity:{tmp_path}/latin": (f"`--score`: `{tmp_path}/latin` is not text in UTF-8", "save it as UTF-8"),
        f"perplexity:{tmp_path}/empty": (f"`--score`: `{tmp_path}/empty` is empty", "pass a file with text"),
        f"qa:{tmp_path}": (
            f"`--score`: `{tmp_path}` cannot be read: Is a directory", "pass a text file that you may read"
        ),
    }  # fmt: skip
    for text, (message, fix) in told.items():
        with pytest.raises(UsageError) as caught:
            find_scorer(text)
        assert (caught.value.message, caught.value.fix) == (message, fix)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("q.jsonl", "did you mean `qa:q.jsonl`?"),
        ("text.txt", "did you mean `perplexity:text.txt`?"),
        ("eval.py", "did you mean `python eval.py`?"),
        ("data.csv", "pass a command, module:function, qa:FILE or perplexity:FILE"),
    ],
)
def test_file_that_is_no_command_is_refused(
    name: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("{}")
    with pytest.raises(UsageError) as caught:
        find_scorer(name)
    assert (caught.value.message, caught.value.fix) == (f"`--score {name}` is a file, not a command", meant)
    (tmp_path / name).chmod(0o755)
    assert find_scorer(f"./{name}").command == f"./{name}", "a shell runs it"


def test_scores_that_are_not_there_are_refused(tmp_path: Path) -> None:
    for text in ("qa:no/such/file", "perplexity:no/such/file", "no_such_module:function", "json:no_such_function", " "):
        with pytest.raises(UsageError, match="--score"):
            find_scorer(text)


def test_lm_evaluation_harness_runs_a_local_task(demo: Path, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"q": "Q li be na eats", "choices": ["A", "END"], "label": i % 2}) for i in range(8))
    )
    (tmp_path / "tiny.yaml").write_text(
        f"task: tiny\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{label}}'\n"
        "doc_to_choice: '{{choices}}'\nmetric_list: [{metric: acc}]\n"
    )
    scorer = find_scorer(f"lm-eval:{tmp_path / 'tiny.yaml'}")
    assert scorer.function is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path / "home"))
        found = scorer.function(*loaded, 0)
    assert found["tiny/acc"].value == 0.5


def test_a_long_question_takes_no_room_from_others(loaded: tuple[Any, Any]) -> None:
    """The model reads 32 words: one question of 30 leaves itself two, and the others all that they have alone."""
    model, tokenizer = loaded
    short = [" ".join(question.words) for question in questions()[:20]]
    before = generate(model, tokenizer, short)
    mixed = generate(model, tokenizer, [*short[:10], " ".join(["ka"] * 30), *short[10:]])
    assert [*mixed[:10], *mixed[11:]] == before
    with pytest.raises(UsageError, match="question 2 has 32 tokens"):
        generate(model, tokenizer, ["ka", " ".join(["ka"] * 32)])


def test_the_models_own_sampling_is_not_asked(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prompts = [" ".join(question.words) for question in questions()[:20]]
    before = generate(model, tokenizer, prompts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.generation_config, "repetition_penalty", 1.5)
        patch.setattr(model.generation_config, "min_new_tokens", 8)
        assert generate(model, tokenizer, prompts) == before


def test_unusual_characters_in_questions(tmp_path: Path) -> None:
    scorer = find_scorer(qa(tmp_path, [{"question": "a\u2028b", "answer": "c"}]))
    assert scorer.function is not None
