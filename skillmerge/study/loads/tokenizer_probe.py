"""Load the tokenizer of a model folder and check it against itself and the model's embedding.

Part of the process of `load_probe`. Runs no code of the folder. Knows no kind of tokenizer: decoded text must encode
to the same ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from skillmerge.errors import some
from skillmerge.study.loads.child import told

TEXTS = (
    "The capital of France is Paris.",
    "def area(r: float) -> float:\n    return 3.14 * r ** 2  # πr²\n",
    "Grüße, naïve café: Привет мир, 你好世界, こんにちは, مرحبا, नमस्ते, 😀",
    " two  spaces and a tab\t.",
)
"""Plain text, code, several scripts, white space."""

_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.tiktoken", "*.spm", "spiece.model", "sentencepiece*", "tekken.json")
_QUESTION = "What is the capital of France?"
_LIBRARIES = {
    "sentencepiece": "sentencepiece", "tiktoken": "tiktoken", "protobuf": "google", "blobfile": "blobfile",
    "jinja": "jinja2", "mistral-common": "mistral_common", "sacremoses": "sacremoses", "fugashi": "fugashi",
}  # fmt: skip
"""Libraries that tokenizers of transformers may need: the name in messages, and the module."""
_SHOWN = 8
_MEDIA = re.compile(r"<\|?/?(?:image|video|audio|vision|img|speech)(?:[^\W\d]|[ -])*\|?>", re.IGNORECASE)
"""Tokens that stand for a medium as a whole. Those with numbers are codes of it, which a model reads and writes."""

_FEW = 4
"""A family has no more tokens for media than these."""


_OTHER_IDS = "AutoTokenizer gives other ids than tokenizer.json: it chooses {} by the model's type"
_LOAD_AS_FILED = "load it with `PreTrainedTokenizerFast.from_pretrained`"


class _BrokenTemplate(Exception):
    """A chat template that fails on the simplest turn."""


def probe(folder: Path, model: Any | None, warnings: Sequence[str] = ()) -> dict[str, Any]:
    """Return a report on a folder's tokenizer. Its faults are in the report, never raised.

    model: what was loaded of the folder, for its rows. warnings: where the caller collects what transformers warns
    of: where a library is missing it tries another, and may complain of that one. The report has `class`, `tokens` and
    `rows` where they are known; then `why` (what is wrong), `lacks` (which library is missing, in the words of the one
    that wants it), `machine` (what this machine lacks) or none of them; `notes`; and `warnings`, messages with a `fix`,
    if there are any.
    """
    if not any(path for pattern in _FILES for path in folder.glob(pattern)):
        return {"notes": ["no tokenizer files; no tokenizer was loaded"]}
    report: dict[str, Any] = {"notes": []}
    try:
        settings = _settings(folder)
        code = settings.get("auto_map")
        if isinstance(code, list) or (isinstance(code, dict) and code.get("AutoTokenizer")):
            return {"notes": ["the tokenizer needs custom code and was not loaded"]}
        if (name := settings.get("tokenizer_class")) and not _is_class(name):
            return {**report, "why": f"tokenizer_config.json names `{name}`, a class that transformers lacks"}
        report |= _checked(folder, model, report["notes"])
    except _BrokenTemplate as error:  # the text is the model's, so it says nothing about the machine
        return {**report, "why": str(error)}
    except Exception as error:
        failed = f"{type(error).__name__}: {error}"
        lacks = [line for text in warnings for line in text.splitlines() if _names_absent(line)]
        if lacks or _is_lack(error):
            clearest = sorted(lacks, key=lambda line: "requires" not in line) or [failed]
            return {**report, "lacks": " ".join(clearest[0].split(". ")[0].split())}
        kind, words = next(item for item in told(error).items() if item[0] != "ok")
        return {**report, kind: words}
    return report


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found if isinstance(found, dict) else {}


def _is_class(name: str) -> bool:
    """Return whether transformers has a tokenizer of this name: it takes others for one of the general kind."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name as find

    names = (name, name.removesuffix("Fast"), f"{name}Fast")
    return any(find(item) is not None for item in names)


def _is_lack(error: BaseException) -> bool:
    """Return whether a library is missing: some say so by an ImportError, some in words."""
    cause = error.__cause__ or error.__context__
    return isinstance(error, ImportError) or _names_absent(str(error)) or (cause is not None and _is_lack(cause))


def _names_absent(text: str) -> bool:
    """Return whether a message names a library that is not installed."""
    return any(name in text.lower() and find_spec(module) is None for name, module in _LIBRARIES.items())


def _checked(folder: Path, model: Any | None, notes: list[str]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    report: dict[str, Any] = {"class": type(tokenizer).__name__, "tokens": len(vocabulary), "rows": _rows(model)}
    rows = report["rows"]
    beyond = {token: number for token, number in vocabulary if rows is not None and number >= rows}
    few = len(beyond) <= _FEW and [*beyond.values()] == [rows + place for place in range(len(beyond))]
    if beyond and few and all(_is_unread(token, tokenizer, model) for token in beyond):
        notes.append(f"{some([*beyond])}: ids beyond the embedding's rows, which this model does not use")
    elif beyond:
        what = f"{len(beyond)} of its {len(vocabulary)} tokens have ids beyond the embedding's {rows} rows"
        return {**report, "why": what}
    if not tokenizer.get_vocab().keys() - _added(tokenizer).keys():
        notes.append("its files hold no vocabulary: the tokenizer knows nothing but its special tokens")
        return report
    if hasattr(tokenizer, "cls_token_box"):  # those of the LayoutLM family
        notes.append("the tokenizer reads words with their places on a page: no text was decoded and encoded")
        return report
    if not _reads_as_filed(folder, tokenizer):
        report["warnings"] = [{"message": _OTHER_IDS.format(type(tokenizer).__name__), "fix": _LOAD_AS_FILED}]
    notes += _split_tokens(tokenizer)
    if model is not None and model.main_input_name != "input_ids":
        return report  # an audio tokenizer only decodes, so a round trip proves nothing
    if not _writes(tokenizer):
        notes.append("the tokenizer has no decoder, so decoded text was not encoded again")
        return report
    return {**report, **_read_again(tokenizer, notes)}


def _is_unread(token: str, tokenizer: Any, model: Any) -> bool:
    """Return whether a model does not use a token: text models of Gemma 3 keep the family's media tokens, and
    BART's that summarize the one of its masks.
    """
    if token == getattr(tokenizer, "mask_token", None):
        return bool(model.can_generate())
    config = getattr(model, "config", None)
    towers = any(getattr(config, name, None) is not None for name in ("vision_config", "audio_config"))
    return not towers and bool(_MEDIA.fullmatch(token))


def _added(tokenizer: Any) -> dict[str, int]:
    """Return the tokens that were added to the vocabulary, if the tokenizer knows them."""
    return dict(getattr(tokenizer, "get_added_vocab", dict)())


def _rows(model: Any | None) -> int | None:
    import torch

    try:
        embedding = model.get_input_embeddings() if model is not None else None
    except NotImplementedError:  # a model of sounds, or one with an embedding in each of its parts
        embedding = None
    return int(embedding.num_embeddings) if isinstance(embedding, torch.nn.Embedding) else None


def _reads_as_filed(folder: Path, tokenizer: Any) -> bool:
    """Return whether the class that transformers chose, by the model's type, reads plain text as tokenizer.json
    does."""
    from tokenizers import Tokenizer

    if not (folder / "tokenizer.json").exists():
        return True
    filed = Tokenizer.from_file(str(folder / "tokenizer.json"))
    filed.no_truncation()
    filed.no_padding()
    return bool(_ids(tokenizer, TEXTS[0]) == filed.encode(TEXTS[0], add_special_tokens=False).ids)


def _split_tokens(tokenizer: Any) -> list[str]:
    """Return a note on special tokens that are read as several: some tokenizers mean to, but no chat will end with
    them."""
    split = [
        token for token in tokenizer.all_special_tokens
        if _ids(tokenizer, token) != [tokenizer.convert_tokens_to_ids(token)]
    ]  # fmt: skip
    return [f"special tokens are encoded as several tokens each: {some(split)}"] if split else []


def _writes(tokenizer: Any) -> bool:
    """Return whether the tokenizer can write text: without a decoder it joins tokens with spaces."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is None or backend.decoder is not None


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _read_again(tokenizer: Any, notes: list[str]) -> dict[str, Any]:
    """`texts`, how many gave the same ids again, or `why` with the first that did not."""
    read = set()
    for text in (*TEXTS, *_chat(tokenizer, notes), *tokenizer.all_special_tokens):
        ids = _ids(tokenizer, text)
        if not ids or (tokenizer.unk_token_id in ids and text != tokenizer.unk_token):
            continue  # unknown characters are lost
        written = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        again = _ids(tokenizer, written)
        if again != ids and not _is_spaced(tokenizer, text, written, ids, again):
            return {
                "why": f"it decodes the ids of {text!r} to {written!r}, which has different ids: {_apart(ids, again)}"
            }
        read.add(text)
    if read.isdisjoint(TEXTS):
        notes.append("no text was decoded and encoded: each contains something unknown to the tokenizer")
    return {"texts": len(read)}


def _is_spaced(tokenizer: Any, text: str, written: str, ids: list[int], again: list[int]) -> bool:
    """Return whether special tokens only got spaces around them when they were written, as those of Llama 2 do."""
    special = {*tokenizer.all_special_ids, *_added(tokenizer).values()}
    before, after = ([token for token in row if token in special] for row in (ids, again))
    return bool(before) and before == after and "".join(text.split()) == "".join(written.split())


def _apart(ids: list[int], again: list[int]) -> str:
    """Return the first ids where two lists differ."""
    start = next((i for i, pair in enumerate(zip(ids, again, strict=False)) if pair[0] != pair[1]), len(again))
    return f"{ids[start : start + _SHOWN]} and {again[start : start + _SHOWN]}"


def _chat(tokenizer: Any, notes: list[str]) -> list[str]:
    """Return one turn of a user as the chat template renders it, if it takes one. Raises _BrokenTemplate where it
    fails."""
    if not tokenizer.chat_template:
        return []
    rendered, failures, refused = [], [], ""
    for content in (_QUESTION, [{"type": "text", "text": _QUESTION}]):  # the parts are those of multimodal models
        try:
            turn = [{"role": "user", "content": content}]
            rendered.append(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
            if _QUESTION in rendered[-1]:
                return rendered[-1:]
        except (ImportError, MemoryError, OSError):
            raise
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
            # What a template itself refuses, or templates by name without a default, are made for other turns.
            named = isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template
            if type(error).__name__ == "TemplateError" or named:
                refused = f"its chat template rejects one plain user turn: {error}"
    if rendered or refused:
        notes.append(refused or "its chat template omits the user's message")
        return rendered[:1]
    raise _BrokenTemplate(f"its chat template fails on one user turn: {failures[0]}")
