"""The report's section on problems, warnings, notes and the comparison of the models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from skillmerge.cli.show import listings
from skillmerge.cli.show.report.html import escaped, prose, table
from skillmerge.outputs.manifest import ManifestBody
from skillmerge.plans.plan import Plan
from skillmerge.study.inspect import Inspection


def remarks_section(plan: Plan | None, manifest: ManifestBody | None, inspection: Inspection | None = None) -> str:
    """Return what needs attention and how the models differ, as HTML; nothing where there is nothing to say."""
    listed = remarks_list(plan, manifest, inspection)
    compared = _compared(plan) if plan is not None else ""
    if not listed and not compared:
        return ""
    return f'<section class="wide"><h2>Problems, warnings and notes</h2>{listed}{compared}</section>'


def remarks_list(
    plan: Plan | None = None,
    manifest: ManifestBody | None = None,
    inspection: Inspection | None = None,
    warned: Sequence[str] = (),
) -> str:
    """Return each problem, warning and note once; nothing where there is none. warned: warnings of a run."""
    problems = [problem.message for problem in plan.problems] if plan is not None else []
    warnings = [warning.message for warning in plan.warnings] if plan is not None else []
    warnings += manifest.warnings if manifest is not None else ()
    warnings += [remark.message for remark in inspection.remarks] if inspection is not None else ()
    notes = list(plan.notes) if plan is not None else []
    notes += inspection.notes if inspection is not None else ()
    kinds = (("problem", problems), ("warning", (*warnings, *warned)), ("note", notes))
    items = "".join(_items(kind, dict.fromkeys(messages)) for kind, messages in kinds)
    return f'<ul class="remarks">{items}</ul>' if items else ""


def _items(kind: str, messages: Iterable[str]) -> str:
    return "".join(f'<li class="{kind}"><b>{kind}</b> {prose(message)}' for message in messages)


def _compared(plan: Plan) -> str:
    said = f"<p>{prose(plan.compared.line)}</p>" if plan.compared.line is not None else ""
    head, found = listings.compared(plan)
    return said + table(
        [escaped(name) for name in head], ([prose(cell) for cell in row] for row in found), range(len(head))
    )
