"""Statistics of a stored skill: counts, shares and norms, and the rounding of the models that it was made from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from skillmerge.engine.measures import update_size
from skillmerge.engine.measures.input_rounding import floor
from skillmerge.engine.rounding_statistics import percent, share
from skillmerge.naming import MODULE_KINDS, module_kind
from skillmerge.plans.depth import number
from skillmerge.tensors import DTYPES, format_bytes


@dataclass(frozen=True, slots=True)
class SkillGroup:
    """Statistics of a stored skill for one kind of module, or all. changed: the share of elements; relative_error: the
    norm of what rounding lost, of the norm of the update.

    input_rounding: the norm that is to be expected of what rounding took from the models before, of the update's;
    input_rounding_added: of the added models alone. None if nothing is known of the models.
    """

    tensors: int
    elements: int
    changed: float | None
    pairs: int
    norm: float
    relative_error: float
    bytes: int
    dense_bytes: int
    input_rounding: float | None = None
    input_rounding_added: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None or key == "changed"}

    @property
    def shown(self) -> tuple[str, str, str]:
        """The figures for people: changed, norm, and stored size."""
        return percent(self.changed), number(self.norm), format_bytes(self.bytes)


@dataclass(frozen=True, slots=True)
class SkillStatistics:
    """Statistics of a stored skill, by module kind and in total. input_precisions: of its models' numbers; large:
    matrices whose update is implausibly large, and its norm as a share of that of what was subtracted."""

    mode: str
    modules: dict[str, SkillGroup]
    all: SkillGroup
    input_precisions: tuple[str, ...] = ()
    large: dict[str, float] = field(default_factory=dict)

    @property
    def rows(self) -> list[tuple[str, SkillGroup]]:
        return [*self.modules.items(), ("all", self.all)]

    def as_dict(self) -> dict[str, Any]:
        modules = {kind: group.as_dict() for kind, group in self.modules.items()}
        precisions = {"input_precisions": list(self.input_precisions)} if self.input_precisions else {}
        large = {"large": self.large} if self.large else {}
        return {"mode": self.mode, "modules": modules, "all": self.all.as_dict(), **precisions, **large}


@dataclass(frozen=True, slots=True)
class SkillInput:
    """The inputs of a skill's tensor. weights: sum of squares of what was subtracted; of_all, of_added and
    precisions: see `InputRounding`. A sum is None if it is not a number that JSON has."""

    weights: float | None
    of_all: float | None
    of_added: float | None
    precisions: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "precisions": list(self.precisions)}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> SkillInput:
        return cls(row["weights"], row["of_all"], row["of_added"], tuple(row["precisions"]))


def summarise_skill(
    tensors: Mapping[str, Mapping[str, Any]], inputs: Mapping[str, SkillInput] | None = None
) -> SkillStatistics:
    """Return the same for a stored skill, from what `skill.json` says of its tensors: counts, shares, and the norm.

    inputs: what is known of the models of each tensor.
    """
    known = inputs or {}
    groups: dict[str, list[str]] = {kind: [] for kind in (*MODULE_KINDS, "other")}
    for name in tensors:
        groups[module_kind(name)].append(name)
    modules = {kind: _skill_group(names, tensors, known) for kind, names in groups.items() if names}
    precisions = tuple(sorted({word for row in known.values() for word in row.precisions}))
    ratios = ((name, tensors[name]["shape"], _ratio(tensors[name], row)) for name, row in known.items())
    whole = _skill_group(list(tensors), tensors, known)
    return SkillStatistics("full", modules, whole, precisions, update_size.too_large(ratios))


def _skill_group(
    names: list[str], tensors: Mapping[str, Mapping[str, Any]], inputs: Mapping[str, SkillInput]
) -> SkillGroup:
    rows = [tensors[name] for name in names]
    elements = [math.prod(row["shape"]) for row in rows]
    norm = math.sqrt(math.fsum(row["sum_of_squares"] for row in rows))
    # A tensor that is the same in both models has no update that rounding could be a part of.
    moved = [inputs[name] for name in names if name in inputs and tensors[name]["changed"]]
    known = [(it.of_all, it.of_added) for it in moved if it.of_all is not None and it.of_added is not None]
    return SkillGroup(
        tensors=len(rows),
        elements=sum(elements),
        changed=share(sum(row["changed"] for row in rows), sum(elements)),
        pairs=sum(row["pairs"] for row in rows),
        norm=norm,
        relative_error=_relative_error(rows),
        bytes=sum(row["bytes"] for row in rows),
        dense_bytes=sum(count * DTYPES[row["dtype"]].itemsize for count, row in zip(elements, rows, strict=True)),
        input_rounding=floor((both for both, _ in known), norm) if known else None,
        input_rounding_added=floor((one for _, one in known), norm) if known else None,
    )


def _ratio(row: Mapping[str, Any], made_of: SkillInput) -> float | None:
    """Return the norm of a tensor's update, of that of what was subtracted; None of zeros."""
    return math.sqrt(row["sum_of_squares"] / made_of.weights) if made_of.weights else None


def _relative_error(rows: list[Mapping[str, Any]]) -> float:
    """Return the norm of what rounding lost, of the norm of the update."""
    lost = math.fsum(row.get("lost_squares", 0.0) for row in rows)
    whole = math.fsum(row["sum_of_squares"] for row in rows)
    return math.sqrt(lost / whole) if whole else 0.0
