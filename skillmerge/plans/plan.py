"""The plan: every output tensor, shard and input as plain data, its digest, and how it is written as JSON."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from skillmerge.brief import brief, drawn
from skillmerge.checkpoints.checkpoint import Naming
from skillmerge.errors import InputError, SkillmergeError, UsageError
from skillmerge.methods.linear import Program
from skillmerge.naming import sliced
from skillmerge.plans.accounting import Problem, settlement
from skillmerge.plans.compare.models import NOTHING, Comparison
from skillmerge.plans.mapping import Source
from skillmerge.plans.side_files import SideFile
from skillmerge.plans.vocabulary.picture import Vocabulary
from skillmerge.recipes.recipe import Recipe
from skillmerge.remarks import Remark, count_of
from skillmerge.tensors import StoredTensor

PLAN_VERSION = 1
DECIDING = (
    "version", "donor", "output", "coefficients", "overrides", "inputs", "shards", "tensors", "side_files"
)  # fmt: skip
"""Keys of a plan that decide the output's bytes, with the formula."""


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """The action on one output tensor.

    action: `merge` computes `program`, `cast` converts one model's tensor to another dtype, `copy` takes its
    bytes, `same` takes the donor's bytes after proving that every model holds the same. Of a skill: `cut` keeps
    the difference of two models exactly, `compute` rounds `program`, `zero` is nothing. Of an adapter: `join` puts the
    parts of adapters beside each other.
    sources: where its elements come from, in the order of the program's models.
    coefficients: their values for this tensor, in the order of `Plan.coefficients`.
    slices: of a packed tensor whose experts have coefficients of their own, what happens to each run of experts that
    share them; it has neither coefficients nor a program itself. experts: of such a slice, the first expert and the
    one behind the last.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    action: str
    sources: tuple[Source, ...]
    coefficients: tuple[float, ...] = ()
    program: Program | None = None
    slices: tuple[TensorPlan, ...] = ()
    experts: tuple[int, int] | None = None

    @property
    def readings(self) -> int:
        """How often its sources are read before the arithmetic, for its methods."""
        return self.program.readings if self.program is not None else 0

    @property
    def read_again(self) -> Iterable[Source]:
        """The sources that are read before the arithmetic too, each once."""
        return dict.fromkeys(source for piece in self.pieces if piece.readings for source in piece.sources)

    @property
    def pieces(self) -> tuple[TensorPlan, ...]:
        """Its slices, or itself."""
        return self.slices or (self,)

    @property
    def span(self) -> tuple[int, int]:
        """Its elements, counted from the whole tensor's first."""
        elements = math.prod(self.shape)
        if self.experts is None:
            return 0, elements
        each = elements // self.shape[0]
        return self.experts[0] * each, self.experts[1] * each

    @property
    def merged(self) -> int:
        """How many of its elements are computed, of which statistics are kept."""
        return sum(last - first for first, last in (it.span for it in self.pieces if it.action == "merge"))

    @property
    def rows(self) -> Iterator[tuple[str, tuple[int, ...], tuple[int | float, ...]]]:
        """Name, shape and coefficients: its own, or those of each expert."""
        return coefficients_of(self.name, self.shape, self.coefficients, slices_of(self))

    def part_of(self, amount: int) -> int:
        """Return what it takes of an amount that the whole tensor takes."""
        if self.experts is None:
            return amount
        first, last = (amount * expert // self.shape[0] for expert in self.experts)
        return last - first

    def within(self, first: int, last: int) -> Iterator[tuple[TensorPlan, int, int]]:
        """Yield the pieces that elements first..last belong to, and which of them."""
        for piece in self.pieces:
            start, stop = piece.span
            if max(first, start) < min(last, stop):
                yield piece, max(first, start), min(last, stop)


@dataclass(frozen=True, slots=True)
class Slice:
    """Some experts of a packed tensor, as data: the first and the last, what happens to them, and their
    coefficients."""

    experts: tuple[int, int]
    action: str
    coefficients: tuple[int | float, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"experts": list(self.experts), "action": self.action, "coefficients": list(self.coefficients)}


def slices_of(tensor: TensorPlan) -> list[Slice]:
    """Return the slices of a packed tensor as data."""
    found = ((it, it.experts) for it in tensor.slices)
    return [Slice((at[0], at[1] - 1), it.action, it.coefficients) for it, at in found if at is not None]


def coefficients_of(
    name: str, shape: tuple[int, ...], coefficients: tuple[int | float, ...], slices: Sequence[Slice]
) -> Iterator[tuple[str, tuple[int, ...], tuple[int | float, ...]]]:
    """Yield name, shape and coefficients of a tensor, or of each expert in it."""
    for piece in slices:
        for expert in range(piece.experts[0], piece.experts[1] + 1):
            yield sliced(name, expert), shape[1:], piece.coefficients
    if not slices:
        yield name, shape, coefficients


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output file: its header's bytes and its tensors in the order of their bytes."""

    file: str
    header: bytes
    specs: tuple[StoredTensor, ...]

    @property
    def size(self) -> int:
        return self.specs[-1].end if self.specs else len(self.header)


@dataclass(frozen=True, slots=True)
class InputFile:
    """A weight file of a model: its size, the digest of its header (size field included), the sha256 that the
    Hub states, and how many bytes of its weights the output is made of."""

    name: str
    size: int
    header_sha256: str
    stated_sha256: str | None
    bytes_read: int


@dataclass(frozen=True, slots=True)
class InputPlan:
    """One model as the plan saw it: where from, which commit, and its weight files."""

    name: str
    uri: str
    revision: str | None
    license: str | None
    remote: bool
    files: tuple[InputFile, ...]
    naming: Naming = field(default_factory=Naming)


@dataclass(frozen=True, slots=True)
class Plan:
    recipe: Recipe
    inputs: tuple[InputPlan, ...]
    donor: str
    coefficients: tuple[str, ...]
    tensors: Mapping[str, TensorPlan]
    shards: tuple[ShardPlan, ...]
    side_files: tuple[SideFile, ...]
    ties: tuple[tuple[str, str, str], ...]
    """(model, copy, original): tensors that are left out as copies, which `apply` proves first."""
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    warnings: tuple[Remark, ...] = ()
    compared: Comparison = NOTHING
    merged_share: float | None = None
    """The parameters of the tensors that the formula changes, of the donor's; of a skill None."""
    vocabulary: Vocabulary | None = None
    """How rows are matched by token, if they are."""
    bytes_read: int = 0
    bytes_again: int = 0
    """What is read besides, to find out what methods have to know of whole tensors."""
    input_itemsizes: tuple[int, ...] = ()
    """The widest element, in bytes, that each of a tensor's sources can have."""
    versions: Mapping[str, Mapping[str, list[int | str]]] = field(default_factory=dict, compare=False)
    """Versions of the input files on this machine, which show changes."""
    digest: str = field(default="", compare=False)
    weights_digest: str = field(default="", compare=False)
    """The digest of what decides the bytes of the weights, by which an interrupted run knows its own shards. Comments
    and gates of the recipe do not change it."""

    __repr__ = brief
    _repr_html_ = drawn

    @property
    def makes_skill(self) -> bool:
        return self.recipe.makes_skill

    @property
    def bytes_written(self) -> int:
        """Size of the output in bytes; for a skill, its size if no element were zero."""
        return sum(shard.size for shard in self.shards) + sum(file.size for file in self.side_files)

    def refuse_problems(self) -> None:
        """Raise InputError with every problem of the accounting and the rules that would settle them."""
        if self.problems:
            count = len(self.problems)
            text = "\n".join(problem.message for problem in self.problems)
            fix = "\n".join(filter(None, (settlement(self.recipe, self.problems), self.acceptance))) or None
            raise InputError(f"{count} problem{'s' if count > 1 else ''} between the models:\n{text}", fix=fix)

    @property
    def strict_error(self) -> type[SkillmergeError]:
        """The error class for warnings under `--strict`: UsageError if all are about the recipe's text."""
        return InputError if any(not warning.of_recipe for warning in self.warnings) else UsageError

    def refuse_warnings(self) -> None:
        """Raise every warning as one error, with its fixes, for `--strict`."""
        if self.warnings:
            text = "\n".join(warning.message for warning in self.warnings)
            advice = dict.fromkeys((*(warning.fix for warning in self.warnings), self.acceptance))
            fix = "\n".join(filter(None, advice)) or None
            raise self.strict_error(f"{count_of(self.warnings)} under --strict:\n{text}", fix=fix)

    @property
    def acceptance(self) -> str | None:
        """Advice that accepts every problem and warning that can be accepted: a line of the recipe, or options."""
        found = (*(it.name for it in self.problems), *(it.name for it in self.warnings))
        names = dict.fromkeys(name for name in found if name is not None)
        final = any(problem.final for problem in self.problems)
        if not names or (final and any(problem.name is None for problem in self.problems)):
            return None  # accepting some would not settle the rest
        if self.recipe.of_command:
            return f"after checking, to accept these differences: {' '.join(f'--accept {it}' for it in names)}"
        every = [*sorted(self.recipe.accept), *(name for name in names if name not in self.recipe.accept)]
        return f"after checking, to accept these differences, add to the recipe:\naccept: [{', '.join(every)}]"

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain data: what `--json` prints, and what `-o` writes."""
        return {
            **deciding_facts(self),
            "digest": self.digest,
            "problems": [problem.as_dict() for problem in self.problems],
            "warnings": [warning.message for warning in self.warnings],
            "notes": list(self.notes),
            "compared": [found.as_dict() for found in self.compared.found],
            **({"merged_share": self.merged_share} if self.merged_share is not None else {}),
            **({"vocabulary": self.vocabulary.as_dict()} if self.vocabulary is not None else {}),
            "bytes_read": self.bytes_read,
            **({"bytes_read_again": self.bytes_again} if self.bytes_again else {}),
            "bytes_written": self.bytes_written,
        }


def sealed(plan: Plan) -> Plan:
    """Return the plan with its digests."""
    weights_digest, digest = digests(deciding_facts(plan), plan.recipe)
    return replace(plan, weights_digest=weights_digest, digest=digest)


def digests(facts: Mapping[str, Any], recipe: Recipe) -> tuple[str, str]:
    """Return the digests of the weights and of the whole plan. facts: at least those that decide, as JSON has them."""
    deciding = json.dumps({key: facts[key] for key in DECIDING}, sort_keys=True)
    of_facts = hashlib.sha256(deciding.encode()).hexdigest()
    # The facts have the values of coefficients, but neither the formula nor the numbers that are written in it.
    of_weights = hashlib.sha256(f"{of_facts}{recipe.formula}".encode()).hexdigest()
    return of_weights, hashlib.sha256((of_facts + recipe.sha256).encode()).hexdigest()


def deciding_facts(plan: Plan) -> dict[str, Any]:
    """Return everything that the output depends on, except the weights themselves."""
    output = plan.recipe.output
    inputs = [
        {
            "name": item.name,
            "uri": item.uri,
            "revision": item.revision,
            "files": [
                {key: getattr(file, key) for key in ("name", "size", "header_sha256", "bytes_read")}
                for file in item.files
            ],
            **item.naming.as_dict(),
        }
        for item in plan.inputs
    ]
    return {
        "version": PLAN_VERSION,
        "recipe_sha256": plan.recipe.sha256,
        "donor": plan.donor,
        "output": {
            **({"kind": output.kind, "compression": output.compression} if output.kind != "model" else {}),
            **({"keep": output.keep} if output.keep is not None else {}),
            "dtype": output.dtype,
            "rounding": output.rounding,
            "seed": output.seed,
        },
        "coefficients": list(plan.coefficients),
        "overrides": dict(plan.recipe.overrides),
        "inputs": inputs,
        "shards": [{"file": shard.file, "size": shard.size} for shard in plan.shards],
        "tensors": [_describe(plan.tensors[spec.name], spec.file) for shard in plan.shards for spec in shard.specs],
        "side_files": [
            {"name": file.name, "size": file.size, file.digest[0]: file.digest[1]} for file in plan.side_files
        ],
    }


def _describe(tensor: TensorPlan, file: str) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "file": file,
        "action": tensor.action,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "sources": [list(source) for source in tensor.sources],
        "coefficients": list(tensor.coefficients),
        **({"slices": [it.as_dict() for it in slices_of(tensor)]} if tensor.slices else {}),
    }
