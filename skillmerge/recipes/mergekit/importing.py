"""The verb import: a configuration of mergekit, written as a recipe."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skillmerge.brief import brief, drawn
from skillmerge.checkpoints.model_config import layers_in
from skillmerge.checkpoints.safetensors import read_header
from skillmerge.durable import disk_errors
from skillmerge.errors import InputError, UsageError, did_you_mean, some
from skillmerge.naming import layer_of
from skillmerge.recipes import yamltext
from skillmerge.recipes.foreign.documents import is_mergekit
from skillmerge.recipes.formula.donor import donor_of
from skillmerge.recipes.formula.parser import parse
from skillmerge.recipes.formula.tree import ExpressionError, names_in
from skillmerge.recipes.mergekit.config import Config, Surroundings, place_of, read, stage_place
from skillmerge.recipes.mergekit.methods import expression, passed_through
from skillmerge.recipes.mergekit.notes import Notes, Refused
from skillmerge.recipes.mergekit.output import dtype_of
from skillmerge.recipes.mergekit.settings import Choice, Varying
from skillmerge.recipes.mergekit.settings import Rule as Written
from skillmerge.recipes.mergekit.stacks import Stacks, behind_layers, stacked, stacks_of
from skillmerge.recipes.mergekit.translation import Translation
from skillmerge.recipes.mergekit.vocabulary import tokens_of
from skillmerge.recipes.mergekit.writing import Draft, moved, names_of, text_of
from skillmerge.recipes.schedules import Rule, matcher, parse_numbers
from skillmerge.recipes.schema import read_table
from skillmerge.recipes.source import STANDARD_INPUT
from skillmerge.recipes.source import text_of as source_text
from skillmerge.recipes.tables.recipe import RecipeTable
from skillmerge.recipes.yamltext import Document
from skillmerge.remarks import Remark


@dataclass(frozen=True, slots=True)
class Imported:
    """A recipe that was written from a mergekit file. output: where it was written, or None. text: the recipe.

    ok: False if warnings were to fail; nothing is written then.
    """

    file: str
    method: str
    output: Path | None
    text: str
    remarks: tuple[Remark, ...]
    ok: bool = True

    __repr__ = brief
    _repr_html_ = drawn

    @property
    def warnings(self) -> list[Remark]:
        """What can make the output differ from mergekit's."""
        return [remark for remark in self.remarks if remark.level == "warning"]

    def as_dict(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "method": self.method,
            "output": str(self.output) if self.output is not None else None,
            "warnings": [remark.message for remark in self.warnings],
            "notes": [remark.message for remark in self.remarks if remark.level == "note"],
            "recipe": self.text,
        }


def import_recipe(
    file: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    document: str | None = None,
    layers: int | None = None,
    strict: bool = False,
    overwrite: bool = False,
) -> Imported:
    """Translate a mergekit configuration into a recipe, and write it to `output` if that is given.

    document: which of several documents in the file, by its `name` or its number from 1. layers: how many the models
    have; by default their config.json says it, if they are folders. strict: write nothing if there are warnings.
    overwrite: replace a file that is there.
    Raises RecipeError for what no recipe says, with its place and what to do; UsageError if `output` exists.
    """
    target = None if output is None or os.fspath(output) == STANDARD_INPUT else Path(output)
    if target is not None and target.exists() and not overwrite:
        raise UsageError(
            f"`{output}` already exists", fix="pass `--overwrite` to replace it, or choose another file with `--output`"
        )
    if target is not None and not target.absolute().parent.is_dir():
        raise UsageError(f"`{target.parent}` is not a folder", fix="create it first")
    made = translated(file, target, document, layers)
    if strict and made.warnings:
        return Imported(made.file, made.method, None, made.text, made.remarks, ok=False)
    if target is not None:
        with disk_errors(target):
            target.write_text(made.text, encoding="utf-8")
    return made


def translated(
    file: str | os.PathLike[str], target: Path | None = None, chosen: str | None = None, layers: int | None = None
) -> Imported:
    """Return the recipe for a mergekit file; relative paths in it start from the folder of `target`.

    Raises RecipeError, UsageError for a file that is a recipe already.
    """
    name = os.fspath(file)
    documents = yamltext.read_old(source_text(name, "name a mergekit file"), name)
    document = _chosen(documents, name, chosen)
    if not is_mergekit(document.data) or "skillmerge" in document.data:
        read_table(yamltext.read(document.text, name), RecipeTable)  # reports what is wrong
        raise UsageError(f"`{name}` is a recipe already", fix="copy it, or name a mergekit file")
    home = Path() if name == STANDARD_INPUT else Path(name).parent
    start = os.path.relpath(home, target.absolute().parent) if target is not None else "."
    stages = [stage for each in documents if (stage := _name_of(each)) and each is not document]
    notes = Notes(document)
    try:
        depths = _depths(document.data, home)
        around = Surroundings(home, stages, layers or next(iter(depths.values()), None), {} if layers else depths)
        draft, config = _draft(document, around, notes, start)
    except Refused as error:
        raise notes.error(error) from error
    return Imported(name, config.method, target, text_of(draft), tuple(draft.remarks))


def _draft(document: Document, around: Surroundings, notes: Notes, start: str) -> tuple[Draft, Config]:
    config = passed_through(read(document, around, notes), notes)
    places = config.models if config.base is None else (config.base, *config.models)
    plain = names_of([*places, *(base for base, _ in config.adapters.values())])
    stacks = stacks_of(config, plain)
    names = dict(stacks.names) if stacks is not None else plain
    given = Translation(config, names, notes, frozenset(plain.values()))
    merge = expression(given)
    output = {"path": stage_place(_name_of(document) or "merged")}
    place = place_of(document.data, around, notes)
    tokens = tokens_of(config, notes, place, around.home)
    like = tokens.like or config.base or config.models[0]
    try:
        node = parse(merge, [*names.values()], [*given.coefficients])
    except ExpressionError as error:
        raise Refused(f"the translation {error}: {merge}"[:400], fix="write it by hand, in fewer terms") from error
    if stacks is not None and config.method == "passthrough" and like != config.models[0]:
        what = "the tokenizer is not that of the first slice, whose embedding the output has"
        raise Refused(what, *tokens.path, fix="name the model of the first slice, or none")
    if names[like] != donor_of(node):
        output["like"] = names[like]
    if (dtype := dtype_of(config, notes)) is not None:
        output["dtype"] = dtype
    given.note_unused()
    used = {name.name for name in names_in(node)} | {names[like]} | {names[it] for it in tokens.taken.values()}
    tensors = _tensors((place.partition("+")[0] for place in places), around.home)
    made = stacked(tensors, stacks) if tensors is not None and stacks is not None else tensors
    coefficients = {name: _fitted(found, made, notes) for name, found in given.coefficients.items() if name in used}
    behind = stacks.behind if stacks is not None else None
    if behind is not None and tensors is None:
        what = f"final norm and head are those of `{behind}`, and their names are guessed"
        notes.warn(f"{what}; check with `skillmerge plan`", "slices")
    elif behind is not None:
        _warn_of_head(next(place for place, name in plain.items() if name == behind), config, around.home, notes)
    stages = {stage_place(stage) for stage in around.stages}
    remarks = sorted(notes.found, key=lambda remark: remark.level != "warning")
    title = f"{config.method}, from {Path(document.name).name if document.name != STANDARD_INPUT else 'mergekit'}"
    draft = Draft(
        title=title,
        coefficients=coefficients,
        merge=merge,
        output=output,
        remarks=remarks,
        tokens={token: names[it] for token, it in tokens.taken.items()} if tokens.by_token else None,
        copied=(behind_layers(tensors), behind) if behind is not None else None,
        **_models(config, plain, stacks, used, lambda place: place if place in stages else moved(place, start)),
    )
    return draft, config


def _warn_of_head(last: str, config: Config, home: Path, notes: Notes) -> None:
    """Warn if the last model of a stack has a head, and the first one has only its embedding for that."""
    first, behind = (_tensors([place.partition("+")[0]], home) for place in (config.models[0], last))
    if first is None or behind is None:
        return
    lost = sorted(set(behind_layers(behind)) - first)
    if lost:
        what = (
            f"the output has no `{lost[0]}`, as the model of its first slice has none; mergekit takes that of the last"
        )
        notes.warn(what, "slices")


def _models(
    config: Config, names: Mapping[str, str], stacks: Stacks | None, used: AbstractSet[str], seen: Callable[[str], str]
) -> dict[str, Any]:
    """Return what a draft has of models: those that are used, and those that these are made of. names: of places.
    seen: returns a place as it is seen from the recipe's folder."""
    parts = {name: it for name, it in stacks.parts.items() if name in used} if stacks is not None else {}
    needed = used | {model for part in parts.values() for model, _, _ in part}
    adapters = {
        names[place]: (seen(adapter), names[base])
        for place, (base, adapter) in config.adapters.items()
        if names.get(place) in needed
    }
    needed |= {base for _, base in adapters.values()}
    models = {name: seen(place) for place, name in names.items() if name in needed and name not in adapters}
    return {"models": models, "adapters": adapters, "stacks": parts}


def _fitted(found: Varying, names: frozenset[str] | None, notes: Notes) -> Varying:
    """Return a coefficient whose rules fit the tensors, if these are known.

    Rules that match none are left out: mergekit passes over such filters. Its gradients go over all layers, a ramp over
    those that it selects: where these are fewer, each layer gets a rule.
    """
    if names is None:
        if any(rule.tensors and len(rule.points) > 1 for rule in found.rules):
            what = (
                "a gradient with a filter goes over the layers that have such tensors; mergekit's goes over all layers"
            )
            notes.note(what, *found.path)
        return found
    rules: list[Written] = []
    for rule in found.rules:
        chosen, whole = _layers_of(rule, names, (rule.tensors,)), _layers_of(rule, names, ()) or []
        if not rule.tensors or (chosen is not None and chosen == whole):
            rules.append(rule)
        elif chosen is not None and (len(rule.points) > 1 or (rule.layers and chosen[-1:] != whole[-1:])):
            place = {layer: index / max(len(whole) - 1, 1) for index, layer in enumerate(whole)}
            values = [(layer, Choice(None, rule.points).at(place[layer])) for layer in chosen]
            rules += [replace(rule, points=(value,), layers=f"{layer}") for layer, value in values]
        elif chosen is not None:
            rules.append(rule)
        elif not any(map(matcher([rule.tensors]).match, names)):
            notes.note(f"a filter matches no tensor, and is left out: `{rule.tensors.strip('*')}`", *found.path)
    return replace(found, rules=tuple(rules))


def _layers_of(rule: Written, names: Iterable[str], tensors: tuple[str, ...]) -> list[int] | None:
    """Return the layers in which a rule selects tensors, with these globs; None if it selects nothing at all."""
    layers = parse_numbers(rule.layers) if rule.layers else ()
    modules = tuple(re.findall(r"\w+", rule.modules))
    ramp = rule.points if len(rule.points) > 1 else None
    chosen = Rule(layers, tuple(filter(None, tensors)), modules, ramp=ramp).select(names)
    return sorted({layer[1] for name in chosen if (layer := layer_of(name)) is not None}) if chosen else None


def _tensors(places: Iterable[str], home: Path) -> frozenset[str] | None:
    """Return the names of a local model's tensors, or None if there is none."""
    for place in places:
        folder = home / place
        try:
            index = folder / "model.safetensors.index.json"
            if index.is_file():
                return frozenset(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            file = folder / "model.safetensors"
            if file.is_file():
                return frozenset(tensor.name for tensor in read_header(str(file), file.name).tensors)
        except (OSError, ValueError, KeyError, TypeError, RecursionError, InputError):
            continue
    return None


def _chosen(documents: Sequence[Document], name: str, chosen: str | None) -> Document:
    """Return the document of a file that was asked for. Raises RecipeError, UsageError."""
    if not documents:
        raise Document(name, "").error("is empty", None, "name a mergekit file")
    names = [_name_of(document) or str(number) for number, document in enumerate(documents, 1)]
    if chosen is None and len(documents) > 1:
        example = f"`skillmerge import {shlex.quote(name)} --document {shlex.quote(names[0])}`"
        fix = f"take one at a time: {example}; its output is then a model of the next"
        what = f"there are {len(documents)} merges in this file: {some(names)}"
        raise documents[1].error(what, documents[1].place(()), fix)
    if chosen is None or (len(documents) == 1 and chosen == "1"):
        return documents[0]
    numbers = [str(number) for number in range(1, len(documents) + 1)]
    for known in (names, numbers):
        if chosen in known:
            return documents[known.index(chosen)]
    fix = did_you_mean(chosen, names) or f"documents: {some(names)}"
    raise UsageError(f"`{name}` has no document `{chosen}`", fix=fix)


def _name_of(document: Document) -> str | None:
    name = document.data.get("name") if isinstance(document.data, dict) else None
    return name if isinstance(name, str) and name.strip() else None


def _depths(data: Any, home: Path) -> dict[str, int]:
    """Return how many layers the models have that are folders with a config, by place."""
    found: dict[str, int] = {}
    for place in dict.fromkeys(place.partition("+")[0] for place in _written(data)):
        try:
            config = json.loads((home / place / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(config, dict) and (count := layers_in(config)) is not None:
            found[place] = count
    return found


def _written(data: Any) -> list[str]:
    """Return the models that a document names, as they are written."""
    if isinstance(data, list):
        return [place for item in data for place in _written(item)]
    if not isinstance(data, dict):
        return []
    own = [data[key] for key in ("base_model", "model") if isinstance(data.get(key), str)]
    inner = [value for key, value in data.items() if isinstance(value, dict) or key in ("models", "slices", "sources")]
    return own + [place for value in inner for place in _written(value)]
