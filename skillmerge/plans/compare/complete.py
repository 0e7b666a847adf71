"""Checks that checkpoints are complete: by the names of their files, their config, other lists of their weights, and
layers that lack tensors of their neighbors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from skillmerge.checkpoints.checkpoint import INDEX_FILE, Checkpoint
from skillmerge.checkpoints.kinds.dense import missing_shards
from skillmerge.checkpoints.model_config import contradictions, sections, ties_embeddings
from skillmerge.checkpoints.tokenizers.small_files import SmallFiles
from skillmerge.checkpoints.tokenizers.vocabulary import json_table
from skillmerge.errors import InputError, some
from skillmerge.methods.terms import model_of
from skillmerge.naming import PARTS, layer_of, module_kind, part_of
from skillmerge.plans.compare.found import Compared, Level
from skillmerge.plans.compare.table import IGNORED

NAME = "architecture"
"""The name of an incomplete checkpoint in `accept`."""

PICKLED_INDEX = "pytorch_model.bin.index.json"

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
_SIDES = {
    "encoder": ("encoder_layers", "num_encoder_layers", "num_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)\.")
_STATED = (
    ("attention_bias", "self_attn.q_proj.weight", "self_attn.q_proj.bias"),
    ("mlp_bias", "mlp.up_proj.weight", "mlp.up_proj.bias"),
)
"""(config key, a tensor of a layer, the tensor that comes with it if the key is true)."""

_OF_TEXT = ("", "text_config", "thinker_config.text_config", "llm_config", "language_config")

_BUFFER = re.compile(r"(inv_freq|masked_bias|attn\.bias|position_ids|num_batches_tracked|rotary_emb\..*)$")

# Config keys that explain why layers differ, besides lists and strings with an entry for each layer.
_PERIODS = re.compile(r"step|period|interval|freq|every|factor|stride|pattern|_per_")
_LETTERS = re.compile(r"layer|block|pattern")
"""Keys of strings with a letter for each layer: `hybrid_override_pattern`, `layers_block_type`, `layer_types`."""
_EDGES = re.compile(r"first_|dense_layers|start|end_index|hash_layers|kv_shared|last_|nextn|mtp")

_LISTS = re.compile(r"layer|block|attn|moe|mlp|ffn|expert|mamba|idx|ind[ei]|pattern|type")
"""Keys of lists that may be about layers."""
_OF_TOKENS = re.compile(r"_per_tok|token_id")

_FEW_TENSORS = 4
"""Fewest tensors of a transformer layer. Projectors have smaller ones, which may be numbered 0 and 2."""

_NAMED = 9

Stack = dict[int, set[str]]
"""The layers of a stack: index -> the rest of each tensor's name."""


def check_complete(models: Mapping[str, Checkpoint], donor: str, files: SmallFiles | None = None) -> list[Compared]:
    """Return what these models (by name) should hold and do not. donor: its name, or "" if there is none.

    A model with the same tensor names as the donor lacks the same ones, which are reported once.
    """
    files = files or SmallFiles()
    found: list[Compared] = []
    known = models[donor].tensors.keys() if donor in models else None
    for name, checkpoint in models.items():
        if model_of(name) != name or not checkpoint.config:
            continue
        found += [*_shards(name, checkpoint), *_pickled(name, checkpoint, files)]
        if name == donor or checkpoint.tensors.keys() != known:
            stacks = _stacks(checkpoint)
            found += [*_counts(name, checkpoint, stacks, name == donor), *_experts(name, checkpoint, stacks)]
            found += [*_stated(name, checkpoint, stacks), *_blocks(name, checkpoint, stacks)]
    return found


def _shards(name: str, checkpoint: Checkpoint) -> Iterator[Compared]:
    missing = missing_shards([*checkpoint.files, *checkpoint.unread])
    if missing is not None:
        yield _found(
            "warning", "files", INDEX_FILE, name, missing, f"{missing} is missing by the names of the others, and "
            f"{INDEX_FILE} does not name it",
        )  # fmt: skip


def _pickled(name: str, checkpoint: Checkpoint, files: SmallFiles) -> Iterator[Compared]:
    """Yield a warning for tensors that only the index of the pickled format names."""
    try:
        document = files.read(checkpoint.store, PICKLED_INDEX, json_table) or {}
    except InputError:
        return  # nothing here needs that file
    named = document.get("weight_map")
    if not isinstance(named, dict) or 2 * len(named.keys() & checkpoint.tensors.keys()) < len(named):
        return
    missing = sorted(named.keys() - checkpoint.tensors.keys())
    missing = [tensor for tensor in missing if not _BUFFER.search(tensor) and not _tied(tensor, checkpoint)]
    if missing:
        yield _found(
            "warning", "weight_map", PICKLED_INDEX, name, f"{len(missing)} missing",
            f"{PICKLED_INDEX} names tensors that the *.safetensors lack: {some([f'`{it}`' for it in missing])}",
        )  # fmt: skip


def _tied(tensor: str, checkpoint: Checkpoint) -> bool:
    return module_kind(tensor) in ("head", "embedding") and ties_embeddings(checkpoint.config)


# Numbers of layers and experts.


def _stacks(checkpoint: Checkpoint) -> dict[str, Stack]:
    stacks: dict[str, Stack] = {}
    for tensor in checkpoint.tensors:
        layer = layer_of(tensor)
        if layer is not None:
            inner = tensor[len(layer[0]) + 1 :].partition(".")[2]
            stacks.setdefault(layer[0], {}).setdefault(layer[1], set()).add(inner)
    return {name: stack for name, stack in stacks.items() if median(map(len, stack.values())) >= _FEW_TENSORS}


def _counts(name: str, checkpoint: Checkpoint, stacks: Mapping[str, Stack], donor: bool) -> Iterator[Compared]:
    """Yield stacks with fewer layers than the config says, and gaps in their numbers."""
    if donor and any(" layers (" in text for text in contradictions(checkpoint.config, _shapes(checkpoint))):
        return  # already reported as a problem of the donor
    for part in ("text", *PARTS):
        inside = [section for where, section in sections(checkpoint.config) if part_of(where) == part]
        of_part = {stack: blocks for stack, blocks in stacks.items() if part_of(stack) == part}
        if any("num_hidden_groups" in section for section in inside):
            continue  # layers share weights
        for which, expected in _expected(inside, of_part):
            matching = {stack: blocks for stack, blocks in of_part.items() if which in stack}
            held = max((_last(blocks) + 1 for blocks in matching.values()), default=0)
            if held < expected and (held or (part != "text" and not any(map(PARTS[part].search, checkpoint.tensors)))):
                where = f"{which or part} layers" if which or part != "text" else "layers"
                certain: Level = "problem" if part == "text" else "warning"
                yield _found(
                    certain if len(matching) == 1 else "note", "blocks", "config.json", name, f"{held} of {expected}",
                    f"config.json says {expected} {where}, and the weights hold {held or 'none'}",
                )  # fmt: skip
        least = min((count for _, count in _expected(inside, of_part)), default=0)
        for stack, blocks in of_part.items():
            # Layer numbers can be huge, so only the first few of each gap are named.
            places = pairwise([-1, *(index for index in sorted(blocks) if index <= _last(blocks))])
            gaps = [index for before, after in places for index in range(before + 1, min(after, before + 1 + _NAMED))]
            if gaps:
                listed = some([str(index) for index in gaps])
                level: Level = "problem" if part == "text" and gaps[0] < least else "warning"
                yield _found(
                    level, stack, "config.json", name, f"without {listed}",
                    f"layer{'s' if len(gaps) > 1 else ''} {listed} of `{stack}` {'are' if len(gaps) > 1 else 'is'} "
                    "missing between the others",
                )  # fmt: skip


def _last(blocks: Stack) -> int:
    """Return the number of the last real layer; heads and leftovers may have larger ones."""
    usual = median(map(len, blocks.values()))
    return max(index for index, block in blocks.items() if 2 * len(block) >= usual)


def _expected(inside: Sequence[Mapping[str, Any]], stacks: Mapping[str, Stack]) -> list[tuple[str, int]]:
    """Return (`encoder`, `decoder` or "" for all stacks, number of layers): the smallest that the sections say."""
    if any(key in section for section in inside for key in _SIDES["decoder"]):
        sides = {side: _least(inside, keys) for side, keys in _SIDES.items() if any(side in it for it in stacks)}
        return [(side, count) for side, count in sides.items() if count]
    count = _least(inside, _COUNTS)
    return [("", count)] if count else []


def _least(inside: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> int:
    said = [next((section[key] for key in keys if type(section.get(key)) is int), 0) for section in inside]
    return min((count for count in said if count > 0), default=0)


def _experts(name: str, checkpoint: Checkpoint, stacks: Mapping[str, Stack]) -> Iterator[Compared]:
    expected = _least([section for _, section in sections(checkpoint.config)], _EXPERTS)
    numbers = {
        int(match[1])
        for stack in stacks.values()
        for block in stack.values()
        for inner in block
        if (match := _EXPERT.search(inner))
    }
    held = len(numbers)
    if 0 < held < expected:
        yield _found(
            "problem", "experts", "config.json", name, f"{held} of {expected}",
            f"config.json says {expected} experts in a layer, and the weights hold {held}",
        )  # fmt: skip


def _stated(name: str, checkpoint: Checkpoint, stacks: Mapping[str, Stack]) -> Iterator[Compared]:
    for key, beside, wanted in _STATED:
        if not any(section.get(key) is True for at, section in sections(checkpoint.config) if at in _OF_TEXT):
            continue
        for stack, blocks in stacks.items():
            inner = set().union(*blocks.values())
            if part_of(stack) == "text" and beside in inner and wanted not in inner:
                yield _found(
                    "warning", key, "config.json", name, "true",
                    f"config.json says `{key}`, and no layer of `{stack}` has `{wanted}`",
                )  # fmt: skip


# Layers that lack tensors of the others.


def _blocks(name: str, checkpoint: Checkpoint, stacks: Mapping[str, Stack]) -> Iterator[Compared]:
    for stack, blocks in stacks.items():
        if len({frozenset(block) for block in blocks.values()}) == 1:
            continue
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for index, traits in zip(sorted(blocks), _traits(checkpoint.config, sorted(blocks)), strict=True):
            kinds.setdefault(traits, []).append(index)
        lacking = {index: inner for alike in kinds.values() for index, inner in _lacking(blocks, alike).items()}
        for pair in (alike for alike in kinds.values() if len(alike) == 2):
            lacking |= _lacking_of_two(blocks, pair)
        if len(lacking) > max(1, len(blocks) // 4):
            yield _found(
                "note", stack, "config.json", name, f"{len(lacking)} blocks",
                f"{len(lacking)} layers of `{stack}` lack tensors that others have, and config.json does not say why",
            )  # fmt: skip
            continue
        for index, inner in sorted(lacking.items()):
            level: Level = "note" if index in (min(blocks), max(blocks)) else "warning"
            listed = some([f"`{it}`" for it in inner])
            yield _found(
                level, f"{stack}.{index}", "config.json", name, f"{len(inner)} missing",
                f"layer {index} of `{stack}` lacks {listed}, which the layers beside it have",
            )  # fmt: skip


def _lacking(blocks: Stack, alike: Sequence[int]) -> dict[int, list[str]]:
    """Return layers of one kind without tensors that most of them and both neighbors have: index -> names."""
    if len(alike) < 3:
        return {}
    counts = Counter(inner for index in alike for inner in blocks[index])
    usual = {inner for inner, count in counts.items() if 2 * count > len(alike)}
    found = {}
    for place, index in enumerate(alike):
        beside = [blocks[alike[other]] for other in (place - 1, place + 1) if 0 <= other < len(alike)]
        missing = sorted(usual.intersection(*beside) - blocks[index])
        if missing:
            found[index] = missing
    return found


def _lacking_of_two(blocks: Stack, alike: Sequence[int]) -> dict[int, list[str]]:
    """Return the same for a kind of two layers: what the other one and every layer of other kinds have."""
    others = [block for index, block in blocks.items() if index not in alike]
    shared = set.union(*(blocks[index] for index in alike)).intersection(*others) if others else set()
    return {index: sorted(shared - blocks[index]) for index in alike if shared - blocks[index]}


def _traits(config: Mapping[str, Any], indices: Sequence[int]) -> list[tuple[Any, ...]]:
    """Return what the config says about each layer, whatever it means. Layers with equal traits should be alike."""
    count = max(indices) + 1
    columns: list[list[Any]] = []
    for _, section in sections(config):
        total = next((section[key] for key in _COUNTS if type(section.get(key)) is int), count)
        columns.append([index < total for index in indices])  # later ones are heads for speculative decoding
        for key, value in section.items():
            listed = _LISTS.search(key) is not None
            if _OF_TOKENS.search(key) or (not listed and (isinstance(value, list) or IGNORED.search(key))):
                continue  # not about layers
            columns += _columns(key, value, indices, min(total, count), section.get(key.replace("period", "offset")))
    return list(zip(*columns, strict=True))


def _columns(key: str, value: Any, indices: Sequence[int], count: int, offset: Any) -> Iterator[list[Any]]:
    counts = (count, max(indices) + 1)
    if (isinstance(value, list) or (isinstance(value, str) and _LETTERS.search(key))) and len(value) in counts:
        yield [repr(value[index]) if index < len(value) else "" for index in indices]
    elif isinstance(value, list) and value and all(type(item) is int for item in value):
        for shift in (0, 1) if 0 not in value else (0,):  # some configs count layers from 1
            yield [index + shift in value for index in indices]
    elif isinstance(value, list) and 0 < 2 * len(value) <= count and all(isinstance(item, str) for item in value):
        yield [index % len(value) for index in indices]  # a repeated pattern
    elif type(value) is int and 1 < value <= count and _PERIODS.search(key):
        yield [index % value for index in indices]
    elif type(value) is int and value > count and _PERIODS.search(key):
        yield [index == offset for index in indices]  # the period is longer than the model
    elif type(value) is int and 0 < value <= count and _EDGES.search(key):
        yield [(index < value, index <= value, index >= count - value) for index in indices]


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for name, spec in checkpoint.tensors.items()}


def _found(level: Level, key: str, file: str, model: str, value: str, message: str) -> Compared:
    return Compared(
        NAME, key, file, level, {model: value}, False, f"model `{model}`: {message}",
        "fetch or save that checkpoint again; if it is meant to be so, write `accept: [architecture]`"
        if level != "note" else None,
    )  # fmt: skip
