"""What a model knows (facts of documents) and does (answers to questions). Closed book; nothing is trained here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .world import DOCUMENT, KIND_OF, NUMBER, VERBS, Person, numbers, prompt

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM

GENERATED = 5
"""Words of an answer, END included."""


@torch.no_grad()
def sample(
    model: Qwen2ForCausalLM, start: torch.Tensor, greedy: bool = False, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Continue each row of `start` at temperature 1. Returns (rows, GENERATED) words, and how many count."""
    tokens = start
    for _ in range(GENERATED):
        logits = model(input_ids=tokens).logits[:, -1]
        if greedy:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            chosen = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, chosen], 1)
    answers = tokens[:, start.shape[1] :]
    ended = answers == NUMBER["END"]
    lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, GENERATED)
    return answers, lengths


def correct(
    model: Qwen2ForCausalLM, people: Sequence[Person], verbs: Sequence[str] = VERBS, times: int = 0
) -> torch.Tensor:
    """Which questions about people are answered rightly: (people, verbs) of shares.

    times: how often each is sampled at temperature 1; 0 is greedy.
    """
    asked = [(person, verb) for person in people for verb in verbs]
    start = torch.tensor(numbers([prompt(*question) for question in asked], 6)).repeat_interleave(max(1, times), 0)
    generator = torch.Generator().manual_seed(0)
    answers, lengths = sample(model, start, greedy=times == 0, generator=generator)
    last = answers.gather(1, (lengths - 2).clamp_min(0)[:, None]).squeeze(1)
    wanted = torch.tensor([NUMBER[KIND_OF[person.facts[verb]]] for person, verb in asked])
    right = (last == wanted.repeat_interleave(max(1, times))).float()
    return right.view(len(people), len(verbs), -1).mean(-1)


@torch.no_grad()
def recall(model: Qwen2ForCausalLM, people: Sequence[Person]) -> float:
    """The share of facts that the model completes rightly after `D name verb`."""
    asked = [(person, verb) for person in people for verb in VERBS]
    start = torch.tensor(numbers([[DOCUMENT, *person.name, verb] for person, verb in asked], 5))
    said = model(input_ids=start).logits[:, -1].argmax(-1)
    return float((said == torch.tensor([NUMBER[person.facts[verb]] for person, verb in asked])).float().mean())
