"""The report's section on a sweep: scores over each number, two scores against each other, every candidate."""

from __future__ import annotations

from collections.abc import Iterator

from skillmerge.cli.show import listings
from skillmerge.cli.show.figures import show
from skillmerge.cli.show.report.charts import chart
from skillmerge.cli.show.report.html import escaped, prose, table
from skillmerge.plans.depth import number
from skillmerge.verbs.sweep.journal import Trial
from skillmerge.verbs.sweep.sweep import Sweep


def sweep_section(sweep: Sweep) -> str:
    charts = "".join((*_over_axes(sweep), *_against(sweep)))
    return (
        f'<section class="wide"><h2>Scores</h2><p>Scored with <code>{escaped(sweep.score)}</code>; '
        f"<code>{escaped(sweep.by)}</code> decides.</p><div class=charts>{charts}</div></section>"
        f"<section><h2>Candidates</h2>{candidates(sweep)}</section>"
    )


def _over_axes(sweep: Sweep) -> Iterator[str]:
    """Each score over each number, with the lambda that rounding left above it."""
    sign = 1 if sweep.minimise else -1
    for axis in sweep.axes if len(sweep.scored) > 1 else ():
        best: dict[float, Trial] = {}  # of several numbers, the best of the others at each value of this one
        for trial in sorted(sweep.scored, key=lambda trial: -sign * trial.scores[sweep.by].value):
            best[trial.values[axis]] = trial
        effective = {value: trial.realised for value, trial in best.items() if trial.realised is not None}
        for name in sweep.best.scores:
            points = [(value, best[value].scores[name].value) for value in sorted(best)]
            yield chart(name, axis, {name: points}, "number", above=("effective λ", effective))


def _against(sweep: Sweep) -> Iterator[str]:
    """Two scores against each other, of the candidates that no other beats in both."""
    names = list(sweep.best.scores)
    pareto = sorted(sweep.pareto, key=lambda trial: trial.scores[names[0]].value)
    if len(pareto) > 1:
        points = [(trial.scores[names[0]].value, trial.scores[names[1]].value) for trial in pareto]
        yield chart(f"{names[1]}: candidates that no other beats in all", names[0], {names[1]: points}, "number")


def candidates(sweep: Sweep) -> str:
    """Return every candidate as a row: its numbers, its scores, and whether it could be the best."""
    names = list(sweep.best.scores)
    rows = []
    for trial in sweep.trials:
        cells = [number(trial.values[axis]) for axis in sweep.axes]
        cells += [listings.scored(trial.scores.get(name)) for name in names]
        cells.append(show(trial.realised, "number"))
        best = trial is sweep.best
        near = "<b>best</b>" if best else "within noise of the best" if sweep.within_noise(trial) else ""
        rows.append((*cells, prose(trial.failed) or near))
    head = (*map(escaped, (*sweep.axes, *names)), "effective λ", "remark")
    return table(head, rows, (0, len(head) - 1))
