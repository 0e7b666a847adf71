"""Compares a formula's models by all of their small files, and decides what their differences mean."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.tokenizers.small_files import SmallFiles
from skillmerge.checkpoints.tokenizers.tokenizer import vocabulary_file
from skillmerge.methods.terms import Term, model_of
from skillmerge.plans.accounting import Problem
from skillmerge.plans.compare.complete import check_complete
from skillmerge.plans.compare.config import compare_config
from skillmerge.plans.compare.found import Compared
from skillmerge.plans.compare.roles import Roles, roles_of, token_matrices
from skillmerge.plans.compare.rows import without_rows
from skillmerge.plans.compare.tokens import compare_tokens
from skillmerge.recipes.recipe import Recipe
from skillmerge.remarks import Remark


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result. found: every difference. names: the compared models. subjects: what was compared, each with what was
    left out."""

    found: tuple[Compared, ...]
    names: tuple[str, ...]
    subjects: tuple[str, ...] = ()

    @property
    def line(self) -> str | None:
        """What was compared, for people; None if there is only one model."""
        return _line(self) if len(self.names) > 1 else None

    @property
    def problems(self) -> list[Problem]:
        return [
            Problem("models", it.message, name=it.name, help=it.help, final=it.name == "architecture")
            for it in self._open("problem")
        ]

    @property
    def warnings(self) -> list[Remark]:
        return [Remark("warning", it.message, it.help, it.name) for it in self._open("warning")]

    @property
    def notes(self) -> list[str]:
        return [it.message for it in self._open("note")]

    def _open(self, level: str) -> list[Compared]:
        return [it for it in self.found if it.level == level and not it.accepted]


NOTHING = Comparison((), ())


def compare_models(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    donor: str,
    terms: Mapping[str, Term | None],
    copied: Collection[str] = (),
    *,
    lenient: bool = False,
) -> Comparison:
    """Compare the models in `terms` with the donor, and each with its own description.

    terms: by the donor's tensor names. copied: tensors that `copy` takes unchanged. lenient: turn problems into
    warnings, for plans and outputs older than these comparisons. Reads only small files. Raises InputError for a
    pointer file of the donor, unless lenient; StalePlan, TemporaryError.
    """
    own = checkpoints[donor]
    roles = roles_of(terms, copied, token_matrices(own.tensors.values(), own.config))
    dtype = None if recipe.makes_skill else recipe.output.dtype
    # Different architectures differ in nearly everything, so the rest is shown only after `accept`.
    settled = "architecture" in recipe.accept
    found = compare_config(checkpoints, donor, roles, dtype, foreign=settled, written=recipe.model_lines())
    foreign = not settled and any(it.name == "architecture" for it in found)
    files = SmallFiles()
    names = [donor, *(name for name, role in roles.items() if role.used and name != donor and model_of(name) == name)]
    if not foreign:
        merged = {tensor for role in roles.values() for tensor in role.tokens}
        without = None if lenient else without_rows(recipe, donor, merged)
        found += compare_tokens(
            checkpoints, donor, roles, files, carried=dtype is not None, lenient=lenient, without=without
        )
    found += check_complete({name: checkpoints[name] for name in names}, donor, files)
    if lenient:
        found = [replace(it, level="warning") if it.level == "problem" else it for it in found]
    found = [
        replace(
            it, accepted=it.name in recipe.accept and it.level != "note", message=recipe.in_words(it.message),
            help=recipe.in_words(it.help or "") or None,
        )
        for it in found
    ]  # fmt: skip
    subjects = (_configuration(checkpoints, names), *(() if foreign else _tokens(checkpoints, names, roles)))
    return Comparison(tuple(found), tuple(names), subjects)


def unsettled(
    recipe: Recipe, found: Iterable[Compared], problems: Sequence[Problem], *, heads_unread: bool
) -> list[str]:
    """Return a note for each name in `accept` without effect. heads_unread: whether `apply` still checks tied heads.

    Leaves out names that are checked only after the problems are settled, and `update-size`: its effect depends on
    what `apply` measures, so the note would come and go with `--stats`.
    """
    if any(problem.final for problem in problems):
        return []
    unknown = {"update-size", *(["merged-share"] if problems else []), *(["ties"] if heads_unread else [])}
    settled = {it.name for it in found if it.accepted}
    return [f"`accept: [{name}]` settles nothing here" for name in sorted({*recipe.accept} - settled - unknown)]


def _line(compared: Comparison) -> str:
    counts = []
    for level in ("problem", "warning", "note"):
        count = sum(it.level == level and not it.accepted for it in compared.found)
        counts += [f"{count} {level}{'s' if count > 1 else ''}"] if count else []
    accepted = sum(it.accepted for it in compared.found)
    counts += [f"{accepted} accepted"] if accepted else []
    what = ", ".join(compared.subjects)
    return f"compared {', '.join(compared.names)}: {what}: {', '.join(counts) or 'no differences'}"


def _configuration(checkpoints: Mapping[str, Checkpoint], names: Sequence[str]) -> str:
    without = [name for name in names if not checkpoints[name].config]
    # The others are compared with the donor, which comes first.
    gap = _gap(names, names if names[0] in without else without, without, "no config.json")
    return f"configuration ({gap})" if gap else "configuration"


def _tokens(checkpoints: Mapping[str, Checkpoint], names: Sequence[str], roles: Roles) -> tuple[str, ...]:
    without = [name for name in names if not vocabulary_file(checkpoints[name].store.list())]
    left = [name for name in names if name not in without]
    gaps = [_gap(names, without if len(left) > 1 else names, without, "no tokenizer files")] if without else []
    if len(left) > 1:
        others = [name for name in left if name != names[0]]
        unmerged = [name for name in others if not roles[name].tokens]
        gap = _gap(others, unmerged, unmerged, "embedding and head stay")
        gaps += [f"ids {gap}"] if gap else []
    return (f"tokenizer ({'; '.join(gaps)})" if gaps else "tokenizer", "chat template", "stop tokens")


def _gap(names: Sequence[str], left_out: Sequence[str], having: Sequence[str], why: str) -> str:
    """Return what is left out of a comparison of `names`, and why. having: the models that are the reason."""
    listed = " and ".join(f"`{name}`" for name in having)
    if len(left_out) < len(names):
        return f"not of {listed}: {why}" if left_out else ""
    return f"not compared: {why}" + (f" in {listed}" if len(having) < len(names) else "")
