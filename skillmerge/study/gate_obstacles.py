"""Reasons, known before any work, why gates cannot be measured: what they name, need and exclude."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from skillmerge.checkpoints.schemes import is_path
from skillmerge.errors import UsageError
from skillmerge.naming import module_kind
from skillmerge.plans.plan import Plan
from skillmerge.recipes.formula.tree import normalise_name
from skillmerge.recipes.gate_table import GATE_FIGURES, Gate
from skillmerge.study.loads.loading import need

_RUNS_A_MODEL = ("loads", "finite_logits", "perplexity")


NO_LOCAL = ("--no-local keeps none", "leave out `--no-local`, or this gate")
IN_A_BUCKET = (
    "an output in a bucket keeps none here",
    "leave out this gate, and run `skillmerge gate` on the finished output; or write into a folder",
)
"""Why a merge keeps no files, and what to do."""


def prepare(gates: Sequence[Gate], stats: str, left: tuple[str, str] | None, plan: Plan) -> None:
    """Raise UsageError, before any work, for gates that cannot be measured after it."""
    for error in obstacles(gates, stats, left, plan):
        raise error


def refuse_options(gates: Sequence[Gate], stats: str, left: tuple[str, str] | None) -> None:
    """Raise UsageError for gates that these options exclude: as tasks do, which run none and see a part of the plan."""
    for gate in gates:
        for error in _excluded(gate, stats, left):
            raise error


def obstacles(gates: Sequence[Gate], stats: str, left: tuple[str, str] | None, plan: Plan) -> Iterator[UsageError]:
    """Yield why gates could not be measured: RecipeError for what the recipe names, else for this machine or run.
    left: NO_LOCAL or IN_A_BUCKET, for a merge whose files leave this machine."""
    for gate in gates:
        yield from _mistakes(gate, plan)
        if gate.kind in _RUNS_A_MODEL:
            try:
                need([gate.name or "transformers"], f"the gate `{label(gate)}`")
            except UsageError as error:
                yield error
        yield from _excluded(gate, stats, left)


def _excluded(gate: Gate, stats: str, left: tuple[str, str] | None) -> Iterator[UsageError]:
    """Yield why a gate cannot be measured with these options."""
    if stats == "off" and gate.kind in GATE_FIGURES:
        yield UsageError(f"the gate `{gate.kind}` needs statistics", fix="pass `--stats sampled` or `--stats full`")
    if left is not None and gate.kind not in (*GATE_FIGURES, "cosine_z"):
        yield UsageError(f"the gate `{gate.kind}` needs the model's files, and {left[0]}", fix=left[1])


def _mistakes(gate: Gate, plan: Plan) -> Iterator[UsageError]:
    """Yield what a gate names that does not exist."""

    def mistake(key: str, message: str, fix: str) -> UsageError:
        return plan.recipe.error(("gates", gate.kind, key), f"the gate `{gate.kind}`: {message}", fix)

    kinds = {module_kind(name) for name in plan.tensors}
    if absent := [kind for kind in gate.modules if kind not in kinds]:
        yield mistake("modules", f"the model has no {' and no '.join(absent)}", f"it has: {', '.join(sorted(kinds))}")
    if gate.kind == "command" and not gate.folder.is_dir():
        yield UsageError(f"the gate `{gate.name}` runs in {gate.folder}, which is not a folder")
    if gate.kind == "cosine_z" and gate.model is not None:
        base = place_of(gate, gate.model, plan)
        if is_path(base) and not Path(base).is_dir():
            yield mistake("base", f"its base {base} is not a folder", "name a model of the recipe, or a model's folder")
    if gate.text is not None and (message := _text_fault(gate.text)):
        yield mistake("text", message, "name a text file; relative paths start at the recipe's folder")


def _text_fault(path: Path) -> str | None:
    """Return why a file has no text to measure; None if it has."""
    try:
        empty = not path.is_file() or not path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        return f"{path} cannot be read: {error}"
    return f"{path} is not a nonempty text file" if empty else None


def place_of(gate: Gate, model: str, plan: Plan) -> str:
    """Return the place of a model that a gate names: one of the recipe's, or a place."""
    folder = gate.folder
    if normalise_name(model) in plan.recipe.models:
        model, folder = plan.recipe.models[normalise_name(model)], plan.recipe.folder
    try:
        return str(folder / Path(model).expanduser()) if is_path(model) else model
    except RuntimeError as error:
        raise UsageError(f"the gate `{gate.kind}`: {model}: {error}", fix="write the full path") from error


def label(gate: Gate, kind: str = "") -> str:
    by = f"by {gate.by}" if gate.by else ""
    return " ".join(filter(None, (gate.kind, by, gate.name or kind, "ratio" if gate.is_ratio else "")))
