"""Recipe + checkpoints' headers -> Plan: everything that is decided before weights are read. Pure data.

Every tensor of every model is accounted for: the output has exactly the donor's tensors, and what the formula
cannot mean, lacks, or leaves over is a problem that names the tensors and prints the rule that would settle
it. No weights are touched and torch is not imported.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from skillmerge.accounting import Account, Problem, account_tensors, copy_rules, settlement
from skillmerge.checkpoints.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, versions
from skillmerge.checkpoints.safetensors_header import MAX_HEADER_BYTES, MAX_NAME, build_header
from skillmerge.coefficients import ScheduleError, matcher
from skillmerge.errors import InputError
from skillmerge.expression import (
    ExpressionError,
    Leaf,
    Sum,
    Term,
    bind,
    degree,
    donor_of,
    expand_skills,
    minus_of,
    sole_model,
    weights,
)
from skillmerge.modelconfig import contradictions, quantisation, tied_source
from skillmerge.naming import module_kind
from skillmerge.program import Program, compile_term
from skillmerge.recipe import Recipe, unused_names
from skillmerge.sidefiles import SideFile, collect, index_bytes
from skillmerge.tensors import DTYPES, OUTPUT_DTYPES, UNIT, TensorSpec

PLAN_VERSION = 1
_PART_NAME = 40
"""Characters that the parts of a tensor add to its name."""

SKILL_SHARD = 4_000_000_000
"""Bytes of dense tensors whose parts go into one file of a skill."""


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What happens to one output tensor.

    action: `merge` computes `program`, `cast` converts one model's tensor to another dtype, `copy` takes its
    bytes, `same` takes the donor's bytes after proving that every model holds the same. Of a skill: `cut` keeps
    the difference of two models exactly, `compute` rounds `program`, `zero` is nothing.
    sources: (model, tensor name in that model) in the order of the program's models.
    coefficients: their values for this tensor, in the order of `Plan.coefficients`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    action: str
    sources: tuple[tuple[str, str], ...]
    coefficients: tuple[float, ...] = ()
    program: Program | None = None


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output file: its header's bytes and its tensors in the order of their bytes."""

    file: str
    header: bytes
    specs: tuple[TensorSpec, ...]

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
    bytes_read: int
    input_itemsizes: tuple[int, ...] = ()
    """The widest element, in bytes, that each of a tensor's sources can have."""
    versions: Mapping[str, Mapping[str, list[int | str]]] = field(default_factory=dict, compare=False)
    """What tells the input files from changed ones on this machine."""
    digest: str = field(default="", compare=False)
    weights_digest: str = field(default="", compare=False)
    """The digest of what decides the output's bytes: it stays where only words of the recipe change, or its gates."""

    @property
    def makes_skill(self) -> bool:
        return self.recipe.output.kind == "skill"

    @property
    def bytes_written(self) -> int:
        """How many bytes the output has; of a skill, how many it would have if nothing in it were zero."""
        return sum(shard.size for shard in self.shards) + sum(file.size for file in self.side_files)

    def refuse_problems(self) -> None:
        """Raise InputError with every problem of the accounting and the rules that would settle them."""
        if self.problems:
            count = len(self.problems)
            text = "\n".join(problem.message for problem in self.problems)
            fix = settlement(self.recipe, self.problems) or None
            raise InputError(f"{count} problem{'s' if count > 1 else ''} between the models:\n{text}", fix=fix)

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain data: what `--json` prints, and what `-o` writes."""
        return {
            **_deciding(self),
            "digest": self.digest,
            "problems": [asdict(problem) for problem in self.problems],
            "notes": list(self.notes),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
        }


def make_plan(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], *, allow_code: bool = False) -> Plan:
    """Plan `recipe` over its opened `checkpoints` (by model name, at least those that it uses).

    Raises RecipeError for rules and expressions that these models give no meaning, InputError for
    checkpoints that are quantised or contradict themselves. What `copy` or `ignore` could settle is
    collected in `problems` instead, so that a person sees all of it at once.
    """
    for name, checkpoint in checkpoints.items():
        refuse_quantised(name, checkpoint)
    donor_name = _donor(recipe)
    donor = checkpoints[donor_name]
    left_out = _left_out(recipe, donor)
    values = _coefficients(recipe, [name for name in donor.tensors if name not in left_out])
    copied = copy_rules(recipe, donor)
    terms = _terms(recipe, {name: row for name, row in values.items() if name not in copied})
    accounts, problems, ties, notes = account_tensors(recipe, checkpoints, donor_name, terms, copied)
    programs: dict[int, Program] = {}  # by the term's identity: thousands of tensors share a few terms
    tensors = {}
    for name, spec in donor.tensors.items():
        if name in left_out:
            continue
        account = accounts.get(name)
        if name in terms and terms[name] is None:
            tensors[name] = TensorPlan(name, spec.dtype, spec.shape, "zero", (), values[name])
        elif account is not None:
            tensors[name] = _plan_tensor(recipe, spec, account, checkpoints, values[name], programs)
    problems += [
        Problem("config", f"the donor's config.json and weights do not belong together: {message}")
        for message in contradictions(donor.config, {name: spec.shape for name, spec in donor.tensors.items()})
    ]
    dtypes = {plan.dtype for name, plan in tensors.items() if plan.dtype != donor.tensors[name].dtype}
    skill = recipe.output.kind == "skill"
    side_files = () if skill else collect(donor, recipe.output.dtype if dtypes else None, allow_code)
    shards: tuple[ShardPlan, ...] = ()
    if len(tensors) == len(donor.tensors) - len(left_out):
        shards = _lay_out_skill(recipe, tensors) if skill else _lay_out(recipe, donor, tensors)
    if not skill and [shard.file for shard in shards] not in ([], [SINGLE_FILE]):
        content = index_bytes({shard.file: list(shard.specs) for shard in shards})
        side_files = tuple(sorted((*side_files, SideFile.of(INDEX_FILE, content)), key=lambda file: file.name))
    read = _bytes_read(tensors, checkpoints)
    plan = Plan(
        recipe=recipe,
        inputs=tuple(_input(name, checkpoints[name], read) for name in recipe.used_models()),
        donor=donor_name,
        coefficients=tuple(recipe.coefficients),
        tensors=tensors,
        shards=shards,
        side_files=side_files,
        ties=tuple(ties),
        problems=tuple(problems),
        notes=(
            *(f"`{name}` stands in the recipe but does nothing" for name in unused_names(recipe)),
            *_oddities(recipe, checkpoints, donor),
            *(f"`{copy}` of model `{model}` is left out: both configs tie it to `{it}`" for model, copy, it in ties),
            *(_untied(donor, tensors) if not problems and not skill else ()),
            *notes,
        ),
        bytes_read=sum(read.values()),
        input_itemsizes=_itemsizes(tensors, checkpoints),
        versions=versions(checkpoints),
    )
    deciding = {key: value for key, value in _deciding(plan).items() if key != "recipe_sha256"}
    weights_digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
    object.__setattr__(plan, "weights_digest", weights_digest)
    object.__setattr__(plan, "digest", hashlib.sha256((weights_digest + recipe.sha256).encode()).hexdigest())
    return plan


def _left_out(recipe: Recipe, donor: Checkpoint) -> set[str]:
    """Tensors that a skill does without, as `ignore` says; a model has all of its donor's."""
    if recipe.output.kind != "skill" or not recipe.ignore:
        return set()
    pattern = matcher(recipe.ignore)
    return {name for name in donor.tensors if pattern.match(name)}


def refuse_quantised(name: str, checkpoint: Checkpoint) -> None:
    """Raise InputError where a checkpoint's weights are no plain numbers."""
    reason = quantisation(checkpoint.config, checkpoint.tensors)
    if reason is not None:
        raise InputError(
            f"model `{name}` ({checkpoint.place}) is quantised, and its numbers cannot be added: {reason}",
            fix="use the checkpoint it was quantised from (bfloat16, float16 or float32)",
        )


def _bind(recipe: Recipe, values: Mapping[str, float]) -> Term | None:
    try:
        return expand_skills(bind(recipe.expression, values), recipe.skills)
    except ExpressionError as error:
        raise recipe.expression_error(error) from error


def _degree_term(recipe: Recipe, values: Mapping[str, float], tensor: str) -> Term | None:
    """The expression with one tensor's coefficients. Raises RecipeError where it is not of degree 1, or of
    degree 0 for a skill, of which None is nothing."""
    term = _bind(recipe, values)
    found = degree(term)
    if recipe.output.kind == "skill":
        if found != 0:
            at = f"for tensor `{tensor}`"
            raise recipe.error(
                ("merge",),
                f"the expression gives {found:g} models' worth of weights {at}, and a skill is a difference",
                "write rl - sft; for a model leave `output.kind` out",
            )
        if not any(weights(term).values()):
            return None
    elif term is None or found != 1:
        asked = ", ".join(f"{name} = {value:g}" for name, value in values.items())
        at = f"for tensor `{tensor}`" + (f" (with {asked})" if asked else "")
        what = f"gives {found:g} models' worth of weights" if found != 0 else "gives a difference, not a model,"
        fix: dict[float, str] = {
            0: "add it to a model: target + lam * (rl - sft); or store it with `output: {kind: skill}`",
            2: "did you mean the average, (a + b) / 2?",
        }
        advice = fix.get(found, "the factors must add up to 1")
        raise recipe.error(("merge",), f"the expression {what} {at}", advice)
    return term


def _donor(recipe: Recipe) -> str:
    if recipe.output.like is not None:
        return recipe.output.like
    defaults = {name: schedule.default for name, schedule in recipe.coefficients.items()}
    term = _bind(recipe, defaults) or _bind(recipe, dict.fromkeys(defaults, 1.0))
    if term is None:
        raise recipe.error(("merge",), "the expression is always zero")
    return donor_of(term)


def _coefficients(recipe: Recipe, names: list[str]) -> dict[str, tuple[float, ...]]:
    """Each tensor's coefficients, in the order of the recipe. Raises RecipeError for rules without meaning."""
    columns = []
    for coefficient, schedule in recipe.coefficients.items():
        try:
            columns.append(schedule.resolve(names))
        except ScheduleError as error:
            path = ("coefficients", coefficient, "rules", error.rule)
            raise recipe.error(path, str(error), error.fix) from error
    return {name: tuple(column[name] for column in columns) for name in names}


def _terms(recipe: Recipe, values: Mapping[str, tuple[float, ...]]) -> dict[str, Term | None]:
    """Each tensor's term; tensors with the same coefficients share one."""
    by_values: dict[tuple[float, ...], Term | None] = {}
    for name, row in values.items():
        if row not in by_values:
            by_values[row] = _degree_term(recipe, dict(zip(recipe.coefficients, row, strict=True)), name)
    return {name: by_values[row] for name, row in values.items()}


def _plan_tensor(
    recipe: Recipe,
    spec: TensorSpec,
    account: Account,
    checkpoints: Mapping[str, Checkpoint],
    values: tuple[float, ...],
    programs: dict[int, Program],
) -> TensorPlan:
    term, sources = account.term, account.sources
    dtype = spec.dtype
    if DTYPES[dtype].is_float and recipe.output.dtype != "same":
        dtype = OUTPUT_DTYPES[recipe.output.dtype]
    if account.same:
        return TensorPlan(spec.name, dtype, spec.shape, "same", sources)
    if len(sources) == 1 and (model := sole_model(term)) is not None:
        source = sources[0][1]
        copied = checkpoints[model].tensors[source].dtype == dtype
        action = "copy" if copied else "cast"
        program = None if copied else compile_term(Leaf(model))
        coefficients = () if account.copied else values
        return TensorPlan(spec.name, dtype, spec.shape, action, ((model, source),), coefficients, program)
    if id(term) not in programs:
        programs[id(term)] = compile_term(term)
    program = programs[id(term)]
    names = dict(sources)
    ordered = tuple((model, names[model]) for model in program.models)
    action = "merge"
    if recipe.output.kind == "skill":
        plain = isinstance(term, Sum) and isinstance(term.left, Leaf) and isinstance(term.right, Leaf) and term.minus
        exact = plain and recipe.output.dtype == "same" and recipe.output.keep is None
        action = "cut" if exact else "compute"
        if action == "compute" and recipe.output.dtype == "same" and DTYPES[dtype].itemsize < 4:
            dtype = "F32"  # what was scaled or summed rarely fits 16 bits
    return TensorPlan(spec.name, dtype, spec.shape, action, ordered, values, program)


def _lay_out_skill(recipe: Recipe, tensors: Mapping[str, TensorPlan]) -> tuple[ShardPlan, ...]:
    """A skill's files: tensors in the donor's order, as many as would be a shard's worth if nothing were zero.

    Their specs say where they would be then; where their parts are is known when they are made.
    """
    limit, filled, header = recipe.output.shard_size or SKILL_SHARD, 0, 0
    groups: list[list[TensorPlan]] = [[]]
    for plan in tensors.values():
        if plan.action == "same":
            continue
        if len(plan.name) > MAX_NAME - _PART_NAME:
            raise InputError(f"tensor `{plan.name[:80]}…` has a name too long for the parts of a skill")
        # Six parts a unit at most, each with its place and shape beside its name.
        entries = 6 * -(-math.prod(plan.shape) // UNIT) * (len(plan.name.encode()) + 160)
        if groups[-1] and (filled + _nbytes(plan) > limit or header + entries > MAX_HEADER_BYTES // 2):
            groups.append([])
            filled = header = 0
        groups[-1].append(plan)
        filled += _nbytes(plan)
        header += entries
    shards = []
    for number, group in enumerate(groups, 1):
        file, specs, end = f"skill-{number:05d}-of-{len(groups):05d}.safetensors", [], 0
        for plan in group:
            specs.append(TensorSpec(plan.name, plan.dtype, plan.shape, file, end, end + _nbytes(plan)))
            end = specs[-1].end
        shards.append(ShardPlan(file, b"", tuple(specs)))
    return tuple(shards)


def _lay_out(recipe: Recipe, donor: Checkpoint, tensors: Mapping[str, TensorPlan]) -> tuple[ShardPlan, ...]:
    """The output's files: the donor's own layout, or shards of at most the size that was asked for."""
    groups: list[tuple[str, list[str]]]
    if recipe.output.shard_size is None:
        groups = [(file, [spec.name for spec in header.tensors]) for file, header in donor.shards.items()]
        if not donor.indexed:
            groups = [(SINGLE_FILE, names) for _, names in groups]
    else:
        pieces: list[list[str]] = [[]]
        filled = 0
        for name, plan in tensors.items():
            nbytes = _nbytes(plan)
            if pieces[-1] and filled + nbytes > recipe.output.shard_size:
                pieces.append([])
                filled = 0
            pieces[-1].append(name)
            filled += nbytes
        count = len(pieces)
        groups = [
            (f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else SINGLE_FILE, names)
            for number, names in enumerate(pieces, 1)
        ]
    shards = []
    for file, names in groups:
        header, specs = build_header((name, tensors[name].dtype, tensors[name].shape) for name in names)
        placed = tuple(TensorSpec(s.name, s.dtype, s.shape, file, s.start, s.end) for s in specs)
        shards.append(ShardPlan(file, header, placed))
    return tuple(shards)


def _nbytes(plan: TensorPlan) -> int:
    return math.prod(plan.shape) * DTYPES[plan.dtype].bits // 8


def _oddities(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], donor: Checkpoint) -> Iterable[str]:
    """What is allowed and still hardly meant."""
    if not donor.config and recipe.output.kind == "model":
        yield "the donor has no config.json: no runtime will load the output as it is"
    seen: dict[str, str] = {}
    for name in recipe.used_models():
        root = checkpoints[name].files.root
        place = str(root.resolve()) if root is not None else checkpoints[name].place
        if place in seen:
            yield f"models `{seen[place]}` and `{name}` are the same: their difference is zero"
        seen.setdefault(place, name)
    for name, value in recipe.overrides.items():
        if recipe.rules_overridden.get(name):
            yield f"--set {name}={value:g} stands in for the whole schedule of `{name}`, its rules included"


def _untied(donor: Checkpoint, tensors: Mapping[str, TensorPlan]) -> list[str]:
    """A word where the recipe drives apart what the donor's config ties and the donor stores twice."""
    notes = []
    for name in [name for name in tensors if module_kind(name) == "head"]:
        others = {other: spec for other, spec in donor.tensors.items() if other != name}
        source = tied_source(name, donor.tensors[name].shape, donor.config, others)
        if source is not None and tensors[source].coefficients != tensors[name].coefficients:
            notes.append(
                f"config.json ties `{name}` to `{source}`, but the recipe gives them different coefficients: "
                "runtimes will not agree which of the two to use"
            )
    return notes


def _itemsizes(tensors: Mapping[str, TensorPlan], checkpoints: Mapping[str, Checkpoint]) -> tuple[int, ...]:
    specs = {name: checkpoint.tensors for name, checkpoint in checkpoints.items()}
    found = {
        (index, specs[model][source].dtype)
        for plan in tensors.values()
        for index, (model, source) in enumerate(plan.sources)
    }
    count = 1 + max((index for index, _ in found), default=-1)
    return tuple(max(DTYPES[dtype].itemsize for index, dtype in found if index == slot) for slot in range(count))


def _bytes_read(tensors: Mapping[str, TensorPlan], checkpoints: Mapping[str, Checkpoint]) -> dict[tuple[str, str], int]:
    """How many bytes of each model's weight files the output is made of."""
    read: dict[tuple[str, str], int] = {}
    for tensor in tensors.values():
        for model, source in tensor.sources:
            spec = checkpoints[model].tensors[source]
            read[model, spec.file] = read.get((model, spec.file), 0) + checkpoints[model].bytes_of(source)
    return read


def _input(name: str, checkpoint: Checkpoint, read: Mapping[tuple[str, str], int]) -> InputPlan:
    files = []
    for file, header in checkpoint.shards.items():
        _, (kind, stated) = checkpoint.files.known_digest(file) or (0, ("", ""))
        digest = hashlib.sha256(header.raw).hexdigest()
        sha256 = stated if kind == "sha256" else None
        count = read.get((name, file), 0) + read.get((minus_of(name), file), 0)
        files.append(InputFile(file, header.size, digest, sha256, count))
    source = checkpoint.files
    return InputPlan(name, checkpoint.uri, source.revision, source.license, source.remote, tuple(files))


def _deciding(plan: Plan) -> dict[str, Any]:
    """Everything that the output depends on, but for the weights themselves."""
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
    }
