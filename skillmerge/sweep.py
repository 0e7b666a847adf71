"""The verb sweep: a recipe, numbers to try, and a score -> what each of them is worth, and the best recipe.

    recipe.sweep/journal.jsonl   what the sweep is, then one line per candidate: nothing is scored twice
    recipe.sweep/optuna.jsonl    a search's own memory
    recipe.sweep/results.json    everything, for programs
    recipe.sweep/scratch/        a candidate that is being scored
    recipe.best.yaml             the recipe with the numbers that did best, and how they were found

A command scores folders, which are made and removed one by one; anything else scores a model in memory.
"""

from __future__ import annotations

import hashlib
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

from skillmerge.candidates import Axis, Values, grid, parse_axis, path_of, with_values
from skillmerge.checkpoints.checkpoint import versions
from skillmerge.errors import CheckFailed, UsageError
from skillmerge.merge import apply
from skillmerge.recipe import Recipe, load
from skillmerge.reporter import Reporter
from skillmerge.scoring import CONFIDENCE, NotFinite, Score, Scorer, Scores, find_scorer, run_command, together
from skillmerge.sources import Access, close_all, open_models
from skillmerge.writer import disk_errors, hold, write_whole

if TYPE_CHECKING:
    from skillmerge.inplace import MergedModel

SWEEP_VERSION = 1
SEARCHES = ("tpe", "cmaes", "random")
_FOUND = "# Found by `skillmerge sweep`"


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate and what it did. realised: lambda after rounding, by `apply`'s statistics; None if unknown.
    failed: why it has no scores, where its scores are no numbers."""

    values: Values
    scores: Scores
    realised: float | None
    seconds: float
    failed: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {
            "values": dict(self.values),
            "scores": {name: {"value": score.value, "error": score.error} for name, score in self.scores.items()},
            "realised": self.realised,
            "seconds": round(self.seconds, 3),
            "failed": self.failed,
        }


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
    with _Journal.open(folder, _identity(first, parsed, access, asked), overwrite) as journal:
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
                found = _searched(chosen, search, trials, seed, folder, tried, by, less)
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


# Scoring.

Scored = Callable[[Values, Recipe], Trial]


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
        from skillmerge.inplace import MergedModel

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


def _searched(
    axes: Sequence[Axis],
    search: str,
    trials: int,
    seed: int,
    folder: Path,
    tried: Callable[[Values], Trial],
    by: str | None,
    minimise: bool,
) -> list[Trial]:
    """Candidates that Optuna proposes, until there are `trials`; its storage knows those of earlier runs."""
    try:
        import optuna
    except ImportError as error:
        raise UsageError(
            "--search needs optuna", fix="pip install 'skillmerge[sweep]', or leave --search out"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "optuna.jsonl")))
    direction = "minimize" if minimise else "maximize"
    study = optuna.create_study(storage=storage, study_name="sweep", direction=direction, load_if_exists=True)
    ended = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL)
    done = [trial for trial in study.trials if trial.state in ended and set(trial.params) == {a.name for a in axes}]
    # A sampler that starts anew starts elsewhere: else it would propose what it has proposed.
    start = seed + len(done)
    samplers: dict[str, Callable[[], Any]] = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=start),
        "cmaes": lambda: optuna.samplers.CmaEsSampler(seed=start),
        "random": lambda: optuna.samplers.RandomSampler(seed=start),
    }
    try:
        study.sampler = samplers[search]()
    except ImportError as error:
        raise UsageError(f"--search {search}: {error}", fix="pip install 'skillmerge[sweep]'") from error
    found = [tried({axis.name: trial.params[axis.name] for axis in axes}) for trial in done]

    def objective(trial: Any) -> float:
        values = {}
        for axis in axes:
            if axis.values and axis.step is None:
                values[axis.name] = trial.suggest_categorical(axis.name, list(axis.values))
            else:
                values[axis.name] = trial.suggest_float(axis.name, axis.low, axis.high, step=axis.step)
        made = tried(values)
        found.append(made)
        if made.failed:
            return math.nan  # a trial without a value, which counts as failed there too
        return made.scores[by or next(iter(made.scores))].value

    study.optimize(objective, n_trials=max(0, trials - len(done)))
    return found


# What is kept.


def _identity(candidate: Recipe, recipe: Recipe, access: Access, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a journal is of: the recipe, the models as they are now, and how they are scored."""
    checkpoints = open_models(candidate, access, lambda message: None)
    try:
        inputs = json.dumps(versions(checkpoints), sort_keys=True)
    finally:
        close_all(checkpoints)
    return {
        "sweep_version": SWEEP_VERSION,
        "recipe_sha256": recipe.sha256,
        "inputs_sha256": hashlib.sha256(inputs.encode()).hexdigest(),
        **asked,
    }


class _Journal:
    """The lines of `journal.jsonl`: the first says what of, the others are trials. Held by one run at a time."""

    def __init__(self, path: Path, trials: list[Trial]) -> None:
        self._path, self.trials = path, trials

    @classmethod
    @contextmanager
    def open(cls, folder: Path, identity: Mapping[str, Any], overwrite: bool) -> Iterator[_Journal]:
        """Raises UsageError where the folder is another sweep's or nothing of ours, OutputLocked where it is in use."""
        path = folder / "journal.jsonl"
        if folder.exists() and not path.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder} exists already and is no sweep", fix="choose another --output")
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with hold(folder):
            with disk_errors(folder):
                known, trials = (None, []) if overwrite else _read_journal(path)
                if known is None:
                    for name in ("journal.jsonl", "optuna.jsonl", "results.json"):
                        (folder / name).unlink(missing_ok=True)
                    write_whole(path, (json.dumps(identity) + "\n").encode())
                    trials = []
                elif known != identity:
                    changed = [key for key in identity if known.get(key) != identity[key]]
                    raise UsageError(
                        f"{folder} holds another sweep: {', '.join(changed)} differ",
                        fix="choose another --output, or replace it with --overwrite",
                    )
                else:  # a line that was cut off is written anew
                    lines = [json.dumps(known), *(json.dumps(trial.as_dict()) for trial in trials)]
                    write_whole(path, ("\n".join(lines) + "\n").encode())
            yield cls(path, trials)

    def find(self, values: Values) -> Trial | None:
        return next((trial for trial in self.trials if dict(trial.values) == dict(values)), None)

    def add(self, trial: Trial) -> None:
        with disk_errors(self._path), open(self._path, "ab") as stream:
            stream.write((json.dumps(trial.as_dict()) + "\n").encode())
            stream.flush()
            os.fsync(stream.fileno())
        self.trials.append(trial)


def _read_journal(path: Path) -> tuple[dict[str, Any] | None, list[Trial]]:
    """The head, None where there is none, and the trials; a last line that a dying run cut off is left out."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    try:
        rows = [json.loads(line) for line in lines[:-1]]
        return (dict(rows[0]) if rows else None), [_trial_of(row) for row in rows[1:]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path}: is damaged, or no sweep's journal", fix="choose another --output, or begin anew with --overwrite"
        ) from error


def _trial_of(row: Mapping[str, Any]) -> Trial:
    scores = {name: Score(found["value"], found["error"]) for name, found in row["scores"].items()}
    return Trial(row["values"], scores, row["realised"], row["seconds"], row["failed"])


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
