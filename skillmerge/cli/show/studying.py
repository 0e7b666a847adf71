"""Exported skills and sweeps for people."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console

from skillmerge.cli.console import Text
from skillmerge.cli.show import listings
from skillmerge.cli.show.figures import show
from skillmerge.cli.show.table import Table
from skillmerge.errors import some
from skillmerge.naming import module_kind
from skillmerge.plans.depth import bars, number
from skillmerge.tensors import format_bytes
from skillmerge.verbs.export.patch import Patch

if TYPE_CHECKING:
    from skillmerge.verbs.export.lora import Exported
    from skillmerge.verbs.sweep.sweep import Sweep


def show_exported(exported: Exported | Patch, out: Console) -> None:
    """Show what was written of an exported skill."""
    if isinstance(exported, Patch):
        share = f"{exported.elements / exported.of:.1%}" if exported.of else "none"
        what = f"{share} of the elements in {exported.tensors} tensors, {format_bytes(exported.bytes)}"
        told = f"wrote {exported.output}: {what}"
        out.print(Text(told, style="bold"), soft_wrap=True)
    else:
        _show_adapter(exported, out)


def _show_adapter(exported: Exported, out: Console) -> None:
    """Show how much of a skill an adapter holds, by module."""
    groups: dict[str, list[Mapping[str, float]]] = {}
    for name, row in exported.modules.items():
        groups.setdefault(module_kind(name), []).append(row)
    head = ("module", "matrices", "norm", "energy kept", "least")
    table = Table(head, f"the adapter, rank {exported.rank}", text=("module",))
    for kind, rows in groups.items():
        squares = [row["norm"] ** 2 for row in rows]
        kept = sum(row["energy"] * square for row, square in zip(rows, squares, strict=True))
        share = kept / sum(squares) if sum(squares) else 1.0
        least = min(row["energy"] for row in rows)
        table.add_row(kind, str(len(rows)), number(math.sqrt(sum(squares))), f"{share:.1%}", f"{least:.1%}")
    out.print(table)
    count = f"{len(exported.left)} tensor{'s' if len(exported.left) != 1 else ''}"
    told = f"wrote {exported.output}: holds {exported.energy:.1%} of the skill's energy"
    out.print(Text(told, style="bold"), soft_wrap=True)
    if exported.left:
        left = f"left out {exported.left_energy:.1%} of the energy, in {count}: {some(list(exported.left), 3)}"
        out.print(Text(left), soft_wrap=True)


def show_sweep(sweep: Sweep, out: Console) -> None:
    """Show every candidate's scores, the best and those within its noise, and a curve over a single number."""
    names = list(sweep.best.scores)
    table = Table((*sweep.axes, *names, "effective λ", ""), text=("",))
    pareto = sweep.pareto
    for trial in sweep.trials:
        remarks = ["best"] if trial is sweep.best else ["within noise of the best"] if sweep.within_noise(trial) else []
        remarks += [trial.failed] if trial.failed else []
        remarks += ["on the Pareto front"] if trial in pareto else []
        table.add_row(
            *(number(trial.values[axis]) for axis in sweep.axes),
            *(listings.scored(trial.scores.get(name)) for name in names),
            show(trial.realised, "number"),
            Text(", ".join(remarks)),
        )
    out.print(table)
    if len(sweep.axes) == 1 and len(sweep.scored) > 2:
        values = [trial.scores[sweep.by].value for trial in sweep.scored]
        (axis,) = sweep.axes
        ends = [number(trial.values[axis]) for trial in (sweep.scored[0], sweep.scored[-1])]
        curve = bars(values, min(values), max(values))
        out.print(
            Text(f"{sweep.by} over {axis}: {ends[0]} {curve} {ends[1]}  ({min(values):.4g} to {max(values):.4g})")
        )
    best = listings.values_of(sweep.best.values)
    out.print(Text(f"best: {best}, written to {sweep.best_recipe}", style="bold"), soft_wrap=True)
    if (smallest := sweep.smallest) is not None and smallest is not sweep.best:
        out.print(Text(f"smallest within noise of the best: {listings.values_of(smallest.values)}"), soft_wrap=True)
    if sweep.best.scores[sweep.by].error is None:
        out.print(Text("note: the noise of these scores is unknown; measure it with `--repeats`"), soft_wrap=True)


def apply_best(sweep: Sweep) -> str:
    """Return the command that merges with the best numbers, into a folder that does not exist yet."""
    command, output = f"skillmerge apply {shlex.quote(str(sweep.best_recipe))}", sweep.recipe.output.path
    if output is None or not os.path.lexists(output):
        return command
    names = (output.with_name(f"{output.name}-{end}") for end in ("best", *range(2, 100)))
    fresh = next((name for name in names if not os.path.lexists(name)), output)
    return f"{command} -o {shlex.quote(os.path.relpath(fresh))}"
