"""Plans and results for people: rich tables on stdout.

Only shows what it is given; nothing is computed here but how to draw it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from skillmerge.cli.console import Text
from skillmerge.cli.console import console as console
from skillmerge.cli.show import tables
from skillmerge.cli.show.figures import show
from skillmerge.engine.measures.skill_statistics import SkillStatistics
from skillmerge.engine.rounding_statistics import LOSSES, Statistics
from skillmerge.errors import some
from skillmerge.naming import module_kind
from skillmerge.outputs.output import Outcome
from skillmerge.outputs.verify import Verdict
from skillmerge.plans.accounting import settlement
from skillmerge.plans.budget import Budget
from skillmerge.plans.depth import Depth, bars, number
from skillmerge.plans.plan import Plan
from skillmerge.remarks import count_of
from skillmerge.tensors import format_bytes
from skillmerge.verbs.export.patch import Patch
from skillmerge.verbs.result import Result

if TYPE_CHECKING:
    from skillmerge.cli.doctor import Diagnosis
    from skillmerge.outputs.hub.commit import Published
    from skillmerge.recipes.lint import Lint
    from skillmerge.verbs.demo.demo import Shown
    from skillmerge.verbs.demo.miniature import Question
    from skillmerge.verbs.derive import Derived
    from skillmerge.verbs.export.lora import Exported
    from skillmerge.verbs.rebuild import Rebuilt
    from skillmerge.verbs.sweep.sweep import Sweep


def new_table(head: Sequence[str], title: str | None = None, left: Collection[str] | None = None) -> Table:
    """A table with these columns. left: those with text; numbers are on the right. By default all are text."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for column in head:
        table.add_column(Text(column), justify="left" if left is None or column in left else "right")
    return table


def show_plan(plan: Plan, needs: Budget | None, where: str | None, free: int | None, out: Console) -> None:
    """The human view of a plan: models, coefficients over depth, what happens to the tensors, totals."""
    recipe = plan.recipe
    out.print(Text(f"{recipe.document.name}: {recipe.document.data['merge']}", style="bold"))
    models = new_table(("model", "from", "files", "size"))
    for item in plan.inputs:
        role = f"{item.name} (donor)" if item.name == plan.donor else item.name
        size = format_bytes(sum(file.size for file in item.files))
        place = f"{item.uri} at {item.revision[:12]}" if item.revision else item.uri
        models.add_row(*map(Text, (role, place, str(len(item.files)), size)))
    out.print(models)
    for name, depth in tables.coefficients(plan):
        _show_coefficient(name, depth, out)
    _show_actions(plan, out)
    for gate in plan.recipe.gates:
        out.print(Text(f"gate: {gate.told}"), soft_wrap=True)
    _show_compared(plan, out)
    for note in plan.notes:
        out.print(Text(f"note: {note}"), soft_wrap=True)
    show_remarks(plan, out)
    totals = [f"reads {format_bytes(plan.bytes_read)}", f"writes {tables.written(plan)}"]
    if (merged := tables.merged(plan)) is not None:
        totals.insert(0, f"merges {merged}")
    if needs is not None:
        totals.append(f"peak memory about {format_bytes(needs.memory)} with {needs.threads} threads")
    if free is not None and plan.makes_skill:
        totals.append(f"disk {format_bytes(free)} free")
    elif free is not None:
        totals.append(f"disk needed {format_bytes(plan.bytes_written)} of {format_bytes(free)} free")
    out.print(Text(", ".join(totals)))
    if where is not None:
        out.print(Text(f"output {where}"), soft_wrap=True)
    show_digest(plan, out)


def show_remarks(plan: Plan, out: Console) -> None:
    """What of a plan needs attention."""
    for warning in plan.warnings:
        out.print(Text(f"warning: {warning.message}", style="yellow"), soft_wrap=True)
        if warning.fix:
            out.print(Text(f"help: {warning.fix}"), soft_wrap=True)
    for problem in plan.problems:
        out.print(Text(f"problem: {problem.message}", style="red"), soft_wrap=True)
    for text in filter(None, (settlement(plan.recipe, plan.problems), plan.acceptance)):
        out.print(Text(f"help: {text}"), soft_wrap=True)


def show_digest(plan: Plan, out: Console) -> None:
    out.print(Text(f"plan {plan.digest}", style="dim"), soft_wrap=True)
    if plan.warnings:
        out.print(Text(count_of(plan.warnings), style="yellow"))


def _show_compared(plan: Plan, out: Console) -> None:
    """What was compared in one line, and every difference as a row."""
    if plan.compared.line is not None:
        out.print(Text(plan.compared.line), soft_wrap=True)
    head, rows = tables.compared(plan)
    if rows:
        table = new_table(head)
        for row in rows:
            table.add_row(*map(Text, row))
        out.print(table)


def _show_coefficient(name: str, depth: Depth, out: Console) -> None:
    """A coefficient over depth as a picture, then by layer and module, equal neighbors in one row."""
    for stack, drawn in depth.pictures:
        out.print(Text(f"{name} over {stack}: {drawn}"))
    table = new_table((name, *depth.kinds))
    for label, cells in depth.rows:
        table.add_row(Text(label), *(cells[kind] for kind in depth.kinds))
    out.print(table)


def _show_actions(plan: Plan, out: Console) -> None:
    table = new_table(tables.ACTION_COLUMNS)
    for row in tables.actions(plan):
        table.add_row(*map(Text, row))
    out.print(table)


def show_result(result: Result, out: Console) -> None:
    """Where the output is and what rounding did."""
    if result.already and not result.output.exists():
        pass  # it is on the Hub only
    elif result.already:
        nothing = "" if result.published else ", nothing to do"
        out.print(Text(f"{result.output} is this plan's output already{nothing}"), soft_wrap=True)
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
    if result.plan is not None and (merged := tables.merged(result.plan)) is not None:
        out.print(Text(f"merged {merged}"))
    what = f"wrote {result.output}" if result.output.exists() else "merged"
    where = f" on {result.device}" if result.device else ""
    if isinstance(statistics, SkillStatistics):
        whole = statistics.all.dense_bytes
        what += f", {size / whole:.2f} of the {format_bytes(whole)} that it would take whole" if whole else ""
    out.print(Text(f"{what} ({format_bytes(size)} in {result.seconds:.1f} s{where})", style="bold"), soft_wrap=True)


def show_gates(outcomes: Sequence[Outcome], out: Console) -> None:
    """What was asked of the output, what was measured, and the verdict."""
    table = new_table(tables.GATE_COLUMNS, left={*tables.GATE_COLUMNS} - {"measured"})
    for outcome in outcomes:
        measured = f"{outcome.measured:.4g}" if outcome.measured is not None else "-"
        verdict = Text("passed", "green") if outcome.passed else Text("FAILED", "bold red")
        table.add_row(Text(outcome.gate), Text(outcome.asked), measured, verdict, Text(outcome.detail))
    out.print(table)


def show_published(published: Published, out: Console) -> None:
    """Where on the Hub a model is."""
    what = "is there already" if published.already else "published"
    how = " as a pull request" if published.pull_request else ""
    out.print(Text(f"{what}{how}: {published.url} (commit {published.commit})", style="bold"), soft_wrap=True)


def statistics_table(statistics: Statistics, title: str = "what rounding did") -> Table:
    title += " (sampled)" if statistics.mode == "sampled" else ""
    table = new_table(("module", "merged tensors", *LOSSES), title, left=("module",))
    for name, group in statistics.rows:
        if group.merged:
            table.add_row(name, str(group.merged), *group.shown)
    return table


def _skill_table(statistics: SkillStatistics) -> Table:
    head = ("module", "tensors", "elements", "changed", "norm", "stored", "of whole")
    table = new_table(head, "the skill", left=("module",))
    for name, group in statistics.rows:
        share = f"{group.bytes / group.dense_bytes:.3f}" if group.dense_bytes else "-"
        table.add_row(name, str(group.tensors), f"{group.elements:,}", *group.shown, share)
    return table


def show_exported(exported: Exported | Patch, out: Console) -> None:
    """What was written of a skill for others to read."""
    if isinstance(exported, Patch):
        share = f"{exported.elements / exported.of:.1%}" if exported.of else "none"
        what = f"{share} of the elements in {exported.tensors} tensors, {format_bytes(exported.bytes)}"
        told = f"wrote {exported.output}: {what}"
        out.print(Text(told, style="bold"), soft_wrap=True)
    else:
        _show_adapter(exported, out)


def _show_adapter(exported: Exported, out: Console) -> None:
    """How much of a skill an adapter holds, by module."""
    groups: dict[str, list[Mapping[str, float]]] = {}
    for name, row in exported.modules.items():
        groups.setdefault(module_kind(name), []).append(row)
    head = ("module", "matrices", "norm", "energy kept", "least")
    table = new_table(head, f"the adapter, rank {exported.rank}", left=("module",))
    for kind, rows in groups.items():
        squares = [row["norm"] ** 2 for row in rows]
        kept = sum(row["energy"] * square for row, square in zip(rows, squares, strict=True))
        share = kept / sum(squares) if sum(squares) else 1.0
        least = min(row["energy"] for row in rows)
        table.add_row(kind, str(len(rows)), number(math.sqrt(sum(squares))), f"{share:.1%}", f"{least:.1%}")
    out.print(table)
    count = f"{len(exported.left)} tensor{'s' if len(exported.left) != 1 else ''}"
    told = f"wrote {exported.output}: it holds {exported.energy:.1%} of the skill's energy"
    out.print(Text(told, style="bold"), soft_wrap=True)
    if exported.left:
        left = f"{count} that no adapter holds have {exported.left_energy:.1%} of it: {some(list(exported.left), 3)}"
        out.print(Text(left), soft_wrap=True)


def show_sweep(sweep: Sweep, out: Console) -> None:
    """Every candidate's scores, the best and those that could be as good; a curve over a single number."""
    names = list(sweep.best.scores)
    table = new_table((*sweep.axes, *names, "realised", ""), left=("",))
    pareto = sweep.pareto
    for trial in sweep.trials:
        remarks = ["best"] if trial is sweep.best else ["within noise of the best"] if sweep.within_noise(trial) else []
        remarks += [trial.failed] if trial.failed else []
        remarks += ["not beaten in all"] if trial in pareto else []
        table.add_row(
            *(number(trial.values[axis]) for axis in sweep.axes),
            *(tables.scored(trial.scores.get(name)) for name in names),
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
    told = ", ".join(f"{name} = {number(value)}" for name, value in sweep.best.values.items())
    out.print(Text(f"best: {told}, written to {sweep.best_recipe}", style="bold"), soft_wrap=True)
    if sweep.best.scores[sweep.by].error is None:
        out.print(Text("how noisy these scores are is not known: --repeats shows it"), soft_wrap=True)


def show_changes(changes: Sequence[str], since: str, out: Console) -> None:
    """What is different from a saved plan."""
    if not changes:
        out.print(Text(f"nothing changed since {since}", style="bold"), soft_wrap=True)
    for change in changes:
        out.print(Text(f"- {change}"), soft_wrap=True)


def show_lint(lint: Lint, out: Console) -> None:
    """As compilers do: file, line, column, what is wrong, and the line itself."""
    for finding in lint.findings:
        place = f":{finding.place.line + 1}:{finding.place.column + 1}" if finding.place else ""
        level = finding.rule.level
        told = Text(f"{finding.file}{place}: ", style="bold") + Text(f"{level}: ", style=_LEVELS[level])
        out.print(told + Text(f"{finding.message} [{finding.rule.id}]"), soft_wrap=True)
        for text in filter(None, (finding.excerpt, finding.fix and f"help: {finding.fix}")):
            out.print(Text(text), soft_wrap=True)
    files = f"{len(lint.files)} recipe{'s' if len(lint.files) != 1 else ''}"
    counts = [_count(lint, level) for level in _LEVELS if level != "note" or lint.count(level)]
    out.print(Text(f"{files}: {', '.join(counts)}", style="bold"))


def _count(lint: Lint, level: str) -> str:
    count = lint.count(level)
    return f"{count or 'no'} {level}{'s' if count != 1 else ''}"


_LEVELS = {"error": "red", "warning": "yellow", "note": ""}


_BYTES = ("total", "available", "free", "memory", "cgroup limit")
"""Facts of a diagnosis that are sizes, where they are large."""


def show_diagnosis(diagnosis: Diagnosis, out: Console) -> None:
    """Sections of facts, ready to be pasted."""
    for name, facts in diagnosis.sections.items():
        out.print(Text(name, style="bold"))
        for key, value in facts.items() or [("none", "")]:
            out.print(Text(f"  {key}: {_fact(key, value)}" if value != "" else f"  {key}"), soft_wrap=True)
    table = new_table(tables.TRIAL_COLUMNS, left=tables.TRIAL_COLUMNS)
    for trial in diagnosis.trials:
        works = "not known" if trial.works is None else "yes" if trial.works else "no"
        table.add_row(trial.what, works, trial.follows)
    out.print(table)


def _fact(key: str, value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(", ".join(_fact(name, fact) for name, fact in item.items()) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key in _BYTES and isinstance(value, int):
        return format_bytes(value)
    return "none" if value is None else str(value)


def show_derived(derived: Derived, out: Console) -> None:
    values = list(derived.numbers.values())
    what = f"{len(values)} rules, {number(min(values))} to {number(max(values))}" if values else "no rules"
    out.print(Text(f"wrote {derived.output}: {what}", style="bold"), soft_wrap=True)
    if derived.removed is not None and derived.chance is not None:
        out.print(Text(f"removes {derived.removed:.3%} of the update's energy; chance would be {derived.chance:.3%}"))


def show_answers(shown: Sequence[Shown], examples: Sequence[tuple[Question, str, str]], out: Console) -> None:
    """How models answer: shares, and some questions with the first one's and the last one's answers."""
    title = f"{len(shown[0].right)} questions about people whom only the target has read of, answered rightly"
    out.print(Text(title, style="bold"))
    table = new_table(("model", "greedy", "sampled"), left=("model",))
    for row in shown:
        table.add_row(row.name, f"{row.greedy:.1%}", f"{row.sampled:.1%}")
    out.print(table)
    table = new_table(("question", "right", "before", "after"))
    for question, before, after in examples:
        table.add_row(*map(Text, (" ".join(question.words), question.wanted, before, after)))
    out.print(table)


def show_parent(parent: str, model: str, out: Console) -> None:
    out.print(Text(f"{parent} is `{model}` of this skill: all tensors have the digests that it was extracted from"))


def show_rebuilt(made: Rebuilt, out: Console) -> None:
    """What was built again, and that it is the same."""
    what = "all" if made.tensors == made.of else f"{made.tensors} of"
    told = f"{made.folder}: {what} {made.of} tensors ({format_bytes(made.bytes)}) come out the same, to the byte"
    out.print(Text(told if made.output is None else f"{told}, in {made.output}", style="bold"), soft_wrap=True)


def show_verdict(verdict: Verdict, out: Console) -> None:
    out.print(
        Text(
            f"{verdict.folder}: verified: {verdict.files} files, {verdict.tensors} tensors, "
            f"{format_bytes(verdict.bytes)}: digests, index, headers, shapes, dtypes, finite values"
        ),
        soft_wrap=True,
    )
    if verdict.load is not None:
        _show_load(verdict.load, out)


def _show_load(report: Mapping[str, Any], out: Console) -> None:
    """What loaded the model, its tokenizer, and what other runtimes made of it."""
    lines = [f"loaded as {report['class']}: no missing, unexpected or mismatched keys; finite output"]
    tokenizer, vllm = report["tokenizer"], report.get("vllm", {})
    if "texts" in tokenizer:
        size = f"{tokenizer['tokens']} tokens for {tokenizer['rows']} rows"
        again = f"{tokenizer['texts']} texts give the same ids when written and read again"
        lines.append(f"tokenizer {tokenizer['class']}: {size}; {again}")
    if vllm:
        count = len(vllm["tokens"])
        same = "all" if vllm["same"] == count else f"the first {vllm['same']}"
        alike = f"{same} of {count} tokens are those of transformers, in {vllm['dtype']}"
        lines.append(f"loaded in vLLM {vllm['version']}: {alike}")
    for line in lines:
        out.print(Text(line), soft_wrap=True)
    for note in (*tokenizer["notes"], *vllm.get("notes", ())):
        out.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)
