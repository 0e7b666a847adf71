"""Optuna proposes candidates one after another, where a grid would be too large."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from skillmerge.errors import UsageError
from skillmerge.recipes.candidates import Axis, Values
from skillmerge.recipes.recipe import Recipe
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
