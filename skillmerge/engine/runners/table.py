"""The table of runners, by the names that `Work.runner` uses."""

from __future__ import annotations

from collections.abc import Callable

from skillmerge.engine.runner import Runner, Work
from skillmerge.engine.runners.threads import Threads
from skillmerge.reporter import Reporter

RUNNERS: dict[str, Callable[[Work, Reporter], Runner]] = {"threads": Threads}


def runner_for(work: Work, reporter: Reporter) -> Runner:
    return RUNNERS[work.runner](work, reporter)
