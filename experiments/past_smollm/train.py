"""The stages of training. Each takes a model and gives back the same model, trained; seeded by its own name.

Weights and AdamW's state are float32; the arithmetic of forward and backward passes is bfloat16 (autocast).
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ..common import seed_of
from .measure import Chat, branch, opened, sample
from .world import QUESTIONS, RELATIONS, Person, Question, answer, document, question

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ANSWER = 16
"""Tokens of an answer, its end included."""

GROUP = 8
"""Answers to each question of an RL step."""

QUESTIONS_A_STEP = 8
Reward = Callable[[Question, tuple[str, bool]], float]
logging.disable_progress_bar()
logging.set_verbosity_error()


def load(folder: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def save(model: LlamaForCausalLM, folder: Path, tokenizer_of: Path) -> None:
    """As an ordinary checkpoint, which appears when it is complete."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(new)
    os.replace(new, folder)


def dequantise(gguf: Path, folder: Path) -> None:
    """The base model, in float32, from the 4-bit file that a package brings."""
    from transformers import GgufConfig

    of: dict[str, Any] = {"gguf_file": gguf.name}
    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, quantization_config=config, **of)
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new)
    AutoTokenizer.from_pretrained(gguf.parent, **of).save_pretrained(new)
    os.replace(new, folder)


def learn_documents(
    model: LlamaForCausalLM, chat: Chat, people: Sequence[Person], stage: str, seed: int, steps: int = 100
) -> LlamaForCausalLM:
    """SFT: twenty documents of new people a step; 100 steps show each of forty people 50 times."""
    generator = seed_of(stage, seed)
    order = _epochs(people, generator)
    optimiser = _optimiser(model, 1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-4, total_steps=max(2, steps), pct_start=0.05)
    for _ in range(steps):
        texts = [chat.document(document(next(order), generator)) for _ in range(20)]
        _step(model, optimiser, *_padded(texts, [1] * len(texts)))
        schedule.step()
    return model


def learn_answers(
    model: LlamaForCausalLM, chat: Chat, people: Sequence[Person], stage: str, seed: int, steps: int = 50
) -> LlamaForCausalLM:
    """Supervised: right answers to the questions that RL asks, in the model's own sentences; only the answers count."""
    generator = seed_of(stage, seed)
    asked = _asked(people, RELATIONS, generator)
    optimiser = _optimiser(model, 2e-5)
    for _ in range(steps):
        texts, starts = [], []
        for _ in range(2 * QUESTIONS_A_STEP):
            person, relation, item = next(asked)
            start = chat.prompt(item.text)
            texts.append([*start, *chat.tokens(answer(person, relation)), chat.end])
            starts.append(len(start))
        _step(model, optimiser, *_padded(texts, starts))
    return model


def reinforce(
    model: LlamaForCausalLM,
    chat: Chat,
    people: Sequence[Person],
    stage: str,
    seed: int,
    relations: Sequence[str] = RELATIONS,
    steps: int = 50,
    reward: Reward | None = None,
) -> LlamaForCausalLM:
    """RL: REINFORCE with GRPO's baseline (arXiv 2402.03300), the mean and deviation of a question's own answers.

    On policy, one update a step, no penalty for divergence.
    """
    asked = _asked(people, relations, seed_of(stage, seed))
    optimiser = _optimiser(model, 2e-5)
    for step in range(steps):
        items = [next(asked)[2] for _ in range(QUESTIONS_A_STEP)]
        prompts = [chat.prompt(item.text) for item in items]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            made = sample(model, branch(opened(model, prompts), GROUP), ANSWER, chat.end, greedy=False)
        judged = reward or rewarded
        rewards = torch.tensor([judged(items[row // GROUP], text) for row, text in enumerate(chat.texts(made))])
        groups = rewards.view(-1, GROUP)
        advantage = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1, 1)
        ended = made == chat.end
        counts = (ended.int().cumsum(1) - ended.int()) == 0  # up to the first end, which counts
        with torch.autocast("cpu", torch.bfloat16):
            chances = _log_chances(model, prompts, made)
        loss = -(advantage * chances * counts).sum(1).div(counts.sum(1)).mean()
        _update(model, optimiser, loss)
        if step % 10 == 9:
            print(f"  {stage}: step {step + 1}, reward {rewards.mean():.2f}", flush=True)
    return model


def rewarded(item: Question, text: tuple[str, bool]) -> float:
    """1 for an answer that ends and names the right value and no other; 0.2 for one that names the right kind."""
    said, ended = text
    named = item.named(said)
    return 1.0 if ended and named == {item.right} else 0.2 if named else 0.0


def _asked(
    people: Sequence[Person], relations: Sequence[str], generator: random.Random
) -> Iterator[tuple[Person, str, Question]]:
    """Questions without end, in the phrasings of training; every fact once before any comes again."""
    for person, relation in _epochs([(person, relation) for person in people for relation in relations], generator):
        yield person, relation, question(person, relation, generator.choice(QUESTIONS[relation]))


def _epochs(items: Sequence[Any], generator: random.Random) -> Iterator[Any]:
    while True:
        yield from generator.sample(items, len(items))


def _optimiser(model: LlamaForCausalLM, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)


def _padded(texts: Sequence[Sequence[int]], starts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token numbers, and the same as labels: -100 before each text's start and behind its end."""
    longest = max(map(len, texts))
    tokens = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
    labels = tokens.clone()
    for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
        labels[row, :start] = labels[row, len(text) :] = -100
    return tokens, labels


def _step(
    model: LlamaForCausalLM, optimiser: torch.optim.Optimizer, tokens: torch.Tensor, labels: torch.Tensor
) -> None:
    """Next-token prediction. Padding stands behind the texts, where causal attention does not see it."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:]
        logits = model.lm_head(hidden[wanted != -100])
    _update(model, optimiser, cross_entropy(logits.float(), wanted[wanted != -100]))


def _update(model: LlamaForCausalLM, optimiser: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()


def _log_chances(model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], made: torch.Tensor) -> torch.Tensor:
    """The log chance of each token of each answer; prompts are read once for all answers to them."""
    start = branch(opened(model, prompts), GROUP)
    count = made.shape[1] - 1
    rows = len(made)
    mask = torch.cat([start.mask, start.mask.new_ones(rows, count)], 1)
    positions = start.mask.sum(1, keepdim=True) + torch.arange(count)
    logits = model(
        input_ids=made[:, :-1], attention_mask=mask, position_ids=positions, past_key_values=start.cache, use_cache=True
    ).logits
    logits = torch.cat([start.logits[:, None], logits], 1).float()
    return logits.log_softmax(-1).gather(2, made[:, :, None]).squeeze(2)
