"""Models whose rows belong to known tokens, and what rows matched by token have to come to: by hand, in numpy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import random_tensors, write_checkpoint

EMBEDDING, HEAD, BLOCK = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
WIDTH = 6
BASE = [*"abcdefgh"]

Words = Sequence[str | None]
"""The token of each row, None for padding."""


def tokenizer_json(words: Words) -> str:
    """Plain tokens as the vocabulary, those in brackets as added tokens."""
    named = {word: row for row, word in enumerate(words) if word is not None}
    added = {word: row for word, row in named.items() if word.startswith("<")}
    plain = {word: row for word, row in named.items() if word not in added}
    return json.dumps({
        "version": "1.0",
        "added_tokens": [{"id": row, "content": word, "special": True} for word, row in added.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": plain, "merges": []},
    })  # fmt: skip


def write_model(
    folder: Path, words: Words, seed: int, *, tied: bool = False, stored: bool = True,
    dtype: torch.dtype = torch.float32, shards: int = 1, width: int = WIDTH, scale: float = 0.02,
) -> Path:  # fmt: skip
    """A model with a row for each of `words`. tied: its config ties the head. stored: it has a head of its own."""
    shapes = {EMBEDDING: (len(words), width), BLOCK: (5, width)}
    shapes |= {HEAD: (len(words), width)} if stored and not tied else {}
    tensors = random_tensors(shapes, dtype, seed, scale)
    if stored and tied:
        tensors[HEAD] = tensors[EMBEDDING].clone()
    config = {"model_type": "odd", "vocab_size": len(words), "tie_word_embeddings": tied}
    write_checkpoint(folder, tensors, shards=shards, config=config)
    (folder / "tokenizer.json").write_text(tokenizer_json(words), encoding="utf-8")
    return folder


def past(target: np.ndarray, rl: np.ndarray, sft: np.ndarray, lam: float = 0.7) -> np.ndarray:
    """As the package computes it: in float64, rounded once."""
    wide = [values.astype(np.float64) for values in (target, rl, sft)]
    return (wide[0] - lam * (wide[2] - wide[1])).astype(np.float32)


def by_hand(
    models: Mapping[str, tuple[Words, np.ndarray]],
    donor: str,
    formula: Callable[..., np.ndarray],
    taken: Mapping[str, str] | None = None,
) -> np.ndarray:
    """The donor's matrix after a merge by token. models: all that the formula reads, the tokens and values of their
    rows. taken: token -> the model whose row it has."""
    words, values = models[donor]
    rows = []
    for row, word in enumerate(words):
        if taken and word in taken:
            theirs, matrix = models[taken[word]]
            rows.append(matrix[list(theirs).index(word)])
        elif word is not None and all(word in theirs for theirs, _ in models.values()):
            rows.append(
                formula(**{name: matrix[list(theirs).index(word)] for name, (theirs, matrix) in models.items()})
            )
        else:
            rows.append(values[row])
    return np.stack(rows)


def same_bits(found: torch.Tensor, wanted: np.ndarray) -> bool:
    return found.shape == wanted.shape and found.numpy().tobytes() == np.ascontiguousarray(wanted).tobytes()


def by_token(**keys: Any) -> dict[str, Any]:
    return {"vocabulary": "by-token", **keys}
