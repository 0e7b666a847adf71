"""Layers of several checkpoints on top of each other, read as one checkpoint: names are numbered again, and that is
all. What is outside the layers is the first one's."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from skillmerge.checkpoints.checkpoint import Checkpoint, Naming, Piece, WeightFile, in_shards, sha256_as_read
from skillmerge.checkpoints.model_config import layers_in, sections
from skillmerge.checkpoints.safetensors import Header
from skillmerge.checkpoints.store import Store, Wait, all_of
from skillmerge.errors import InputError
from skillmerge.naming import layer_of, module_kind, part_of
from skillmerge.tensors import TensorSpec

SHARD = 5_000_000_000
"""Bytes of tensors in one file, as far as they can be parted: a stack has no files of its own to go by."""

Source = tuple[Checkpoint, str]
"""Where a tensor is: a checkpoint, and its name there."""


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers of a checkpoint's language model. stack: how their names begin; count: how many the model has;
    tensors: number -> the rest of a name -> the name. Numbers from `count` on are of other heads, such as those for
    speculative decoding.
    """

    checkpoint: Checkpoint
    stack: str
    count: int
    tensors: Mapping[int, Mapping[str, str]]


def layers_of(model: str, checkpoint: Checkpoint) -> Layers:
    """Return the layers of the model `model`. Raises InputError where it is not clear which they are."""
    stacks: dict[str, dict[int, dict[str, str]]] = {}
    for name in checkpoint.tensors:
        layer = layer_of(name)
        if layer is not None and part_of(layer[0]) == "text":
            rest = name[len(layer[0]) + 1 :].partition(".")[2]
            stacks.setdefault(layer[0], {}).setdefault(layer[1], {})[rest] = name
    shared = any("num_hidden_groups" in section for _, section in sections(checkpoint.config))
    said = layers_in(checkpoint.config) if not shared else None
    both_ways = any(section.get("is_encoder_decoder") is True for _, section in sections(checkpoint.config))
    if len(stacks) > 1 and not both_ways and said is not None:  # heads for speculative decoding have layers too
        stacks = {stack: layers for stack, layers in stacks.items() if len(layers) >= said}
    if len(stacks) != 1:
        found = f"has layers in {' and in '.join(f'`{stack}`' for stack in stacks)}" if stacks else "has no layers"
        raise InputError(f"model `{model}` {found}: only a model with one row of layers can be part of a stack")
    (stack, layers), *_ = stacks.items()
    count = said if said is not None and said > 0 else max(layers) + 1
    missing = next((number for number in range(min(count, len(layers) + 1)) if number not in layers), None)
    if missing is not None:
        raise InputError(f"model `{model}`: layer {missing} of `{stack}` is missing", fix="fetch it again")
    return Layers(checkpoint, stack, count, layers)


class Stacked(Checkpoint):
    """A checkpoint whose tensors are others'. `sources`: by its own names."""

    def __init__(
        self,
        name: str,
        uri: str,
        first: Checkpoint,
        sources: Mapping[str, Source],
        store: Store,
        config: Mapping[str, Any],
        naming: Naming,
    ) -> None:
        """first: what its side files are of. store: these, as the stack has them."""
        self.sources = dict(_in_order(sources))
        self._parts = list({id(part): part for part, _ in self.sources.values()}.values())
        at = replace(
            first.at, place=f"stack `{name}`", root=None, revision=None, doubt="",
            remote=any(part.at.remote for part in self._parts),
        )  # fmt: skip
        tensors: dict[str, TensorSpec] = {}
        files: dict[str, WeightFile] = {}
        sizes = {name: part.tensors[source].nbytes for name, (part, source) in self.sources.items()}
        for file, names in in_shards(sizes, SHARD):
            files[file] = self._file(names)
            for each in names:
                part, source = self.sources[each]
                spec = part.tensors[source]
                tensors[each] = TensorSpec(each, spec.dtype, spec.shape, file)
        super().__init__(uri, at, store, config, tensors, files)
        self.naming = naming

    def read(self, pieces: Sequence[Piece]) -> Wait:
        return all_of(
            [
                part.read(
                    [
                        Piece(self.sources[it.tensor][1], it.first, it.count, it.buffer, it.start)
                        for it in pieces
                        if self.sources[it.tensor][0] is part
                    ]
                )
                for part in {id(part): part for part, _ in (self.sources[it.tensor] for it in pieces)}.values()
            ]
        )

    def hint(self, tensor: str, first: int, count: int) -> None:
        part, source = self.sources[tensor]
        part.hint(source, first, count)

    def cost(self, tensor: str) -> int:
        part, source = self.sources[tensor]
        return part.cost(source)

    def written_dtype(self, tensor: str) -> str:
        part, source = self.sources[tensor]
        return part.written_dtype(source)

    def sha256(self, file: str, stop: threading.Event | None = None) -> str:
        return sha256_as_read(self, file, self.files[file].described, stop)

    def check_unchanged(self, files: Collection[str] | None = None) -> None:
        names = (name for file in (self.files if files is None else files) for name in self.files[file].tensors)
        for part, of_part in self._files_of(names):
            part.check_unchanged(of_part)

    def cancel(self) -> None:
        for part in self._parts:
            part.cancel()

    def close(self) -> None:
        """Its parts are somebody else's to close."""

    def _file(self, names: Sequence[str]) -> WeightFile:
        """Return a file that there is not: what its tensors are made of stands for its header."""
        digest = hashlib.sha256()
        for name in names:
            part, source = self.sources[name]
            digest.update(f"{name}\0{part.uri}\0{source}\0".encode())
        version: list[int | str] = []
        for part, files in self._files_of(names):
            for file in files:
                version += part.files[file].version
                digest.update(hashlib.sha256(part.files[file].described).digest())
        size = sum(part.tensors[source].nbytes for part, source in map(self.sources.__getitem__, names))
        return WeightFile(Header(b"", (), size), digest.digest(), tuple(version), None, tuple(names))

    def _files_of(self, names: Iterator[str] | Sequence[str]) -> Iterator[tuple[Checkpoint, list[str]]]:
        """Yield the parts that tensors come from, each with the files that hold them."""
        found: dict[int, set[str]] = {}
        for part, source in map(self.sources.__getitem__, names):
            found.setdefault(id(part), set()).add(part.tensors[source].file)
        for part in self._parts:
            if id(part) in found:
                yield part, sorted(found[id(part)])


def _in_order(sources: Mapping[str, Source]) -> Iterator[tuple[str, Source]]:
    """Yield the embeddings, the layers by their numbers, and the rest."""
    layers: dict[int, list[str]] = {}
    before: list[str] = []
    behind: list[str] = []
    for name in sources:
        layer = layer_of(name)
        if layer is not None and part_of(layer[0]) == "text":
            layers.setdefault(layer[1], []).append(name)
        else:
            (before if module_kind(name) == "embedding" else behind).append(name)
    for name in (*before, *(name for number in sorted(layers) for name in layers[number]), *behind):
        yield name, sources[name]
