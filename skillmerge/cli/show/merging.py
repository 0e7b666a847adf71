"""Plans and merges for people: what would be done, what was done, and the effect of rounding.

Computes nothing but how to draw it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from skillmerge.cli.console import Text
from skillmerge.cli.show import listings
from skillmerge.cli.show.proving import show_gates
from skillmerge.cli.show.table import Table
from skillmerge.engine.measures.skill_statistics import SkillStatistics
from skillmerge.engine.rounding_statistics import LOSSES, Statistics
from skillmerge.plans.accounting import settlement
from skillmerge.plans.budget import Budget
from skillmerge.plans.depth import Depth
from skillmerge.plans.plan import Plan
from skillmerge.remarks import count_of
from skillmerge.tensors import format_bytes
from skillmerge.verbs.result import Result

if TYPE_CHECKING:
    from skillmerge.outputs.hub.published import Published


def show_plan(plan: Plan, needs: Budget | None, where: str | None, free: int | None, out: Console) -> None:
    """Show a plan: models, coefficients over depth, actions, totals."""
    recipe = plan.recipe
    out.print(Text(f"{recipe.document.name}: {recipe.document.data['merge']}", style="bold"))
    models = Table(("model", "from", "files", "size"), text=("model", "from"))
    for item in plan.inputs:
        role, onto = listings.role(plan, item.name), recipe.entries[item.name].onto
        size = format_bytes(sum(file.size for file in item.files))
        place = f"{item.uri} at {item.revision[:12]}" if item.revision else item.uri
        place += f" onto {onto}" if onto else ""
        held = ("-", "-") if item.naming.stack else (str(len(item.files)), size)  # a stack has no files of its own
        models.add_row(*map(Text, (role, place, *held)))
    out.print(models)
    for name, depth in listings.coefficients(plan):
        _show_coefficient(name, depth, out)
    _show_actions(plan, out)
    _show_vocabulary(plan, out)
    for gate in plan.recipe.gates:
        out.print(Text(f"gate: {gate.told}"), soft_wrap=True)
    _show_compared(plan, out)
    for note in plan.notes:
        out.print(Text(f"note: {note}"), soft_wrap=True)
    show_remarks(plan, out)
    if not plan.problems:  # else its sizes would be those of what little can be planned
        _show_totals(plan, needs, free, out)
    if where is not None:
        out.print(Text(f"output {where}"), soft_wrap=True)
    show_digest(plan, out)


def _show_totals(plan: Plan, needs: Budget | None, free: int | None, out: Console) -> None:
    totals = [f"reads {listings.read(plan)}", f"writes {listings.written(plan)}"]
    if (merged := listings.merged(plan)) is not None:
        totals.insert(0, f"merges {merged}")
    if (told := listings.patched(plan)) is not None:
        out.print(Text(told))
    if needs is not None:
        totals.append(f"peak memory about {format_bytes(needs.memory)} with {needs.threads} threads")
    if free is not None and plan.makes_skill:
        totals.append(f"disk {format_bytes(free)} free")
    elif free is not None:
        totals.append(f"disk needed {format_bytes(plan.bytes_written)} of {format_bytes(free)} free")
    out.print(Text(", ".join(totals)))


def show_remarks(plan: Plan, out: Console) -> None:
    """Show a plan's warnings and problems."""
    for warning in plan.warnings:
        out.print(Text(f"warning: {warning.message}", style="yellow"), soft_wrap=True)
        if warning.fix:
            out.print(Text(f"help: {warning.fix}"), soft_wrap=True)
    for problem in plan.problems:
        out.print(Text(f"problem: {problem.message}", style="red"), soft_wrap=True)
    for text in filter(None, (settlement(plan.recipe, plan.problems), plan.acceptance)):
        out.print(Text(f"help: {text}"), soft_wrap=True)


def show_digest(plan: Plan, out: Console) -> None:
    if not plan.problems:  # there is nothing to apply by that name
        out.print(Text(f"plan {plan.digest}", style="dim"), soft_wrap=True)
    if plan.warnings:
        out.print(Text(count_of(plan.warnings), style="yellow"))


def _show_compared(plan: Plan, out: Console) -> None:
    """Show what was compared in one line, and every difference as a row."""
    if plan.compared.line is not None:
        out.print(Text(plan.compared.line), soft_wrap=True)
    head, rows = listings.compared(plan)
    if rows:
        table = Table(head)
        for row in rows:
            table.add_row(*map(Text, row))
        out.print(table)


def _show_coefficient(name: str, depth: Depth, out: Console) -> None:
    """Show a coefficient over depth as a picture, then by layer and module, equal neighbors in one row."""
    for stack, drawn in depth.pictures:
        out.print(Text(f"{name} over {stack}: {drawn}"))
    table = Table((name, *depth.kinds), text=(name,))
    for label, cells in depth.rows:
        table.add_row(Text(label), *(cells[kind] for kind in depth.kinds))
    out.print(table)


def _show_actions(plan: Plan, out: Console) -> None:
    table = Table(listings.ACTION_COLUMNS, text=listings.ACTION_COLUMNS[1:])
    for row in listings.actions(plan):
        table.add_row(*map(Text, row))
    out.print(table)


def _show_vocabulary(plan: Plan, out: Console) -> None:
    """Show which rows are matched by token."""
    rows, lines = listings.vocabulary(plan)
    if rows:
        table = Table(listings.VOCABULARY_COLUMNS, text=("tokens",))
        for row in rows:
            table.add_row(*map(Text, row))
        out.print(table)
    for line in lines:
        out.print(Text(line), soft_wrap=True)


def show_changes(changes: Sequence[str], since: str, out: Console) -> None:
    """Show what changed since a saved plan."""
    if not changes:
        out.print(Text(f"nothing changed since {since}", style="bold"), soft_wrap=True)
    for change in changes:
        out.print(Text(f"- {change}"), soft_wrap=True)


def show_result(result: Result, out: Console) -> None:
    """Show where the output is, and the effect of rounding."""
    if result.already and not result.is_kept:
        pass  # it is on the Hub only
    elif result.already:
        nothing = "" if result.published else ", nothing to do"
        out.print(Text(f"{result.shown} is up to date{nothing}"), soft_wrap=True)
    else:
        _show_work(result, out)
        if result.gates:
            show_gates(result.gates, out)
    if result.published is not None:
        show_published(result.published, out)
    if result.warnings:
        out.print(Text(count_of(result.warnings), style="yellow"))


def _show_work(result: Result, out: Console) -> None:
    statistics, size = result.manifest.statistics, result.manifest.size
    if isinstance(statistics, SkillStatistics):
        out.print(_skill_table(statistics))
    elif statistics.mode != "off" and statistics.all.changed is not None:
        out.print(statistics_table(statistics))
    if result.plan is not None and (merged := listings.merged(result.plan)) is not None:
        out.print(Text(f"merged {merged}"))
    if result.plan is not None and (told := listings.patched(result.plan)) is not None:
        out.print(Text(told.replace("writes", "wrote")))
    what = f"wrote {result.shown}" if result.is_kept else "merged"
    where = f" on {result.device}" if result.device else ""
    if isinstance(statistics, SkillStatistics):
        whole = statistics.all.dense_bytes
        what += f", {size / whole:.2f} of the {format_bytes(whole)} that it would take uncompressed" if whole else ""
    out.print(Text(f"{what} ({format_bytes(size)} in {result.seconds:.1f} s{where})", style="bold"), soft_wrap=True)


def statistics_table(statistics: Statistics, title: str = "Effect of rounding") -> Table:
    title += " (sampled)" if statistics.mode == "sampled" else ""
    table = Table(("module", "merged tensors", *LOSSES), title, text=("module",), drop=("merged tensors",))
    for name, group in statistics.rows:
        if group.merged:
            table.add_row(name, str(group.merged), *group.shown)
    return table


def _skill_table(statistics: SkillStatistics) -> Table:
    head = ("module", "tensors", "elements", "changed", "norm", "stored", "ratio")
    table = Table(head, "Skill", text=("module",), drop=("elements", "tensors", "norm"))
    for name, group in statistics.rows:
        share = f"{group.bytes / group.dense_bytes:.3f}" if group.dense_bytes else "-"
        table.add_row(name, str(group.tensors), f"{group.elements:,}", *group.shown, share)
    return table


def show_published(published: Published, out: Console) -> None:
    """Show where on the Hub a model is."""
    what = "already published" if published.already else "published"
    branch = f" on branch `{published.branch}`" if published.branch else ""
    how = " as a pull request" if published.pull_request else branch
    out.print(Text(f"{what}{how}: {published.url} (commit {published.commit})", style="bold"), soft_wrap=True)
