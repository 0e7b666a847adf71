"""Searches with Optuna, for sweeps that are too large for a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from skillmerge.recipes.recipe import Recipe
from skillmerge.verbs.sweep.candidates import Axis, Values
from skillmerge.verbs.sweep.journal import Trial

SEARCHES: Mapping[str, tuple[str, ...]] = {"tpe": ("optuna",), "cmaes": ("optuna", "cmaes"), "random": ("optuna",)}
"""Searches, and the packages that each needs."""


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
    """Return Optuna's study of this sweep, kept in its folder."""
    import optuna

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
    study.sampler = samplers[search]()
    return study


def _ended(study: Any, axes: Sequence[Axis]) -> list[Any]:
    """Return the trials of earlier runs over the same axes."""
    names = {axis.name for axis in axes}
    return [trial for trial in study.trials if trial.state.name in ("COMPLETE", "FAIL") and set(trial.params) == names]
