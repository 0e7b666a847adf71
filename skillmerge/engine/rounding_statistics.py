"""The effect of rounding: effective lambda, lost and changed shares, per tensor, per module kind and in total.

Measured where the update v is not 0. The keys of manifests call the first two `realised` and `vanished`:

    effective lambda  lambda * <y - t, u> / <u, u>    with u = lambda * v, t the base, y the output
    lost share        elements with u != 0 and y = t, of those with u != 0
    changed share     elements with y != t, of all
    norm ratio        |y - t| / |t|

t is rounded to the output's dtype first, so that only the update is measured. Sums are kept per block and
added exactly, so that they depend on nothing but the numbers. `sampled` reads one block in SAMPLE_STRIDE of
each tensor, at an offset given by its name, and at least one.
"""

from __future__ import annotations

import math
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from skillmerge.naming import MODULE_KINDS, module_kind
from skillmerge.plans.depth import number
from skillmerge.plans.plan import Plan, TensorPlan

if TYPE_CHECKING:
    from torch import Tensor

    from skillmerge.methods.evaluate import Scratch


SAMPLE_STRIDE = 128

LOSSES = ("requested λ", "effective λ", "lost", "changed")
"""Headings for people, in the order of `Group.shown`."""


@dataclass(frozen=True, slots=True)
class TensorStatistics:
    """Statistics of a tensor of `total` elements, with `elements` measured. A sum is None if it is not a number
    that JSON has (NaN and Inf were allowed in).

    vv, uv, dv: <v, v>, <u, v> and <y - t, v> of a packed tensor whose experts each have a lambda in front of the
    difference v; None of others.
    """

    total: int
    elements: int
    updated: int
    vanished: int
    changed: int
    uu: float | None
    du: float | None
    dd: float | None
    tt: float | None
    vv: float | None = None
    uv: float | None = None
    dv: float | None = None

    @property
    def norm_ratio(self) -> float | None:
        """|y - t| / |t|; None of a base of zeros, and where a sum is not a number."""
        return math.sqrt(self.dd / self.tt) if self.dd is not None and self.tt else None

    @property
    def whole(self) -> dict[str, float] | None:
        """Its figures for all of the tensor, which a sample stands for; None if a sum is not a number."""
        by, uu, du, dd, tt = self.total / self.elements, self.uu, self.du, self.dd, self.tt
        if uu is None or du is None or dd is None or tt is None:
            return None
        return {
            "total": self.total, "elements": self.elements * by, "updated": self.updated * by,
            "vanished": self.vanished * by, "changed": self.changed * by,
            "uu": uu * by, "du": du * by, "dd": dd * by, "tt": tt * by,
        }  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        # Spelled out, because large models have tens of thousands of tensors.
        found = {
            "total": self.total, "elements": self.elements, "updated": self.updated, "vanished": self.vanished,
            "changed": self.changed, "uu": self.uu, "du": self.du, "dd": self.dd, "tt": self.tt,
        }  # fmt: skip
        return found if self.vv is None else {**found, "vv": self.vv, "uv": self.uv, "dv": self.dv}


@dataclass(frozen=True, slots=True)
class Group:
    """The effect of rounding on one kind of module, or on all. changed: None if nothing was measured, and then so is
    all the rest; the lambdas: None if not every tensor has one number in front of the difference."""

    tensors: int = 0
    merged: int = 0
    changed: float | None = None
    vanished: float | None = None
    realised: float | None = None
    norm_ratio: float | None = None
    asked_lambda: float | None = None
    realised_lambda: float | None = None

    @property
    def lambdas(self) -> tuple[float, float] | None:
        """Requested and effective lambda; of updates that have none, the effective share of 1."""
        if self.asked_lambda is not None:
            return (self.asked_lambda, self.realised_lambda) if self.realised_lambda is not None else None
        return (1.0, self.realised) if self.realised is not None else None

    @property
    def shown(self) -> tuple[str, ...]:
        """The figures for people, in the order of LOSSES."""
        lambdas = [number(value) for value in self.lambdas or ()] or ["-", "-"]
        return (*lambdas, percent(self.vanished), percent(self.changed))

    def as_dict(self) -> dict[str, Any]:
        row: dict[str, Any] = {"tensors": self.tensors, "merged": self.merged}
        if self.changed is not None:
            row |= {key: getattr(self, key) for key in ("changed", "vanished", "realised", "norm_ratio")}
        if self.asked_lambda is not None:
            row |= {"asked_lambda": self.asked_lambda, "realised_lambda": self.realised_lambda}
        return row


@dataclass(frozen=True, slots=True)
class Statistics:
    """The effect of rounding, by module kind and in total. mode: full, sampled or off."""

    mode: str
    modules: dict[str, Group]
    all: Group

    @property
    def rows(self) -> list[tuple[str, Group]]:
        return [*self.modules.items(), ("all", self.all)]

    def as_dict(self) -> dict[str, Any]:
        modules = {kind: group.as_dict() for kind, group in self.modules.items()}
        return {"mode": self.mode, "modules": modules, "all": self.all.as_dict()}


def percent(part: float | None) -> str:
    """Return the rows of a table for people."""
    return "-" if part is None else f"{part:.1%}"


def is_sampled(name: str, block: int, blocks: int, mode: str) -> bool:
    """Return whether block number `block` of the `blocks` of tensor `name` is read for statistics."""
    if mode != "sampled":
        return mode == "full"
    stride = min(SAMPLE_STRIDE, blocks)
    return block % stride == zlib.crc32(name.encode()) % stride


@dataclass(frozen=True, slots=True)
class BlockStatistics:
    """Counts and sums of one block: `uu`, `du`, `dd` and `tt` are <u, u>, <y - t, u>, <y - t, y - t> and <t, t>."""

    elements: int
    updated: int
    vanished: int
    changed: int
    uu: float
    du: float
    dd: float
    tt: float


def measure(base: Tensor, out: Tensor, subtracted: Tensor, scratch: Scratch) -> BlockStatistics:
    """Measure one block: `base` as it is stored, `out` as it is written, `subtracted` = -lambda * v."""
    import torch

    from skillmerge.bits import bit_view, fold_sum
    from skillmerge.methods.rounding import round_nearest

    count, wide = out.numel(), torch.float64
    if base.dtype != out.dtype:
        base = round_nearest(base, scratch.get("statistics", 0, out.dtype, count))
    before, after = bit_view(base), bit_view(out)
    changed = torch.ne(before, after, out=scratch.get("statistics", 1, before.dtype, count))
    update = scratch.get("statistics", 2, wide, count).copy_(subtracted)
    step = scratch.get("statistics", 3, wide, count).copy_(out)
    square = scratch.get("statistics", 4, wide, count).copy_(base)
    step.sub_(square)
    tt = fold_sum(square.mul_(square))
    dd = fold_sum(torch.mul(step, step, out=square))
    du = -fold_sum(step.mul_(update))
    updated = int(torch.count_nonzero(update).item())
    visible = int(torch.count_nonzero(torch.mul(update, changed, out=step)).item())
    return BlockStatistics(
        elements=count,
        updated=updated,
        vanished=updated - visible,
        changed=int(torch.count_nonzero(changed).item()),
        uu=fold_sum(update.mul_(update)),
        du=du,
        dd=dd,
        tt=tt,
    )


def total(blocks: Iterable[BlockStatistics], size: int) -> TensorStatistics:
    """Return the statistics of one tensor of `size` elements; sums are exact, in whatever order."""
    blocks = list(blocks)
    return TensorStatistics(
        total=size,
        elements=sum(block.elements for block in blocks),
        updated=sum(block.updated for block in blocks),
        vanished=sum(block.vanished for block in blocks),
        changed=sum(block.changed for block in blocks),
        uu=_sum(block.uu for block in blocks),
        du=_sum(block.du for block in blocks),
        dd=_sum(block.dd for block in blocks),
        tt=_sum(block.tt for block in blocks),
    )


def total_of(tensor: TensorPlan, blocks: Mapping[int, BlockStatistics]) -> TensorStatistics:
    """Return the statistics of a tensor of a plan. blocks: by their first elements, in any order."""
    found = total(blocks.values(), tensor.merged)
    if not tensor.slices:
        return found
    terms, starts = [], sorted(blocks)
    for piece in tensor.slices:
        low, high = (bisect_left(starts, end) for end in piece.span)
        inside = [blocks[start] for start in starts[low:high]]
        if (lam := factor(piece)) is None and inside:
            return found
        terms += [(block.uu / lam / lam, block.uu / lam, block.du / lam) for block in inside if lam]
    vv, uv, dv = (_sum(column) for column in zip(*terms, strict=True)) if terms else (None, None, None)
    return found if None in (vv, uv, dv) else replace(found, vv=vv, uv=uv, dv=dv)


def _sum(values: Iterable[float]) -> float | None:
    """Return the exact sum, or None if it is not a number that JSON has (NaN and Inf were allowed in)."""
    try:
        result = math.fsum(values)
    except (OverflowError, ValueError):
        return None
    return result if math.isfinite(result) else None


def summarise(plan: Plan, measured: Mapping[str, TensorStatistics], mode: str) -> Statistics:
    """Per module kind and in all: counts, and Requested and effective lambda weighted by the update's energy."""
    rows = [
        Row(name, tensor.action == "merge", measured.get(name), factor(tensor)) for name, tensor in plan.tensors.items()
    ]
    kinds: dict[str, list[Row]] = {kind: [] for kind in (*MODULE_KINDS, "other")}
    for row in rows:
        kinds[module_kind(row.name)].append(row)
    return Statistics(mode, {kind: group(found) for kind, found in kinds.items() if found}, group(rows))


@dataclass(frozen=True, slots=True)
class Row:
    """A tensor of a group. merged: whether the formula computes it; factor: lambda, where one number stands in front of
    the difference; statistics: None if nothing was measured."""

    name: str
    merged: bool
    statistics: TensorStatistics | None
    factor: float | None = None

    @property
    def by_expert(self) -> tuple[float, float, float] | None:
        """`vv`, `uv` and `dv` of a tensor that has them."""
        it = self.statistics
        return None if it is None or it.vv is None or it.uv is None or it.dv is None else (it.vv, it.uv, it.dv)


def group(rows: Sequence[Row]) -> Group:
    """Return what rounding did to these tensors together; what was sampled of a tensor stands for all of it."""
    known = [(row, whole) for row in rows if row.statistics is not None and (whole := row.statistics.whole) is not None]
    merged = sum(row.merged for row in rows)
    if not known:
        return Group(len(rows), merged)
    sums = {key: math.fsum(whole[key] for _, whole in known) for key in known[0][1]}
    asked, realised = _lambdas(known) if sums["uu"] > 0 else (None, None)
    return Group(
        len(rows),
        merged,
        changed=share(sums["changed"], sums["total"]),
        vanished=share(sums["vanished"], sums["updated"]),
        realised=share(sums["du"], sums["uu"]),
        norm_ratio=math.sqrt(sums["dd"] / sums["tt"]) if sums["tt"] else None,
        asked_lambda=asked,
        realised_lambda=realised,
    )


def _lambdas(rows: Sequence[tuple[Row, dict[str, float]]]) -> tuple[float, float] | tuple[None, None]:
    """Requested and effective lambda of tensors that all have one."""
    if any(row.factor is None and row.by_expert is None for row, _ in rows):
        return None, None
    # u = lambda * v, so <v, v> = <u, u> / lambda^2.
    known = [(whole["uu"], whole["du"], row.factor) for row, whole in rows if row.factor]
    terms = [(uu / factor / factor, uu / factor, du / factor) for uu, du, factor in known]
    for row, _ in rows:
        if row.statistics is not None and (sums := row.by_expert) is not None:
            vv, uv, dv = (it * row.statistics.total / row.statistics.elements for it in sums)
            terms.append((vv, uv, dv))
    plain, asked, realised = (_sum(column) for column in zip(*terms, strict=True)) if terms else (None, None, None)
    if not plain or asked is None or realised is None:
        return None, None
    return asked / plain, realised / plain


def share(part: float, whole: float) -> float | None:
    """Return a part of a whole; None of nothing."""
    return part / whole if whole else None


def factor(tensor: TensorPlan) -> float | None:
    """lambda, where the tensor is `base + lambda * v` with one number in front of the difference."""
    return tensor.program.asked if tensor.program is not None and tensor.program.base else None
