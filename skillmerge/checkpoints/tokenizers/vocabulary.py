"""Files that hold vocabularies -> which text each id is, and how text is cut. Content is not trusted.

Bytes of tokens are written as byte-level tokenizers write them (a space is `Ġ`), so that all files of one vocabulary
agree. Every function raises ValueError where a file is not what its name says.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from skillmerge.checkpoints.safetensors import refuse_bulk, unique_keys
from skillmerge.checkpoints.tokenizers.small_files import MAX_BYTES
from skillmerge.checkpoints.tokenizers.tokenization import in_order, tokenization

SKILL_TOKENS = "skill.tokens.json"
"""The file of a stored skill that says which tokens its rows belong to. A skill has no tokenizer of its own."""

MOST_TOKENS = 1 << 20
"""The largest vocabularies have 900,000 tokens."""

_MOST_IDS = 1 << 31
_MOST_LINES_BYTES = 16 << 20
"""Of merges, a line each. Those of the largest vocabularies take 6 MB."""
_MOST_INNER = 8
"""Fields of a piece, which has three."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """tokens: id -> text. tokenization: see `tokenization`; only what the file says."""

    tokens: Mapping[int, str]
    tokenization: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class NoTable(ValueError):
    """Raised for content that no library reads as a JSON object."""


def json_table(content: bytes) -> dict[str, Any]:
    """Return a JSON object, read strictly. Raises NoTable, and ValueError for what other libraries may read."""
    refuse_bulk(content, MAX_BYTES)
    try:
        document = json.loads(content.decode("utf-8"), object_pairs_hook=unique_keys)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise NoTable(str(error)) from error
    if not isinstance(document, dict):
        raise NoTable("it is not a JSON object")
    return document


def tokenizer_json(content: bytes) -> Vocabulary:
    """Read the format of the `tokenizers` library."""
    document = json_table(content)
    model, added = document.get("model"), document.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(added, list):
        raise ValueError("`added_tokens` is not a list")
    _refuse_many(len(added))
    if isinstance(vocabulary, dict):
        tokens = _by_id(vocabulary)
    elif isinstance(vocabulary, list):
        _refuse_many(len(vocabulary))
        tokens = {number: _text(piece[0] if isinstance(piece, list) and piece else None)
                  for number, piece in enumerate(vocabulary)}  # fmt: skip
    else:
        raise ValueError("it has no `model.vocab`")
    for token in added:
        if not isinstance(token, dict):
            raise ValueError("`added_tokens` has an entry that is not a table")
        tokens[_number(token.get("id"))] = _text(token.get("content"))
    return Vocabulary(tokens, tokenization(document))


def vocab_json(content: bytes) -> Vocabulary:
    """token -> id, as `vocab.json` and `added_tokens.json` have it."""
    table = json_table(content)
    if all(isinstance(entry, dict) for entry in table.values()):
        return Vocabulary({})  # speech models have a vocabulary for each language
    return Vocabulary(_by_id(table))


def skill_tokens(content: bytes) -> Vocabulary:
    """Read the text of each id, in order; null where it is not known."""
    refuse_bulk(content, MAX_BYTES)
    texts = json.loads(content.decode("utf-8"))
    if not isinstance(texts, list):
        raise ValueError("it is not a JSON list")
    _refuse_many(len(texts))
    return Vocabulary({number: _text(text) for number, text in enumerate(texts) if text is not None})


def skill_tokens_text(tokens: Mapping[int, str]) -> str:
    """Write what `skill_tokens` reads, one id a line."""
    lines = (json.dumps(tokens.get(number)) for number in range(max(tokens, default=-1) + 1))
    return "[\n" + ",\n".join(lines) + "\n]\n"


def vocab_txt(content: bytes) -> Vocabulary:
    """Read one token a line, with the line ends of any system."""
    _refuse_many(content.count(b"\n"))
    text = content.decode("utf-8").replace("\r\n", "\n")
    return Vocabulary(dict(enumerate(text.removesuffix("\n").split("\n"))))


def merges_txt(content: bytes) -> tuple[str, ...]:
    """Read one merge a line."""
    if len(content) > _MOST_LINES_BYTES:
        raise ValueError(f"it is larger than {_MOST_LINES_BYTES >> 20} MB")
    lines = content.decode("utf-8").splitlines()
    return in_order(line for line in lines if line.strip() and not line.startswith("#version"))


def tokens_model(content: bytes) -> Vocabulary:
    """`tokenizer.model`: sentencepiece's, or ranks of bytes, as newer models have under the same name."""
    first = content[:4096].partition(b"\n")[0].split(b" ")
    return tiktoken(content) if len(first) == 2 and first[1].strip().isdigit() else sentencepiece(content)


def tiktoken(content: bytes) -> Vocabulary:
    """Ranks: a token's bytes in base64 and its id, a line each."""
    tokens = {}
    _refuse_many(content.count(b"\n") + content.count(b"\r"))
    for line in content.splitlines():
        if line:
            encoded, _, rank = line.partition(b" ")
            tokens[_number(int(rank))] = _written(base64.b64decode(encoded, validate=True))
    return Vocabulary(tokens)


def tekken(content: bytes) -> Vocabulary:
    """Mistral's ranks: special tokens first, then tokens by the rank of their bytes, as many of them as are used."""
    document = json_table(content)
    settings, ranks = document.get("config"), document.get("vocab")
    if not isinstance(settings, dict) or not isinstance(ranks, list):
        raise ValueError("it has no `config` or no `vocab`")
    _refuse_many(len(ranks))
    special = _number(settings.get("default_num_special_tokens", 0))
    size = _number(settings.get("default_vocab_size", _MOST_IDS - 1))
    tokens = {}
    for entry in ranks:
        if not isinstance(entry, dict):
            raise ValueError("`vocab` has an entry that is not a table")
        tokens[special + _number(entry.get("rank"))] = _written(
            base64.b64decode(_text(entry.get("token_bytes")), validate=True)
        )
    named = document.get("special_tokens")
    if not isinstance(named, list | None):
        raise ValueError("`special_tokens` is not a list")
    for entry in named or []:
        if isinstance(entry, dict):
            tokens[_number(entry.get("rank"))] = _text(entry.get("token_str"))
    return Vocabulary({number: text for number, text in tokens.items() if number < size})


def sentencepiece(content: bytes) -> Vocabulary:
    """Read a `ModelProto` of sentencepiece: its first field, repeated, is a piece, whose first field is its text."""
    tokens: dict[int, str] = {}
    for number, piece in _fields(content):
        if number == 1:
            text = next((value for inner, value in _fields(piece, _MOST_INNER) if inner == 1), None)
            if text is None:
                raise ValueError("a piece has no text")
            tokens[len(tokens)] = text.decode("utf-8")
    if not tokens:
        raise ValueError("it holds no pieces")
    return Vocabulary(tokens)


def added_tokens(decoder: Any) -> dict[int, str]:
    """`added_tokens_decoder` of `tokenizer_config.json`: id -> its text, or a table with its `content`."""
    if decoder is None:
        return {}
    if not isinstance(decoder, dict):
        raise ValueError("`added_tokens_decoder` is not a table")
    return {_number(int(key)): _text(content_of(token)) for key, token in decoder.items()}


def content_of(token: Any) -> str | None:
    """Return a special token, which is a text or a table with its `content`; None if it is neither."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _fields(message: bytes, most: int = MOST_TOKENS) -> Iterator[tuple[int, bytes]]:
    """Yield the fields of a protobuf message that hold bytes: (number, bytes). Raises ValueError after `most` of any
    kind."""
    position, end = 0, len(message)
    while position < end:
        if (most := most - 1) < 0:
            raise ValueError("it has too many fields")
        tag, position = _varint(message, position)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            _, position = _varint(message, position)
            continue
        if wire == 2:
            length, position = _varint(message, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError("it is not a protobuf message")
        if position + length > end:
            raise ValueError("it is cut off")
        if wire == 2:
            yield number, message[position : position + length]
        position += length


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise ValueError("it is cut off")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("it is not a protobuf message")


def _visible() -> dict[int, str]:
    """Return the characters that byte-level tokenizers write bytes as (GPT-2's table)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + number) for number, byte in enumerate(hidden)}


_CHARACTERS = _visible()


def _written(token: bytes) -> str:
    return token.decode("latin-1").translate(_CHARACTERS)


def _refuse_many(count: int) -> None:
    if count > MOST_TOKENS:
        raise ValueError(f"it has more than {MOST_TOKENS:,} tokens")


def _by_id(vocabulary: Mapping[str, Any]) -> dict[int, str]:
    _refuse_many(len(vocabulary))
    _check(vocabulary.values())
    return dict(zip(vocabulary.values(), vocabulary, strict=True))


def _check(numbers: Collection[Any]) -> None:
    if set(map(type, numbers)) - {int}:
        raise ValueError("an id is not a whole number")
    if numbers and not 0 <= min(numbers) <= max(numbers) < _MOST_IDS:
        raise ValueError("an id is out of range")


def _number(value: Any) -> int:
    _check([value])
    number: int = value
    return number


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a token is not a text")
    return value
