"""Rows and column names that two or more of terminal, page and Markdown share, as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from skillmerge.cli.show.figures import ACTIONS
from skillmerge.errors import some
from skillmerge.methods.terms import model_of
from skillmerge.plans.depth import Depth, number, over_depth
from skillmerge.plans.plan import Plan
from skillmerge.plans.vocabulary.picture import Vocabulary
from skillmerge.study.scoring.scores import CONFIDENCE, Score
from skillmerge.tensors import ULP_EDGES, format_bytes, format_count, percent

ACTION_COLUMNS = ("tensors", "from", "action", "names")
TRIAL_COLUMNS = ("test", "works", "effect")
GATE_COLUMNS = ("gate", "required", "measured", "result", "")


_PLAIN = 1e6
"""Numbers from here on have an exponent."""


VOCABULARY_COLUMNS = ("tokens", "same", "moved", "only here", "only there", "padding")


class Action(NamedTuple):
    """Tensors of a plan that are treated alike."""

    tensors: str
    models: str
    what: str
    names: str


def role(plan: Plan, name: str) -> str:
    """Return a model's name, and whether it is the donor. An output that is an adapter takes nothing from one."""
    return f"{name} (donor)" if name == plan.donor and not plan.recipe.makes_adapter else name


def actions(plan: Plan) -> list[Action]:
    """Return what the plan does, and with how many tensors of which models."""
    groups: dict[tuple[str, str], list[str]] = {}
    for tensor in plan.tensors.values():
        models = ", ".join(dict.fromkeys(model_of(source.model) for source in tensor.sources))
        groups.setdefault((tensor.action, models), []).append(tensor.name)
    return [Action(str(len(it)), models, ACTIONS[action], some(it, 2)) for (action, models), it in groups.items()]


def compared(plan: Plan) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return head and rows of the differences between the models: key, value in each model, and the result.

    There are no rows if no difference has values.
    """
    shown = [one for one in plan.compared.found if one.values]
    models = list(dict.fromkeys(model for one in shown for model in one.values))
    rows = []
    for one in shown:
        follows = "accepted" if one.accepted else one.level
        values = (one.values.get(model, "-") for model in models)
        rows.append((one.key, *values, f"{follows} `{one.name}`" if one.name else follows))
    return ("difference", *models, "result"), rows


def vocabulary(plan: Plan) -> tuple[list[tuple[str, ...]], list[str]]:
    """Return how the models' tokens lie beside the donor's, a row each; and what the matrices take from where, with a
    few tokens of each kind, as lines. Nothing if rows are not matched by token."""
    found = plan.vocabulary
    if found is None:
        return [], []
    rows = [
        (f"{name} (donor)", f"{it.same:,}", "-", "-", "-", f"{it.padding:,}")
        if name == found.donor
        else (name, *map("{:,}".format, (it.same, it.moved_count, it.here_count, it.there_count, it.padding)))
        for name, it in found.models.items()
    ]
    return rows, [*_rows_taken(found), *_examples(found)]


def _rows_taken(found: Vocabulary) -> Iterator[str]:
    groups: dict[str, list[str]] = {}
    for name, it in found.matrices.items():
        parts = [f"{it.merged:,} of {it.rows:,} rows merged by token"]
        parts += [f"{it.of_donor:,} as in `{found.donor}`"] if it.of_donor else []
        parts += [f"{len(tokens):,} from `{model}`: {some(list(tokens), 4)}" for model, tokens in it.taken.items()]
        groups.setdefault(", ".join(parts), []).append(name)
    yield from (f"{some(names, 2)}: {said}" for said, names in groups.items())


def _examples(found: Vocabulary) -> Iterator[str]:
    for name, it in found.models.items():
        moved = [f"{text} ({there}, here {here})" for text, here, there in it.moved]
        kinds = (
            (f"moved in `{name}`", moved, it.moved_count),
            (f"not in `{name}`", it.here, it.here_count),
            (f"only in `{name}`", it.there, it.there_count),
        )
        for what, tokens, count in kinds:
            if count:
                yield f"{what}: {', '.join(tokens)}{', …' if count > len(tokens) else ''}"


def coefficients(plan: Plan) -> Iterator[tuple[str, Depth]]:
    """Yield each coefficient by layer and kind of module."""
    for index, name in enumerate(plan.coefficients):
        found = (row for tensor in plan.tensors.values() for row in tensor.rows)
        rows = ((tensor, shape, values[index]) for tensor, shape, values in found if values[index:])
        yield name, over_depth(rows)


def written(plan: Plan) -> str:
    """Return the size of the output; a skill's size is known only once it is encoded."""
    return ("at most " if plan.makes_skill else "") + format_bytes(plan.bytes_written)


def read(plan: Plan) -> str:
    """Return how much is read, and how much of it once more for methods that have to know whole tensors."""
    if not plan.bytes_again:
        return format_bytes(plan.bytes_read)
    kept = ", of what it keeps on this disk" if any(item.remote for item in plan.inputs) else ""
    return f"{format_bytes(plan.bytes_read)} ({format_bytes(plan.bytes_again)} more for methods{kept})"


def merged(plan: Plan) -> str | None:
    """Return how much of the donor the formula changes; None if that is not known, or means nothing."""
    if plan.merged_share is None or patched(plan) is not None:
        return None
    whole = sum(math.prod(tensor.shape) for tensor in plan.tensors.values())
    return f"{percent(plan.merged_share)} of {format_count(whole)} parameters"


def patched(plan: Plan) -> str | None:
    """Return what happens where the output is a stack, or a model with a patch or an adapter applied, and nothing
    else."""
    entry = plan.recipe.entries.get(plan.donor)
    if entry is None or not entry.is_made or plan.merged_share != 0:
        return None
    return f"writes the {entry.place}" if entry.stack else f"writes `{entry.onto}` with the {entry.kind} applied"


@dataclass(frozen=True, slots=True)
class Ulps:
    """Elements that moved by first..last units in the last place; last is None in the class without an end."""

    first: int
    last: int | None
    count: int
    share: float

    def label(self, to: str) -> str:
        """`1`, `2 to 4`, `more`; `to` stands between the two numbers."""
        if self.last is None:
            return "more"
        return str(self.last) if self.first == self.last else f"{self.first}{to}{self.last}"


def ulps(counts: Sequence[int] | None) -> list[Ulps]:
    """Return the classes of changes; none if nothing changed or nothing is known."""
    whole = sum(counts or ())
    if not counts or not whole:
        return []
    ends = zip((1, *(edge + 1 for edge in ULP_EDGES)), (*ULP_EDGES, None), counts, strict=True)
    return [Ulps(first, last, count, count / whole) for first, last, count in ends]


def scored(score: Score | None) -> str:
    """Return a score and, where it is known, how far the true one may be off."""
    if score is None:
        return "–"
    return _plain(score.value, 4) + (f" ± {_plain(CONFIDENCE * score.error, 2)}" if score.error is not None else "")


def values_of(numbers: Mapping[str, float]) -> str:
    """Return the numbers of a candidate: `lam = 0.7, mu = 1`."""
    return ", ".join(f"{name} = {number(value)}" for name, value in numbers.items())


def _plain(value: float, digits: int) -> str:
    """Return a number with so many significant digits, without an exponent below a million."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:.0f}" if 10**digits <= abs(rounded) < _PLAIN else f"{value:.{digits}g}"
