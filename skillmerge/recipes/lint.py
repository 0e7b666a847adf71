"""The verb lint: all mistakes that show in a recipe's text alone, each with its position.

Errors are what `plan` and `apply` would refuse; warnings are what they do, and what is hardly meant. A finding is
certain: what depends on the models' tensors is left to `plan`. Opens no model; of other files reads the lock alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

from skillmerge.brief import brief, drawn
from skillmerge.checkpoints.missing import meant, missing
from skillmerge.checkpoints.place import Local, ModelPlace
from skillmerge.errors import Place, RecipeError, SkillmergeError, UsageError, did_you_mean
from skillmerge.methods.terms import calls, degree, outer_calls, weights
from skillmerge.recipes import lock as lockfile
from skillmerge.recipes.formula.parser import grouped
from skillmerge.recipes.formula.tree import ExpressionError, names_in, normalise_name
from skillmerge.recipes.lint_rules import RULES, LintRule
from skillmerge.recipes.parse import load
from skillmerge.recipes.recipe import Recipe, one_model_meant, unclear_donor, unused_names
from skillmerge.recipes.source import RecipeSource, name_of
from skillmerge.recipes.yamltext import Path as DataPath
from skillmerge.remarks import Remark, warning

_MANY = 256
"""Combinations of coefficients that are tried, at most."""
_MOST_GB = 100
_FEW_BYTES = 1_000_000
_LARGE = 10.0
"""Sweeps in the literature end at 2; a factor beyond this is a slip of the decimal point."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. place: None if it is the file as a whole. excerpt: the line with a marker."""

    file: str
    rule: LintRule
    message: str
    fix: str | None = None
    place: Place | None = None
    excerpt: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as plain data. Lines and columns count from 1; the end column is exclusive."""
        where = self.place
        return {
            "file": self.file,
            "line": where.line + 1 if where else None,
            "column": where.column + 1 if where else None,
            "end_column": where.column + where.width + 1 if where else None,
            "level": self.rule.level,
            "rule": self.rule.id,
            "message": self.message,
            "fix": self.fix,
        }


@dataclass(frozen=True, slots=True)
class Lint:
    """The findings in `files`. strict: whether warnings fail too."""

    files: tuple[str, ...]
    findings: tuple[Finding, ...]
    strict: bool = False

    __repr__ = brief
    _repr_html_ = drawn

    @property
    def ok(self) -> bool:
        return not (self.count("error") or (self.strict and self.count("warning")))

    def count(self, level: str) -> int:
        return sum(finding.rule.level == level for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return {
            "files": len(self.files),
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "notes": self.count("note"),
            "findings": [finding.as_dict() for finding in self.findings],
        }


def lint(
    recipes: RecipeSource | Iterable[RecipeSource],
    *,
    strict: bool = False,
    allow: Iterable[str] = (),
) -> Lint:
    """Return everything that is wrong with a recipe or with recipes, from their text alone.

    strict: warnings make `ok` false too. allow: ids of warnings that are not looked for.
    Raises UsageError for a rule that is none, or that is an error and cannot be allowed.
    """
    allowed = set(allow)
    warnings = [rule.id for rule in RULES.values() if rule.level != "error"]
    for name in sorted(allowed - set(warnings)):
        what = "is an error, which cannot be allowed" if name in RULES else "is not a lint rule"
        raise UsageError(f"`{name}` {what}", fix=did_you_mean(name, warnings) or f"rules: {', '.join(warnings)}")
    sources = [recipes] if isinstance(recipes, str | os.PathLike | Mapping) else list(recipes)
    found = [finding for source in sources for finding in _lint(source) if finding.rule.id not in allowed]
    return Lint(tuple(map(name_of, sources)), tuple(found), strict)


def remarks(recipe: Recipe) -> list[Remark]:
    """Return the warnings that `plan` and `apply` give of a recipe's text, those of lint."""
    found = _sorted(finding for check in _MEANING for finding in check(recipe))
    return [warning(f"{_line(it)}{it.message}", it.fix, of_recipe=True) for it in found]


def _line(finding: Finding) -> str:
    return f"line {finding.place.line + 1} of the recipe: " if finding.place is not None else ""


def _lint(source: RecipeSource) -> list[Finding]:
    file = name_of(source)
    try:
        recipe = load(source)
    except RecipeError as error:
        return _sorted(_of_error(file, "invalid-recipe", each) for each in (error, *error.others))
    except SkillmergeError as error:
        message = error.message.removeprefix(f"{file}: ").removeprefix(f"{file} ")
        return [Finding(file, RULES["invalid-recipe"], message, error.fix)]
    return _sorted(finding for check in _CHECKS for finding in check(recipe))


def _sorted(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda it: (it.place.line, it.place.column) if it.place else (-1, -1))


def _of_error(file: str, rule: str, error: RecipeError) -> Finding:
    message = error.what.removeprefix(f"{file}: ")
    return Finding(file, RULES[rule], message, error.fix, error.place, error.excerpt)


def _at(recipe: Recipe, rule: str, path: DataPath, message: str, fix: str | None = None) -> Finding:
    """Return a finding about the key at `path`, or about the value where it has no key."""
    document = recipe.document
    place = document.keys.get(path) or document.place(path)
    error = document.error(message, place, fix)
    return _of_error(document.name, rule, error)


def _written(recipe: Recipe, section: str, name: str) -> DataPath:
    """Return where the table's entry stands, whose key may be spelled in another form of Unicode."""
    return next((section, key) for key in recipe.document.data[section] if normalise_name(key) == name)


def _models(recipe: Recipe) -> Iterator[Finding]:
    """Yield findings about places that are malformed, missing, or can change."""
    used = recipe.used_models()
    lock, lock_error = _lock(recipe)
    remote = False
    for name in recipe.models:
        path = _written(recipe, "models", name)
        if recipe.entries[name].stack:
            continue
        try:
            place = recipe.model_place(name)
        except RecipeError as error:
            yield _of_error(recipe.document.name, "invalid-recipe", error)
            continue
        if name not in used:
            continue
        if isinstance(place, Local):
            yield from _missing(recipe, name, place)
        if place.versioned:
            remote = True
            yield from _revision(recipe, name, place, path, lock)
    if remote and lock_error is not None:
        yield Finding(recipe.document.name, RULES["stale-lock"], lock_error.message, lock_error.fix)


def _same(recipe: Recipe) -> Iterator[Finding]:
    """Yield findings about models that have the same place."""
    seen: dict[tuple[ModelPlace, str | None], str] = {}
    for name in recipe.stored_models():
        try:
            place = recipe.model_place(name)
        except RecipeError:
            continue  # which has its own finding
        other = seen.setdefault((place, recipe.entries[name].adapter), name)
        if other != name and name not in recipe.patches and other not in recipe.patches:
            path = _written(recipe, "models", name)
            yield _at(recipe, "same-model", path, f"`{other}` and `{name}` are the same model")


def _missing(recipe: Recipe, name: str, place: Local) -> Iterator[Finding]:
    """Yield a folder that is not there, where something near it is: alone that may be so on the machine that lints; or
    what is there and is not a folder."""
    written = recipe.models[name]
    if os.path.lexists(place.path):
        found = missing(place.path, written)
    else:
        fix = meant(place.path, written)
        found = (f"folder `{written}` does not exist", fix) if fix is not None else None
    if found is not None:
        yield _at(recipe, "missing-model", recipe.place_path(name), f"model `{name}`: {found[0]}", found[1])


def _lock(recipe: Recipe) -> tuple[Mapping[str, lockfile.LockedModel] | None, SkillmergeError | None]:
    try:
        return lockfile.read(lockfile.path_of(Path(recipe.document.name))), None
    except SkillmergeError as error:
        return {}, error


def _revision(
    recipe: Recipe, name: str, place: ModelPlace, path: DataPath, lock: Mapping[str, lockfile.LockedModel] | None
) -> Iterator[Finding]:
    again = f"recreate it: `skillmerge plan {recipe.document.name} --lock`"
    if lock is None:
        if not place.pinned:
            fix = f"pin a commit, or lock it: `skillmerge plan {recipe.document.name} --lock`"
            what = f"`{place.revision}`" if place.revision else "the default branch"
            yield _at(recipe, "unpinned-revision", path, f"model `{name}` is {what} of {place.name}", fix)
        return
    if not lock:
        return  # it is damaged, which is reported once
    found = lock.get(name)
    if found is None or found.uri != recipe.models[name]:
        what = f"holds {found.uri}" if found else "does not hold it"
        yield _at(recipe, "stale-lock", path, f"model `{name}` is {place}, the lock {what}", again)
    elif place.pinned and place.revision != found.commit:
        yield _at(recipe, "stale-lock", path, f"model `{name}` is pinned to {place.revision}, not the lock's", again)


def _unused(recipe: Recipe) -> Iterator[Finding]:
    for name in unused_names(recipe):
        section = "models" if name in recipe.models else "coefficients"
        what = "model" if section == "models" else "coefficient"
        yield _at(recipe, "unused-name", _written(recipe, section, name), f"{what} `{name}` does nothing", "remove it")


def _output(recipe: Recipe) -> Iterator[Finding]:
    if recipe.output.path is None and recipe.output.bucket is None and recipe.output.push is None:
        fix = f"add `output: {{path: ./merged}}`, or run `skillmerge apply {recipe.document.name} --output DIR`"
        yield _at(recipe, "no-output", ("output",), "there is no `output.path`", fix)


def _hidden_rules(recipe: Recipe) -> Iterator[Finding]:
    for name, schedule in recipe.coefficients.items():
        path = _written(recipe, "coefficients", name)
        for index, rule in enumerate(schedule.rules):
            for later in range(index + 1, len(schedule.rules)):
                if schedule.rules[later].covers(rule):
                    place = recipe.document.place((*path, "rules", later))
                    where = f" on line {place.line + 1}" if place else ""
                    message = f"this rule of `{name}` has no effect: the one{where} matches everything that it matches"
                    yield _at(recipe, "hidden-rule", (*path, "rules", index), message, "put general rules first")
                    break


def _degrees(recipe: Recipe) -> Iterator[Finding]:
    """Yield whether any of the values that the coefficients are given makes the expression one model."""
    values = {name: _values(recipe, name) for name in _used_coefficients(recipe)}
    count = math.prod(len(given) for given in values.values())
    ramps = any(rule.ramp for name in values for rule in recipe.coefficients[name].rules)
    wrong = []
    for row in islice(product(*values.values()), _MANY):
        try:
            found = degree(recipe.term({name: value for name, (value, _) in zip(values, row, strict=True)}))
        except ExpressionError as error:
            wrong.append(_of_error(recipe.document.name, "not-one-model", recipe.expression_error(error)))
            continue
        if found in recipe.degrees or count > _MANY or ramps:  # between the ends of a ramp it may be one
            return
        wrong.append(_not_one(recipe, found))
    yield wrong[0]


def _large_factors(recipe: Recipe) -> Iterator[Finding]:
    """Values that alone, the other coefficients at their defaults, make a factor large."""
    defaults = _defaults(recipe)
    for name in defaults:
        if _most(recipe, {**defaults, name: 1.0}) > _LARGE:
            continue  # it is not this one that does it
        told: set[DataPath] = set()
        for value, path in _values(recipe, name):
            most = _most(recipe, {**defaults, name: value})
            if most > _LARGE and path not in told:
                told.add(path)
                message = f"with this `{name}`, a model is multiplied by {most:g}"
                yield _at(recipe, "large-factor", path, message, "published merges stay below 2")


def _doubtful_calls(recipe: Recipe) -> Iterator[Finding]:
    """Yield calls with numbers that are hardly meant, for each value with the other coefficients at their defaults."""
    defaults = _defaults(recipe)
    told = set()
    for row in (defaults, *({**defaults, name: value} for name in defaults for value, _ in _values(recipe, name))):
        with suppress(ExpressionError):
            for call, doubt in ((it, doubt) for it in calls(recipe.term(row)) for doubt in it.doubts):
                if (call.position, doubt) not in told:
                    told.add((call.position, doubt))
                    fix = "if that is meant, write the difference the other way around, with a positive number"
                    error = ExpressionError(f"has {doubt}", call.position, len(call.method.name), fix)
                    yield _of_error(recipe.document.name, "negative-weight", recipe.expression_error(error))


def _donor(recipe: Recipe) -> Iterator[Finding]:
    remark = unclear_donor(recipe)
    if remark is not None and remark.name not in recipe.accept:
        yield _at(recipe, "unclear-donor", ("merge",), remark.message, remark.fix)


def _accidental(recipe: Recipe) -> Iterator[Finding]:
    """Coefficients that are 1 everywhere, and that have to be for the expression to be one model."""
    defaults = _defaults(recipe)
    try:
        term = recipe.term(defaults)
        if degree(term) not in recipe.degrees or min(weights(term).values(), default=0.0) >= 0:
            return
        for name in defaults:
            ones = {value for value, _ in _values(recipe, name)} == {1.0}
            if ones and degree(recipe.term({**defaults, name: 0.75})) not in recipe.degrees:
                fix = grouped(recipe.expression_text, recipe.models) or "put the difference in parentheses"
                what = " or ".join({0: "a difference", 1: "one model"}[it] for it in recipe.degrees)
                message = f"the expression is {what} only where `{name}` is 1"
                yield _at(recipe, "accidental-model", ("merge",), message, fix)
    except ExpressionError:
        return


def _sizes(recipe: Recipe) -> Iterator[Finding]:
    """Yield a size that is a plain number, and a small one."""
    written = recipe.document.data.get("output", {}).get("shard_size")
    if str(written).isdecimal() and int(written) < _FEW_BYTES:
        message = f"`shard_size: {written}` is {written} bytes"
        fix = f"did you mean `{written}GB`?" if int(written) <= _MOST_GB else "write a unit, such as 5GB"
        yield _at(recipe, "odd-size", ("output", "shard_size"), message, fix)


def _used_coefficients(recipe: Recipe) -> list[str]:
    used = {name.name for name in names_in(recipe.expression) if not name.is_model}
    return [name for name in recipe.coefficients if name in used]


def _defaults(recipe: Recipe) -> dict[str, float]:
    return {name: recipe.coefficients[name].default for name in _used_coefficients(recipe)}


def _most(recipe: Recipe, values: Mapping[str, float]) -> float:
    try:
        term = recipe.term(values)
    except ExpressionError:
        return 0.0
    return max(map(abs, (*weights(term).values(), *(factor for _, factor in outer_calls(term, 1.0)))), default=0.0)


def _values(recipe: Recipe, name: str) -> list[tuple[float, DataPath]]:
    """Return each number that a coefficient is given, and where."""
    schedule, path = recipe.coefficients[name], _written(recipe, "coefficients", name)
    table = isinstance(recipe.document.data[path[0]][path[1]], dict)
    found = [(schedule.default, (*path, "default") if table else path)]
    for index, rule in enumerate(schedule.rules):
        key = (*path, "rules", index, "ramp" if rule.ramp else "value")
        found += [(value, key) for value in rule.ramp or (rule.value,)]
    return found


def _not_one(recipe: Recipe, found: float) -> Finding:
    message, fix = f"the expression gives {found:g} models' worth of weights", "the factors must add up to 1"
    if recipe.makes_skill:
        message, fix = f"{message}, and a skill is a difference", "write rl - sft"
    elif recipe.makes_adapter:
        fix = "an adapter is a difference, or one model with adapters on it: base + lam * v"
    else:
        message = message if found != 0 else "the expression gives a difference, not a model"
        fix = one_model_meant(recipe, found)
    return _at(recipe, "not-one-model", ("merge",), message, fix)


_MEANING = (_unused, _hidden_rules, _large_factors, _doubtful_calls, _accidental, _sizes)
"""Checks of a recipe's meaning, which `plan` and `apply` also report as warnings."""
_CHECKS = (_models, _same, *_MEANING, _donor, _degrees, _output)
