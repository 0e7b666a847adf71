"""The report's section on problems, warnings, notes and the comparison of the models."""

from __future__ import annotations

from collections.abc import Sequence

from skillmerge.cli.show import listings
from skillmerge.cli.show.report.html import escaped, prose, table
from skillmerge.outputs.manifest import ManifestBody
from skillmerge.plans.plan import Plan
from skillmerge.study.inspect import Inspection


def remarks_section(plan: Plan | None, manifest: ManifestBody | None, inspection: Inspection | None = None) -> str:
    """Return what needs attention and how the models differ, as HTML; nothing where there is nothing to say."""
    listed = remarks_list(plan, manifest, inspection)
    compared = _compared(plan) + _vocabulary(plan) if plan is not None else ""
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
    notes = list(plan.notes) if plan is not None else []
    notes += inspection.notes if inspection is not None else ()
    remarks = (*(plan.warnings if plan is not None else ()), *(inspection.remarks if inspection is not None else ()))
    warnings = {remark.message: remark.fix for remark in remarks}
    for message in (*(manifest.warnings if manifest is not None else ()), *warned):
        warnings.setdefault(message, None)
    kinds = (("problem", dict.fromkeys(problems)), ("warning", warnings), ("note", dict.fromkeys(notes)))
    items = "".join(_item(kind, *item) for kind, messages in kinds for item in messages.items())
    return f'<ul class="remarks">{items}</ul>' if items else ""


def _item(kind: str, message: str, fix: str | None) -> str:
    help_ = f"<br><b>help</b> {prose(fix)}" if fix else ""
    return f'<li class="{kind}"><b>{kind}</b> {prose(message)}{help_}'


def _compared(plan: Plan) -> str:
    said = f"<p>{prose(plan.compared.line)}</p>" if plan.compared.line is not None else ""
    head, found = listings.compared(plan)
    return said + table(
        [escaped(name) for name in head], ([prose(cell) for cell in row] for row in found), range(len(head))
    )


def _vocabulary(plan: Plan) -> str:
    """Return which rows are matched by token."""
    rows, lines = listings.vocabulary(plan)
    if not rows:
        return ""
    shown = table([escaped(name) for name in listings.VOCABULARY_COLUMNS], ([prose(it) for it in row] for row in rows))
    return "<h3>Rows by token</h3>" + shown + "".join(f"<p>{prose(line)}</p>" for line in lines)
