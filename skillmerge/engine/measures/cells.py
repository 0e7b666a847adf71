"""The effect of rounding on each layer and kind of module: cells whose deviations a mean of 1 may hide.

A cell is one layer's tensors of one kind (`layer 4 mlp`), or one kind's tensors outside all layers. Its figures are
those of `rounding_statistics`, added up from the sums of its tensors, which the manifest keeps.

How much is enough. `sampled` reads at least one block of every tensor: of a tensor of up to 65,536 elements all of it.
The effective share of a cell is R = sum w <d, u> / sum w <u, u>, d = y - t, over its tensors, each weighted by w, its
elements for each one that was read. This ratio of means has a standard error (Cochran 1977, Sampling Techniques,
sections 6.3 and 6.10) whose square is

    KURTOSIS * sum w^2 <u, u> <e, e> / n / (sum w <u, u>)^2        with e = d - R u, n the elements with u != 0

    + RUNS^2 * sum (w <u, u>)^2 (1 - f) / k / (sum w <u, u>)^2    with f the share read, k the blocks that it is in

<u, u> <e, e> / n stands for the sum of (u e)^2, which is not kept. The two are equal where the sizes of u and e have
nothing to do with each other; where e grows with u, the sum is up to KURTOSIS times as large (3 of normal numbers).

That takes elements for independent, and what was sampled is blocks of neighbors: a few rows, whose weights may be of
another size than those of other rows, so that rounding does something else to them. Blocks are the units then (Cochran,
section 9.2), but of most tensors only one or two are read, which do not show how far blocks differ. It is taken to be
by RUNS, as a standard deviation. Rows whose weights and whose updates both have sizes of exp(N(0, 0.2^2)), with 6 to 64
rows in a block, make it 0.06 at most; with rows alike it is nearly 0. Sizes of exp(N(0, 0.5^2)) make it up to 0.1, but
rows of real models are taken to differ less. Where one block was read, a cell is off below a share of 0.75, with 3 of
them below 0.81; in a tensor that was read whole there is nothing to guess.

The second part is for warnings alone. A gate excuses only what the elements themselves show, the first part.

A cell is off where R is further than DEVIATION from 1 even after SIGMAS standard errors, which happens by chance in
fewer than one cell of 700, and only where at least LEAST elements with an update were read: of fewer, a mean and its
error say little. Cells that were read whole are treated alike: the question is whether rounding takes part of such an
update, not how the last bits of 64 elements happened to fall.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from skillmerge.engine.rounding_statistics import Group, Row, TensorStatistics, group
from skillmerge.naming import MODULE_KINDS, layer_of, module_kind
from skillmerge.tensors import block_count

DEVIATION = 0.1
"""An effective lambda further than this from the requested one, as a share of it, is worth a warning."""

SIGMAS, KURTOSIS, RUNS, LEAST = 3.0, 3.0, 0.05, 100

_ORDER = {kind: index for index, kind in enumerate((*MODULE_KINDS, "other"))}


@dataclass(frozen=True, slots=True)
class Cell:
    """Tensors of one layer and kind, or of one kind in all layers. label: `layer 4 mlp`; `visual.blocks 4 mlp` where
    there are several stacks; `head outside layers`; `mlp`. updated: elements with an update that were looked at; error,
    lambda_error: the standard errors of `group.realised` and `group.realised_lambda` that these elements show; unread:
    what blocks that were not read may add to `error`. finite: whether each tensor's sums are numbers; of others `group`
    has nothing."""

    label: str
    kind: str
    names: tuple[str, ...]
    group: Group
    updated: int
    error: float
    lambda_error: float
    unread: float = 0.0
    finite: bool = True

    @property
    def is_measured(self) -> bool:
        """Whether enough elements with an update were measured."""
        return self.updated >= LEAST and self.group.realised is not None

    @property
    def is_off(self) -> bool:
        """Whether the effective share of the update deviates from 1 by more than chance explains."""
        realised = self.group.realised
        chance = SIGMAS * math.hypot(self.error, self.unread)
        return self.is_measured and realised is not None and abs(realised - 1) - chance > DEVIATION


class Measured(Protocol):
    """A tensor as a manifest has it."""

    @property
    def name(self) -> str: ...
    @property
    def action(self) -> str: ...
    @property
    def statistics(self) -> TensorStatistics | None: ...


def rows_of(tensors: Iterable[Measured], factors: Mapping[str, float | None] | None = None) -> list[Row]:
    """Return rows of a manifest's tensors. factors: lambda of each, which a manifest does not have. Without them it is
    left out of packed experts too, whose statistics tell it: all cells show shares of what was requested."""
    if factors is None:
        return [Row(it.name, it.action == "merge", _without_lambda(it.statistics)) for it in tensors]
    return [Row(it.name, it.action == "merge", it.statistics, factors.get(it.name)) for it in tensors]


def _without_lambda(statistics: TensorStatistics | None) -> TensorStatistics | None:
    return replace(statistics, vv=None, uv=None, dv=None) if statistics is not None else None


def cells(rows: Iterable[Row]) -> list[Cell]:
    """Return the cells of these tensors, in the order of layers; those outside of layers come last."""
    found: dict[tuple[tuple[str, int] | None, str], list[Row]] = {}
    for row in rows:
        found.setdefault((layer_of(row.name), module_kind(row.name)), []).append(row)
    several = len({layer[0] for layer, _ in found if layer is not None}) > 1
    ordered = sorted(found, key=lambda cell: (cell[0] is None, cell[0] or ("", 0), _ORDER[cell[1]]))
    return [_cell(_label(layer, kind, several), kind, found[layer, kind]) for layer, kind in ordered]


def kinds(rows: Iterable[Row]) -> list[Cell]:
    """Return one cell for each kind of module, over all layers."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(module_kind(row.name), []).append(row)
    return [_cell(kind, kind, found[kind]) for kind in sorted(found, key=lambda kind: _ORDER[kind])]


def pools(
    known: Sequence[Cell], low: Sequence[Cell], high: Sequence[Cell], rows: Mapping[str, Row]
) -> Iterator[tuple[Cell, float]]:
    """Yield the cells combined if some are too low or too high within chance, and how many standard errors are chance
    for all of them.

    Those too low and those too high would cancel, so each group is judged without the other. To leave out what is high
    lowers the mean of n cells alike by up to the mean of half a normal distribution, sqrt(2 n / pi) errors of the mean.
    """
    for judged, others, what in ((low, high, "high"), (high, low, "low")):
        if judged:
            left = [cell for cell in known if cell not in others]
            label = f"all layers not too {what}, together" if others else "all layers together"
            sigmas = SIGMAS + (math.sqrt(2 / math.pi * len(left)) if others else 0.0)
            yield _cell(label, label, [rows[name] for cell in left for name in cell.names]), sigmas


def _label(layer: tuple[str, int] | None, kind: str, several: bool) -> str:
    return f"{layer[0] if several else 'layer'} {layer[1]} {kind}" if layer is not None else f"{kind} outside layers"


def _cell(label: str, kind: str, rows: Sequence[Row]) -> Cell:
    whole = group(rows)
    known = [row.statistics for row in rows if row.statistics is not None]
    updated, finite = sum(it.updated for it in known), all(it.whole is not None for it in known)
    error, unread = _errors([(row, 1.0) for row in rows], whole.realised)
    lambda_error, _ = _errors([(row, row.factor) for row in rows], whole.realised_lambda)
    return Cell(label, kind, tuple(row.name for row in rows), whole, updated, error, lambda_error, unread, finite)


def _errors(rows: Iterable[tuple[Row, float | None]], realised: float | None) -> tuple[float, float]:
    """Return both parts of the standard error of what these tensors realised of the updates that are, without these
    factors, u."""
    spread, apart, energy = [], [], []
    for row, factor in rows:
        statistics = row.statistics
        if statistics is None or realised is None or not statistics.updated:
            continue
        uu, du, dd = statistics.uu, statistics.du, statistics.dd
        if uu is None or du is None or dd is None:
            continue
        if factor is None and (sums := row.by_expert) is not None:
            uu, _, du = sums
        elif factor:
            uu, du = uu / factor / factor, du / factor
        else:
            continue
        weight = statistics.total / statistics.elements
        rest = max(0.0, dd - 2 * realised * du + realised * realised * uu)
        spread.append(weight * weight * uu * rest / statistics.updated)
        apart.append((weight * uu) ** 2 * (1 - 1 / weight) / block_count(statistics.elements))
        energy.append(weight * uu)
    if not (whole := math.fsum(energy)):
        return 0.0, 0.0
    return math.sqrt(KURTOSIS * math.fsum(spread)) / whole, RUNS * math.sqrt(math.fsum(apart)) / whole


def worst(found: Iterable[Cell]) -> Cell | None:
    """Return the cell that is furthest off, or None if none is off."""
    off = [cell for cell in found if cell.is_off]
    return max(off, key=lambda cell: abs((cell.group.realised or 0.0) - 1), default=None)
