"""Compares the configurations of a formula's models, and the donor's with its own weights.

The output is computed as the donor's configuration says; what another model was trained for is compared with that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.methods.terms import minus_of, model_of
from skillmerge.naming import layer_of, module_kind
from skillmerge.plans.compare.config_values import (
    architecture,
    effective,
    is_part,
    layers,
    other_parts,
    text_kind,
    text_part,
)
from skillmerge.plans.compare.found import Compared, Level
from skillmerge.plans.compare.roles import Roles, heads
from skillmerge.plans.compare.table import IGNORED, ROWS, Row
from skillmerge.tensors import DTYPES

FILE = "config.json"
_Meaning = tuple[Level, str]

_OWN = "{names} {has} a head of {its} own, the donor {donor} "
_TIED = "{names} {ties} {its} head to the embedding"
_NOWHERE = ": what the head learned has no place in the output"
_USED = "stores one but ties it to the embedding: runtimes use the embedding, and what the head learned is lost"
_SPARE = " and {stores} one all the same, which is read as the head that the donor {donor} has: runtimes may use the "
_LOST: _Meaning = ("problem", _OWN + _USED)
_NO_PLACE: _Meaning = ("problem", _OWN + "ties its head to the embedding" + _NOWHERE)
_NO_HEAD: _Meaning = ("problem", _OWN + "has none" + _NOWHERE)
_STORED: _Meaning = ("warning", _TIED + _SPARE + "embedding in its place")
_READ: _Meaning = ("warning", _TIED + ", which is read as the head that the donor {donor} has")
_ONE = {"has": "has", "its": "its", "ties": "ties", "stores": "stores"}
_MANY = {"has": "have", "its": "their", "ties": "tie", "stores": "store"}

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
_EXTRA = {"mllama": 8, "moshi": 1}
"""Extra rows after the vocabulary, for image tokens and the start token, by architecture."""


def compare_config(
    models: Mapping[str, Checkpoint],
    donor: str,
    roles: Roles,
    dtype: str | None,
    *,
    foreign: bool = False,
    written: Mapping[str, str] | None = None,
    others: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Compared]:
    """Return how the configurations of the formula's models differ from the donor's.

    A model without a configuration, such as a stored skill, is not compared. dtype: of the output, or None for a skill,
    which gets no configuration. foreign: also compare different architectures, in which nearly everything differs.
    written: the recipe's line for each model. others: configurations to compare in place of models' own.
    """
    configs = {name: (others or {}).get(name, models[name].config) for name in _compared(models, donor, roles)}
    found = [] if dtype is None else [*_donor(models[donor], donor, dtype)]
    if configs.get(donor):
        found += _without(models, donor, roles)
        found += _architectures(models, configs, donor, written or {})
        if foreign or not any(one.name == "architecture" for one in found):
            found += _parts(configs, donor)
        found += _ties({name: models[name] for name in configs}, donor, roles)
    return found


def _compared(models: Mapping[str, Checkpoint], donor: str, roles: Roles) -> list[str]:
    used = [name for name, role in roles.items() if role.used and name != donor and model_of(name) == name]
    return [donor, *(name for name in used if models[name].config)]


def _without(models: Mapping[str, Checkpoint], donor: str, roles: Roles) -> Iterator[Compared]:
    for name, role in roles.items():
        skill = model_of(name) != name or minus_of(name) in models
        if role.used and name != donor and not skill and not models[name].config:
            said = f"model `{name}` has no config.json: its configuration is not compared"
            yield Compared(None, FILE, FILE, "note", {name: "none"}, False, said)


def _architectures(
    models: Mapping[str, Checkpoint],
    configs: Mapping[str, Mapping[str, Any]],
    donor: str,
    written: Mapping[str, str],
) -> Iterator[Compared]:
    kinds = {name: architecture(config) for name, config in configs.items()}
    depths = {name: layers(text_part(config)) for name, config in configs.items()}
    values = {name: _kind(kinds[name], depths[name]) for name in configs}
    other_kind = [name for name in configs if None not in (kinds[name], kinds[donor]) and kinds[name] != kinds[donor]]
    other_depth = [
        name for name in configs if None not in (depths[name], depths[donor]) and depths[name] != depths[donor]
    ]
    others = [name for name in configs if name in (*other_kind, *other_depth)]
    if others:
        told = " and ".join(f"`{name}` is {values[name]}" for name in others)
        which = "is it the right model" if len(others) == 1 else "are they the right models"
        message = f"{told}, the donor `{donor}` {values[donor]}: {which}?"
        key = "model_type" if other_kind else "num_hidden_layers"
        wrong = dict(_others_config(models, depths))
        advice = "\n".join([*wrong.values(), *(_path(name, written) for name in wrong or others)])
        yield Compared("architecture", key, FILE, "problem", values, False, message, advice)
    types = {name: str(config.get("model_type")) for name, config in configs.items()}
    wrapped = [name for name in configs if name not in others and types[name] != types[donor]]
    if wrapped:
        told = " and ".join(f"`{name}` ({types[name]})" for name in wrapped)
        message = f"{told} and the donor `{donor}` ({types[donor]}) hold the same language model"
        yield Compared(None, "model_type", FILE, "note", types, False, message)


def _path(name: str, written: Mapping[str, str]) -> str:
    return f"check the path of `{name}`" + (f": {written[name]}" if name in written else "")


def _others_config(models: Mapping[str, Checkpoint], depths: Mapping[str, int | None]) -> Iterator[tuple[str, str]]:
    """Yield models that have fewer layers than their own config says, and as many as another model."""
    for name, depth in depths.items():
        stacks = {layer for layer in map(layer_of, models[name].tensors) if layer is not None}
        held = max((index for _, index in stacks), default=-1) + 1
        if depth is not None and held < depth and held in depths.values() and len({stack for stack, _ in stacks}) == 1:
            yield name, f"the weights of `{name}` have {held} layers: its config.json is of another model"


def _kind(kind: str | None, depth: int | None) -> str:
    return (kind or "unnamed") + (f" with {depth} layers" if depth is not None else "")


def compare_texts(configs: Mapping[str, Mapping[str, Any]], donor: str) -> Iterator[Compared]:
    """Yield the differences of the language models."""
    texts = {name: text_part(config) for name, config in configs.items()}
    yield from _rows(texts, donor, "", {name: text_kind(config) for name, config in configs.items()})


def _parts(configs: Mapping[str, Mapping[str, Any]], donor: str) -> Iterator[Compared]:
    """Yield the differences of the language models, then those of the other parts."""
    yield from compare_texts(configs, donor)
    texts = {name: text_part(config) for name, config in configs.items()}
    others = {name: dict(other_parts(text)) for name, text in texts.items()}
    for key in others[donor]:
        having = {name: parts[key] for name, parts in others.items() if key in parts}
        kinds = {name: part.get("model_type") for name, part in having.items()}
        yield from _rows(having, donor, f"{key}: ", kinds)


def _rows(
    parts: Mapping[str, Mapping[str, Any]], donor: str, prefix: str, kinds: Mapping[str, str | None]
) -> Iterator[Compared]:
    values = {name: effective(part, kinds[name]) for name, part in parts.items()}
    for row in ROWS:
        having = {name: found[row.what] for name, found in values.items() if row.what in found}
        if donor in having and any(value != having[donor] for value in having.values()):
            yield _difference(row, prefix, having, donor)
        elif len(having) < len(parts) and row.level != "note" and any(_says(value, row) for value in having.values()):
            silent = [f"`{name}`" for name in parts if name not in having]
            told = f"{' and '.join(silent)} {'does' if len(silent) == 1 else 'do'} not say it"
            message = f"{row.what}: {told}, and what that means is not known"
            yield Compared(None, prefix + row.what, FILE, "note", _shown(having), False, message)
    known = {key for row in ROWS for key in row.keys}
    for key in sorted(set.intersection(*(set(part) for part in parts.values()))):
        found = {name: part[key] for name, part in parts.items()}
        looked_at = key in known or is_part(key, found[donor]) or IGNORED.search(key) is not None
        if not looked_at and None not in found.values() and any(it != found[donor] for it in found.values()):
            message = f"`{key}` differs, which skillmerge does not know the meaning of: the donor's is used"
            shown = {name: _json(it) if isinstance(it, list | dict) else _text(it) for name, it in found.items()}
            yield Compared(None, prefix + key, FILE, "note", shown, False, message)


def _says(value: Any, row: Row) -> bool:
    """Return whether a value differs from what a missing key usually means."""
    return value != row.default and value not in (None, False, ())


def _difference(row: Row, prefix: str, having: Mapping[str, Any], donor: str) -> Compared:
    other = [name for name, value in having.items() if value != having[donor]]
    level: Level = row.level
    shown = _shown(having)
    alone = len(other) == len(having) - 1 and len({repr(having[name]) for name in other}) == 1
    if row.name == "rope-scaling" and alone and len(other) > 1 and having[donor] is not None:
        level = "note"  # the usual way to serve long inputs: the donor alone has it
    told = " and ".join(f"`{name}` has {shown[name]}" for name in other)
    message = f"{prefix}{row.what}: {told}, the donor `{donor}` {shown[donor]}: {row.follows}"
    return Compared(row.name if level != "note" else None, prefix + row.what, FILE, level, shown, False, message)


def _shown(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: _text(value) for name, value in values.items()}


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:99]}…"


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], int) and isinstance(value[1], tuple):
        return f"{value[0]} in {len(value[1])} layers"
    if isinstance(value, tuple):
        text = ", ".join(" ".join(map(_text, item)) if isinstance(item, tuple) else _text(item) for item in value)
        return text if len(text) <= 100 else f"{text[:99]}…"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _ties(models: Mapping[str, Checkpoint], donor: str, roles: Roles) -> Iterator[Compared]:
    """Yield a finding for each consequence of heads that only some models tie to the embedding."""
    tied = {name: _is_tied(model.config) for name, model in models.items()}
    stored = {name: heads(model.tensors.values(), model.config) for name, model in models.items()}
    scores, headed = stored[donor], {name: bool(found) for name, found in stored.items()}
    found: dict[_Meaning, list[str]] = {}
    for name in models:
        if name == donor:
            continue
        # If the donor stores a head, heads that the formula does not use are no loss.
        if any(token in scores or not headed[donor] for token in roles[name].tokens):
            meaning = _meaning(tied[donor], headed[donor], tied[name], headed[name])
            if meaning is not None:
                found.setdefault(meaning, []).append(name)
    values = {name: _tie(tied[name], headed[name]) for name in models}
    for (level, text), others in found.items():
        names = " and ".join(f"`{name}`" for name in others)
        message = text.format(names=names, donor=f"`{donor}`", **(_ONE if len(others) == 1 else _MANY))
        accept = "ties" if level != "note" else None
        yield Compared(accept, "tie_word_embeddings", FILE, level, values, False, message)


def _meaning(donor_tied: bool | None, donor_head: bool, tied: bool | None, head: bool) -> _Meaning | None:
    """Return the consequence of how a model and the donor tie and store their heads; None if there is none."""
    if head and donor_head:
        return _LOST if donor_tied and tied is False else _STORED if tied and donor_tied is False else None
    if head and not tied:
        level, text = _NO_HEAD if donor_tied is False else _NO_PLACE
        return (level if tied is False else "note"), text
    return _READ if donor_head and tied and not donor_tied else None


def spare_heads(found: Compared) -> list[str]:
    """Return the models that tie and store a head that is read as the donor's; [] for any other finding."""
    names, ties, rest = found.message.partition(" tie")
    is_spare = found.key == "tie_word_embeddings" and ties and "all the same, which is read" in rest
    return [name for name in found.values if f"`{name}`" in names] if is_spare else []


def _is_tied(config: Mapping[str, Any]) -> bool | None:
    return next(
        (part["tie_word_embeddings"] for part in (text_part(config), config) if "tie_word_embeddings" in part), None
    )


def _tie(tied: bool | None, head: bool) -> str:
    return ("tied" if tied else "not tied" if tied is False else "not said") + (", has a head" if head else ", no head")


def _donor(donor: Checkpoint, name: str, dtype: str) -> Iterator[Compared]:
    """Yield warnings about how runtimes treat weights that disagree with their own configuration."""
    text = text_part(donor.config)
    stated = next(
        (part[key] for part in (donor.config, text) for key in ("dtype", "torch_dtype") if part.get(key)), None
    )
    large = (spec for spec in donor.tensors.values() if len(spec.shape) > 1 and DTYPES[spec.dtype].is_float)
    matrices = {donor.written_dtype(spec.name) for spec in large}
    if dtype == "same" and matrices and _DTYPES.get(str(stated), "") not in {"", *matrices}:
        held = ", ".join(sorted(matrices))
        yield Compared(
            "dtype-config", "dtype", FILE, "warning", {name: f"{stated}, weights {held}"}, False,
            f"the donor `{name}` says {stated} in config.json, and its matrices are {held}: runtimes convert them",
            "set `output.dtype` to what config.json says, or correct config.json",
        )  # fmt: skip
    rows = [it.shape[0] for name, it in donor.tensors.items() if name.endswith("embed_tokens.weight") and it.shape]
    size = text.get("vocab_size")
    extra = next((rows for kind, rows in _EXTRA.items() if str(text.get("model_type")).startswith(kind)), 0)
    if type(size) is int and len(rows) == 1 and rows[0] > size + extra:
        yield Compared(
            "dtype-config", "vocab_size", FILE, "warning", {name: f"{size:,}, rows {rows[0]:,}"}, False,
            f"the donor `{name}` says vocab_size {size:,}, its embedding has {rows[0]:,} rows: some runtimes refuse it",
            f"set vocab_size to {rows[0]:,} in the donor's config.json",
        )  # fmt: skip
    classes = donor.config.get("architectures")
    causal = isinstance(classes, list) and any(str(each).endswith("ForCausalLM") for each in classes)
    if (
        causal
        and _is_tied(donor.config) is False
        and not any(module_kind(each) == "head" for each in donor.tensors)
        and not heads(donor.tensors.values(), donor.config)
    ):
        yield Compared(
            "ties", "tie_word_embeddings", FILE, "warning", {name: "not tied, no head"}, False,
            f"the donor `{name}` has no head, and config.json does not tie it: runtimes start with a random one",
            "set `tie_word_embeddings` to true in the donor's config.json, or add its head",
        )  # fmt: skip
