"""The tokenizer of one model, from its small files: which text each id is, how text is cut, where answers stop.

Of a remote model at most five files are fetched, in this order, each where it is there and is not the donor's:
the vocabulary, `tokenizer_config.json`, `generation_config.json`, the chat template, `added_tokens.json` (without
tokens in the config), `merges.txt` (beside `vocab.json`), `special_tokens_map.json` (without an EOS token elsewhere).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.model_config import sections
from skillmerge.checkpoints.tokenizers.small_files import SmallFiles
from skillmerge.checkpoints.tokenizers.vocabulary import (
    SKILL_TOKENS,
    NoTable,
    Vocabulary,
    added_tokens,
    content_of,
    json_table,
    merges_txt,
    skill_tokens,
    tekken,
    tiktoken,
    tokenizer_json,
    tokens_model,
    vocab_json,
    vocab_txt,
)
from skillmerge.errors import InputError

VOCABULARIES: tuple[tuple[str, Callable[[bytes], Vocabulary]], ...] = (
    ("tokenizer.json", tokenizer_json),
    ("vocab.json", vocab_json),
    ("vocab.txt", vocab_txt),
    ("tokenizer.model", tokens_model),
    ("spiece.model", tokens_model),
    ("tiktoken.model", tiktoken),
    ("*.tiktoken", tiktoken),
    ("tekken.json", tekken),
    (SKILL_TOKENS, skill_tokens),
)
"""Files that say which text each id is, best first."""

_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja",
           "chat_template.json", "additional_chat_templates/*")  # fmt: skip
"""Files that belong to a vocabulary."""

_SHIFTED = ("Pegasus", "XLMRoberta", "Camembert", "MBart", "NLLB", "Nllb", "Barthez", "XGLM", "M2M100", "BigBird",
            "Plbart", "PLBart", "Speech2Text", "FNet", "Rembert", "RemBert", "DebertaV2")  # fmt: skip
"""Classes whose ids are not those of their sentencepiece file: their code moves them."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The tokenizer that a model's files describe.

    file: the vocabulary's, or "" if there is none. tokens: id -> text, empty if that is not known.
    tokenization: how text is cut, as far as it is known (`tokenization.tokenization`).
    stop: the ids that end an answer, and stop_file, which says so; empty if nothing does. templates: name -> chat
    template, the usual one as `default`, and template_file. pad, bos: ids. unread: why files could not be read.
    broken: those of `unread` that are no JSON objects, which no runtime can read either. pointers: those of
    `unread` where a pointer is in the file's place, and what to do.
    """

    file: str = ""
    tokens: Mapping[int, str] = field(default_factory=dict)
    tokenization: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stop: frozenset[int] = frozenset()
    stop_file: str = ""
    templates: Mapping[str, str] = field(default_factory=dict)
    template_file: str = ""
    pad: int | None = None
    bos: int | None = None
    unread: tuple[str, ...] = ()
    broken: frozenset[str] = frozenset()
    pointers: Mapping[str, str | None] = field(default_factory=dict)


def vocabulary_file(names: Iterable[str]) -> str:
    """Return the file, among a model's, that says which text each id is, or ""."""
    found = [file for pattern, _ in VOCABULARIES for file in names if "/" not in file and fnmatchcase(file, pattern)]
    return found[0] if found else ""


def is_of_tokenizer(name: str) -> bool:
    """Return whether a file of a model is its vocabulary, or belongs to it."""
    return any(fnmatchcase(name, pattern) for pattern in (*_BESIDE, *(it for it, _ in VOCABULARIES)))


def read_tokenizer(checkpoint: Checkpoint, files: SmallFiles, *, tokens: bool = True) -> Tokenizer:
    """Return the tokenizer of a model. files: shared by all models that are compared, the donor's read first. tokens:
    whether the vocabulary is wanted.

    Raises StalePlan, TemporaryError. What cannot be read as what it is, is named in `unread`.
    """
    return _Reading(checkpoint, files).tokenizer(tokens)


class _Reading:
    """One model's files, and what could not be read of them."""

    def __init__(self, checkpoint: Checkpoint, files: SmallFiles) -> None:
        self._checkpoint, self._store, self._files = checkpoint, checkpoint.store, files
        self._unread: list[str] = []
        self._broken: set[str] = set()
        self._pointers: dict[str, str | None] = {}
        self._listed = self._store.list()

    def tokenizer(self, vocabulary: bool) -> Tokenizer:
        file = vocabulary_file(self._listed)
        parse = next((parse for pattern, parse in VOCABULARIES if vocabulary and fnmatchcase(file, pattern)), None)
        found = (self._read(file, parse) if parse is not None else None) or Vocabulary({})
        config = self._read("tokenizer_config.json", json_table) or {}
        if file.endswith(".model") and str(config.get("tokenizer_class", "")).startswith(_SHIFTED):
            found = Vocabulary({})
        generation = self._read("generation_config.json", json_table) or {}
        template_file, templates = self._templates(config)
        tokens, merges = self._added(file, found.tokens, config), found.tokenization
        if file == "vocab.json":
            lines = self._read("merges.txt", merges_txt)
            merges = {"merges": lines} if lines is not None else {}
        special = self._special(config)
        stop_file, stop = self._stop(generation, tokens, special)
        return Tokenizer(
            file, tokens, merges, stop, stop_file, templates, template_file,
            self._id("pad", tokens, special), self._id("bos", tokens, special), tuple(self._unread),
            frozenset(self._broken), self._pointers,
        )  # fmt: skip

    def _read(self, file: str, parse: Callable[[bytes], T]) -> T | None:
        try:
            return self._files.read(self._store, file, parse)
        except InputError as error:
            self._unread.append(error.message)
            if self._store.at.path(file) in self._files.pointers:
                self._pointers[error.message] = error.fix
            elif isinstance(error.__cause__, NoTable | RecursionError):
                self._broken.add(error.message)
            return None

    def _added(self, file: str, tokens: Mapping[int, str], config: Mapping[str, Any]) -> Mapping[int, str]:
        """Return the tokens and those that other files add. The same object where they add nothing."""
        try:
            added = added_tokens(config.get("added_tokens_decoder"))
        except ValueError as error:
            self._unread.append(f"{self._store.at.path('tokenizer_config.json')}: cannot be read: {error}")
            added = {}
        if not added and file != "tokenizer.json":
            found = self._read("added_tokens.json", vocab_json)
            added = dict(found.tokens) if found is not None else {}
        # What `tokenizer.json` says is what is loaded.
        new = {number: text for number, text in added.items() if file != "tokenizer.json" or number not in tokens}
        return {**tokens, **new} if tokens and new else tokens

    def _templates(self, config: Mapping[str, Any]) -> tuple[str, Mapping[str, str]]:
        if "chat_template.jinja" in self._listed:
            text = self._read("chat_template.jinja", _jinja)
            return "chat_template.jinja", {"default": text} if text is not None else {}
        if templates := _named(config.get("chat_template")):
            return "tokenizer_config.json", templates
        document = self._read("chat_template.json", json_table) or {}
        return "chat_template.json", _named(document.get("chat_template"))

    def _special(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return where `eos_token` and its like are named."""
        if config.get("eos_token") is not None:
            return config
        return {**(self._read("special_tokens_map.json", json_table) or {}), **config}

    def _stop(
        self, generation: Mapping[str, Any], tokens: Mapping[int, str], special: Mapping[str, Any]
    ) -> tuple[str, frozenset[int]]:
        said = [("generation_config.json", generation)]
        said += [("config.json", section) for _, section in sections(self._checkpoint.config)]
        for file, table in said:
            if found := _ids(table.get("eos_token_id")):
                return file, found
        number = _find(content_of(special.get("eos_token")), tokens)
        return "tokenizer_config.json", frozenset() if number is None else frozenset([number])

    def _id(self, which: str, tokens: Mapping[int, str], special: Mapping[str, Any]) -> int | None:
        for _, section in sections(self._checkpoint.config):
            if type(section.get(f"{which}_token_id")) is int:
                number: int = section[f"{which}_token_id"]
                return number
        return _find(content_of(special.get(f"{which}_token")), tokens)


def _jinja(content: bytes) -> str:
    return content.decode("utf-8").rstrip()


def _named(template: Any) -> dict[str, str]:
    """Return a template, or a list of named ones, by name and without white space at their ends."""
    if isinstance(template, str):
        return {"default": template.rstrip()}
    return {
        str(entry["name"]): entry["template"].rstrip()
        for entry in (template if isinstance(template, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("template"), str) and "name" in entry
    }


def _ids(value: Any) -> frozenset[int]:
    return frozenset(item for item in (value if isinstance(value, list) else [value]) if type(item) is int)


def _find(token: str | None, tokens: Mapping[int, str]) -> int | None:
    return next((number for number, text in tokens.items() if text == token), None) if token is not None else None
