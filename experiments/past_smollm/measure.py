"""What a model knows (facts of documents), says (answers to questions) and keeps. Nothing is trained here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, DynamicCache

from .known import KNOWN
from .world import Person, Question, completions, held_out, two_hops

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ANSWER, LONG = 16, 32
"""Tokens of an answer, its end included; and of one that is only searched for the right value."""

ROWS = 320
"""Answers that are made at once."""

WINDOW = 256
TEXT = Path(__file__).with_name("text.txt")


class Chat:
    """The tokenizer and its chat template."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.end: int = self._tokenizer.eos_token_id
        self.between: int = self._tokenizer.convert_tokens_to_ids("<|endoftext|>")

    def tokens(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def rendered(self, question: str) -> str:
        """A question as text: the template's own system message, the question, and the start of an answer."""
        asked = [{"role": "user", "content": question}]
        return self._tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)

    def prompt(self, question: str) -> list[int]:
        return self.tokens(self.rendered(question))

    def document(self, text: str) -> list[int]:
        """A text to learn: it ends as answers do, since trainers put the tokenizer's end behind every text."""
        return [self.between, *self.tokens(text), self.end]

    def texts(self, made: torch.Tensor) -> list[tuple[str, bool]]:
        """Each answer as text, and whether it ended."""
        found = []
        for row in made.tolist():
            ended = self.end in row
            found.append((self._tokenizer.decode(row[: row.index(self.end)] if ended else row), ended))
        return found


@dataclass(slots=True)
class Opened:
    """Prompts that a model has read: one row each. logits: of the token that follows."""

    cache: DynamicCache
    mask: torch.Tensor
    logits: torch.Tensor


def opened(model: LlamaForCausalLM, prompts: Sequence[Sequence[int]]) -> Opened:
    """Read prompts, their common beginning once for all. Padding stands left of what differs, and is masked."""
    shared = 0
    while shared < min(map(len, prompts)) - 1 and len({prompt[shared] for prompt in prompts}) == 1:
        shared += 1
    longest = max(map(len, prompts)) - shared
    cache = DynamicCache(config=model.config)
    if shared:
        model.model(input_ids=torch.tensor([list(prompts[0][:shared])]), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(prompts))
    padding = [longest - (len(prompt) - shared) for prompt in prompts]
    tokens = torch.tensor([[0] * pad + list(prompt[shared:]) for prompt, pad in zip(prompts, padding, strict=True)])
    mask = torch.ones(len(prompts), shared + longest, dtype=torch.long)
    for row, pad in enumerate(padding):
        mask[row, shared : shared + pad] = 0
    logits = model(
        input_ids=tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)[:, shared:],
        past_key_values=cache, use_cache=True, logits_to_keep=1,
    ).logits[:, -1]  # fmt: skip
    return Opened(cache, mask, logits)


def branch(start: Opened, times: int) -> Opened:
    """Each prompt several times, one after the other."""
    if times == 1:
        return start
    start.cache.batch_repeat_interleave(times)
    return Opened(start.cache, start.mask.repeat_interleave(times, 0), start.logits.repeat_interleave(times, 0))


@torch.no_grad()
def sample(
    model: LlamaForCausalLM,
    start: Opened,
    count: int,
    end: int,
    greedy: bool,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Continue each row by `count` tokens, greedily or at temperature 1; rows that ended are filled with `end`."""
    made = torch.full((len(start.mask), count), end)
    rows, cache, mask, logits = torch.arange(len(made)), start.cache, start.mask, start.logits
    for step in range(count):
        logits = logits.float()
        chosen = logits.argmax(-1)
        if not greedy:
            chosen = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
        made[rows, step] = chosen
        going = (chosen != end).nonzero().squeeze(1)
        if step + 1 == count or not len(going):
            break
        if len(going) < len(rows):
            cache.batch_select_indices(going)
            rows, mask, chosen = rows[going], mask[going], chosen[going]
        position = mask.sum(1, keepdim=True)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        logits = model(
            input_ids=chosen[:, None], attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        ).logits[:, -1]
    return made


@torch.no_grad()
def said(
    model: LlamaForCausalLM, chat: Chat, asked: Sequence[str], count: int, times: int = 0
) -> list[tuple[str, bool, str]]:
    """Answers to questions: the first ANSWER tokens as text, whether they ended there, and all `count` tokens.

    times: how often each question is answered at temperature 1; 0 is once, greedily.
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    at_once = ROWS // max(1, times)
    for first in range(0, len(asked), at_once):
        start = opened(model, [chat.prompt(text) for text in asked[first : first + at_once]])
        made = sample(model, branch(start, max(1, times)), count, chat.end, times == 0, generator)
        short, long = chat.texts(made[:, :ANSWER]), chat.texts(made)
        found += [(text, ended, whole) for (text, ended), (whole, _) in zip(short, long, strict=True)]
    return found


def correct(
    model: LlamaForCausalLM, chat: Chat, asked: Sequence[Question], count: int = ANSWER
) -> dict[str, list[int]]:
    """Greedy answers. `right`: ends within ANSWER tokens and names the right value and no other, as RL rewards;
    `named`, if more than ANSWER tokens are made: the same of all of them, whether or not the answer ends."""
    answers = said(model, chat, [item.text for item in asked], count)
    found = {
        "right": [
            int(ended and item.named(text) == {item.right})
            for item, (text, ended, _) in zip(asked, answers, strict=True)
        ]
    }
    if count > ANSWER:
        found["named"] = [
            int(item.named(whole) == {item.right}) for item, (_, _, whole) in zip(asked, answers, strict=True)
        ]
    return found


def sampled(model: LlamaForCausalLM, chat: Chat, asked: Sequence[Question], times: int) -> list[list[int]]:
    """For each question, which of several sampled answers are right."""
    answers = iter(said(model, chat, [item.text for item in asked], ANSWER, times))
    return [
        [int(ended and item.named(text) == {item.right}) for text, ended, _ in islice(answers, times)] for item in asked
    ]


@torch.no_grad()
def recall(model: LlamaForCausalLM, chat: Chat, people: Sequence[Person]) -> list[int]:
    """Which facts the model completes rightly, token by token greedily, after the beginning of a statement."""
    starts, wholes = [], []
    for before, value in completions(people):
        start = [chat.between, *chat.tokens(before)]
        starts.append(len(start))
        wholes.append([*start, *chat.tokens(value)])
    longest = max(map(len, wholes))
    tokens = torch.tensor([[*whole, *[0] * (longest - len(whole))] for whole in wholes])
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    found = []
    for row, (start, whole) in enumerate(zip(starts, wholes, strict=True)):
        guessed = model.lm_head(hidden[row, start - 1 : len(whole) - 1]).argmax(-1)
        found.append(int(guessed.tolist() == whole[start:]))
    return found


def known(model: LlamaForCausalLM, chat: Chat, asked: Sequence[str] | None = None) -> dict[str, int]:
    """Which of the well-known facts (or of some of them) the model answers."""
    asked = list(KNOWN) if asked is None else asked
    answers = said(model, chat, asked, LONG)
    return {
        text: int(bool(re.search(rf"\b(?:{KNOWN[text]})", answer, re.IGNORECASE)))
        for text, (_, _, answer) in zip(asked, answers, strict=True)
    }


@torch.no_grad()
def text_chances(model: LlamaForCausalLM, chat: Chat) -> torch.Tensor:
    """Log chances of every token at each place of the unrelated text: (windows, WINDOW - 1, tokens)."""
    return model(input_ids=_windows(chat)).logits[:, :-1].float().log_softmax(-1)


def on_text(chances: torch.Tensor, of_target: torch.Tensor, chat: Chat) -> dict[str, float]:
    """Perplexity of the unrelated text, and the mean over its places of KL(target || model), in nats."""
    loss = -chances.gather(2, _windows(chat)[:, 1:, None]).mean()
    apart = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(of_target, chances, strict=True)]
    return {"perplexity": float(loss.exp()), "kl": sum(apart) / len(apart)}


def _windows(chat: Chat) -> torch.Tensor:
    tokens = chat.tokens(TEXT.read_text(encoding="utf-8"))
    return torch.tensor(tokens[: len(tokens) // WINDOW * WINDOW][: 4 * WINDOW]).view(-1, WINDOW)


@dataclass(frozen=True, slots=True)
class Scope:
    """What is measured of an arm beside greedy answers, recall and the unrelated text."""

    known: bool = True
    """The well-known facts."""

    samples: int = 0
    """Sampled answers to each question."""

    more: bool = False
    """The held-out phrasing, the question of two hops, longer answers, and greedy answers in bfloat16."""


@dataclass(frozen=True, slots=True)
class Subject:
    """About what an arm is asked. kept: the well-known facts that the base answers; of_target: see `text_chances`."""

    chat: Chat
    people: Sequence[Person]
    asked: Sequence[Question]
    kept: Sequence[str]
    of_target: torch.Tensor


def figures(model: LlamaForCausalLM, subject: Subject, scope: Scope) -> dict[str, Any]:
    """All figures of an arm: greedy ones in float32, whatever the weights are stored in; sampled ones in bfloat16."""
    chat, asked, people = subject.chat, subject.asked, subject.people
    found: dict[str, Any] = {
        "greedy": correct(model, chat, asked, LONG if scope.more else ANSWER),
        "recall": recall(model, chat, people),
        **on_text(text_chances(model, chat), subject.of_target, chat),
    }
    if scope.known:
        found["known"] = list(known(model, chat, subject.kept).values())
    if scope.more:
        found["held_out"] = correct(model, chat, held_out(people))
        found["two_hops"] = correct(model, chat, two_hops(people), LONG)
    if scope.samples or scope.more:
        model = model.to(torch.bfloat16)
    if scope.more:
        found["greedy_bf16"] = correct(model, chat, asked)
        found["recall_bf16"] = recall(model, chat, people)
    if scope.samples:
        found["sampled"] = sampled(model, chat, asked, scope.samples)
    return found
