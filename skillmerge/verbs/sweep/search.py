"""Searches with Optuna, for sweeps that are too large for a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from skillmerge.errors import UsageError
from skillmerge.recipes.recipe import Recipe
from skillmerge.verbs.sweep.candidates import Axis, Values
from skillmerge.verbs.sweep.journal import Trial

SEARCHES = ("tpe", "cmaes", "random")


# Scoring.

Scored = Callable[[Values, Recipe], Trial]


def searched(
    axes: Sequence[Axis],
    search: str,
    trials: int,
    seed: int,
    folder: Path,
    tried: Callable[[Values], Trial],
    by: str | None,
    minimise: bool,
) -> list[Trial]:
    """Candidates that Optuna proposes, until there are `trials`; its storage has those of earlier runs."""
    study = _study(search, seed, folder, axes, minimise)
    done = _ended(study, axes)
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
            return math.nan  # A trial without a value also counts as failed in Optuna.
        return made.scores[by or next(iter(made.scores))].value

    study.optimize(objective, n_trials=max(0, trials - len(done)))
    return found


def _study(search: str, seed: int, folder: Path, axes: Sequence[Axis], minimise: bool) -> Any:
    """Optuna's study of this sweep, kept in its folder. Raises UsageError if a package is missing."""
    try:
        import optuna
    except ImportError as error:
        raise UsageError(
            "`--search` needs the package optuna", fix="pip install 'skillmerge[sweep]', or leave `--search` out"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "optuna.jsonl")))
    direction = "minimize" if minimise else "maximize"
    study = optuna.create_study(storage=storage, study_name="sweep", direction=direction, load_if_exists=True)
    # A restarted sampler needs another seed, or it would repeat its proposals.
    start = seed + len(_ended(study, axes))
    samplers: dict[str, Callable[[], Any]] = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=start),
        "cmaes": lambda: optuna.samplers.CmaEsSampler(seed=start),
        "random": lambda: optuna.samplers.RandomSampler(seed=start),
    }
    try:
        study.sampler = samplers[search]()
    except ImportError as error:
        raise UsageError(f"--search {search}: {error}", fix="pip install 'skillmerge[sweep]'") from error
    return study


def _ended(study: Any, axes: Sequence[Axis]) -> list[Any]:
    """Return the trials of earlier runs over the same axes."""
    names = {axis.name for axis in axes}
    return [trial for trial in study.trials if trial.state.name in ("COMPLETE", "FAIL") and set(trial.params) == names]
