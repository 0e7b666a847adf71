"""What a document of mergekit says about tokens: whose tokenizer the output has, and whose rows.

mergekit matches rows by token as soon as a tokenizer is named. Where the models' tokenizers are in folders, it is known
here whether that changes anything, and whether `vocabulary: by-token` says the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skillmerge.checkpoints.tokenizers.small_files import MAX_BYTES
from skillmerge.checkpoints.tokenizers.vocabulary import tokenizer_json
from skillmerge.recipes.mergekit.config import Config
from skillmerge.recipes.mergekit.notes import Notes, Refused, table

_FILE = "tokenizer.json"
_REMOVE = "remove it, or merge with mergekit"
_ONE = "name the model whose tokens the output is to have: `tokenizer_source: base`"
_UNION = "`union` makes a tokenizer of all models' tokens, and skillmerge keeps that of one model"

Place = Callable[..., str]
"""A written model, and the keys that lead to it -> its place."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """like: the model whose tokenizer the output has, or None. by_token: whether rows are matched by token. taken:
    token -> the model whose row it is. path: the keys that lead to where the document says so."""

    like: str | None = None
    by_token: bool = False
    taken: Mapping[str, str] = field(default_factory=dict)
    path: tuple[str, ...] = ("base_model",)


def tokens_of(config: Config, notes: Notes, place: Place, home: Path) -> Tokens:
    """Return what a document says about tokens. Raises Refused. home: the folder that relative paths start from."""
    data = config.data
    if data.get("chat_template") is not None:
        notes.note("the weights are equal; the chat template stays the donor's", "chat_template")
    source: Any = data.get("tokenizer_source")
    path: tuple[str, ...] = ("tokenizer_source",)
    written: Mapping[str, Any] = {}
    if data.get("tokenizer") is not None:
        inner = table(data["tokenizer"], "tokenizer", "tokenizer")
        source, path = inner.get("source", "union"), ("tokenizer", "source")
        written = table(inner.get("tokens"), "tokens", "tokenizer", "tokens")
        if inner.get("pad_to_multiple_of"):
            what = "`pad_to_multiple_of` changes the number of rows, and embeddings keep their size"
            raise Refused(what, "tokenizer", "pad_to_multiple_of", fix=_REMOVE)
    if source is None:
        return Tokens()
    known = _known(config, home)
    like = _whole(config, known, path) if source == "union" else _named(source, config, place, path)
    notes.note("the tokenizer's files are copied as they are, and embeddings keep their size", *path)
    taken = {str(token): _taken(token, how, config, place) for token, how in written.items()}
    by_token = bool(taken) or (known is not None and any(it != known[like] for it in known.values()))
    if by_token and known is not None:
        _warn(known, like, taken, notes, path)
    return Tokens(like, by_token, taken, path)


def _named(source: Any, config: Config, place: Place, path: tuple[str, ...]) -> str:
    model = config.base if source == "base" else place(source, *path)
    if model is None:
        raise Refused("there is no `base_model` whose tokenizer it could be", *path, fix="name a model")
    if model not in (*config.models, config.base):
        raise Refused(f"`{source}` is not one of the models that are merged", *path, fix="name one of them")
    return model


def _whole(config: Config, known: Mapping[str, Mapping[str, int]] | None, path: tuple[str, ...]) -> str:
    """Return the model that has all tokens of the others, the base if it has. Raises Refused."""
    if {*config.models, config.base} - {None} == {config.models[0]}:
        return config.models[0]
    if known is None:
        raise Refused(f"{_UNION}; the tokenizers are not in folders here to compare", *path, fix=_ONE)
    every = {token for tokens in known.values() for token in tokens}
    ordered = sorted(known, key=lambda model: model != config.base)
    model = next((model for model in ordered if len(known[model]) == len(every)), None)
    if model is None:
        most = max(ordered, key=lambda it: len(known[it]))
        missing = min(every - known[most].keys())
        raise Refused(f"{_UNION}: `{_end(most)}` has most of them, and lacks `{missing[:40]}`", *path, fix=_ONE)
    return model


def _taken(token: str, how: Any, config: Config, place: Place) -> str:
    """Return the model whose row of a token the output has. Raises Refused."""
    path = ("tokenizer", "tokens", token)
    inner = table(how, token, *path)
    source = inner.get("source")
    if isinstance(source, dict) and "kind" in source:
        what = "a row of zeros" if source["kind"] == "zero" else "the row of another token"
        raise Refused(f"`{token}` would get {what}, which no recipe says", *path, fix=_REMOVE)
    if not inner.get("force"):
        what = f"`{token}` would be filled in where a model lacks it; skillmerge takes the row of the tokenizer's model"
        raise Refused(what, *path, fix="write `force: true` to take the whole row of that model, or remove it")
    model = place(source, *path, "source")
    if model not in (*config.models, config.base):
        raise Refused(f"`{source}` is not one of the models that are merged", *path, fix="name one of them")
    return model


def _known(config: Config, home: Path) -> dict[str, Mapping[str, int]] | None:
    """Return the tokens of each model with their ids, or None if they are not all in folders here."""
    models = dict.fromkeys([*config.models, *([config.base] if config.base is not None else [])])
    found = {model: _tokens(home / model.partition("+")[0] / _FILE) for model in models}
    return {model: it for model, it in found.items() if it is not None} if None not in found.values() else None


def _tokens(file: Path) -> dict[str, int] | None:
    try:
        if not file.is_file() or file.stat().st_size > MAX_BYTES:
            return None
        texts = tokenizer_json(file.read_bytes()).tokens
    except (OSError, ValueError, RecursionError):
        return None
    return {text: number for number, text in texts.items()}


def _warn(
    known: Mapping[str, Mapping[str, int]], like: str, taken: Iterable[str], notes: Notes, path: tuple[str, ...]
) -> None:
    """Warn of tokens that some models have and others lack: what one model has alone is its row with both."""
    partly = [
        token
        for token in known[like].keys() - set(taken)
        if 1 < sum(token in tokens for tokens in known.values()) < len(known)
    ]
    if partly:
        count = "1 token is" if len(partly) == 1 else f"{len(partly)} tokens are"
        notes.warn(
            f"{count} in some models only, such as `{min(partly)[:40]}`: mergekit fills in what a model lacks, and "
            f"skillmerge keeps the row of `{_end(like)}`", *path,
        )  # fmt: skip


def _end(place: str) -> str:
    return place.rstrip("/").rsplit("/", 1)[-1]
