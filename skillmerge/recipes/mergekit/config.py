"""A document of mergekit -> what it merges where: models, and the levels of parameters that count in each part.

Written from its published format (https://github.com/arcee-ai/mergekit#merge-configuration), and from how version 0.1.5
was seen to read it. Knows no method but by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from skillmerge.checkpoints.place import looks_like_repository
from skillmerge.errors import did_you_mean
from skillmerge.recipes.mergekit.notes import Notes, Refused, table
from skillmerge.recipes.yamltext import Document
from skillmerge.recipes.yamltext import Path as Keys

_KNOWN = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype", "name",
    "tokenizer_source", "tokenizer", "chat_template",
)  # fmt: skip
_HOW = {"models": {"model", "parameters"}, "sources": {"model", "parameters", "layer_range"},
        "slices": {"sources", "parameters", "base_model"}, "modules": {"models", "slices", "parameters"}}  # fmt: skip
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]")


@dataclass(frozen=True, slots=True)
class Level:
    """A table of parameters, and where it stands."""

    table: Mapping[str, Any]
    path: Keys


@dataclass(frozen=True, slots=True)
class Region:
    """A part of the output. layers: the first, and the last; None for all. module: whose tensors, or "" for all.

    sources: model -> the level of its own. levels: those of all its models, the nearest first. taken: model -> its
    first and its last layer there, of slices.
    """

    sources: Mapping[str, Level]
    levels: tuple[Level, ...]
    layers: tuple[int, int] | None = None
    module: str = ""
    taken: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def levels_of(self, model: str | None) -> tuple[Level, ...]:
        own = (self.sources[model],) if model is not None and model in self.sources else ()
        return (*own, *self.levels)


@dataclass(frozen=True, slots=True)
class Config:
    """models: all in their order, the base too if it is listed. base: None if there is none. moves: whether layers
    move, repeat, or are left out. adapters: place of a model with an adapter on it -> places of both."""

    document: Document
    method: str
    base: str | None
    models: tuple[str, ...]
    regions: tuple[Region, ...]
    moves: bool = False
    adapters: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def listed(self) -> bool:
        """Whether the base is one of the models."""
        return self.base in self.models

    @property
    def others(self) -> tuple[str, ...]:
        """The models but the base."""
        return tuple(model for model in self.models if model != self.base)

    @property
    def data(self) -> Mapping[str, Any]:
        return self.document.data  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """home: the folder that relative paths start from. stages: names of the file's other documents. layers: how many
    the models have, as far as that is known. depths: what each of those has that are known by themselves, by place."""

    home: Path
    stages: Sequence[str] = ()
    layers: int | None = None
    depths: Mapping[str, int] = field(default_factory=dict)

    def layers_of(self, model: str) -> int | None:
        """Return how many layers a model has. One that is not here may be deeper than those that are."""
        return self.depths.get(model.partition("+")[0]) if self.depths else self.layers


def read(document: Document, around: Surroundings, notes: Notes) -> Config:
    """Return what a document says. Raises Refused."""
    data = document.data
    for key in data:
        if key not in _KNOWN:
            near = did_you_mean(str(key), list(_KNOWN))
            notes.note(f"`{key}` means nothing to mergekit{f'; {near}' if near else ''}", key)
    for path, _ in document.repeated:
        notes.note(f"`{path[-1]}` is written twice, with the same value", *path)
    method = data.get("merge_method")
    if not isinstance(method, str):
        raise Refused("`merge_method` is missing", fix="add the method, such as `merge_method: ties`")
    given = [key for key in ("models", "slices", "modules") if data.get(key)]
    if len(given) != 1:
        what = " and ".join(f"`{key}`" for key in given) or "neither `models` nor `slices`"
        raise Refused(f"there is {what}: mergekit takes one of `models`, `slices` and `modules`", *given[1:2])
    reader = _Reader(data, around, notes)
    regions = tuple(reader.regions(given[0]))
    base = reader.base(regions)
    models = dict.fromkeys(model for region in regions for model in region.sources)
    return Config(document, method, base, tuple(models), regions, reader.moves, reader.adapters)


def stage_place(name: str) -> str:
    """Return where the output of a document is, seen from the folder of its recipe."""
    return f"./{name}"


def place_of(data: Mapping[str, Any], around: Surroundings, notes: Notes) -> Callable[..., str]:
    """Return what turns a written model, and the keys that lead to it, into its place."""
    return _Reader(data, around, notes).place


class _Reader:
    def __init__(self, data: Mapping[str, Any], around: Surroundings, notes: Notes) -> None:
        self.data, self.around, self.notes = data, around, notes
        self.bases: list[tuple[str, Keys]] = []
        self.moves = False
        self.adapters: dict[str, tuple[str, str]] = {}
        self.above = self.level(data)

    def level(self, data: Mapping[str, Any], *path: str | int) -> Level:
        here = (*path, "parameters")
        return Level(table(data.get("parameters"), "parameters", *here), here)

    def place(self, written: Any, *path: str | int) -> str:
        """Return a model, which is a repository or a folder, as a place of ours; of one with an adapter on it both
        places, with a plus between them."""
        adapter: Any = None
        revision = ""
        while isinstance(written, dict):
            adapter = written.get("lora") or adapter
            revision = str(written.get("revision") or revision)
            written = written.get("model", written.get("path"))
        if not isinstance(written, str) or not written.strip():
            raise Refused(f"the model `{written}` is not a text", *path, fix="write a folder or `org/name`")
        name, plus, added = written.partition("+")
        if not plus and not adapter:
            return self._at(written, revision, *path)
        if not name.strip() or (plus and not added.strip()):
            what = "a model before the plus" if not name.strip() else "an adapter behind the plus"
            raise Refused(f"`{written}` lacks {what}", *path, fix="write both, as in `model+adapter`")
        if "+" in added or (plus and adapter):
            raise Refused(f"`{written}` has more than one adapter", *path, fix="name one, as in `model+adapter`")
        found = self._at(name, revision, *path), self.place(added or adapter, *path)
        if found[1] in self.adapters:
            raise Refused("this adapter has an adapter itself", *path, fix="name one, as in `model+adapter`")
        self.notes.warn(
            "mergekit merges an adapter first, in the dtype that it is told to; skillmerge adds it in float32", *path
        )
        self.adapters["+".join(found)] = found
        return "+".join(found)

    def _at(self, written: str, revision: str, *path: str | int) -> str:
        """Return a repository or a folder as a place of ours."""
        if written in self.around.stages:
            self.notes.note(f"`{written}` is the output of another document: import and apply that one first", *path)
            return stage_place(written)
        text = written + (f"@{revision}" if revision else "")
        if looks_like_repository(text) and not (self.around.home / written).is_dir():
            return f"hf://{text}"
        if _WINDOWS.match(written):
            self.notes.note(f"`{written}` is a folder on Windows: write where it is here", *path)
        return written

    def base(self, regions: Sequence[Region]) -> str | None:
        """Return the base of the whole model; those of slices have to be the same."""
        found = self.data.get("base_model")
        base = self.place(found, "base_model") if found is not None else None
        for other, path in self.bases:
            if base is not None and other != base:
                raise Refused(f"this slice has the base `{other}`, and others have `{base}`", *path, fix=_BASES)
            base = other
        if base is not None and len(regions) > len(self.bases) and found is None:
            raise Refused("some slices have a `base_model`, and others have none", "slices", fix=_BASES)
        return base

    def regions(self, key: str) -> list[Region]:
        if key == "models":
            return [Region(self.sources(self.data["models"], "models"), (self.above,))]
        if key == "slices":
            return self.slices(self.data["slices"], (self.above,), "slices")
        modules = table(self.data["modules"], "modules", "modules")
        found = []
        for name, module in modules.items():
            path = ("modules", name)
            inner = table(module, name, *path)
            levels = (self.level(inner, *path), self.above)
            self.unknown(inner, "modules", *path)
            if inner.get("models"):
                found.append(Region(self.sources(inner["models"], *path, "models"), levels, module=name))
            elif len(modules) > 1:
                raise Refused(f"module `{name}` has slices, and there are others", *path, fix="give it `models`")
            else:
                return self.slices(inner.get("slices"), levels, *path, "slices")
        if len({frozenset(region.sources) for region in found}) > 1:
            raise Refused("modules merge different models", "modules", fix="import one recipe for each set of models")
        if len(found) == 1:
            return [Region(found[0].sources, found[0].levels)]
        self.notes.warn(
            "each module is taken to be the tensors whose names contain its name; check with `skillmerge plan`",
            "modules",
        )
        return found

    def sources(self, items: Any, *path: str | int) -> dict[str, Level]:
        """Return the models of a list, and the parameters of each."""
        if not isinstance(items, list):
            raise Refused(f"`{path[-1]}` is not a list", *path)
        found: dict[str, Level] = {}
        for index, item in enumerate(items):
            here = (*path, index)
            if not isinstance(item, dict) or "model" not in item:
                raise Refused(f"`{path[-1]}` holds an entry without a `model`", *here)
            self.unknown(item, str(path[-1]), *here)
            model = self.place(item["model"], *here, "model")
            if model in found:
                raise Refused(
                    f"`{model}` is listed twice, which mergekit refuses too", *here, "model", fix="leave one out"
                )
            found[model] = self.level(item, *here)
        return found

    def unknown(self, data: Mapping[str, Any], what: str, *path: str | int) -> None:
        for key in data:
            if key not in _HOW[what]:
                near = did_you_mean(str(key), sorted(_HOW[what]))
                self.notes.note(f"`{key}` means nothing to mergekit here{f'; {near}' if near else ''}", *path, key)

    def slices(self, items: Any, levels: tuple[Level, ...], *path: str | int) -> list[Region]:
        """Return the slices, and find out whether together they are all layers, each in its place."""
        if not isinstance(items, list):
            raise Refused(f"`{path[-1]}` is not a list", *path)
        found, first = [], 0
        for index, item in enumerate(items):
            here = (*path, index)
            data = table(item, "slices", *here)
            self.unknown(data, "slices", *here)
            sources = self.sources(data.get("sources"), *here, "sources")
            if not sources:
                raise Refused("this slice has no sources", *here)
            ranges = [
                self.range(source, self.around.layers_of(model), *here, "sources", number)
                for number, (model, source) in enumerate(zip(sources, data["sources"], strict=True))
            ]
            counts = {end - begin for begin, end in ranges}
            if len(counts) > 1:
                raise Refused("the sources of this slice have different numbers of layers", *here)
            if data.get("base_model") is not None:
                at = (*here, "base_model")
                self.bases.append((self.place(data["base_model"], *at), at))
            taken = {model: (begin, end - 1) for model, (begin, end) in zip(sources, ranges, strict=True)}
            last = first + counts.pop() - 1
            found.append(Region(sources, (self.level(data, *here), *levels), (first, last), taken=taken))
            self.moves |= any(begin != first for begin, _ in ranges)
            first = last + 1
        layers = self.around.layers
        depths = {self.around.layers_of(model) for region in found for model in region.sources} - {None} or {layers}
        self.moves |= bool(depths - {None, first})
        if self.moves:
            return [replace(found[0], layers=None)] if len(found) == 1 else found
        if None in depths:
            self.notes.warn(
                f"the slices end with layer {first - 1}, taken to be the last; check with `--layers`", *path
            )
        if len(found) == 1 and layers is not None:
            return [Region(found[0].sources, found[0].levels)]
        return found

    def range(self, source: Mapping[str, Any], layers: int | None, *path: str | int) -> tuple[int, int]:
        """Return the first layer of a source, and the one after its last. layers: of its model."""
        here = (*path, "layer_range")
        given = source.get("layer_range")
        if not isinstance(given, list) or len(given) != 2 or not all(type(end) is int for end in given):
            what = "`layer_range` is two numbers, such as [0, 32]"
            raise Refused(what, *(here if "layer_range" in source else path), fix=_RANGE)
        if given[0] < 0 or given[1] > _LAYERS:
            raise Refused("a layer has a number from 0 on", *here, fix="count from the first layer")
        if given[1] <= given[0]:
            raise Refused("this slice has no layers", *here, fix=_RANGE)
        if layers is not None and given[1] > layers:
            what = f"layer {given[1] - 1} is past the last layer, which is {layers - 1}"
            raise Refused(what, *here, fix=f"write at most {layers} as the second number")
        return given[0], given[1]


_RANGE = "write the first layer, and the number behind the last one: [0, 1] is layer 0"
_LAYERS = 100_000
"""More layers than any model has."""
_BASES = "give all slices the same `base_model`"
