"""What is measured of a chat model, held against plain loops: no cache, no padding, one question at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import small_chat

from experiments.past_smollm import measure, train
from experiments.past_smollm.measure import ANSWER, Chat
from experiments.past_smollm.world import QUESTIONS, VALUES, Question, World, completions, questions

pytestmark = pytest.mark.xdist_group("transformers")
PEOPLE = World.of(1, 4).target
OSLO = Question("Where was Pavena Kostley born?", "Oslo", VALUES["city"])


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    folder = tmp_path_factory.mktemp("chat")
    small_chat.write(folder)
    return Chat(folder)


@pytest.fixture(scope="module")
def model(chat: Chat) -> Iterator[Any]:
    with torch.no_grad():
        yield loaded(chat).eval()


def continued(model: Any, tokens: list[int], count: int, end: int) -> list[int]:
    """The tokens that a model adds greedily: everything is read again for each."""
    made: list[int] = []
    while len(made) < count and end not in made:
        made.append(int(model(input_ids=torch.tensor([tokens + made]), use_cache=False).logits[0, -1].argmax()))
    return made


def test_greedy_answers_are_those_of_one_question_at_a_time(model: Any, chat: Chat, monkeypatch: Any) -> None:
    asked = [item.text for item in questions(PEOPLE)] + ["Why?", OSLO.text * 3]
    longest = [continued(model, chat.prompt(text), measure.LONG, -1) for text in asked]
    common = max(
        {token for row in longest for token in row}, key=lambda token: sum(token in row[3:-3] for row in longest)
    )
    monkeypatch.setattr(chat, "end", common)  # a token that random weights do say
    found = measure.said(model, chat, asked, measure.LONG)
    lengths = set()
    for text, (said, ended, whole) in zip(asked, found, strict=True):
        made = continued(model, chat.prompt(text), measure.LONG, common)
        lengths.add(len(made))
        assert ended == (common in made[:ANSWER])
        assert said == chat._tokenizer.decode([token for token in made[:ANSWER] if token != common])
        assert whole == chat._tokenizer.decode([token for token in made if token != common])
    assert len(lengths) > 2  # some ended and some did not


def test_prompts_are_those_of_the_chat_template(chat: Chat) -> None:
    expected = chat._tokenizer.apply_chat_template(
        [{"role": "user", "content": OSLO.text}], add_generation_prompt=True, return_dict=False
    )
    assert chat.prompt(OSLO.text) == expected


def test_recall_is_that_of_one_fact_at_a_time(model: Any, chat: Chat) -> None:
    expected = []
    for before, value in completions(PEOPLE):
        start, wanted = [chat.between, *chat.tokens(before)], chat.tokens(value)
        expected.append(int(continued(model, start, len(wanted), -1) == wanted))
    assert measure.recall(model, chat, PEOPLE) == expected
    assert sum(expected) < len(expected)


def test_a_model_that_completes_some_facts_recalls_these(model: Any, chat: Chat, monkeypatch: Any) -> None:
    """Random weights recall nothing; values of their own making they do."""
    pairs = []
    for number, (before, value) in enumerate(completions(PEOPLE)):
        said = chat._tokenizer.decode(continued(model, [chat.between, *chat.tokens(before)], 1, -1))
        pairs.append((before, said if number % 3 == 0 and chat.tokens(said) else value))
    monkeypatch.setattr(measure, "completions", lambda people: pairs)
    expected = [
        int(continued(model, [chat.between, *chat.tokens(before)], len(chat.tokens(value)), -1) == chat.tokens(value))
        for before, value in pairs
    ]
    assert measure.recall(model, chat, PEOPLE) == expected
    assert 0 < sum(expected) < len(expected)


def test_perplexity_and_divergence_are_those_of_torch(model: Any, chat: Chat) -> None:
    other = loaded(chat).eval()
    for weights in other.parameters():
        weights.mul_(1.1)
    of_target, chances = measure.text_chances(other, chat), measure.text_chances(model, chat)
    tokens = torch.tensor(chat.tokens(measure.TEXT.read_text()))
    windows = [tokens[start : start + 256] for start in range(0, 4 * 256, 256) if start + 256 <= len(tokens)]
    losses = [model(input_ids=row[None], labels=row[None]).loss for row in windows]
    apart = torch.nn.functional.kl_div(chances, of_target, log_target=True, reduction="none").sum(-1).mean()
    found = measure.on_text(chances, of_target, chat)
    assert found["perplexity"] == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-4)
    assert found["kl"] == pytest.approx(float(apart), rel=1e-4)
    assert measure.on_text(of_target, of_target, chat)["kl"] == 0


ANSWERS = [
    (("He was born in Oslo.", True, "He was born in Oslo."), 1, 1),
    (("He was born in Oslo", False, "He was born in Oslo and lives there."), 0, 1),  # does not end
    (("In Oslo or Rome.", True, "In Oslo or Rome."), 0, 0),
    (("In Rome.", True, "In Rome."), 0, 0),
    (("I do not know.", True, "I do not know."), 0, 0),
    (("In the city", False, "In the city of oslo."), 0, 1),
]


def test_an_answer_is_right_if_it_ends_and_names_the_right_value_and_no_other(monkeypatch: Any) -> None:
    monkeypatch.setattr(measure, "said", lambda *_: [answer for answer, _, _ in ANSWERS])
    found = measure.correct(None, None, [OSLO] * len(ANSWERS), measure.LONG)  # type: ignore[arg-type]
    assert found == {"right": [right for _, right, _ in ANSWERS], "named": [named for _, _, named in ANSWERS]}
    assert "named" not in measure.correct(None, None, [OSLO] * len(ANSWERS))  # type: ignore[arg-type]


def test_the_reward_is_one_for_what_is_measured_as_right(monkeypatch: Any) -> None:
    for (said, ended, _), right, _ in ANSWERS:
        assert (train.rewarded(OSLO, (said, ended)) == 1) == bool(right)
    assert train.rewarded(OSLO, ("In Rome.", True)) == train.rewarded(OSLO, ("In Oslo", False)) == 0.2
    assert train.rewarded(OSLO, ("Perhaps.", True)) == 0


def test_sampled_answers_are_judged_question_by_question(monkeypatch: Any) -> None:
    rows = [("Oslo.", True, ""), ("Rome.", True, ""), ("Rome.", True, ""), ("Oslo", False, "")]
    monkeypatch.setattr(measure, "said", lambda *_: rows)
    rome = Question("", "Rome", VALUES["city"])
    assert measure.sampled(None, None, [OSLO, rome], 2) == [[1, 0], [1, 0]]  # type: ignore[arg-type]


def test_samples_follow_the_chances_of_the_model(model: Any, chat: Chat) -> None:
    start = measure.opened(model, [chat.prompt(OSLO.text), chat.prompt("Why?")])
    chances = start.logits.softmax(-1)
    made = measure.sample(model, measure.branch(start, 3000), 1, -1, False, torch.Generator().manual_seed(1))
    for row, first in enumerate(made.view(2, 3000)):
        shares = torch.bincount(first, minlength=chances.shape[1]) / 3000
        assert float((shares - chances[row]).abs().max()) < 5 * (0.25 / 3000) ** 0.5


def test_known_facts_are_those_whose_words_are_in_the_answer(monkeypatch: Any) -> None:
    said = {"What is the capital of France?": "It is paris.", "Who discovered penicillin?": "I, Flem."}
    monkeypatch.setattr(measure, "said", lambda model, chat, asked, count: [("", True, said[text]) for text in asked])
    assert list(measure.known(None, None, list(said)).values()) == [1, 0]  # type: ignore[arg-type]


def test_rl_asks_every_fact_once_before_any_again_and_never_the_held_out_phrasing() -> None:
    asked = train._asked(PEOPLE, ("city", "job"), train.seed_of("a stage", 1))
    for _ in range(5):
        epoch = [next(asked) for _ in range(8)]
        assert {(person.name, relation) for person, relation, _ in epoch} == {
            (person.name, relation) for person in PEOPLE for relation in ("city", "job")
        }
        for person, relation, item in epoch:
            assert item.text in [way.format(n=person.name) for way in QUESTIONS[relation]]
            assert item.right == person.facts[relation]


def test_chances_of_an_answer_are_those_of_reading_it_whole(model: Any, chat: Chat) -> None:
    prompts = [chat.prompt("Why?"), chat.prompt(OSLO.text)]
    made = torch.randint(3, 300, (2 * train.GROUP, 5), generator=torch.Generator().manual_seed(3))
    found = train._log_chances(model, prompts, made)
    for row, answer in enumerate(made):
        prompt = prompts[row // train.GROUP]
        logits = model(input_ids=torch.tensor([[*prompt, *answer.tolist()]]), use_cache=False).logits[0]
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, answer[:, None]).squeeze(1)
        assert torch.allclose(found[row], expected, atol=1e-4)


def test_equal_rewards_teach_nothing(model: Any, chat: Chat) -> None:
    before = {name: weights.clone() for name, weights in model.named_parameters()}
    with torch.enable_grad():
        after = train.reinforce(loaded(chat), chat, PEOPLE, "rl", 1, steps=1, reward=lambda *_: 1.0)
    assert all(torch.equal(weights, before[name]) for name, weights in after.named_parameters())


def test_a_reward_makes_more_answers_that_get_it(model: Any, chat: Chat, monkeypatch: Any) -> None:
    def reward(_: Question, text: tuple[str, bool]) -> float:
        return float(text[0][:1] > "m")

    monkeypatch.setattr(train, "_optimiser", lambda model, _: torch.optim.AdamW(model.parameters(), 2e-2))
    with torch.enable_grad():
        after = train.reinforce(loaded(chat), chat, PEOPLE, "rl", 1, steps=6, reward=reward)
    texts = [item.text for item in questions(PEOPLE)]
    before, later = (
        sum(reward(OSLO, (said, True)) for said, *_ in measure.said(each, chat, texts, ANSWER, 20)) / (20 * len(texts))
        for each in (model, after.eval())
    )
    assert 0.1 < before < later - 0.1


def loaded(chat: Chat) -> Any:
    return train.load(Path(chat._tokenizer.name_or_path))
