"""Recipe + checkpoints' headers -> Plan: everything that is decided before weights are read. Pure data.

Every tensor of every model is accounted for: the output has exactly the donor's tensors, and what the formula
cannot mean, lacks, or leaves over is a problem that names the tensors and prints the rule that would settle
it. No weights are touched and torch is not imported.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from skillmerge.checkpoints.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, versions
from skillmerge.checkpoints.model_config import contradictions
from skillmerge.methods.terms import Leaf, Term, degree, is_zero, model_of
from skillmerge.plans.accounting import Problem, account_tensors, copy_rules
from skillmerge.plans.adapters.planning import plan_adapter
from skillmerge.plans.advice.heads import driven_apart, stored_heads
from skillmerge.plans.advice.oddities import oddities, ramps_over_adapters, shallow_adapters, unlike_bases
from skillmerge.plans.advice.shares import Shares, ignored_tensors, shares_of
from skillmerge.plans.compare.found import Compared
from skillmerge.plans.compare.models import NOTHING, Comparison, compare_models, unsettled
from skillmerge.plans.dtypes.kept import levelled, output_specs
from skillmerge.plans.dtypes.quantised import exact_tensors
from skillmerge.plans.layout import lay_out, lay_out_skill
from skillmerge.plans.models.actions import actions
from skillmerge.plans.models.coefficients import coefficients_of, kept_coefficients
from skillmerge.plans.models.experts import Row, Run, all_of_them, by_tensor, runs
from skillmerge.plans.plan import InputFile, InputPlan, Plan, ShardPlan, TensorPlan, sealed
from skillmerge.plans.side_files import SideFile, collect, index_bytes
from skillmerge.plans.vocabulary.by_token import vocabulary_of
from skillmerge.recipes.formula.tree import ExpressionError
from skillmerge.recipes.lint import remarks
from skillmerge.recipes.recipe import Recipe, one_model_meant, unclear_donor
from skillmerge.remarks import Remark, warning
from skillmerge.tensors import DTYPES, TensorSpec


def plan_recipe(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    *,
    allow_code: bool = False,
    lenient: bool = False,
    compare: bool = True,
) -> Plan:
    """Plan `recipe` over its opened `checkpoints` (by model name, at least those that it uses).

    lenient: report differences between the models as warnings at most, for outputs of versions that did not compare.
    compare: whether to compare the models; False if that was done.

    Raises RecipeError for rules and expressions without meaning for these models, InputError for checkpoints that are
    quantized or contradict themselves. What `copy` or `ignore` could settle is collected in `problems`, to be
    reported all at once.
    """
    if recipe.makes_adapter:
        return _adapter_plan(recipe, checkpoints)
    donor = checkpoints[donor_name := _donor(recipe)]
    given, names = kept_coefficients(recipe, donor.tensors, donor.config)
    copied = copy_rules(recipe, donor)
    terms, values, experts = _terms(recipe, *by_tensor(given, names, copied), copied)
    exact = exact_tensors(recipe, checkpoints, donor_name, terms)
    wanted = output_specs(recipe, donor, exact)
    accounts = account_tensors(recipe, checkpoints, donor_name, terms, exact)
    tensors = actions(recipe, checkpoints, wanted, values, accounts.tensors, terms, experts)
    compared = compare_models(recipe, checkpoints, donor_name, terms, copied, lenient=lenient) if compare else NOTHING
    problems = (*compared.problems, *accounts.problems, *_contradictions(recipe, donor, donor_name))
    notes = _notes(recipe, checkpoints, donor, {} if problems else tensors, accounts.ties)
    shards, side_files = _files(recipe, donor, tensors, len(tensors) == len(terms), allow_code)
    shares = None if problems or recipe.makes_skill else _shares(recipe, checkpoints, donor_name, copied, given)
    doubts = _doubts(recipe, compared, shares, _warnings(recipe, checkpoints, donor, tensors, wanted))
    idle = _idle(recipe, doubts["compared"].found, problems, tensors, checkpoints) if compare else []
    return sealed(
        Plan(
            recipe=recipe,
            donor=donor_name,
            coefficients=tuple(recipe.coefficients),
            tensors=tensors,
            shards=shards,
            side_files=side_files,
            ties=accounts.ties,
            problems=problems,
            notes=(*notes, *accounts.notes, *compared.notes, *idle),
            **doubts,
            **_inputs(recipe, checkpoints, tensors),
        )
    )


def _adapter_plan(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> Plan:
    """Return the plan of an output that is an adapter, whose tensors no model has."""
    made = plan_adapter(recipe, checkpoints)
    return sealed(
        Plan(
            recipe=recipe,
            donor=_donor(recipe),
            coefficients=tuple(recipe.coefficients),
            ties=(),
            problems=(),
            notes=(),
            warnings=tuple(it for it in _of_models(recipe, checkpoints) if it.name not in recipe.accept),
            **made,
            **_inputs(recipe, checkpoints, made["tensors"]),
        )
    )


def _bind(recipe: Recipe, values: Mapping[str, float]) -> Term | None:
    try:
        return recipe.term(values)
    except ExpressionError as error:
        raise recipe.expression_error(error) from error


def _degree_term(recipe: Recipe, values: Mapping[str, float], tensor: str) -> Term | None:
    """Return the expression with one tensor's coefficients. Raises RecipeError if it is not of degree 1, or of
    degree 0 for a skill, of which None is nothing."""
    term = _bind(recipe, values)
    found = degree(term)
    if recipe.makes_skill:
        if found != 0:
            at = f"for tensor `{tensor}`"
            raise recipe.error(
                ("merge",),
                f"the expression gives {found:g} models' worth of weights {at}, and a skill is a difference",
                "write rl - sft; for a model leave `output.kind` out",
            )
        if is_zero(term):
            return None
    elif term is None or found != 1:
        asked = ", ".join(f"{name} = {value:g}" for name, value in values.items())
        at = f"for tensor `{tensor}`" + (f" (with {asked})" if asked else "")
        what = f"gives {found:g} models' worth of weights" if found != 0 else "gives a difference, not a model,"
        raise recipe.error(("merge",), f"the expression {what} {at}", one_model_meant(recipe, found))
    return term


def _donor(recipe: Recipe) -> str:
    if recipe.donor is None:
        _bind(recipe, {name: schedule.default for name, schedule in recipe.coefficients.items()})
        raise recipe.error(("merge",), "the expression is always zero")
    return recipe.donor


def _terms(
    recipe: Recipe, values: Mapping[str, Row], experts: Mapping[str, Sequence[Row]], copied: Mapping[str, str]
) -> tuple[dict[str, Term | None], dict[str, Row], dict[str, list[Run]]]:
    """Return each tensor's term: the model that it is copied from, or the expression; None if it is nothing. Also the
    values that count, and the runs of experts of packed tensors with values of their own.

    Tensors with the same coefficients share a term; that of experts has the models of all of them.
    """
    leaves = {model: Leaf(model) for model in recipe.models}
    by_values: dict[Row, Term | None] = {}
    terms: dict[str, Term | None] = {}
    for name, row in values.items():
        if name in copied:
            terms[name] = leaves[copied[name]]
            continue
        for each in experts.get(name, (row,)):
            if each not in by_values:
                by_values[each] = _degree_term(recipe, dict(zip(recipe.coefficients, each, strict=True)), name)
        terms[name] = all_of_them(map(by_values.get, experts[name])) if name in experts else by_values[row]
    recipe.refuse_unequal_calls(by_values.values())
    used = {name: () if name in copied else row for name, row in values.items()}
    return terms, used, {name: list(runs(rows, by_values)) for name, rows in experts.items()}


def _contradictions(recipe: Recipe, donor: Checkpoint, name: str) -> list[Problem]:
    shapes = {tensor: spec.shape for tensor, spec in donor.tensors.items()}
    said = recipe.in_words(f"config.json and weights of the donor `{name}` contradict each other: ")
    return [Problem("config", said + message) for message in contradictions(donor.config, shapes)]


def _files(
    recipe: Recipe, donor: Checkpoint, tensors: Mapping[str, TensorPlan], complete: bool, allow_code: bool
) -> tuple[tuple[ShardPlan, ...], tuple[SideFile, ...]]:
    """Return the output's shards, none if it is not complete, and its side files, of which a skill has none."""
    if recipe.makes_skill:
        return lay_out_skill(recipe, tensors) if complete else (), ()
    is_cast = any(plan.dtype != donor.written_dtype(name) for name, plan in tensors.items())
    side_files = collect(donor, recipe.output.dtype if is_cast else None, allow_code)
    shards = lay_out(recipe, donor, tensors) if complete else ()
    if [shard.file for shard in shards] not in ([], [SINGLE_FILE]):
        content = index_bytes({shard.file: list(shard.specs) for shard in shards})
        side_files = tuple(sorted((*side_files, SideFile.of(INDEX_FILE, content)), key=lambda file: file.name))
    return shards, side_files


def _notes(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    donor: Checkpoint,
    tensors: Mapping[str, TensorPlan],
    ties: Iterable[tuple[str, str, str]],
) -> Iterator[str]:
    """Yield notes. tensors: of a plan without problems."""
    yield from oddities(recipe, checkpoints, donor)
    yield from (f"`{copy}` of model `{model}` is left out: both configs tie it to `{it}`" for model, copy, it in ties)


def _warnings(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    donor: Checkpoint,
    tensors: Mapping[str, TensorPlan],
    wanted: Mapping[str, TensorSpec],
) -> Iterator[Remark]:
    """Yield warnings about what the recipe does."""
    yield from _of_models(recipe, checkpoints)
    yield from shallow_adapters(recipe, checkpoints)
    yield from levelled(recipe, donor, wanted)
    if not recipe.makes_skill:
        yield from driven_apart(donor, tensors)


def _of_models(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> Iterator[Remark]:
    """Yield warnings about the recipe's text, and about where its models come from."""
    yield from _of_recipe(recipe, checkpoints)
    for name in recipe.used_models():
        if doubt := checkpoints[name].at.doubt:
            yield warning(f"model `{name}`: {doubt}", "name the commit or the branch that you mean")
    yield from unlike_bases(recipe, checkpoints)
    yield from ramps_over_adapters(recipe, checkpoints)


def _of_recipe(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> Iterator[Remark]:
    """Yield warnings about a handwritten recipe that is valid but probably not meant."""
    if not recipe.document.by_hand:
        return
    yield from remarks(recipe)
    seen: dict[str, str] = {}
    for name in recipe.used_models():
        root, entry = checkpoints[name].at.root, recipe.entries[name]
        place = str(root.resolve()) if root is not None else checkpoints[name].place
        place += f" {entry.adapter} {entry.onto}" if entry.kind == "adapter" else ""
        if place in seen:
            what = f"models `{seen[place]}` and `{name}` are the same: their difference is zero"
            yield warning(what, "change the folder of one of them", of_recipe=True)
        seen.setdefault(place, name)


def _shares(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    donor_name: str,
    copied: Mapping[str, str],
    values: Mapping[str, Row],
) -> Shares:
    if ignored := ignored_tensors(recipe, checkpoints, donor_name):
        values = coefficients_of(recipe, [*values, *ignored], checkpoints[donor_name].config)
    return shares_of(recipe, checkpoints, donor_name, copied, values)


def _doubts(recipe: Recipe, compared: Comparison, shares: Shares | None, apart: Iterable[Remark]) -> dict[str, Any]:
    """Return warnings and accepted differences, of the models and the recipe's text, and the merged share."""
    of_text = (unclear_donor(recipe), shares.doubt(recipe) if shares is not None else None)
    found = [*(doubt for doubt in of_text if doubt is not None), *apart]
    accepted = [
        Compared(doubt.name, "merge", "the recipe", "warning", {}, True, doubt.message)
        for doubt in found
        if doubt.name in recipe.accept
    ]
    return {
        "warnings": (*compared.warnings, *(doubt for doubt in found if doubt.name not in recipe.accept)),
        "compared": replace(compared, found=(*compared.found, *accepted)),
        "merged_share": shares.share if shares is not None else None,
    }


def _idle(
    recipe: Recipe,
    found: Iterable[Compared],
    problems: Sequence[Problem],
    tensors: Mapping[str, TensorPlan],
    checkpoints: Mapping[str, Checkpoint],
) -> list[str]:
    if not recipe.accept:
        return []
    heads = {} if recipe.makes_skill else stored_heads(_donor(recipe), tensors, checkpoints)
    return unsettled(recipe, found, problems, heads_unread=bool(heads))


def _inputs(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], tensors: Mapping[str, TensorPlan]) -> dict[str, Any]:
    found = inputs_of(recipe.used_models(), checkpoints, tensors)
    return {**found, "vocabulary": vocabulary_of(checkpoints[_donor(recipe)])}


def inputs_of(
    names: Iterable[str], checkpoints: Mapping[str, Checkpoint], tensors: Mapping[str, TensorPlan]
) -> dict[str, Any]:
    """Return the parts of a plan that say what is read. names: of its models."""
    read = _bytes_read(tensors, checkpoints)
    pieces = [piece for tensor in tensors.values() for piece in tensor.pieces]
    again = ((it.readings, it, source) for it in pieces if it.readings for source in it.sources)
    return {
        "inputs": tuple(_input(name, checkpoints[name], read) for name in names),
        "bytes_read": sum(read.values()),
        "bytes_again": sum(
            readings * it.part_of(checkpoints[name].cost(source)) for readings, it, (name, source) in again
        ),
        "input_itemsizes": _itemsizes(tensors, checkpoints),
        "versions": versions(checkpoints),
    }


def _itemsizes(tensors: Mapping[str, TensorPlan], checkpoints: Mapping[str, Checkpoint]) -> tuple[int, ...]:
    """Return the widest element, in bytes, that each of a tensor's sources can have."""
    specs = {name: checkpoint.tensors for name, checkpoint in checkpoints.items()}
    found = {
        (index, specs[model][source].dtype)
        for plan in tensors.values()
        for piece in (plan, *plan.slices)
        for index, (model, source) in enumerate(piece.sources)
    }
    count = 1 + max((index for index, _ in found), default=-1)
    return tuple(max(DTYPES[dtype].itemsize for index, dtype in found if index == slot) for slot in range(count))


def _bytes_read(tensors: Mapping[str, TensorPlan], checkpoints: Mapping[str, Checkpoint]) -> dict[tuple[str, str], int]:
    """Return how many bytes of each model's weight files the output is made of, those of a skill's two planes
    together."""
    read: Counter[tuple[str, str]] = Counter()
    places = {name: (model_of(name), checkpoint) for name, checkpoint in checkpoints.items()}
    for piece in (piece for tensor in tensors.values() for piece in tensor.pieces):
        for name, source in piece.sources:
            model, checkpoint = places[name]
            for file, cost in checkpoint.costs(source).items():
                read[model, file] += piece.part_of(cost)
    return read


def _input(name: str, checkpoint: Checkpoint, read: Mapping[tuple[str, str], int]) -> InputPlan:
    files = []
    for file, known in checkpoint.files.items():
        kind, stated = known.digest or ("", "")
        digest = hashlib.sha256(known.described).hexdigest()
        sha256 = stated if kind == "sha256" else None
        files.append(InputFile(file, known.size, digest, sha256, read.get((name, file), 0)))
    at = checkpoint.at
    return InputPlan(name, checkpoint.uri, at.revision, at.license, at.remote, tuple(files), checkpoint.naming)
