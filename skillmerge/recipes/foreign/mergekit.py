"""mergekit's YAML -> the equivalent recipe, or what in it has no counterpart.

Written from its published configuration format (https://github.com/arcee-ai/mergekit#merge-configuration), of which
what adds and scales whole models can be said: linear, task_arithmetic, and passthrough of one model.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from skillmerge.errors import did_you_mean

_IDLE = {"int8_mask", "normalize", "rescale", "weight", "lambda", "density", "t"}
_KNOWN = {
    "merge_method",
    "models",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "name",
    "tokenizer_source",
}
_DTYPES = ("bfloat16", "float16", "float32")
_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n", "nan", "inf"}
"""Words that some version of YAML does not read as text."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@\S+)?")
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*|(?:hf://)?[A-Za-z0-9_./][A-Za-z0-9_.-]*/[A-Za-z0-9_./@-]*")


TRANSLATED = "`linear`, `task_arithmetic` and `passthrough` of one model have counterparts"


class NoCounterpart(Exception):
    """Something in a configuration has no counterpart in a recipe. path: the keys that lead to it, if one place does.
    fix: what to write, or None."""

    def __init__(self, message: str, *path: str | int, fix: str | None = None) -> None:
        super().__init__(message)
        self.path, self.fix = path, fix


def is_mergekit(data: Any) -> bool:
    """Return whether a document is a configuration of mergekit."""
    return isinstance(data, dict) and ("merge_method" in data or "slices" in data or _listed(data.get("models")))


def equivalent(data: Mapping[str, Any]) -> str:
    """Return the recipe that is equivalent to a configuration. Raises NoCounterpart."""
    method = data.get("merge_method")
    if method is not None and method not in ("linear", "task_arithmetic", "passthrough"):
        raise NoCounterpart(
            f"`merge_method: {method}` has no counterpart in this version: merge with mergekit, as the plain sum of "
            "the models or updates is another merge",
            "merge_method",
        )
    if unknown := sorted({*data} - _KNOWN, key=str):
        raise NoCounterpart(f"`{unknown[0]}` has no counterpart in a recipe", unknown[0])
    if method is None:
        raise NoCounterpart("`merge_method` is missing")
    if data.get("tokenizer_source") not in (None, "base"):
        raise NoCounterpart(
            f"`tokenizer_source: {data['tokenizer_source']}` has no counterpart in a recipe", "tokenizer_source"
        )
    base = _place(data["base_model"], "base_model") if data.get("base_model") is not None else None
    models, shared = data.get("models") or [], _parameters(data)
    if not isinstance(models, list):
        raise NoCounterpart("`models` is not a list", "models")
    rows = [_row(shared, item, "models", index) for index, item in enumerate(models)]
    if method != "task_arithmetic" and base is not None and base not in dict(rows):
        raise NoCounterpart(
            f"`base_model: {base}`, which is not one of the models, has no counterpart here", "base_model"
        )
    if method == "passthrough":
        if len(rows) != 1 or "scale" in shared:
            raise NoCounterpart("a passthrough of several models, or with a scale, has no counterpart", "merge_method")
        names = _names([rows[0][0]])
        return _recipe(names, names[rows[0][0]], data)
    if method == "linear":
        return _linear(rows, base, shared, data)
    if base is None:
        raise NoCounterpart("task_arithmetic without `base_model` has no counterpart", "merge_method")
    return _task_arithmetic(base, rows, shared, data)


def moved(data: Mapping[str, Any], start: str) -> dict[str, Any]:
    """Return a configuration whose relative folders begin with `start`, for a recipe that is not beside it."""

    def place(written: Any) -> Any:
        if isinstance(written, dict):
            return {**written, "model": place(written.get("model"))}
        if not isinstance(written, str) or _REPOSITORY.fullmatch(written) or "://" in written:
            return written
        return written if written.startswith(("/", "~")) else os.path.normpath(os.path.join(start, written))

    models = data.get("models")
    listed = models if isinstance(models, list) else []
    entries = [{**it, "model": place(it["model"])} if isinstance(it, dict) and "model" in it else it for it in listed]
    base = {"base_model": place(data["base_model"])} if "base_model" in data else {}
    return {**data, **base, **({"models": entries} if entries else {})}


def _linear(
    rows: Sequence[tuple[str, float]], base: str | None, shared: Mapping[str, Any], data: Mapping[str, Any]
) -> str:
    total = _finite(sum(factor for _, factor in rows))
    if abs(total) < 1e-9:
        raise NoCounterpart("weights that add up to 0 have no counterpart")
    names = _names([place for place, _ in rows])
    if not shared.get("normalize", True) and abs(total - 1) > 1e-9:
        raise NoCounterpart(f"the weights add up to {total:g}, and the model would be scaled by that")
    terms = " + ".join(_times(factor, names[place]) for place, factor in rows)
    merge = terms if abs(total - 1) <= 1e-9 else f"({terms}) / {total:.10g}"
    return _recipe(names, merge, data, like=None if base is None else names[base])


def _task_arithmetic(
    base: str, rows: Sequence[tuple[str, float]], shared: Mapping[str, Any], data: Mapping[str, Any]
) -> str:
    """base + sum of weight * (model - base), scaled by `lambda`; an entry for the base itself has no effect."""
    rows = [(place, factor) for place, factor in rows if place != base]
    names = _names([base, *(place for place, _ in rows)])
    by = _number(shared.get("lambda", 1), "parameters", "lambda")
    total = _finite(sum(factor for _, factor in rows))
    if shared.get("normalize", False) and abs(total) > 1e-8:
        by /= total
    terms = [_times(_finite(factor * by), f"({names[place]} - {names[base]})") for place, factor in rows]
    return _recipe(names, " + ".join([names[base], *terms]), data)


def _times(factor: float, what: str) -> str:
    return what if factor == 1 else f"{factor:.10g} * {what}"


def _row(shared: Mapping[str, Any], item: Any, *path: str | int) -> tuple[str, float]:
    """Return the place and the weight of the model at `path`. Raises NoCounterpart."""
    if not isinstance(item, dict) or "model" not in item:
        raise NoCounterpart("`models` holds an entry without a `model`", *path)
    place, own = _place(item["model"], *path, "model"), _parameters(item, *path)
    for key in sorted({*own, *shared} - _IDLE, key=str):
        where = (*path, "parameters", key) if key in own else ("parameters", key)
        near = did_you_mean(str(key), sorted(_IDLE))
        raise NoCounterpart(f"the parameter `{key}` has no counterpart", *where, fix=near)
    where = path if "weight" in own else ()
    return place, _number(own.get("weight", shared.get("weight", 1)), *where, "parameters", "weight")


def _parameters(table: Mapping[str, Any], *path: str | int) -> Mapping[str, Any]:
    found = table.get("parameters") or {}
    if not isinstance(found, dict):
        raise NoCounterpart("`parameters` is not a table", *path, "parameters")
    return found


def _number(value: Any, *path: str | int) -> float:
    """Return the number at `path`. Raises NoCounterpart, for what is none with how to write it."""
    what = path[-1]
    if isinstance(value, bool) or not isinstance(value, int | float):
        schedule = "{default: 0.5, rules: [{modules: mlp, value: 0.3}]}"
        if isinstance(value, list) and len(value) == 2 and all(type(point) in (int, float) for point in value):
            # Outside of layers, mergekit takes the first point.
            schedule = f"{{default: {value[0]}, rules: [{{layers: 0-, ramp: {value}}}]}}"
        raise NoCounterpart(
            f"a `{what}` that is a list or a filter has no direct counterpart",
            *path,
            fix=f"write a coefficient with `rules`, such as `coefficients: {{lam: {schedule}}}`",
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise NoCounterpart(f"a `{what}` that is not finite has no counterpart", *path)
    return number


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise NoCounterpart("weights that are too large together have no counterpart")
    return number


def _place(written: Any, *path: str | int) -> str:
    """Return a model of mergekit, which is a repository or a folder, as a place of ours."""
    text = written.get("model") if isinstance(written, dict) else written
    if not isinstance(text, str):
        raise NoCounterpart(f"the model `{text}`, which is not a text, has no counterpart", *path)
    if "+" in text or (isinstance(written, dict) and written.get("lora")):
        raise NoCounterpart(f"`{text}` puts an adapter on a model: merge it in first (peft: `merge_and_unload`)", *path)
    if _REPOSITORY.fullmatch(text):
        return f"hf://{text}"
    return text


def _names(places: Sequence[str]) -> dict[str, str]:
    """Return a name for each place, from its last part; one alone needs no number."""
    names: dict[str, str] = {}
    for place in dict.fromkeys(places):
        last = place.split("@")[0].rstrip("/").rsplit("/", 1)[-1]
        last = re.sub(r"[^A-Za-z0-9_]", "_", last)[:60].strip("_") or "model"
        name = f"m{last}" if last[0].isdigit() or last.lower() in _WORDS else last
        while name in names.values():
            name += "_2"
        names[place] = name
    return names


def _quoted(place: str) -> str:
    """Return a place as YAML text that reads back unchanged."""
    if _PLAIN.fullmatch(place) and place.lower() not in _WORDS:
        return place
    text = json.dumps(place, ensure_ascii=False)
    return "".join(character if character.isprintable() else f"\\U{ord(character):08x}" for character in text)


def _recipe(names: Mapping[str, str], merge: str, data: Mapping[str, Any], *, like: str | None = None) -> str:
    models = "\n".join(f"  {name}: {_quoted(place)}" for place, name in names.items())
    dtype = data.get("out_dtype") or data.get("dtype")
    written = f", dtype: {dtype}" if dtype in _DTYPES else ""
    donor = f", like: {like}" if like is not None else ""
    return f"skillmerge: 1\nmodels:\n{models}\nmerge: {merge}\noutput: {{path: ./merged{donor}{written}}}"


def _listed(models: Any) -> bool:
    return isinstance(models, list) and any(isinstance(item, dict) and "model" in item for item in models)
