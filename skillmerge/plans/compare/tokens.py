"""Compares the tokenizers of a formula's models: whether added rows belong to the same tokens, and whether the models
split text, stop and format conversations alike."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.model_config import sections
from skillmerge.checkpoints.tokenizers.matching import SPELLINGS
from skillmerge.checkpoints.tokenizers.placeholders import is_placeholder
from skillmerge.checkpoints.tokenizers.small_files import SmallFiles
from skillmerge.checkpoints.tokenizers.tokenization import described
from skillmerge.checkpoints.tokenizers.tokenizer import Tokenizer, read_tokenizer, vocabulary_file
from skillmerge.checkpoints.tokenizers.vocabulary import added_tokens, content_of, json_table
from skillmerge.errors import InputError, visible
from skillmerge.methods.terms import minus_of, model_of
from skillmerge.plans.compare.found import Compared, Level
from skillmerge.plans.compare.roles import Role, Roles, row_count

NAMED = 8
"""How many tokens a message names."""

_REST = "its tokenizer is compared as far as other files say it"
_LONGEST = 40


@dataclass(frozen=True, slots=True)
class _Models:
    """The compared models, donor first. rows: number of rows of the merged token matrices; 0 if none are merged.
    without: how to take these out of the formula, for people, or None. carried: whether the output has a tokenizer.
    by_token: whether rows are matched by token, so that ids of different models mean nothing beside each other."""

    donor: str
    checkpoints: Mapping[str, Checkpoint]
    roles: Roles
    tokenizers: Mapping[str, Tokenizer]
    rows: int
    without: str | None
    carried: bool
    by_token: bool

    def role(self, name: str) -> Role:
        return self.roles.get(name, Role())

    @property
    def output(self) -> Tokenizer:
        """The tokenizer that the output has."""
        return self.tokenizers[self.donor]

    @property
    def added(self) -> list[str]:
        """The models besides the donor that the formula adds."""
        return [name for name in self.tokenizers if name != self.donor and self.role(name).added]

    def meaning(self, name: str, number: int | None) -> int | str | None:
        """Return what tells an id of a model from those of the others: its token, where rows are matched by token."""
        return self.tokenizers[name].tokens.get(number, number) if self.by_token and number is not None else number

    @property
    def merged(self) -> dict[str, Mapping[int, str]]:
        """The known tokens of each model whose embedding or head is merged."""
        return {
            name: it.tokens
            for name, it in self.tokenizers.items()
            if it.tokens and (name == self.donor or (self.role(name).tokens and model_of(name) == name))
        }


def compare_tokens(
    models: Mapping[str, Checkpoint],
    donor: str,
    roles: Roles,
    files: SmallFiles | None = None,
    *,
    carried: bool = True,
    lenient: bool = False,
    without: str | None = None,
    by_token: bool = False,
) -> list[Compared]:
    """Return the differences between the tokenizers of the models that the formula uses. The caller sets `accepted`.

    models: by the names that `roles` has. files: where other comparisons read small files too, the same. carried:
    whether the output takes the donor's files. without: what takes the matrices of tokens out of the formula, for
    people. by_token: whether rows are matched by token, and ids mean nothing. Raises InputError for a pointer in the
    place of a file that the output takes, unless lenient; StalePlan, TemporaryError.
    """
    files = files or SmallFiles()
    names = [donor, *(name for name in models if name != donor and roles.get(name, Role()).used)]
    differ = _vocabularies_differ([models[name] for name in names], files)
    known = _Models(
        donor,
        models,
        roles,
        {name: read_tokenizer(models[name], files, tokens=differ) for name in names},
        0 if by_token else _rows(models, donor, roles),
        without,
        carried,
        by_token,
    )
    for message, fix in known.output.pointers.items() if carried and not lenient else ():
        raise InputError(message, fix=fix)
    found = [*_unread(known), *_ids(known)]
    if not any(it.name == "tokenizer" and it.level == "problem" for it in found):
        found += _tokenization(known)
    told = [*_stops(known), *_templates(known)] if carried else []
    return [*found, *told, *_numbers(known)]


def _vocabularies_differ(checkpoints: Sequence[Checkpoint], files: SmallFiles) -> bool:
    """Return whether the vocabularies may differ. Files with the same digest need not be fetched."""
    digests = set()
    for checkpoint in checkpoints:
        listed = checkpoint.store.list()
        file = vocabulary_file(listed)
        stat = listed.get(file)
        # With any other file, the added tokens are in a file of their own.
        digests.add(stat.digest if stat is not None and file == "tokenizer.json" else None)
    return len(digests) > 1 or None in digests or len({_named(checkpoint, files) for checkpoint in checkpoints}) > 1


def _named(checkpoint: Checkpoint, files: SmallFiles) -> str:
    """Return the added and special tokens of tokenizer_config.json, as text to compare."""
    try:
        config = files.read(checkpoint.store, "tokenizer_config.json", json_table) or {}
        special = [content_of(config.get(f"{which}_token")) for which in ("eos", "pad", "bos")]
        return repr((sorted(added_tokens(config.get("added_tokens_decoder")).items()), special))
    except (InputError, ValueError):
        return ""  # read_tokenizer says what is wrong with it


def _rows(models: Mapping[str, Checkpoint], donor: str, roles: Roles) -> int:
    """Return the smallest number of rows of the token matrices that a model besides the donor contributes to."""
    counts = [
        row_count(tensor, models[model].tensors)
        for name, role in roles.items()
        if name != donor
        for tensor in role.tokens
        for model in (donor, name)
        if model in models and tensor in models[model].tensors
    ]
    return min((count for count in counts if count), default=0)


def _unread(known: _Models) -> Iterator[Compared]:
    for name, it in known.tokenizers.items():
        for message in it.unread if model_of(name) == name else ():
            if known.carried and name == known.donor and message in it.broken:
                said = f"the donor `{name}`: {message}; the output carries the file as it is"
                help = "fetch or save that file again; to carry it as it is, write `accept: [tokenizer]`"
                yield Compared("tokenizer", "files", it.file, "warning", {name: message}, False, said, help)
                continue
            if message in it.pointers and known.role(name).tokens:
                place = known.checkpoints[name].at.path("x")[:-1]
                said = f"model `{name}`: {message.removeprefix(place)}; {_REST}"
                values = {name: "a pointer"}
                yield Compared("tokenizer", "files", it.file, "warning", values, False, said, it.pointers[message])
                continue
            said = f"model `{name}`: {message}; {_REST}"
            yield Compared(None, "tokenizer", it.file, "note", {name: message}, False, said)
    if any(it.file for it in known.tokenizers.values()):
        for name, it in known.tokenizers.items():
            skill = model_of(name) != name or minus_of(name) in known.checkpoints
            if not it.file and not skill and known.role(name).tokens:
                said = f"model `{name}` has no tokenizer files: its ids are taken to be those of the other models"
                yield Compared(None, "tokenizer", "tokenizer.json", "note", {name: "none"}, False, said)


# Ids and their tokens.


def _ids(known: _Models) -> Iterator[Compared]:
    merged = known.merged
    base = next(iter(merged.values()), {})
    differing = {
        number
        for tokens in merged.values()
        if tokens is not base
        for number, text in tokens.items()
        if base.get(number) != text and number < known.rows
    }
    clashing, free = [], []
    for number in sorted(differing):
        texts = {tokens[number] for tokens in merged.values() if number in tokens}
        texts = {SPELLINGS.get(text, text) for text in texts}
        if len({text for text in texts if not is_placeholder(text)}) > 1:
            clashing.append(number)
        elif len(texts) > 1:
            free.append(number)
    if clashing:
        yield _clash(known, clashing)
    if free:
        yield _placeholders(known, free)
    if len(merged) > 1 and known.rows:
        yield from _unnamed(known, {*clashing, *free})


def _clash(known: _Models, ids: Sequence[int]) -> Compared:
    merged = known.merged
    count = f"{len(ids):,} ids mean" if len(ids) > 1 else "an id means"
    named = _with_ids(merged, ids)
    return Compared(
        "tokenizer",
        "tokens",
        known.output.file,
        "problem",
        {name: _listed(tokens, ids) for name, tokens in merged.items()},
        False,
        f"{count} different tokens in models whose embedding or head is merged: {named}",
        known.without,
    )


def _with_ids(merged: Mapping[str, Mapping[int, str]], ids: Sequence[int]) -> str:
    """Describe the first tokens at these ids, each with its id in every model."""
    texts: dict[str, None] = {}  # an ordered set
    for number in ids:
        texts |= dict.fromkeys(tokens[number] for tokens in merged.values() if number in tokens)
        if len(texts) >= NAMED:
            break
    wanted = list(texts)[:NAMED]
    where: dict[str, dict[str, int]] = {text: {} for text in wanted}
    for name, tokens in merged.items():
        for number, text in tokens.items():
            if text in where:
                where[text].setdefault(name, number)
    said = []
    for text, places in where.items():
        by_id: dict[int, list[str]] = {}
        for name, number in places.items():
            by_id.setdefault(number, []).append(f"`{name}`")
        at = ", ".join(f"{number} in {' and '.join(names)}" for number, names in by_id.items())
        said.append(f"`{_shown(text)}` is {at}{' only' if len(places) == 1 else ''}")
    more = len(ids) > len(wanted)
    return "; ".join(said) + ("; …" if more else "")


def _placeholders(known: _Models, ids: Sequence[int]) -> Compared:
    """Return the finding about ids that are unused in some models and used in others."""
    merged = known.merged
    plus = [tokens for name, tokens in merged.items() if name in known.added]
    minus = [tokens for name, tokens in merged.items() if known.role(name).subtracted]
    disagreeing = [
        number
        for number in ids
        if any(number in a and number in b and a[number] != b[number] for a in plus for b in minus)
    ]
    level: Level = "warning" if disagreeing else "note"
    shown = disagreeing or ids
    count = f"{len(shown):,} ids are" if len(shown) > 1 else "an id is"
    message = f"{count} kept free in some models and used in others: {_with_ids(merged, shown)}"
    if disagreeing:
        message += "; the difference has rows of trained tokens minus rows of unused ones"
    values = {name: _listed(tokens, shown) for name, tokens in merged.items()}
    advice = "; ".join([*filter(None, [known.without]), "if the difference is meant, write `accept: [tokenizer]`"])
    name, help = ("tokenizer", advice) if disagreeing else (None, None)
    return Compared(name, "placeholders", known.output.file, level, values, False, message, help)


def _unnamed(known: _Models, told: set[int]) -> Iterator[Compared]:
    """Yield a note on tokens that some models lack, except reported ones. Rows without a token are mostly padding."""
    merged = known.merged
    first = next(iter(merged.values()))
    everywhere, anywhere = set(first), set(first)
    for tokens in merged.values():
        if tokens is not first:
            everywhere &= tokens.keys()
            anywhere |= tokens.keys()
    some = sorted(number for number in anywhere - everywhere - told if number < known.rows)
    if some:
        count = f"{len(some):,} tokens are" if len(some) > 1 else "a token is"
        yield Compared(
            None, "tokens", known.output.file, "note",
            {name: _listed(tokens, some) for name, tokens in merged.items()}, False,
            f"{count} not in every model, and the rows follow the formula: {_with_ids(merged, some)}",
        )  # fmt: skip


# How text is split, where answers stop, how conversations are formatted.


def _tokenization(known: _Models) -> Iterator[Compared]:
    parts = {part for it in known.tokenizers.values() for part in it.tokenization}
    for part in sorted(parts):
        said = {name: it.tokenization[part] for name, it in known.tokenizers.items() if part in it.tokenization}
        reference = said.get(known.donor, next(iter(said.values())))
        others = [name for name, texts in said.items() if texts != reference]
        if not others:
            continue
        merged = any(known.role(name).tokens for name in others)
        yield Compared(
            "tokenization" if merged else None,
            part,
            known.output.file,
            "warning" if merged else "note",
            {name: _cut_off(" ".join(visible(text).split())) for name, text in described(part, said).items()},
            False,
            f"{' and '.join(f'`{it}`' for it in others)} cut{'s' if len(others) == 1 else ''} text in another way than "
            f"`{known.donor}`"
            + (", whose tokenizer the output has" if known.carried else "")
            + f": {'other' if part.endswith('s') else 'another'} {part}",
            "if that is meant, write `accept: [tokenization]`" if merged else None,
        )


def _stops(known: _Models) -> Iterator[Compared]:
    for name in known.added:
        it = known.tokenizers[name]
        ours = {known.meaning(known.donor, number) for number in known.output.stop}
        lacking = sorted(number for number in it.stop if known.meaning(name, number) not in ours)
        if not lacking:
            continue
        less = len(it.tokens) < len(known.output.tokens) and not known.by_token
        texts = {**known.output.tokens, **it.tokens} if less else it.tokens
        tokens = [f"{number} (`{_shown(texts[number])}`)" if number in texts else str(number) for number in lacking]
        yield Compared(
            "stop-tokens",
            "eos_token_id",
            it.stop_file,
            "warning",
            {model: _stop_ids(known.tokenizers[model]) for model in (known.donor, name)},
            False,
            f"`{name}` stops at {', '.join(tokens)}, and the output, which has the stop tokens of `{known.donor}`, "
            "does not: it may go on where an answer ends",
            f"add {'its' if known.by_token else 'the'} id to `eos_token_id` in the generation_config.json of "
            f"`{known.donor}`, or write `accept: [stop-tokens]`",
        )


def _templates(known: _Models) -> Iterator[Compared]:
    ours = known.output.templates
    for name in known.added:
        theirs, file = known.tokenizers[name].templates, known.tokenizers[name].template_file
        differing = any(key in ours and ours[key] != text for key, text in theirs.items())
        differing = differing or ("default" in theirs and ours.get("default") != theirs["default"])
        if not theirs or (ours and not differing):
            continue
        message = (
            f"`{name}` has another chat template than `{known.donor}`; the output has that of `{known.donor}`"
            if ours
            else f"`{name}` has a chat template and `{known.donor}` has none; the output has none"
        )
        yield Compared(
            "chat-template",
            "chat_template",
            file,
            "warning",
            {model: _template(known.tokenizers[model]) for model in (known.donor, name)},
            False,
            message,
            f"to take the side files of `{name}`, write `output.like: {name}`; to keep those of `{known.donor}`, "
            "`accept: [chat-template]`",
        )


def _numbers(known: _Models) -> Iterator[Compared]:
    """Yield notes: padding and beginning ids, and the vocabulary's size."""
    its = known.tokenizers.items()
    for key, what, values in (
        ("pad_token_id", "padding", {name: known.meaning(name, it.pad) for name, it in its}),
        ("bos_token_id", "the beginning of a text", {name: known.meaning(name, it.bos) for name, it in its}),
        ("vocab_size", "the size of the vocabulary", {name: _size(known.checkpoints[name]) for name, _ in its}),
    ):
        if len({*values.values()} - {None}) > 1:
            said = {name: _shown(str(value)) for name, value in values.items() if value is not None}
            listed = ", ".join(f"{value} in `{name}`" for name, value in said.items())
            listed += f"; the output has that of `{known.donor}`" if known.carried else ""
            yield Compared(None, key, "config.json", "note", said, False, f"{what} differs: {listed}")


def _size(checkpoint: Checkpoint) -> int | None:
    sizes = (section.get("vocab_size") for _, section in sections(checkpoint.config))
    return next((size for size in sizes if type(size) is int), None)


def _stop_ids(it: Tokenizer) -> str:
    return ", ".join(map(str, sorted(it.stop))) or "none"


def _template(it: Tokenizer) -> str:
    if not it.templates:
        return "none"
    return f"{sum(map(len, it.templates.values())):,} characters in {it.template_file}"


def _listed(tokens: Mapping[int, str], ids: Sequence[int]) -> str:
    shown = ", ".join(f"{number} {_shown(tokens[number])}" for number in ids[:NAMED] if number in tokens)
    return (shown or "-") + (", …" if len(ids) > NAMED else "")


def _shown(token: str) -> str:
    """Return a token as text that fits on one line of a terminal."""
    return _cut_off(visible(json.dumps(token, ensure_ascii=False)[1:-1]), _LONGEST)


def _cut_off(text: str, longest: int = 2 * _LONGEST) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
