"""The report's section on problems, warnings, notes and the comparison of the models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from skillmerge.cli.show import tables
from skillmerge.cli.show.html import escaped, prose
from skillmerge.outputs.manifest import ManifestBody
from skillmerge.plans.plan import Plan


def remarks_section(plan: Plan | None, manifest: ManifestBody | None) -> str:
    """Return what needs attention and how the models differ, as HTML; nothing where there is nothing to say."""
    problems = [problem.message for problem in plan.problems] if plan is not None else []
    warnings = [warning.message for warning in plan.warnings] if plan is not None else []
    warnings += [message for message in (manifest.warnings if manifest is not None else ()) if message not in warnings]
    notes = list(plan.notes) if plan is not None else []
    listed = "".join(_items(kind, items) for kind, items in (
        ("problem", problems), ("warning", warnings), ("note", notes),
    ))  # fmt: skip
    listed = f'<ul class="remarks">{listed}</ul>' if listed else ""
    compared = _compared(plan) if plan is not None else ""
    return f"<section><h2>Problems, warnings and notes</h2>{listed}{compared}</section>" if listed or compared else ""


def _items(kind: str, messages: Iterable[str]) -> str:
    return "".join(f'<li class="{kind}"><b>{kind}</b> {prose(message)}</li>' for message in messages)


def _compared(plan: Plan) -> str:
    said = f"<p>{escaped(plan.compared.line)}</p>" if plan.compared.line is not None else ""
    head, found = tables.compared(plan)
    if not found:
        return said
    rows = "".join(_row("td", row) for row in found)
    table = f"<table><thead>{_row('th', head)}</thead><tbody>{rows}</tbody></table>"
    return f'{said}<div class="scroll" tabindex="0">{table}</div>'


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag} class=text>{escaped(cell)}</{tag}>" for cell in cells) + "</tr>"
