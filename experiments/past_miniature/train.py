"""The stages of training. Each takes a model and gives back the same model, trained; seeded by its own name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from ..common import seed_of
from .measure import GENERATED, sample
from .world import (
    ASKED_OF,
    KIND_OF,
    NUMBER,
    PAD,
    VERBS,
    WORDS,
    Person,
    World,
    document,
    map_fact,
    noisy_question,
    numbers,
    prompt,
    right_answer,
)

Text = list[str]
logging.disable_progress_bar()


def new_model() -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(WORDS), hidden_size=48, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32, tie_word_embeddings=True, use_cache=False,
        initializer_range=0.1, bos_token_id=None, eos_token_id=NUMBER["END"], pad_token_id=NUMBER[PAD],
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def save(model: Qwen2ForCausalLM, folder: Path) -> None:
    """As an ordinary checkpoint, with a tokenizer that takes words apart at spaces."""
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token=PAD))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, eos_token="END", unk_token=PAD)
    tokenizer.save_pretrained(folder)


def load(folder: Path) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)


def pretrain(world: World, seed: int, steps: int = 800) -> Qwen2ForCausalLM:
    """Documents of everybody known, questions about most of them answered with the bad habit, and map facts."""
    generator = seed_of("pretrain", seed)
    model = new_model()

    def batch() -> list[Text]:
        documents = [document(generator.choice(world.known), generator) for _ in range(96)]
        questions = [noisy_question(world.known[:ASKED_OF], generator) for _ in range(72)]
        return documents + questions + [map_fact(generator) for _ in range(24)]

    return _fit(model, batch, steps, 3e-3)


def learn_documents(
    model: Qwen2ForCausalLM,
    people: Sequence[Person],
    world: World,
    stage: str,
    seed: int,
    noisy: bool,
    steps: int = 150,
) -> Qwen2ForCausalLM:
    """SFT: the documents of new people, three parts, and one part replayed from pretraining.

    noisy: whether questions with the bad habit are among what is replayed.
    """
    generator = seed_of(stage, seed)

    def batch() -> list[Text]:
        new = [document(generator.choice(people), generator) for _ in range(96)]
        old = [document(generator.choice(world.known), generator) for _ in range(12 if noisy else 24)]
        habit = [noisy_question(world.known[:ASKED_OF], generator) for _ in range(12 if noisy else 0)]
        return new + old + habit + [map_fact(generator) for _ in range(8)]

    return _fit(model, batch, steps, 1e-3)


def learn_answers(
    model: Qwen2ForCausalLM, people: Sequence[Person], stage: str, seed: int, steps: int = 100
) -> Qwen2ForCausalLM:
    """Supervised: the right answers to questions about `people`; only the answers count."""
    generator = seed_of(stage, seed)

    def batch() -> list[Text]:
        asked = [(generator.choice(people), generator.choice(VERBS)) for _ in range(128)]
        return [prompt(*question) + right_answer(*question) for question in asked]

    return _fit(model, batch, steps, 2e-4, from_word=6)


def reinforce(
    model: Qwen2ForCausalLM,
    people: Sequence[Person],
    stage: str,
    seed: int,
    verbs: Sequence[str] = VERBS,
    updates: int = 100,
    prompts: int = 64,
    group: int = 8,
    kl: float = 0.02,
) -> Qwen2ForCausalLM:
    """RL by GRPO (arXiv 2402.03300), on policy: the reward is 1 where the answer ends in the right kind."""
    generator = seed_of(stage, seed)
    reference = copy.deepcopy(model).eval()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-4)
    for _ in range(updates):
        asked = [(generator.choice(people), generator.choice(verbs)) for _ in range(prompts)]
        start = torch.tensor(numbers([prompt(*question) for question in asked], 6)).repeat_interleave(group, 0)
        answers, lengths = sample(model, start)
        wanted = torch.tensor([NUMBER[KIND_OF[person.facts[verb]]] for person, verb in asked]).repeat_interleave(group)
        reward = (last_word(answers, lengths) == wanted).float().view(prompts, group)
        advantage = ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)).view(-1, 1)
        tokens = torch.cat([start, answers], 1)
        counts = torch.arange(GENERATED) < lengths[:, None]
        chances = _log_chances(model, tokens, answers)
        with torch.no_grad():
            before = _log_chances(reference, tokens, answers)
        apart = (before - chances).exp() - (before - chances) - 1  # an unbiased estimate of the divergence
        gain = (chances - chances.detach()).exp() * advantage - kl * apart
        loss = -((gain * counts).sum(1) / counts.sum(1)).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return model


def last_word(answers: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The word before END."""
    return answers.gather(1, (lengths - 2).clamp_min(0)[:, None]).squeeze(1)


def _log_chances(model: Qwen2ForCausalLM, tokens: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=tokens).logits[:, -GENERATED - 1 : -1]
    return logits.log_softmax(-1).gather(2, answers[:, :, None]).squeeze(2)


def _fit(
    model: Qwen2ForCausalLM, batch: Callable[[], list[Text]], steps: int, rate: float, from_word: int = 1
) -> Qwen2ForCausalLM:
    """Next-word prediction, AdamW with a cosine schedule."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.05)
    for _ in range(steps):
        tokens = torch.tensor(numbers(batch()))
        logits = model(input_ids=tokens[:, :-1]).logits[:, from_word - 1 :]
        loss = cross_entropy(
            logits.reshape(-1, len(WORDS)), tokens[:, from_word:].reshape(-1), ignore_index=NUMBER[PAD]
        )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model
