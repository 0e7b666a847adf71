"""A plan as Markdown, for a job's summary or a comment on a pull request.

Names and messages come from recipes and checkpoints that a stranger may have proposed: none of them becomes markup, a
mention or a link, and the page stays within the size limit of a comment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from skillmerge.cli.show import listings
from skillmerge.errors import visible
from skillmerge.plans.accounting import settlement
from skillmerge.plans.budget import Budget
from skillmerge.plans.depth import Depth
from skillmerge.plans.plan import Plan
from skillmerge.remarks import count_of
from skillmerge.tensors import format_bytes

MARK = "<!-- skillmerge plan -->"
"""The first line, which identifies the comment on the next run."""

_ROWS = 40
_CELL = 300
"""Rows of a list and characters of a cell: a plan of any size fits into a comment of 65,536 characters."""


def plan_page(
    plan: Plan,
    needs: Budget | None,
    where: str | None,
    free: int | None,
    changes: Sequence[str] | None = None,
    since: str | None = None,
) -> str:
    """Return a plan as Markdown. where: the output. free: bytes on its disk. changes: since the saved plan `since`."""
    recipe = plan.recipe
    parts = [
        MARK,
        f"### {_code(recipe.document.name)}: {_code(recipe.document.data['merge'])}",
        _verdict(plan),
    ]
    if changes is not None:
        parts += [f"**Changes since {_code(since or '')}**", _list(changes) if changes else "None."]
    parts += [
        _problems(plan),
        _list([gate.told for gate in plan.recipe.gates], "gate: "),
        _compared(plan),
        _list([warning.message for warning in plan.warnings], "warning: "),
        _list(plan.notes, "note: "),
        _models(plan),
    ]
    parts += [_coefficient(name, depth) for name, depth in listings.coefficients(plan)]
    parts += [_actions(plan), _vocabulary(plan)]
    if not plan.problems:
        parts += [_totals(plan, needs, where, free), f"plan `{plan.digest}`"]
    return "\n\n".join(filter(None, parts)) + "\n"


def _verdict(plan: Plan) -> str:
    if not plan.problems and not getattr(plan, "ok", True):
        return f"**Cannot be applied with `--strict`**: {count_of(plan.warnings)}."
    if not plan.problems:
        return f"**Can be applied**: {len(plan.tensors)} tensors, {format_bytes(plan.bytes_written)}."
    count = len(plan.problems)
    return f"**Cannot be applied**: {count} problem{'s' if count > 1 else ''} between the models."


def _problems(plan: Plan) -> str:
    if not plan.problems:
        return ""
    listed = _list(problem.message for problem in plan.problems)
    fix = "\n".join(filter(None, (settlement(plan.recipe, plan.problems), plan.acceptance)))
    return f"{listed}\n\n{_block(fix)}" if fix else listed


def _compared(plan: Plan) -> str:
    head, rows = listings.compared(plan)
    table = _table([head[0], *map(_code, head[1:-1]), head[-1]], [[*map(_code, row)] for row in rows]) if rows else ""
    return "\n\n".join(filter(None, (plan.compared.line, table)))


def _models(plan: Plan) -> str:
    rows = [
        (
            _code(item.name) + listings.role(plan, item.name).removeprefix(item.name),
            _code(item.uri),
            _code(item.revision) if item.revision else "",
            str(len(item.files)),
            format_bytes(sum(file.size for file in item.files)),
        )
        for item in plan.inputs
    ]
    return _table(("model", "from", "commit", "files", "size"), rows)


def _coefficient(name: str, depth: Depth) -> str:
    pictures = [f"{_code(name)} over {_code(stack)}: {_code(drawn)}" for stack, drawn in depth.pictures]
    rows = [(_code(label), *(cells[kind] for kind in depth.kinds)) for label, cells in depth.rows]
    return "\n\n".join([*pictures, _table((_code(name), *depth.kinds), rows)])


def _actions(plan: Plan) -> str:
    rows = [(row.tensors, _code(row.models), row.what, _code(row.names)) for row in listings.actions(plan)]
    return _table(listings.ACTION_COLUMNS, rows)


def _vocabulary(plan: Plan) -> str:
    rows, lines = listings.vocabulary(plan)
    table = _table(listings.VOCABULARY_COLUMNS, [(_code(row[0]), *row[1:]) for row in rows]) if rows else ""
    return "\n\n".join(filter(None, (table, _list(lines))))


def _totals(plan: Plan, needs: Budget | None, where: str | None, free: int | None) -> str:
    rows = [("reads", listings.read(plan)), ("writes", listings.written(plan))]
    if (merged := listings.merged(plan)) is not None:
        rows.insert(0, ("merges", merged))
    if (told := listings.patched(plan)) is not None:
        rows.insert(0, ("output", told))
    if needs is not None:
        rows.append(("peak memory", f"about {format_bytes(needs.memory)} with {needs.threads} threads"))
    if free is not None:
        rows.append(("disk free", format_bytes(free)))
    if where is not None:
        rows.append(("output", _code(where)))
    return _table(("totals", ""), rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", r"\|") for cell in row] for row in rows[:_ROWS])]
    if len(rows) > _ROWS:
        lines.append([f"… and {len(rows) - _ROWS} more", *[""] * (len(header) - 1)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _list(items: Iterable[str], what: str = "") -> str:
    every = list(items)
    more = [f"- … and {len(every) - _ROWS} more"] if len(every) > _ROWS else []
    return "\n".join([*(f"- {what}{_code(item)}" for item in every[:_ROWS]), *more])


def _code(text: str) -> str:
    """Return text as a code span on one line, with a fence longer than any in it, so that nothing is markup."""
    line = " ".join(visible(text).split())
    line = line if len(line) <= _CELL else f"{line[: _CELL - 1]}…"
    fence = _fence(line, 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}" if line else ""


def _fence(text: str, least: int) -> str:
    return "`" * max(least, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))


def _block(text: str) -> str:
    """Return lines as a code block, fenced by more backticks than they contain."""
    kept = visible(text)[: 20 * _CELL]
    fence = _fence(kept, 3)
    return f"{fence}yaml\n{kept}\n{fence}"
