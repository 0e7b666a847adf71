"""A sweep's scores on disk, so that an interrupted sweep scores nothing twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillmerge.checkpoints.checkpoint import versions
from skillmerge.claim import CLAIM_FILES, hold
from skillmerge.durable import disk_errors, sync_file, write_whole
from skillmerge.errors import UsageError
from skillmerge.plans.opening import Access, close_all, open_models
from skillmerge.recipes.recipe import Recipe
from skillmerge.reporter import Reporter
from skillmerge.study.scoring.scores import Score, Scores
from skillmerge.verbs.sweep.candidates import Values

SWEEP_VERSION = 1


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate and its scores. realised: the effective lambda, by `apply`'s statistics; None if unknown.
    failed: why it has no scores, if they are not numbers."""

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


# The journal.


def identity(candidate: Recipe, recipe: Recipe, access: Access, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return what identifies a sweep: the recipe, the models as they are now, and how they are scored."""
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


class Journal:
    """The lines of `journal.jsonl`: the first identifies the sweep, the others are trials. One run holds it at a
    time."""

    def __init__(self, path: Path, trials: list[Trial]) -> None:
        self.path, self.trials = path, trials

    @classmethod
    @contextmanager
    def open(cls, folder: Path, identity: Mapping[str, Any], overwrite: bool, reporter: Reporter) -> Iterator[Journal]:
        """Open a sweep's journal. Raises UsageError if the folder is not its own, OutputLocked if it is in use."""
        path = folder / "journal.jsonl"
        if folder.exists() and not path.exists() and (not folder.is_dir() or set(os.listdir(folder)) - {*CLAIM_FILES}):
            raise UsageError(f"{folder} already exists and is not a sweep", fix="choose another folder with `--output`")
        with hold(folder, reporter):
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
                        f"{folder} holds a different sweep: {', '.join(changed)} differ",
                        fix="choose another folder with `--output`, or pass `--overwrite` to replace the sweep",
                    )
                else:  # rewrite a line that was cut off
                    lines = [json.dumps(known), *(json.dumps(trial.as_dict()) for trial in trials)]
                    write_whole(path, ("\n".join(lines) + "\n").encode())
            yield cls(path, trials)

    def find(self, values: Values) -> Trial | None:
        return next((trial for trial in self.trials if dict(trial.values) == dict(values)), None)

    def add(self, trial: Trial) -> None:
        with disk_errors(self.path), open(self.path, "ab") as stream:
            stream.write((json.dumps(trial.as_dict()) + "\n").encode())
            stream.flush()
            sync_file(stream.fileno())
        self.trials.append(trial)


def _read_journal(path: Path) -> tuple[dict[str, Any] | None, list[Trial]]:
    """Return the head (or None) and the trials, without a last line that an interrupted run cut off."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    try:
        rows = [json.loads(line) for line in lines[:-1]]
        return (dict(rows[0]) if rows else None), [_trial_of(row) for row in rows[1:]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path}: is damaged, or not a sweep's journal",
            fix="choose another `--output`, or start again with `--overwrite`",
        ) from error


def _trial_of(row: Mapping[str, Any]) -> Trial:
    scores = {name: Score(found["value"], found["error"]) for name, found in row["scores"].items()}
    return Trial(row["values"], scores, row["realised"], row["seconds"], row["failed"])
