"""What happens to each output tensor: copied, converted, computed; of packed experts with coefficients of their own,
what happens to each run of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.methods.linear import Program, compile_term
from skillmerge.methods.terms import Leaf, Sum, Term, models_of, sole_model
from skillmerge.plans.accounting import Account
from skillmerge.plans.models.experts import Row, Run
from skillmerge.plans.plan import TensorPlan
from skillmerge.recipes.recipe import Recipe
from skillmerge.tensors import DTYPES, TensorSpec


def actions(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    wanted: Mapping[str, TensorSpec],
    values: Mapping[str, Row],
    accounts: Mapping[str, Account],
    terms: Mapping[str, Term | None],
    experts: Mapping[str, Sequence[Run]],
) -> dict[str, TensorPlan]:
    """Return what happens to each tensor, except those that have a problem.

    wanted: the donor's tensors, in the output's dtypes. values: the coefficients that count. experts: of packed tensors
    whose experts have coefficients of their own.
    """
    programs: dict[int, Program] = {}  # by the term's identity: thousands of tensors share a few terms
    tensors = {}
    for name, term in terms.items():
        spec = wanted[name]
        if term is None:
            tensors[name] = TensorPlan(name, spec.dtype, spec.shape, "zero", (), values[name])
        elif name in accounts:
            tensors[name] = _plan_tensor(recipe, spec, accounts[name], checkpoints, values[name], programs)
            if name in experts:
                tensors[name] = _sliced(recipe, checkpoints, tensors[name], experts[name], programs)
    return tensors


def _plan_tensor(
    recipe: Recipe,
    spec: TensorSpec,
    account: Account,
    checkpoints: Mapping[str, Checkpoint],
    values: Row,
    programs: dict[int, Program],
) -> TensorPlan:
    term, sources = account.term, account.sources
    dtype = spec.dtype
    if account.same:
        return TensorPlan(spec.name, dtype, spec.shape, "same", sources)
    if len(sources) == 1 and (model := sole_model(term)) is not None:
        copied = checkpoints[model].tensors[sources[0].tensor].dtype == dtype
        program = None if copied else compile_term(Leaf(model))
        return TensorPlan(spec.name, dtype, spec.shape, "copy" if copied else "cast", sources, values, program)
    if id(term) not in programs:
        programs[id(term)] = compile_term(term)
    program = programs[id(term)]
    by_model = {source.model: source for source in sources}
    ordered = tuple(by_model[model] for model in program.models)
    action, dtype = _skill_action(recipe, term, dtype) if recipe.makes_skill else ("merge", dtype)
    if action == "cut":  # what is kept exactly is as wide as the model that is added
        dtype = checkpoints[ordered[0].model].tensors[ordered[0].tensor].dtype
    return TensorPlan(spec.name, dtype, spec.shape, action, ordered, values, program)


def _skill_action(recipe: Recipe, term: Term, dtype: str) -> tuple[str, str]:
    """Return whether a skill keeps its tensor exactly, and the dtype of what it keeps."""
    plain = isinstance(term, Sum) and isinstance(term.left, Leaf) and isinstance(term.right, Leaf) and term.minus
    if recipe.output.dtype != "same":
        return "compute", dtype
    if plain and recipe.output.keep is None:
        return "cut", dtype
    return "compute", _wide(dtype)


def _sliced(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    tensor: TensorPlan,
    experts: Sequence[Run],
    programs: dict[int, Program],
) -> TensorPlan:
    """Return the plan of a packed tensor with slices. tensor: its plan with the sources of all of them."""
    action, dtype, slices = "merge", tensor.dtype, []
    if recipe.makes_skill:
        action, dtype = "compute", dtype if recipe.output.dtype != "same" else _wide(dtype)
    spec = TensorSpec(tensor.name, dtype, tensor.shape, "")
    for first, last, row, term in experts:
        if term is None:
            piece = TensorPlan(spec.name, dtype, spec.shape, "zero", (), row)
        else:
            needed = models_of(term)
            account = Account(term, tuple(it for it in tensor.sources if it.model in needed))
            piece = _plan_tensor(recipe, spec, account, checkpoints, row, programs)
            piece = replace(piece, action=action) if recipe.makes_skill else piece
        slices.append(replace(piece, experts=(first, last)))
    return replace(tensor, action=action, dtype=dtype, coefficients=(), program=None, slices=tuple(slices))


def _wide(dtype: str) -> str:
    """Return a dtype that holds what was scaled or summed, which rarely fits 16 bits."""
    return "F32" if DTYPES[dtype].itemsize < 4 else dtype
