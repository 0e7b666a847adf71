"""Compares the configurations of a formula's models, and the donor's with its own weights.

The output is computed as the donor's configuration says; what another model was trained for is compared with that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.methods.terms import model_of
from skillmerge.naming import module_kind
from skillmerge.plans.compare.config_values import architecture, effective, layers, other_parts, text_kind, text_part
from skillmerge.plans.compare.found import Compared, Level
from skillmerge.plans.compare.roles import Roles
from skillmerge.plans.compare.table import IGNORED, ROWS, Row
from skillmerge.tensors import DTYPES

FILE = "config.json"
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}


def compare_config(
    models: Mapping[str, Checkpoint], donor: str, roles: Roles, dtype: str | None, *, foreign: bool = False
) -> list[Compared]:
    """Return how the configurations of the models that a formula uses differ from the donor's, which is first.

    A model without a configuration, as a stored skill is, is not compared. dtype: of the output, or None for a skill,
    which gets no configuration. foreign: two architectures, of which nearly everything differs, are compared too.
    """
    configs = {name: models[name].config for name in _compared(models, donor, roles)}
    found = [] if dtype is None else [*_donor(models[donor], donor, dtype)]
    if configs.get(donor):
        found += _architectures(configs, donor)
        if foreign or not any(one.name == "architecture" for one in found):
            found += _parts(configs, donor, roles)
        found += _ties({name: models[name] for name in configs}, donor, roles)
    return found


def _compared(models: Mapping[str, Checkpoint], donor: str, roles: Roles) -> list[str]:
    used = [name for name, role in roles.items() if role.used and name != donor and model_of(name) == name]
    return [donor, *(name for name in used if models[name].config)]


def _architectures(configs: Mapping[str, Mapping[str, Any]], donor: str) -> Iterator[Compared]:
    kinds = {name: architecture(config) for name, config in configs.items()}
    depths = {name: layers(text_part(config)) for name, config in configs.items()}
    values = {name: _kind(kinds[name], depths[name]) for name in configs}
    for name in configs:
        if name == donor:
            continue
        other_kind = None not in (kinds[name], kinds[donor]) and kinds[name] != kinds[donor]
        other_depth = None not in (depths[name], depths[donor]) and depths[name] != depths[donor]
        if other_kind or other_depth:
            pair = {donor: values[donor], name: values[name]}
            message = f"`{name}` is {values[name]}, the donor `{donor}` {values[donor]}: is it the right model?"
            key = "model_type" if other_kind else "num_hidden_layers"
            yield Compared("architecture", key, FILE, "problem", pair, False, message)
        elif configs[name].get("model_type") != configs[donor].get("model_type"):
            pair = {each: str(configs[each].get("model_type")) for each in (donor, name)}
            message = f"`{name}` ({pair[name]}) and the donor `{donor}` ({pair[donor]}) hold the same language model"
            yield Compared(None, "model_type", FILE, "note", pair, False, message)


def _kind(kind: str | None, depth: int | None) -> str:
    return (kind or "unnamed") + (f" with {depth} layers" if depth is not None else "")


def _parts(configs: Mapping[str, Mapping[str, Any]], donor: str, roles: Roles) -> Iterator[Compared]:
    """The differences of the language models, then of what the models hold beside them."""
    texts = {name: text_part(config) for name, config in configs.items()}
    yield from _rows(texts, donor, roles, "", {name: text_kind(config) for name, config in configs.items()})
    others = {name: dict(other_parts(text)) for name, text in texts.items()}
    for key in others[donor]:
        having = {name: parts[key] for name, parts in others.items() if key in parts}
        kinds = {name: part.get("model_type") for name, part in having.items()}
        yield from _rows(having, donor, roles, f"{key}: ", kinds)


def _rows(
    parts: Mapping[str, Mapping[str, Any]], donor: str, roles: Roles, prefix: str, kinds: Mapping[str, str | None]
) -> Iterator[Compared]:
    values = {name: effective(part, kinds[name]) for name, part in parts.items()}
    for row in ROWS:
        having = {name: found[row.what] for name, found in values.items() if row.what in found}
        if donor in having and any(value != having[donor] for value in having.values()):
            yield _difference(row, prefix, having, donor, roles)
        elif len(having) < len(parts) and row.level != "note" and any(_says(value, row) for value in having.values()):
            silent = ", ".join(f"`{name}`" for name in parts if name not in having)
            message = f"{row.what}: {silent} does not say it, and what that means is not known"
            yield Compared(None, prefix + row.what, FILE, "note", _shown(having), False, message)
    known = {key for row in ROWS for key in row.keys}
    for key in sorted(set.intersection(*(set(part) for part in parts.values()))):
        found = {name: part[key] for name, part in parts.items()}
        plain = all(isinstance(value, int | float | str | bool) for value in found.values())
        if plain and key not in known and not IGNORED.search(key) and len({*found.values()}) > 1:
            message = f"`{key}` differs, which skillmerge does not know the meaning of: the donor's is used"
            yield Compared(None, prefix + key, FILE, "note", _shown(found), False, message)


def _says(value: Any, row: Row) -> bool:
    """Whether a value is another than what the lack of a key mostly means."""
    return value != row.default and value not in (None, False, ())


def _difference(row: Row, prefix: str, having: Mapping[str, Any], donor: str, roles: Roles) -> Compared:
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
    """Heads that are tied to the embedding in only some models."""
    tied = {name: _is_tied(model.config) for name, model in models.items()}
    heads = {name: _heads(model) for name, model in models.items()}
    for name in models:
        if name == donor or not roles[name].tokens:
            continue
        values = {each: _tie(tied[each], heads[each]) for each in (donor, name)}
        if heads[name] and heads[donor] and tied[donor] and tied[name] is False:
            message = (
                f"`{name}` has a head of its own, the donor `{donor}` stores one but ties it to the embedding: "
                "runtimes use the embedding, and what the head learned is lost"
            )
            yield Compared("ties", "tie_word_embeddings", FILE, "problem", values, False, message)
        elif heads[name] and not heads[donor] and not tied[name]:
            level: Level = "problem" if tied[name] is False else "note"
            message = (
                f"`{name}` has a head of its own, the donor `{donor}` ties its head to the embedding: "
                "what the head learned has no place in the output"
            )
            accept = "ties" if level == "problem" else None
            yield Compared(accept, "tie_word_embeddings", FILE, level, values, False, message)
        elif heads[donor] and not heads[name] and tied[name] and not tied[donor]:
            message = f"`{name}` ties its head to the embedding, which is read as the head that the donor `{donor}` has"
            yield Compared("ties", "tie_word_embeddings", FILE, "warning", values, False, message)


def _is_tied(config: Mapping[str, Any]) -> bool | None:
    return next(
        (part["tie_word_embeddings"] for part in (text_part(config), config) if "tie_word_embeddings" in part), None
    )


def _heads(model: Checkpoint) -> list[str]:
    return [name for name in model.tensors if name.endswith(("lm_head.weight", "embed_out.weight"))]


def _tie(tied: bool | None, heads: Sequence[str]) -> str:
    return ("tied" if tied else "not tied" if tied is False else "not said") + (
        ", has a head" if heads else ", no head"
    )


def _donor(donor: Checkpoint, name: str, dtype: str) -> Iterator[Compared]:
    """What a runtime will make of weights that do not agree with their own configuration."""
    text = text_part(donor.config)
    stated = next(
        (part[key] for part in (donor.config, text) for key in ("dtype", "torch_dtype") if part.get(key)), None
    )
    matrices = {spec.dtype for spec in donor.tensors.values() if len(spec.shape) > 1 and DTYPES[spec.dtype].is_float}
    if dtype == "same" and matrices and _DTYPES.get(str(stated), "") not in {"", *matrices}:
        held = ", ".join(sorted(matrices))
        yield Compared(
            "dtype-config", "dtype", FILE, "warning", {name: f"{stated}, weights {held}"}, False,
            f"the donor `{name}` says {stated} in config.json, and its matrices are {held}: runtimes convert them",
            "set `output.dtype` to what config.json says, or correct config.json",
        )  # fmt: skip
    rows = [spec.shape[0] for each, spec in donor.tensors.items() if each.endswith("embed_tokens.weight")]
    size = text.get("vocab_size")
    extra = 8 if str(text.get("model_type")).startswith("mllama") else 0  # its tokens of images have rows of their own
    if type(size) is int and len(rows) == 1 and rows[0] > size + extra:
        yield Compared(
            "dtype-config", "vocab_size", FILE, "warning", {name: f"{size:,}, rows {rows[0]:,}"}, False,
            f"the donor `{name}` says vocab_size {size:,}, its embedding has {rows[0]:,} rows: some runtimes refuse it",
            f"set vocab_size to {rows[0]:,} in the donor's config.json",
        )  # fmt: skip
    classes = donor.config.get("architectures")
    causal = isinstance(classes, list) and any(str(each).endswith("ForCausalLM") for each in classes)
    if causal and _is_tied(donor.config) is False and not any(module_kind(each) == "head" for each in donor.tensors):
        yield Compared(
            "ties", "tie_word_embeddings", FILE, "warning", {name: "not tied, no head"}, False,
            f"the donor `{name}` has no head, and config.json does not tie it: runtimes start with a random one",
            "set `tie_word_embeddings` to true in the donor's config.json, or add its head",
        )  # fmt: skip
