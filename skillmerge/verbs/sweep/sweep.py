"""The verb sweep: a recipe, numbers to try, and a score -> the scores of all candidates, and the best recipe.

    recipe.sweep/journal.jsonl   settings, then one line per candidate, so that nothing is scored twice
    recipe.sweep/optuna.jsonl    a search's own memory
    recipe.sweep/results.json    everything, for programs
    recipe.sweep/scratch/        a candidate that is being scored
    recipe.best.yaml             the recipe with the best numbers, and how they were found

A command scores folders, which are created and removed one by one; anything else scores a model in memory.
"""

from __future__ import annotations

import json
import math
import operator
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillmerge.brief import brief, drawn
from skillmerge.durable import disk_errors, remove_tree, write_whole
from skillmerge.engine.runner import Work, check_words
from skillmerge.errors import CheckFailed, UsageError
from skillmerge.plans.opening import Access
from skillmerge.recipes.recipe import Recipe
from skillmerge.recipes.source import RecipeSource
from skillmerge.reporter import Reporter, default_reporter
from skillmerge.study.scoring.scores import CONFIDENCE, NotFinite, Score, together
from skillmerge.verbs.sweep.candidates import Values, grid, with_values
from skillmerge.verbs.sweep.in_folder import InFolder
from skillmerge.verbs.sweep.journal import Journal, Trial
from skillmerge.verbs.sweep.search import Scored, searched
from skillmerge.verbs.sweep.setting import FOUND, Asked, Setting, prepare
from skillmerge.verbs.tasks.cluster import Cluster, check_cluster

if TYPE_CHECKING:
    from skillmerge.verbs.sweep.in_memory import MergedModel


@dataclass(frozen=True, slots=True)
class Sweep:
    """All candidates in the order of their values. by: the score that decides; minimise: whether lower is better."""

    output: Path
    recipe: Recipe
    best_recipe: Path
    score: str
    axes: tuple[str, ...]
    by: str
    minimise: bool
    trials: tuple[Trial, ...]
    resumed: int

    __repr__ = brief
    _repr_html_ = drawn

    @property
    def scored(self) -> list[Trial]:
        return [trial for trial in self.trials if not trial.failed]

    @property
    def best(self) -> Trial:
        """The candidate with the best score; of equals, the one with the smallest numbers."""
        sign = 1 if self.minimise else -1
        return min(self.scored, key=lambda trial: (sign * trial.scores[self.by].value, _size(trial.values)))

    def within_noise(self, trial: Trial) -> bool | None:
        """Return whether chance could explain the difference from the best (95 %); None if the noise is unknown.

        Errors are taken as independent, which overstates the noise if the questions are the same.
        """
        if trial.failed:
            return False
        one, other = self.best.scores[self.by], trial.scores[self.by]
        if one.error is None or other.error is None:
            return None
        return abs(one.value - other.value) <= CONFIDENCE * math.hypot(one.error, other.error)

    @property
    def smallest(self) -> Trial | None:
        """The candidate with the smallest numbers within noise of the best; None where the noise is not known."""
        near = [trial for trial in self.scored if self.within_noise(trial)]
        return min(near, key=lambda trial: _size(trial.values), default=None)

    @property
    def pareto(self) -> list[Trial]:
        """The Pareto front, if there are two scores or more: candidates that no other one dominates."""
        names = list(self.best.scores)
        sign = {name: -1 if name == self.by and self.minimise else 1 for name in names}

        def beaten(trial: Trial) -> bool:
            mine = [sign[name] * trial.scores[name].value for name in names]
            for other in self.scored:
                theirs = [sign[name] * other.scores[name].value for name in names]
                if theirs != mine and all(a >= b for a, b in zip(theirs, mine, strict=True)):
                    return True
            return False

        return [trial for trial in self.scored if not beaten(trial)] if len(names) > 1 else []

    def as_dict(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "best_recipe": str(self.best_recipe),
            "score": self.score,
            "by": self.by,
            "minimise": self.minimise,
            "best": self.best.as_dict(),
            "within_noise": [trial.as_dict()["values"] for trial in self.trials if self.within_noise(trial)],
            "pareto": [dict(trial.values) for trial in self.pareto],
            "trials": [trial.as_dict() for trial in self.trials],
            "resumed": self.resumed,
        }


def sweep(
    recipe: RecipeSource,
    axes: Sequence[str],
    score: str,
    output: str | os.PathLike[str] | None = None,
    *,
    by: str | None = None,
    minimise: bool | None = None,
    repeats: int = 1,
    search: str | None = None,
    trials: int = 30,
    seed: int = 0,
    device: str = "auto",
    on: str | None = None,
    overwrite: bool = False,
    follow_links: bool = False,
    locked: bool = False,
    hub: str = "stream",
    reporter: Reporter | None = None,
    finished: Callable[[Trial], None] = lambda trial: None,
) -> Sweep:
    """Score a recipe with many coefficients, and write the best recipe.

    axes: see `candidates`. score: see `study.scoring.scorers`. output: the sweep's folder [default: `recipe.sweep`
    beside the recipe]. by: the score that decides [default: the first]. search: tpe, cmaes or random (with Optuna)
    instead of a grid, with `trials` candidates. repeats: how often each is scored, with different seeds. on: ray or
    ray://HOST:PORT, where candidates are merged and scored by a command, side by side. Rerun to resume. Raises
    UsageError, CheckFailed if a score fails, OutputLocked, and what `apply` raises.
    """
    check_words(repeats=repeats, trials=trials, seed=seed, device=device, hub=hub)
    reporter = reporter or default_reporter("sweeping", "candidates")
    check_cluster(on)
    how = Access(follow_links, locked, download=hub == "download"), device, on
    asked = Asked(search, operator.index(trials), operator.index(repeats), operator.index(seed), by, minimise)
    setting = prepare(recipe, axes, score, output, asked, how)
    if setting.recipe.gates:
        reporter.note("gates do not run while candidates are scored; the best recipe keeps them")
    with (
        Journal.open(setting.folder, setting.identity, overwrite, reporter) as journal,
        _scoring(setting, reporter) as scored,
    ):
        resumed = len(journal.trials)
        if resumed:
            reporter.note(_kept(setting, journal))
        made = _ordered(_try_all(setting, journal, scored, reporter, finished))
        return _report(setting, made, resumed, reporter)


def _try_all(
    setting: Setting, journal: Journal, scored: Scored, reporter: Reporter, finished: Callable[[Trial], None]
) -> list[Trial]:
    """Return every candidate's scores, from the journal or scored now."""
    asked = setting.asked

    def keep(trial: Trial) -> Trial:
        _check_names(trial, journal.trials, asked.by)
        journal.add(trial)
        finished(trial)
        return trial

    def tried(values: Values) -> Trial:
        trial = journal.find(values)
        if trial is not None:
            _check_names(trial, (), asked.by)
            return trial
        return keep(scored(values, with_values(setting.recipe, values)))

    if asked.search is not None:
        return searched(
            setting.axes, asked.search, asked.trials, asked.seed, setting.folder, tried, asked.by, setting.less
        )
    candidates = list(grid(setting.axes))
    found = []
    with reporter.bar(len(candidates)) as progress:
        if setting.on is not None:
            left = [values for values in candidates if journal.find(values) is None]
            for number, trial in enumerate(_scored_on(setting.on, setting, left, reporter) if left else (), 1):
                keep(trial)
                progress(len(candidates) - len(left) + number)
            return [tried(values) for values in candidates]
        for number, values in enumerate(candidates, start=1):
            found.append(tried(values))
            progress(number)
    return found


def _kept(setting: Setting, journal: Journal) -> str:
    """Return a note on the scores that are not measured again: the journal cannot know what a command reads."""
    if setting.asked.search is None:
        known = [journal.find(values) is not None for values in grid(setting.axes)]
        found, count = sum(known), len(known)
    else:
        found, count = min(len(journal.trials), setting.asked.trials), setting.asked.trials
    changed = "if the command changed, " if setting.scorer.command is not None else ""
    return f"{found} of {count} candidates read from {journal.path}; {changed}pass `--overwrite` to score them again"


def _report(setting: Setting, made: tuple[Trial, ...], resumed: int, reporter: Reporter) -> Sweep:
    """Write the results and the best recipe, and warn of a range that is too narrow.

    Raises CheckFailed if no candidate has a score.
    """
    names = next((list(trial.scores) for trial in made if not trial.failed), None)
    if names is None:
        raise CheckFailed(f"no candidate has a score: {made[0].failed}", fix="try smaller coefficients")
    axes, by = tuple(axis.name for axis in setting.axes), setting.asked.by or names[0]
    result = Sweep(
        setting.folder,
        setting.recipe,
        setting.best,
        setting.score,
        axes,
        by,
        setting.less,
        made,
        min(resumed, len(made)),
    )  # fmt: skip
    with disk_errors(setting.folder):
        content = (json.dumps(result.as_dict(), indent=1) + "\n").encode()
        write_whole(setting.folder / "results.json", content)
    with disk_errors(setting.best):
        recipe = with_values(result.recipe, result.best.values).document.text.encode()
        if setting.best.exists() and not setting.best.read_bytes().endswith(recipe):
            reporter.note(f"replaced {setting.best}, which an earlier sweep wrote")
        write_whole(setting.best, _found(result).encode() + recipe)
    for axis in setting.axes:
        if axis.has_at_its_edge(value := result.best.values[axis.name]):
            fix = f"try a wider range with `--set {axis.name}=START:STOP:STEP`"
            reporter.warn(f"the best `{axis.name}`, {value:g}, is at the edge of what was tried", fix)
    return result


def _check_names(trial: Trial, others: Sequence[Trial], by: str | None) -> None:
    """Raise CheckFailed if a candidate has other scores than the ones before, UsageError for an unknown --by."""
    if trial.failed:
        return
    names = list(trial.scores)
    if by is not None and by not in names:
        raise UsageError(f"`--by {by}`: the scores are {', '.join(names)}")
    for other in others:
        if not other.failed and list(other.scores) != names:
            raise CheckFailed(
                f"candidates have scores of different names: {', '.join(other.scores)}, and now {', '.join(names)}",
                fix="make the score return the same names each time",
            )


def _ordered(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    unique = {tuple(trial.values.items()): trial for trial in trials}
    return tuple(unique[key] for key in sorted(unique, key=lambda key: [value for _, value in key]))


def _size(values: Values) -> float:
    return sum(value * value for value in values.values())


@contextmanager
def _scoring(setting: Setting, reporter: Reporter) -> Iterator[Scored]:
    """Yield the function that merges and scores a candidate, in the sweep's folder or in memory."""
    scratch = setting.folder / "scratch"
    with suppress(OSError):
        remove_tree(scratch)  # left by a run that was killed
    model: MergedModel | None = None

    def in_folder(values: Values, recipe: Recipe) -> Trial:
        scoring = InFolder(setting.scorer, setting.access, Work(setting.device), setting.seeds, scratch, Path.cwd())
        trial, warnings = scoring(values, recipe)
        for message, fix in warnings:
            reporter.warn(message, fix)
        return trial

    def in_memory(values: Values, recipe: Recipe) -> Trial:
        nonlocal model
        from skillmerge.verbs.sweep.in_memory import MergedModel

        started = time.monotonic()
        if model is None:  # only where something is left to score
            model = MergedModel(setting.first, setting.access, setting.device, reporter)
            for each in grid(setting.axes) if setting.asked.search is None else ():
                model.planned(with_values(setting.recipe, each))  # a problem of the last one is known before all scores
        held, failed = model, ""
        realised = held.use(recipe).all.realised_lambda
        try:
            scores = together([held.scored(setting.scorer, seed) for seed in setting.seeds])
        except NotFinite as error:
            scores, failed = {}, str(error)
        return Trial(values, scores, realised, time.monotonic() - started, failed)

    try:
        yield in_folder if setting.scorer.command is not None else in_memory
    finally:
        if model is not None:
            model.close()
        with suppress(OSError):
            remove_tree(scratch)


def _scored_on(on: str, setting: Setting, candidates: Sequence[Values], reporter: Reporter) -> Iterator[Trial]:
    """Score candidates on a cluster, side by side, and yield each when it is done. Raises the first one's error."""
    with closing(Cluster(on, None, setting.device)) as cluster:
        cluster.find_places(reporter)
        here, work = Path.cwd(), Work(cluster.device, cluster.threads)
        scratch = here / setting.folder / "scratch"
        scoring = cluster.share(InFolder(setting.scorer, setting.access, work, setting.seeds, scratch, here))
        recipe = _anywhere(setting.recipe, here)
        running = {cluster.submit(scoring, values, with_values(recipe, values), True) for values in candidates}
        try:
            while running:
                for task in cluster.ended(running, 0.5):
                    running.remove(task)
                    trial, warnings = cluster.result(task)
                    for message, fix in warnings:
                        reporter.warn(message, fix)
                    yield trial
        finally:
            cluster.cancel(running)


def _anywhere(recipe: Recipe, here: Path) -> Recipe:
    """Return a recipe whose models and lock are the same in whatever folder a node's processes run."""
    document = replace(recipe.document, name=str(here / recipe.document.name))
    return replace(recipe, document=document, folder=here / recipe.folder)


def _found(sweep: Sweep) -> str:
    """Return a comment that says how the best numbers were found."""
    best = sweep.best
    said = ", ".join(f"{name} = {value:g}" for name, value in best.values.items())
    score = best.scores[sweep.by]
    lines = [
        f"{FOUND.removeprefix('# ')} on {sweep.recipe.document.name}: {said}",
        f"{sweep.by} = {_told(score)}, the {'lowest' if sweep.minimise else 'highest'} of {len(sweep.trials)} "
        f"candidates, by --score {sweep.score!r}",
    ]
    others = [trial for trial in sweep.trials if trial is not best and sweep.within_noise(trial)]
    if score.error is None:
        lines.append("The noise was not measured (use --repeats).")
    elif others:
        named = "; ".join(", ".join(f"{name} = {v:g}" for name, v in trial.values.items()) for trial in others[:8])
        more = f" and {len(others) - 8} more" if len(others) > 8 else ""
        lines.append(f"Within noise of: {named}{more}")
    return "".join(f"# {line}\n" for line in lines)


def _told(score: Score) -> str:
    # Not as an interval: that of a share near 1 would go beyond it.
    return f"{score.value:.4g}" + (f" ± {CONFIDENCE * score.error:.2g} (95 %)" if score.error is not None else "")
