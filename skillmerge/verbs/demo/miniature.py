"""The small trained family that ships with the package: forward pass, questions, scores.

A minimal Qwen2 (https://arxiv.org/abs/2407.10671) in float32, so that the demo runs wherever torch does. The tests
compare it with transformers. `experiments/past_miniature` trained the models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from skillmerge.checkpoints.kinds.table import open_folder
from skillmerge.engine.values import read_values

FAMILY = Path(__file__).parent / "family"
MODELS = ("base", "source-sft", "source-rl", "target-sft")
ANSWER_WORDS = 5
"""Most words of an answer, including the one that ends it."""

_END = "END"


@dataclass(frozen=True, slots=True)
class Question:
    """A question in words, and the last word of its correct answer."""

    words: tuple[str, ...]
    wanted: str


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers in words, one for each question, and whether each is correct."""

    words: Sequence[tuple[str, ...]]
    right: Sequence[bool]

    @property
    def share(self) -> float:
        return sum(self.right) / len(self.right)


def questions() -> list[Question]:
    """Questions about the people in the target's documents, four for each."""
    document = json.loads((FAMILY / "questions.json").read_text(encoding="utf-8"))
    return [Question(tuple(item["question"].split()), item["answer"]) for item in document]


class Miniature:
    """A checkpoint of Qwen2's architecture with tied embeddings, ready to answer questions."""

    def __init__(self, folder: Path) -> None:
        """Load a checkpoint. Raises InputError if there is none."""
        checkpoint = open_folder(str(folder), folder)
        self._config: Mapping[str, Any] = checkpoint.config
        self._weights: dict[str, Tensor] = {}
        for name, spec in checkpoint.tensors.items():
            self._weights[name] = read_values(checkpoint, name).view(spec.shape).float()
        checkpoint.close()
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        self._numbers: dict[str, int] = tokenizer["model"]["vocab"]
        self._words = {number: word for word, number in self._numbers.items()}

    def answer(self, asked: Sequence[Question], *, greedy: bool, seed: int = 0) -> Answers:
        """Answer questions of one length, greedily or by sampling at temperature 1."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.tensor([[self._numbers[word] for word in question.words] for question in asked])
        start = tokens.shape[1]
        with torch.inference_mode():
            for _ in range(ANSWER_WORDS):
                logits = self.logits(tokens)[:, -1]
                chances = logits.softmax(-1)
                chosen = logits.argmax(-1) if greedy else torch.multinomial(chances, 1, generator=generator)[:, 0]
                tokens = torch.cat([tokens, chosen[:, None]], 1)
        said = [tuple(self._words[number] for number in row) for row in tokens[:, start:].tolist()]
        said = [words[: words.index(_END)] if _END in words else words for words in said]
        return Answers(said, [words[-1:] == (question.wanted,) for words, question in zip(said, asked, strict=True)])

    def logits(self, tokens: Tensor) -> Tensor:
        """Compute the logits of every next word: [rows, words] of int64 -> [rows, words, vocabulary] of float32."""
        config, weights = self._config, self._weights
        heads, eps = int(config["num_attention_heads"]), float(config["rms_norm_eps"])
        rows, length = tokens.shape
        hidden = weights["model.embed_tokens.weight"][tokens]
        width = hidden.shape[-1] // heads
        theta = float((config.get("rope_parameters") or config).get("rope_theta", 10000.0))
        steps = torch.arange(length)[:, None] * theta ** -(torch.arange(0, width, 2) / width)
        turn = torch.cat([steps, steps], -1)
        for layer in range(int(config["num_hidden_layers"])):

            def linear(values: Tensor, name: str, block: str = f"model.layers.{layer}") -> Tensor:
                return functional.linear(values, weights[f"{block}.{name}.weight"], weights.get(f"{block}.{name}.bias"))

            def norm(values: Tensor, name: str, block: str = f"model.layers.{layer}") -> Tensor:
                return functional.rms_norm(values, values.shape[-1:], weights[f"{block}.{name}.weight"], eps)

            seen = norm(hidden, "input_layernorm")
            q, k, v = (
                linear(seen, f"self_attn.{part}_proj").view(rows, length, heads, width).transpose(1, 2)
                for part in "qkv"
            )
            mixed = functional.scaled_dot_product_attention(_turned(q, turn), _turned(k, turn), v, is_causal=True)
            hidden = hidden + linear(mixed.transpose(1, 2).reshape(rows, length, -1), "self_attn.o_proj")
            seen = norm(hidden, "post_attention_layernorm")
            gate = functional.silu(linear(seen, "mlp.gate_proj"))
            hidden = hidden + linear(gate * linear(seen, "mlp.up_proj"), "mlp.down_proj")
        hidden = functional.rms_norm(hidden, hidden.shape[-1:], weights["model.norm.weight"], eps)
        return hidden @ weights["model.embed_tokens.weight"].T


def _turned(values: Tensor, angles: Tensor) -> Tensor:
    """Apply rotary position embedding (arXiv 2104.09864), halves side by side."""
    first, second = values.chunk(2, -1)
    return values * angles.cos() + torch.cat([-second, first], -1) * angles.sin()
