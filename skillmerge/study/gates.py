"""The verb gate: measure each gate of an output, and decide whether it passes.

Figures come from the manifest, the cosine from the models that went in; what loads a model or runs a command is a
process of its own. A gate that cannot be measured has failed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from skillmerge.brief import brief, drawn
from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.schemes import local_folder
from skillmerge.engine.measures.cells import LEAST, SIGMAS, Cell, cells, pools, rows_of
from skillmerge.engine.rounding_statistics import Row, Statistics, factor
from skillmerge.errors import CheckFailed, ResourceError, SkillmergeError, UsageError, some
from skillmerge.naming import module_kind
from skillmerge.outputs.buckets.at_hand import at_hand
from skillmerge.outputs.manifest import ManifestBody
from skillmerge.outputs.output import MOVED, Outcome, Output
from skillmerge.outputs.verify import check_structure, check_values, is_intact
from skillmerge.plans.opening import Access, planned
from skillmerge.plans.plan import Plan
from skillmerge.recipes.gate_table import GATE_FIGURES, Gate
from skillmerge.recipes.parse import load_gates
from skillmerge.reporter import Reporter, default_reporter
from skillmerge.study.gate_obstacles import label, place_of
from skillmerge.study.inspect import inspect_merge
from skillmerge.study.loads.generation import TOKENS
from skillmerge.study.loads.loading import check_generation, check_tokenizer, load, loads_whole
from skillmerge.study.scoring.scorers import Scorer, run_command
from skillmerge.study.scoring.scores import NotFinite

_OF_ALL_ELEMENTS = ("changed", "norm_ratio")
"""Figures of all elements, which need no minimum of elements with an update."""


@dataclass(frozen=True, slots=True)
class GateReport:
    """The outcomes of an output's gates. folder: as it was named."""

    folder: str
    outcomes: tuple[Outcome, ...]

    __repr__ = brief
    _repr_html_ = drawn

    @property
    def ok(self) -> bool:
        """Whether every gate passed."""
        return all(outcome.passed for outcome in self.outcomes)

    def as_dict(self) -> dict[str, Any]:
        return {"folder": self.folder, "gates": [outcome.as_dict() for outcome in self.outcomes]}


class GateFailed(CheckFailed):
    """At least one gate failed. plan, body: those of the output, if it was just made."""

    def __init__(
        self,
        outcomes: Sequence[Outcome],
        *,
        fix: str | None = None,
        plan: Plan | None = None,
        body: ManifestBody | None = None,
    ) -> None:
        failed = [outcome for outcome in outcomes if not outcome.passed]
        told = "; ".join(f"{item.gate}: {item.shown} (required: {item.asked})" for item in failed)
        super().__init__(f"{len(failed)} of {len(outcomes)} gates failed: {told}", fix=fix)
        self.outcomes, self.plan, self.body = tuple(outcomes), plan, body

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "gates": [outcome.as_dict() for outcome in self.outcomes]}


Opened = Callable[[], AbstractContextManager[tuple[Plan, Mapping[str, Checkpoint]]]]


@dataclass(frozen=True, slots=True)
class GateInput:
    """The input of gates: a finished folder, its manifest's body, and, while in use, its models."""

    folder: Path
    body: ManifestBody
    opened: Opened
    access: Access
    reporter: Reporter = field(default_factory=Reporter)
    text: Path | None = None
    """The text for a perplexity, so that one load serves all gates."""
    tokens: int = 0
    """Tokens to generate, to compare runtimes."""
    patched: bool = False
    """Whether the donor is a model with a patch applied."""
    reports: dict[Path | None, Mapping[str, Any]] = field(default_factory=dict)
    """Reports of loading with transformers, by text."""


def check(gates: Sequence[Gate], given: GateInput, tell: Callable[[Outcome], None]) -> list[Outcome]:
    """Measure every gate, even after failures; `tell` gets each outcome as it is known.

    Raises UsageError if a gate does not fit this output, ResourceError if the machine fails, CheckFailed if a
    command has changed it.
    """
    outcomes = []
    text = next((gate.text for gate in gates if gate.text), None)
    compared = any(gate.kind == "loads" and gate.name for gate in gates)
    given = replace(given, text=text, tokens=TOKENS if compared else 0)
    for gate in gates:
        try:
            found = list(_measure(gate, given))
        except (UsageError, ResourceError):  # a fault of the machine says nothing about the model
            raise
        except SkillmergeError as error:
            # A command's error may contain anything, and outcomes go into published files.
            first, _, rest = error.message.partition("\n")
            found = [Outcome(label(gate), gate.asked, None, False, first)]
            if rest:
                given.reporter.note(f"{label(gate)}: {rest}")
        for outcome in found:
            tell(outcome)
        outcomes += found
    if any(gate.kind == "command" for gate in gates) and not is_intact(given.folder, given.body):
        raise CheckFailed(
            "a command among the gates changed the model's files", fix="change the command to write elsewhere"
        )
    return outcomes


def _judged(gate: Gate, measured: float | None, kind: str = "", detail: str = "") -> Outcome:
    if measured is not None and not math.isfinite(measured):
        measured, detail = None, f"{measured}"
    return Outcome(label(gate, kind), gate.asked, measured, measured is not None and gate.holds(measured), detail)


def _measure(gate: Gate, given: GateInput) -> Iterator[Outcome]:
    if gate.kind in GATE_FIGURES:
        yield from _figures(gate, given)
    elif gate.kind == "cosine_z":
        yield from _cosine(gate, given)
    elif gate.kind == "finite":
        yield _finite(gate, given)
    elif gate.kind == "perplexity":
        yield _perplexity(gate, given)
    elif gate.kind == "command":
        yield _command(gate, given)
    else:
        yield _loads(gate, given)


def _figures(gate: Gate, given: GateInput) -> Iterator[Outcome]:
    """Yield figures that `apply` measured, for the whole model, kinds of module, or the worst layer."""
    body, statistics = given.body, given.body.statistics
    if statistics.mode == "off" or not isinstance(statistics, Statistics):
        raise UsageError(
            f"the gate `{gate.kind}` needs merge statistics, which this output lacks",
            fix="merge it again: `skillmerge apply RECIPE --stats sampled`",
        )
    if gate.is_default and given.patched and not statistics.all.merged:
        yield Outcome(label(gate), gate.asked, None, True, "a patch is applied")
        return
    if gate.by:
        yield from _by_block(gate, given)
        return
    modules = statistics.modules
    everywhere = [kind for kind, group in modules.items() if group.merged] if gate.kind == "norm_ratio" else []
    for kind in gate.modules or everywhere or ("",):
        group = modules.get(kind) if kind else statistics.all
        if group is None:
            yield _judged(gate, None, kind, "the model has no such module")
            continue
        measured = getattr(group, gate.kind)
        if measured is None and gate.kind in ("changed", "norm_ratio") and not group.merged:
            measured = _taken(body, kind) if gate.kind == "changed" else 0.0
        why = "" if measured is not None else "no update was measured"
        if why and gate.kind == "realised_lambda" and group.realised is not None:
            why = "not every tensor has one lambda (use `realised`)"
        if gate.kind == "changed" and measured == 0 and statistics.mode == "sampled":
            why = "nothing changed in the sample (use `--stats full`)"
        yield _judged(gate, measured, kind, why)


def _by_block(gate: Gate, given: GateInput) -> Iterator[Outcome]:
    """Yield the figure of the layer and kind of module that is furthest from what is required; all must pass."""
    factors: dict[str, float | None] = {}
    if gate.kind == "realised_lambda":  # lambda itself is in the plan alone
        with given.opened() as (plan, _):
            factors = {name: factor(tensor) for name, tensor in plan.tensors.items()}
    rows = {row.name: row for row in rows_of(given.body.tensors, factors)}
    found = cells(rows.values())
    for kind in gate.modules or ("",):
        of_kind = [cell for cell in found if kind in ("", cell.kind)]
        if lost := [cell.label for cell in of_kind if not cell.finite]:
            yield replace(_judged(gate, None, kind, f"{some(lost)}: the update is not finite"), where=lost[0])
            continue
        known = [cell for cell in of_kind if cell.is_measured or gate.kind in _OF_ALL_ELEMENTS]
        yield _worst(gate, kind, [cell for cell in known if getattr(cell.group, gate.kind) is not None], rows)


def _worst(gate: Gate, kind: str, known: Sequence[Cell], rows: Mapping[str, Row]) -> Outcome:
    """Return the outcome of the worst block. Deviations that are chance in one may be certain in many together."""
    if not known:
        few = f"no layer{f' of kind {kind}' if kind else ''} has {LEAST} elements with an update"
        return _judged(gate, None, kind, few)
    beyond = {cell: gate.excess(getattr(cell.group, gate.kind)) - _chance(gate, cell) for cell in known}
    worst = max(known, key=lambda cell: beyond[cell])
    failing = sum(beyond[cell] > 0 for cell in known)
    outside = [cell for cell in known if not gate.holds(getattr(cell.group, gate.kind))]
    said = f"{failing} of {len(known)} fail" if failing else f"the worst of {len(known)}"
    said += f"; {len(outside)} outside within chance" if outside and not failing else ""
    low = [it for it in outside if gate.minimum is not None and getattr(it.group, gate.kind) < gate.minimum]
    for pool, sigmas in pools(known, low, [it for it in outside if it not in low], rows) if not failing else ():
        if gate.excess(getattr(pool.group, gate.kind)) > _chance(gate, pool, sigmas):
            worst, failing = pool, 1
    found = _judged(gate, getattr(worst.group, gate.kind), kind, f"{worst.label}; {said}")
    return replace(found, where=worst.label, passed=not failing)


def _chance(gate: Gate, cell: Cell, sigmas: float = SIGMAS) -> float:
    """Return how far a figure can be off by chance, as far as the elements themselves show it."""
    return sigmas * {"realised": cell.error, "realised_lambda": cell.lambda_error}.get(gate.kind, 0.0)


def _taken(body: ManifestBody, kind: str) -> float:
    """Return the share of elements that were copied from a model other than the donor."""
    rows = [row for row in body.tensors if not kind or module_kind(row.name) == kind]
    sizes = [math.prod(row.shape) for row in rows]
    whole = sum(sizes)
    other = sum(size for row, size in zip(rows, sizes, strict=True) if row.sources and row.sources[0][0] != body.donor)
    return other / whole if whole else 0.0


def _cosine(gate: Gate, given: GateInput) -> Iterator[Outcome]:
    """Measure the update's cosine with the target's own, in standard deviations from chance; see docs/metrics.md."""
    with given.opened() as (plan, checkpoints):
        base = place_of(gate, gate.model, plan) if gate.model is not None else None
        found = inspect_merge(plan, checkpoints, base, given.access)
    for kind in gate.modules or ("",):
        group = found.modules.get(kind) if kind else found.total
        measured = group.get("cosine_z") if group is not None else None
        why = "" if measured is not None else "there are no two updates to compare"
        yield _judged(gate, measured, kind, why)


def _finite(gate: Gate, given: GateInput) -> Outcome:
    check_values(given.folder, given.body)
    return Outcome(label(gate), gate.asked, None, True)


def _loads(gate: Gate, given: GateInput) -> Outcome:
    """Measure `loads` (every tensor is loaded, the tokenizer is sound, another runtime generates what transformers
    generates) or `finite_logits` (the computed logits are finite)."""
    report = _report(given, given.text)
    passed = bool(report.get("finite")) if gate.kind == "finite_logits" or gate.name else loads_whole(report)
    notes: list[str] = []
    if passed and gate.name:
        notes = check_generation(given.folder, report, gate.name).get("notes", [])
    elif passed and gate.kind == "loads":
        check_tokenizer(given.folder, report, given.reporter, f"{label(gate)}: ")
        for note in report["tokenizer"]["notes"]:
            given.reporter.note(f"{label(gate)}: {note}")
    return Outcome(label(gate), gate.asked, None, passed, "; ".join(notes) if passed else report["why"])


def _report(given: GateInput, text: Path | None) -> Mapping[str, Any]:
    if text not in given.reports:
        given.reports[text] = load(given.folder, text, given.tokens)
    return given.reports[text]


def _perplexity(gate: Gate, given: GateInput) -> Outcome:
    ours = _perplexity_of(_report(given, gate.text))
    if not gate.is_ratio:
        return _judged(gate, ours)
    with given.opened() as (plan, checkpoints):
        model = gate.model or plan.donor
        if model not in checkpoints or plan.recipe.entries[model].kind != "path":
            raise UsageError(f"the gate `perplexity`: `{model}` is not a whole model of this merge")
        with _folder_of(plan, model, checkpoints[model]) as folder:
            theirs = _perplexity_of(load(folder, gate.text))
    asked = replace(gate, model=model)
    return _judged(asked, ours / theirs, detail=f"{ours:.4g}, and {theirs:.4g} of `{model}`")


def _folder_of(plan: Plan, model: str, checkpoint: Checkpoint) -> AbstractContextManager[Path]:
    """Return where transformers can load a model from; one on the Hub goes into the Hub's cache, one in a bucket into
    a temporary folder."""
    return local_folder(plan.recipe.model_place(model).at(checkpoint.at.revision or ""))


def _perplexity_of(report: Mapping[str, Any]) -> float:
    if "perplexity" not in report:
        raise CheckFailed(report.get("no_perplexity") or report["why"])
    return float(report["perplexity"])


def _command(gate: Gate, given: GateInput) -> Outcome:
    scorer = Scorer(gate.name, command=gate.run)
    try:
        scores = run_command(scorer, given.folder.resolve(), 0, timeout=gate.timeout, where=gate.folder)
    except NotFinite as error:
        return _judged(gate, None, detail=str(error))
    name = gate.score or next(iter(scores))
    if name not in scores:
        return _judged(gate, None, detail=f"it printed {', '.join(scores)}, but not {name}")
    if gate.score is None and len(scores) > 1:
        return _judged(gate, None, detail=f"it printed {', '.join(scores)}; name one with `score:`")
    return _judged(gate, scores[name].value)


def gate(
    folder: str | os.PathLike[str],
    gates: str | os.PathLike[str] | None = None,
    *,
    base_folder: str | os.PathLike[str] | None = None,
    follow_links: bool = False,
    reporter: Reporter | None = None,
) -> GateReport:
    """Measure every gate of the file `gates` (or of the recipe in the manifest) on the output in `folder`.

    Commands are only run from a file that the caller names: a manifest comes with a model, from anywhere.
    base_folder: what the recipe's relative paths start from, where gates read the models that went in and these
    have moved. Raises UsageError, RecipeError, CheckFailed if it is no sound output; a gate that does not hold
    is in what is returned, not raised.
    """
    reporter = reporter or default_reporter("measuring")
    base = Path(base_folder) if base_folder is not None else None
    with at_hand(folder, whole=True, reporter=reporter) as found:
        return _gate(found.folder if found.place else folder, gates, base, follow_links, reporter)


def _gate(
    folder: str | os.PathLike[str],
    gates: str | os.PathLike[str] | None,
    base: Path | None,
    follow_links: bool,
    reporter: Reporter,
) -> GateReport:
    output = Output.open(folder)
    root = output.folder
    check_structure(root, output.manifest)
    recipe, commits = output.recipe(base)
    asked = load_gates(gates) if gates is not None else recipe.gates
    if not asked:
        raise UsageError(
            f"{gates or 'the recipe in the manifest'} has no gates",
            fix="pass a file with gates: `skillmerge gate DIR --gates FILE`",
        )
    if gates is None and any(item.kind == "command" for item in asked):
        raise UsageError(
            f"the recipe in the manifest of {root} has gates that run commands, written by its author",
            fix="check them, and pass a file that you trust: `skillmerge gate DIR --gates FILE`",
        )
    access = Access(follow_links, commits=commits, allow_code=True, moved=MOVED)

    @contextmanager
    def opened() -> Iterator[tuple[Plan, Mapping[str, Checkpoint]]]:
        with planned(recipe, None, access, reporter.note, lenient=True) as (plan, checkpoints):
            yield plan, checkpoints

    def tell(outcome: Outcome) -> None:
        reporter.event("gate", **outcome.as_dict())

    patched = recipe.entries[output.manifest.donor].is_made
    outcomes = check(asked, GateInput(root, output.manifest, opened, access, reporter, patched=patched), tell)
    return GateReport(os.fspath(folder), tuple(outcomes))
