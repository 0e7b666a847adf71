"""The accounting of every tensor of every model, and the problems of tensors without a place.

For each tensor of the donor: which models' tensors the output needs. For each tensor of another model that
the donor lacks: a problem, unless a rule or the config's ties account for it. Knows names, shapes and dtypes; only
`prove_ties` reads weights.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from skillmerge.checkpoints.checkpoint import Checkpoint, read_bytes
from skillmerge.checkpoints.model_config import tied_source, ties_embeddings
from skillmerge.errors import InputError, some
from skillmerge.methods.terms import Leaf, Term, model_of, models_of
from skillmerge.naming import module_kind
from skillmerge.plans.advice.arrangement import unlike
from skillmerge.plans.advice.causes import cause_of, left_behind, share, tensors_of
from skillmerge.plans.advice.shares import MUCH
from skillmerge.plans.compare.rows import by_token_advice
from skillmerge.plans.mapping import Source, find_source
from skillmerge.recipes.formula.tree import names_in
from skillmerge.recipes.recipe import Recipe
from skillmerge.recipes.schedules import matcher, near_pattern
from skillmerge.tensors import DTYPES, UNIT, TensorSpec


@dataclass(frozen=True, slots=True)
class Problem:
    """A difference between the models that only the user can settle.

    copy, ignore, rename: what would settle it, as lines of the recipe's sections `copy`, `ignore` and `models`. name:
    what `accept` calls it, where that would settle it. help: what to do where no line of the recipe settles it.
    final: no rule is worth printing, of this problem and of any beside it.
    """

    kind: str
    message: str
    tensors: tuple[str, ...] = ()
    copy: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    name: str | None = None
    rename: tuple[str, ...] = ()
    help: str | None = None
    final: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, without empty keys and `final`, which is for `settlement`."""
        always = ("kind", "message", "tensors", "copy", "ignore")
        return {key: value for key, value in asdict(self).items() if key in always or (value and key != "final")}


def settlement(recipe: Recipe, problems: Iterable[Problem]) -> str:
    """Return what would settle the problems, each once: rules to paste into the recipe, and what to do elsewhere.
    There are no rules if the models are of different architectures."""
    problems = list(problems)
    parts: list[str] = []
    for advice in dict.fromkeys(problem.help for problem in problems if problem.help):
        if not any({*advice.splitlines()} <= {*part.splitlines()} for part in parts):
            parts.append(advice)
    if any(problem.final for problem in problems):
        return "\n".join(parts)
    lines = list(dict.fromkeys(line for problem in problems for line in problem.rename))
    if lines:
        what = "to read these under the donor's names, write in the recipe's `models:`"
        if recipe.of_command:
            what = (
                "to read one under the other's names, write a recipe with `output: {kind: skill}`, and in its `models:`"
            )
        parts.append("\n".join([what, *lines]))
    if recipe.of_command:
        globs = dict.fromkeys(line.removeprefix("  - ") for problem in problems for line in problem.ignore)
        ignore = " ".join(f"--ignore {glob}" for glob in globs)
        return "\n".join([*parts, *([f"if the skill does not need them, pass: {ignore}"] if globs else [])])
    for key, present in (("copy", recipe.copy), ("ignore", recipe.ignore)):
        lines = list(dict.fromkeys(line for problem in problems for line in getattr(problem, key)))
        if lines:
            where = f"add to the recipe's `{key}:`" if present else "add to the recipe:"
            why = "to take the donor's own" if key == "copy" else "if the output does not need them"
            parts.append("\n".join([f"{why}, {where}", *([] if present else [f"{key}:"]), *lines]))
    return "\n".join(parts)


@dataclass(frozen=True, slots=True)
class Account:
    """The sources of one output tensor. `same`: all sources must hold the same bytes."""

    term: Term
    sources: tuple[Source, ...]
    same: bool = False


@dataclass(frozen=True, slots=True)
class Accounts:
    """The result of the accounting. ties: (model, copy, original) of tied tensors whose copies are left out of the
    output."""

    tensors: Mapping[str, Account]
    """Sources of the output tensors that have any, and no problem."""
    problems: tuple[Problem, ...]
    ties: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]
    """Notes."""


def account_tensors(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    donor_name: str,
    terms: Mapping[str, Term | None],
    exact: Collection[str] = (),
) -> Accounts:
    """Account for the output's tensors, whose terms these are, and for those that the donor lacks.

    exact: tensors that have to be the same everywhere, whatever their dtype."""
    donor, in_formula = checkpoints[donor_name], models_in(recipe)
    whole = [model for model in in_formula if model not in recipe.skills]  # a skill has no integers to compare
    accounts: dict[str, Account] = {}
    troubles: dict[tuple[str, str], list[tuple[str, str]]] = {}
    notes = set()
    needed: dict[int, list[str]] = {}  # by the term's identity: thousands of tensors share a few terms
    for name, term in terms.items():
        if term is None:
            continue
        spec = donor.tensors[name]
        same = not isinstance(term, Leaf) and (name in exact or not DTYPES[spec.dtype].is_float)
        if id(term) not in needed:
            needed[id(term)] = models_of(term)
        models, sources = whole if same else needed[id(term)], []
        for model in models:
            source = find_source(spec, model, checkpoints[model])
            if source is None:
                troubles.setdefault(("missing", model), []).append((name, ""))
            elif difference := _difference(spec, checkpoints[model].tensors[source.tensor]):
                troubles.setdefault((difference[0], model), []).append((name, difference[1]))
            else:
                sources.append(source)
                if source.tensor != name:
                    notes.add(f"`{name}` of model `{model}` is its `{source.tensor}`, which its config ties to it")
        if len(sources) == len(models):
            if same:
                sources.sort(key=lambda source: source.model != donor_name)
            accounts[name] = Account(term, tuple(sources), same)
    extra, ties = _leftovers(recipe, checkpoints, donor_name, in_formula)
    apart = _apart(recipe, checkpoints, donor_name, troubles, extra)
    left = {key: found for key, found in troubles.items() if key[0] != "missing" or model_of(key[1]) not in apart}
    problems = [
        *apart.values(),
        *(_problem(recipe, kind, model, found, donor_name, checkpoints) for (kind, model), found in left.items()),
        *(_extra(model, names, checkpoints[model], donor_name) for model, names in extra.items() if model not in apart),
    ]
    notes |= _unread(checkpoints)
    found = tuple(_in_words(recipe, problem) for problem in problems)
    return Accounts(accounts, found, tuple(ties), tuple(map(recipe.in_words, sorted(notes))))


def _in_words(recipe: Recipe, problem: Problem) -> Problem:
    return replace(
        problem, message=recipe.in_words(problem.message), help=problem.help and recipe.in_words(problem.help)
    )


def _unread(checkpoints: Mapping[str, Checkpoint]) -> set[str]:
    return {
        f"model `{name}`: {some(list(it.unread))} is "
        + ("not named by its index and" if it.indexed else f"beside {next(iter(it.files), 'the weights')} and")
        + " not read"
        for name, it in checkpoints.items()
        if it.unread
    }


def models_in(recipe: Recipe) -> list[str]:
    """Return the models of the formula, in the order of the text."""
    return list(dict.fromkeys(name.name for name in names_in(recipe.expression) if name.is_model))


def copy_rules(recipe: Recipe, donor: Checkpoint) -> dict[str, str]:
    """Return the model that each tensor is copied from. The last rule that matches wins; one that matches nothing is a
    mistake."""
    copied: dict[str, str] = {}
    for index, rule in enumerate(recipe.copy):
        pattern = matcher(rule.tensors)
        chosen = [name for name in donor.tensors if pattern.match(name)]
        if not chosen:
            near = near_pattern(rule.tensors[0], donor.tensors)
            raise recipe.error(("copy", index), "this rule matches no tensor of the donor", near)
        copied.update(dict.fromkeys(chosen, rule.model))
    return copied


def _difference(wanted: TensorSpec, found: TensorSpec) -> tuple[str, str] | None:
    if wanted.shape != found.shape:
        return "shape", f"{list(wanted.shape)} against {list(found.shape)}"
    kinds = (DTYPES[wanted.dtype].kind, DTYPES[found.dtype].kind)
    if kinds[0] != kinds[1] or (kinds[0] != "float" and wanted.dtype != found.dtype):
        return "dtype", f"{wanted.dtype} against {found.dtype}"
    return None


def _problem(
    recipe: Recipe,
    kind: str,
    model: str,
    found: list[tuple[str, str]],
    donor_name: str,
    checkpoints: Mapping[str, Checkpoint],
) -> Problem:
    donor, help = checkpoints[donor_name], None
    names = [name for name, _ in found]
    if kind == "missing":
        message = f"model `{model}` lacks {tensors_of(names)} that the formula needs: {some(names)}"
    else:
        shown = "; ".join(f"`{name}` {detail}" for name, detail in found[:4]) + ("; …" if len(found) > 4 else "")
        differ = "differs" if len(names) == 1 else "differ"
        message = (
            f"{tensors_of(names)} {differ} in {kind} between the donor `{donor_name}` and model `{model}`: {shown}"
        )
        if kind == "shape" and all(module_kind(name) in ("embedding", "head") for name in names):
            message += "\ntheir vocabularies seem to differ"
            help = by_token_advice(recipe, [donor, checkpoints[model]])
        elif kind == "shape" and share(names, donor.tensors) >= MUCH:
            return Problem(
                kind, message, tuple(names), help=f"check that `{model}` is the right model; its sizes differ"
            )
    globs = _globs(names, donor.tensors)
    if recipe.makes_skill:  # it takes no tensor as it is, but can do without
        return Problem(kind, message, tuple(names), ignore=tuple(f'  - "{glob}"' for glob in globs), help=help)
    rules = tuple(f'  - {{tensors: "{glob}", from: {donor_name}}}' for glob in globs)
    return Problem(kind, message, tuple(names), copy=rules, help=help)


def _leftovers(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], donor_name: str, in_formula: list[str]
) -> tuple[dict[str, list[str]], list[tuple[str, str, str]]]:
    """Return tensors of the formula's models that the donor lacks, except ignored ones; and copies of tied tensors as
    (model, copy, original)."""
    donor = checkpoints[donor_name]
    extra = {
        model: [name for name in checkpoints[model].tensors if name not in donor.tensors]
        for model in in_formula
        if model != donor_name
    }
    left_out = recipe.left_out(donor.tensors)
    for index, glob in enumerate(recipe.ignore):
        pattern = matcher([glob])
        taken = (name for part in (left_out, *extra.values()) for name in part)
        if not any(map(pattern.match, taken)):
            in_donor = any(pattern.match(name) for name in donor.tensors)
            why = "the donor has what it matches, and the output has exactly the donor's tensors" if in_donor else None
            raise recipe.error(("ignore", index), "this rule matches no tensor that the donor lacks", why)
    ignored = matcher(recipe.ignore) if recipe.ignore else None
    found, ties = {}, []
    for model, names in extra.items():
        left = [name for name in names if ignored is None or not ignored.match(name)]
        tied = {name: source for name in left if (source := _tied_to(name, checkpoints[model], donor)) is not None}
        ties += [(model, name, source) for name, source in tied.items()]
        left = [name for name in left if name not in tied]
        if left:
            found[model] = left
    return found, ties


def _apart(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    donor_name: str,
    troubles: Mapping[tuple[str, str], list[tuple[str, str]]],
    extra: Mapping[str, list[str]],
) -> dict[str, Problem]:
    """Return the models with so many unmatched tensors that ignoring them would leave little of the skill; and the
    models that hold tensors that are not weights."""
    found: dict[str, Problem] = {}
    donor = checkpoints[donor_name]
    lacking = {model: [name for name, _ in names] for (kind, model), names in troubles.items() if kind == "missing"}
    without = share({name for names in lacking.values() for name in names}, donor.tensors)  # any of the models
    for model in dict.fromkeys(map(model_of, (*lacking, *extra))):
        missing, more = lacking.get(model, []), extra.get(model, [])
        checkpoint = checkpoints[model]
        cause = left_behind(model, checkpoint, more)
        much = share(more, checkpoint.tensors) >= MUCH or (without >= MUCH and missing)
        if cause is None and missing:
            cause = unlike(model, checkpoint, donor_name, donor)
        if cause is None and much:
            cause = cause_of(recipe, model, checkpoint, donor_name, donor, missing, more)
        if cause is not None:
            found[model] = Problem("names", cause.message, tuple(missing or more), rename=cause.rename, help=cause.help)
    return found


def _extra(model: str, names: list[str], checkpoint: Checkpoint, donor_name: str) -> Problem:
    message = f"model `{model}` has {tensors_of(names)} that the donor `{donor_name}` lacks: {some(names)}"
    rules = tuple(f'  - "{glob}"' for glob in _globs(names, set(checkpoint.tensors) - set(names)))
    return Problem("extra", message, tuple(names), ignore=rules)


def _tied_to(name: str, checkpoint: Checkpoint, donor: Checkpoint) -> str | None:
    """Return the tensor that `name` is a copy of, where both configs say so and the donor has it."""
    if not ties_embeddings(checkpoint.config) or not ties_embeddings(donor.config):
        return None
    kept = {other: spec for other, spec in checkpoint.tensors.items() if other in donor.tensors}
    return tied_source(name, checkpoint.tensors[name].shape, checkpoint.config, kept)


def _globs(names: list[str], others: Iterable[str]) -> list[str]:
    """Return globs that match `names` and none of `others`; numbers in names become `*` where that is possible."""
    wanted = set(names)
    rest = [name for name in others if name not in wanted]
    globs: dict[str, None] = {}
    for name in names:
        glob = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        if glob not in globs:
            pattern = matcher([glob])
            globs[name if any(pattern.match(other) for other in rest) else glob] = None
    return list(globs)


def prove_ties(ties: Iterable[tuple[str, str, str]], checkpoints: Mapping[str, Checkpoint]) -> None:
    """Prove that each tensor that is left out as a copy is one. Raises InputError if the bytes differ."""
    for model, name, source in ties:
        checkpoint = checkpoints[model]
        copy, original = checkpoint.tensors[name], checkpoint.tensors[source]
        for first in range(0, copy.elements, UNIT):
            count = min(UNIT, copy.elements - first)
            if copy.dtype != original.dtype or read_bytes(checkpoint, name, first, count) != read_bytes(
                checkpoint, source, first, count
            ):
                raise InputError(
                    f"model `{model}`: config.json ties `{name}` to `{source}`, but the two differ, and the donor "
                    f"has no `{name}`",
                    fix=f'if the output does not need it, add to the recipe:\nignore:\n  - "{name}"',
                )
