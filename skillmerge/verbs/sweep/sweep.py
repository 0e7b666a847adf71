"""The verb sweep: a recipe, numbers to try, and a score -> what each of them is worth, and the best recipe.

    recipe.sweep/journal.jsonl   what the sweep is, then one line per candidate: nothing is scored twice
    recipe.sweep/optuna.jsonl    a search's own memory
    recipe.sweep/results.json    everything, for programs
    recipe.sweep/scratch/        a candidate that is being scored
    recipe.best.yaml             the recipe with the numbers that did best, and how they were found

A command scores folders, which are made and removed one by one; anything else scores a model in memory.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillmerge.brief import brief
from skillmerge.durable import disk_errors, write_whole
from skillmerge.errors import CheckFailed, UsageError
from skillmerge.plans.opening import Access
from skillmerge.recipes.candidates import Axis, Values, grid, parse_axis, path_of, with_values
from skillmerge.recipes.parse import load
from skillmerge.recipes.recipe import Recipe
from skillmerge.reporter import Reporter
from skillmerge.study.scorers import Scorer, find_scorer, run_command
from skillmerge.study.scores import CONFIDENCE, NotFinite, Score, Scores, together
from skillmerge.verbs.apply import apply
from skillmerge.verbs.sweep.journal import Journal, Trial, identity
from skillmerge.verbs.sweep.search import SEARCHES, Scored, searched

if TYPE_CHECKING:
    from skillmerge.verbs.sweep.in_memory import MergedModel


_FOUND = "# Found by `skillmerge sweep`"


@dataclass(frozen=True, slots=True)
class Sweep:
    """All candidates, in the order of their values. by: the score that decides; minimise: whether less is better."""

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

    @property
    def scored(self) -> list[Trial]:
        return [trial for trial in self.trials if not trial.failed]

    @property
    def best(self) -> Trial:
        """The best score; of equals the one with the smallest numbers."""
        sign = 1 if self.minimise else -1
        return min(self.scored, key=lambda trial: (sign * trial.scores[self.by].value, _size(trial.values)))

    def within_noise(self, trial: Trial) -> bool | None:
        """Whether the best and this one could be the same but for chance (95 %); None where the noise is not known.

        Errors are taken as independent, which for the same questions overstates the noise.
        """
        if trial.failed:
            return False
        one, other = self.best.scores[self.by], trial.scores[self.by]
        if one.error is None or other.error is None:
            return None
        return abs(one.value - other.value) <= CONFIDENCE * math.hypot(one.error, other.error)

    @property
    def pareto(self) -> list[Trial]:
        """Where there are two scores or more: those that no other one beats in one and equals in all."""
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
    recipe: str | os.PathLike[str],
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
    overwrite: bool = False,
    follow_links: bool = False,
    locked: bool = False,
    hub: str = "stream",
    reporter: Reporter | None = None,
    finished: Callable[[Trial], None] = lambda trial: None,
) -> Sweep:
    """Score a recipe with many numbers in it; see `candidates` for `axes`, `scoring` for `score`.

    output: a folder of the sweep's own (default: `recipe.sweep` beside the recipe). by: the score that decides
    (default: the first). search: tpe, cmaes or random (with Optuna) instead of a grid, of `trials` candidates.
    repeats: how often each is scored, with another seed. Continues what was interrupted.
    Raises UsageError, CheckFailed where a score fails, OutputLocked; and what `merge.apply` raises.
    """
    reporter = reporter or Reporter()
    parsed = load(recipe)
    chosen, scorer = _axes(parsed, axes), find_scorer(score)
    if search is not None and search not in SEARCHES:
        raise UsageError(f"search {search!r}: {', '.join(SEARCHES)}")
    if repeats < 1 or trials < 1:
        raise UsageError("repeats and trials are numbers from 1")
    if parsed.output.kind == "skill":
        raise UsageError("a skill cannot be scored", fix="sweep a recipe that makes a model")
    folder = Path(output) if output is not None else Path(recipe).with_suffix(".sweep")
    best = _place_of_best(Path(recipe), folder)
    access = Access(follow_links, locked, download=hub == "download")
    less = scorer.minimise if minimise is None else minimise
    asked: dict[str, Any] = {"score": score, "score_sha256": scorer.digest, "repeats": repeats, "seed": seed}
    asked["axes"] = [axis.name for axis in chosen]
    if search is not None:  # what was proposed depends on all of these
        asked |= {"axes": list(axes), "search": search, "by": by, "minimise": less}
    if parsed.gates:
        (reporter or Reporter()).warn("gates are not looked at while candidates are scored; the best recipe keeps them")
    first = with_values(parsed, _first(chosen, search))
    for axis in chosen:
        with_values(parsed, {axis.name: axis.low})
    with Journal.open(folder, identity(first, parsed, access, asked), overwrite) as journal:
        with _scoring(scorer, first, access, device, reporter, seed, repeats, folder / "scratch") as scored:

            def tried(values: Values) -> Trial:
                trial = journal.find(values)
                if trial is None:
                    trial = scored(values, with_values(parsed, values))
                    _check_names(trial, journal.trials, by)
                    journal.add(trial)
                    finished(trial)
                else:
                    _check_names(trial, (), by)
                return trial

            resumed = len(journal.trials)
            if search is None:
                candidates = list(grid(chosen))
                found = []
                with reporter.bar(len(candidates)) as progress:
                    for number, values in enumerate(candidates, start=1):
                        found.append(tried(values))
                        progress(number)
            else:
                found = searched(chosen, search, trials, seed, folder, tried, by, less)
        made = _ordered(found)
        names = next((list(trial.scores) for trial in made if not trial.failed), None)
        if names is None:
            raise CheckFailed(f"no candidate has a score: {made[0].failed}", fix="try smaller numbers")
        result = Sweep(
            folder, parsed, best, score, tuple(axis.name for axis in chosen), by or names[0], less, made,
            min(resumed, len(made)),
        )  # fmt: skip
        with disk_errors(folder):
            write_whole(folder / "results.json", (json.dumps(result.as_dict(), indent=1) + "\n").encode())
        with disk_errors(best):
            write_whole(best, _best_recipe(result).encode())
    return result


def _place_of_best(recipe: Path, folder: Path) -> Path:
    """Beside the recipe, whose relative paths it has: `recipe.best.yaml`, or by the name of the sweep's folder.

    Raises UsageError, before any work, where it cannot be written.
    """
    best = recipe.with_name(f"{folder.stem}.best.yaml")
    try:
        if best.exists() and not (best.is_file() and best.read_bytes().startswith(_FOUND.encode())):
            raise UsageError(
                f"{best} exists already and is not a sweep's", fix="move it away: the best recipe goes there"
            )
        tempfile.TemporaryFile(dir=best.parent).close()
    except OSError as error:
        raise UsageError(
            f"{best} cannot be written: {error.strerror}",
            fix="the best recipe goes beside the recipe: copy that elsewhere",
        ) from error
    return best


def _check_names(trial: Trial, others: Sequence[Trial], by: str | None) -> None:
    """Raise CheckFailed where a candidate has other scores than the ones before, UsageError for a --by of none."""
    if trial.failed:
        return
    names = list(trial.scores)
    if by is not None and by not in names:
        raise UsageError(f"--by {by}: the scores are {', '.join(names)}")
    for other in others:
        if not other.failed and list(other.scores) != names:
            raise CheckFailed(
                f"candidates have different scores: {', '.join(other.scores)}, and now {', '.join(names)}",
                fix="the score must give the same names each time",
            )


def _axes(recipe: Recipe, texts: Sequence[str]) -> list[Axis]:
    try:
        axes = [parse_axis(text) for text in texts]
    except ValueError as error:
        raise UsageError(f"--set: {error}") from error
    if not axes:
        raise UsageError("nothing to try", fix="name a number of the recipe: --set lam=0:2:0.25")
    places = [path_of(recipe, axis.name) for axis in axes]
    if len(set(places)) < len(places):
        raise UsageError("--set names one number twice")
    return axes


def _first(axes: Sequence[Axis], search: str | None) -> Values:
    if search is None:
        return next(grid(axes))
    return {axis.name: axis.low for axis in axes}


def _ordered(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    unique = {tuple(trial.values.items()): trial for trial in trials}
    return tuple(unique[key] for key in sorted(unique, key=lambda key: [value for _, value in key]))


def _size(values: Values) -> float:
    return sum(value * value for value in values.values())


@contextmanager
def _scoring(
    scorer: Scorer,
    first: Recipe,
    access: Access,
    device: str,
    reporter: Reporter,
    seed: int,
    repeats: int,
    scratch: Path,
) -> Iterator[Scored]:
    """How one candidate is merged and scored: in a folder in `scratch`, or in memory."""
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    model: MergedModel | None = None

    def in_folder(recipe: Recipe) -> tuple[Mapping[str, Any], Callable[[int], Scores]]:
        out = scratch / "model"
        made = apply(
            recipe, out, device=device, follow_links=access.follow_links, locked=access.locked,
            hub="download" if access.download else "stream", overwrite=out.exists(),
        )  # fmt: skip
        return made.manifest["statistics"], lambda number: run_command(scorer, out, number)

    def in_memory(recipe: Recipe) -> tuple[Mapping[str, Any], Callable[[int], Scores]]:
        nonlocal model
        from skillmerge.verbs.sweep.in_memory import MergedModel

        if model is None:  # only where something is left to score
            model = MergedModel(first, access, device, reporter.warn)
        held = model
        return held.use(recipe), lambda number: held.scored(scorer, number)

    def scored(values: Values, recipe: Recipe) -> Trial:
        started = time.monotonic()
        statistics, once = (in_folder if scorer.command is not None else in_memory)(recipe)
        realised = statistics["all"].get("realised_lambda")
        try:
            scores = together([once(seed + number) for number in range(repeats)])
            failed = ""
        except NotFinite as error:
            scores, failed = {}, str(error)
        return Trial(values, scores, realised, time.monotonic() - started, failed)

    try:
        yield scored
    finally:
        if model is not None:
            model.close()
        shutil.rmtree(scratch, ignore_errors=True)


def _best_recipe(sweep: Sweep) -> str:
    """The recipe with the best numbers, and how they were found on top of it."""
    best = sweep.best
    said = ", ".join(f"{name} = {value:g}" for name, value in best.values.items())
    score = best.scores[sweep.by]
    lines = [
        f"{_FOUND.removeprefix('# ')} on {sweep.recipe.document.name}: {said}",
        f"{sweep.by} = {_told(score)}, the {'least' if sweep.minimise else 'greatest'} of {len(sweep.trials)} "
        f"candidates, by --score {sweep.score!r}",
    ]
    others = [trial for trial in sweep.trials if trial is not best and sweep.within_noise(trial)]
    if score.error is None:
        lines.append("How noisy that is was not measured (--repeats would).")
    elif others:
        named = "; ".join(", ".join(f"{name} = {v:g}" for name, v in trial.values.items()) for trial in others[:8])
        more = f" and {len(others) - 8} more" if len(others) > 8 else ""
        lines.append(f"Within noise of: {named}{more}")
    text = with_values(sweep.recipe, best.values).document.text
    return "".join(f"# {line}\n" for line in lines) + text


def _told(score: Score) -> str:
    interval = score.interval
    return f"{score.value:.4g}" + (f" (95 %: {interval[0]:.4g} to {interval[1]:.4g})" if interval else "")
