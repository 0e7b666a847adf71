"""What a document of mergekit says about the dtype of its output."""

from __future__ import annotations

from typing import Any

from skillmerge.recipes.foreign.spellings import word_meant
from skillmerge.recipes.mergekit.config import Config
from skillmerge.recipes.mergekit.notes import Notes, Refused

_DTYPES = ("bfloat16", "float16", "float32")
_WIDE = ("linear", "slerp", "passthrough")
"""Methods that mergekit 0.1.5 computes in float32 in any case, or not at all."""


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
