"""Groups of tensors that figures are given for: modules, layers, cells of both, experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from skillmerge.naming import MODULE_KINDS, expert_of, layer_label, layer_of, module_kind, sliced, summarised

T = TypeVar("T")

ALL_LAYERS = "layers"
"""The place of an expert's tensors of all layers together."""


def kinds_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Return names by kind of module, and `all`."""
    kinds: dict[str, list[str]] = {"all": list(names)}
    for name in names:
        kinds.setdefault(module_kind(name), []).append(name)
    return kinds


def groups_of(rows: Mapping[str, Any]) -> dict[str, dict[str, list[str]]]:
    modules: dict[str, list[str]] = {kind: [] for kind in (*MODULE_KINDS, "other")}
    layers: dict[str, list[str]] = {}
    cells: dict[str, list[str]] = {}
    summaries: dict[str, list[str]] = {}
    for name in sorted(rows, key=lambda name: layer_of(name) or ("~", 0)):
        label = layer_label(name)
        modules[module_kind(name)].append(name)
        layers.setdefault(label, []).append(name)
        cells.setdefault(f"{label} {module_kind(name)}", []).append(name)
        summaries.setdefault(summarised(name), []).append(name)
    return {"modules": modules, "layers": layers, "cells": cells, "summaries": summaries}


def by_expert(experts: Mapping[str, Mapping[int, T]], rows: Mapping[str, tuple[T, Any]]) -> dict[str, tuple[T, None]]:
    """Return what was measured of each expert, by tensor or by slice of one. experts: of each packed tensor."""
    found: dict[str, tuple[T, None]] = {}
    for name, (update, _) in rows.items():
        if expert_of(name) is not None:
            found[name] = update, None
        for expert, part in experts.get(name, {}).items():
            found[sliced(name, expert)] = part, None
    return found


def expert_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the tensors of each expert, by layer and in all layers, in the order of layers and experts."""
    groups: dict[str, list[str]] = {}
    ordered = sorted((layer_of(name) or ("~", 0), expert_of(name) or 0, name) for name in names)
    for _, expert, name in ordered:
        groups.setdefault(f"{layer_label(name)} {expert}", []).append(name)
    for _, expert, name in sorted(ordered, key=lambda it: it[1]):
        groups.setdefault(f"{ALL_LAYERS} {expert}", []).append(name)
    return groups
