"""What a document of mergekit says about its output: dtype, tokenizer, and the files beside the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from skillmerge.recipes.foreign.spellings import word_meant
from skillmerge.recipes.mergekit.config import Config
from skillmerge.recipes.mergekit.notes import Notes, Refused, table

_DTYPES = ("bfloat16", "float16", "float32")
_WIDE = ("linear", "slerp", "passthrough")
"""Methods that mergekit 0.1.5 computes in float32 in any case, or not at all."""
_VOCABULARIES = "merging vocabularies is not offered; make the tokenizers equal first"


def dtype_of(config: Config, notes: Notes) -> str | None:
    """Return the dtype of the output, or None for that of the donor. Raises Refused."""
    computed, stored = (_dtype(config.data.get(key), key, notes) for key in ("dtype", "out_dtype"))
    if computed == "float32" or config.method == "passthrough":
        return stored or computed
    where = ("dtype",) if computed else ()
    what = computed or "the dtype of the models"
    if config.method in _WIDE:
        notes.note("mergekit and skillmerge compute this method in float32; halves of a step can round apart", *where)
    else:
        notes.warn(f"mergekit computes in {what}; skillmerge computes in float32 and rounds once", *where)
    return stored or computed


def _dtype(value: Any, key: str, notes: Notes) -> str | None:
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    if name == "float64":
        notes.warn("float64 is written as float32", key)
        return "float32"
    if name not in _DTYPES:
        fix = word_meant("dtype", name, list(_DTYPES)) or "write bfloat16, float16 or float32"
        raise Refused(f"`{value}` is not a dtype of mergekit that skillmerge writes", key, fix=fix)
    return name


def tokenizer_of(config: Config, notes: Notes, place: Callable[..., str]) -> str | None:
    """Return the model whose tokenizer the output has, or None if the document names none. Raises Refused.

    place: a written model -> its place.
    """
    data = config.data
    if data.get("chat_template") is not None:
        notes.note("the weights are equal; the chat template stays the donor's", "chat_template")
    source: Any = data.get("tokenizer_source")
    path: tuple[str, ...] = ("tokenizer_source",)
    if data.get("tokenizer") is not None:
        inner = table(data["tokenizer"], "tokenizer", "tokenizer")
        source, path = inner.get("source", "union"), ("tokenizer", "source")
        for key in ("tokens", "pad_to_multiple_of"):
            if inner.get(key):
                raise Refused(f"`{key}` changes the vocabulary: {_VOCABULARIES}", "tokenizer", key, fix=_REMOVE)
    if source is None:
        return None
    if source == "union":
        raise Refused(f"`union` changes the vocabulary: {_VOCABULARIES}", *path, fix=_REMOVE)
    model = config.base if source == "base" else place(source, *path)
    if model is None:
        raise Refused("there is no `base_model` whose tokenizer it could be", *path, fix="name a model")
    if model not in (*config.models, config.base):
        raise Refused(f"`{source}` is not one of the models that are merged", *path, fix="name one of them")
    notes.note("the tokenizer's files are copied as they are, and embeddings keep their size", *path)
    return str(model)


_REMOVE = "remove it, or merge with mergekit"
