"""Compares a formula's models by all of their small files, and decides what their differences mean."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.model_config import sections
from skillmerge.checkpoints.tokenizers.small_files import SmallFiles
from skillmerge.checkpoints.tokenizers.tokenizer import vocabulary_file
from skillmerge.checkpoints.views.by_token import ByToken
from skillmerge.methods.terms import Term, minus_of, model_of
from skillmerge.plans.accounting import Problem
from skillmerge.plans.compare.complete import check_complete
from skillmerge.plans.compare.config import compare_config
from skillmerge.plans.compare.found import Compared
from skillmerge.plans.compare.roles import Roles, roles_of, token_matrices
from skillmerge.plans.compare.rows import by_token_advice, leaving_out
from skillmerge.plans.compare.tokens import compare_tokens
from skillmerge.plans.stacks.compare import compare_parts, leveled_parts
from skillmerge.plans.vocabulary.by_token import vocabulary_of, without_rows
from skillmerge.recipes.recipe import Recipe
from skillmerge.remarks import Remark


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result. found: every difference. names: the compared models. subjects: what was compared, each with what was
    left out. uncompared: what was not, each with the reason."""

    found: tuple[Compared, ...]
    names: tuple[str, ...]
    subjects: tuple[str, ...] = ()
    uncompared: tuple[str, ...] = ()

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
    roles = {name: role if _moves_rows(name, checkpoints) else replace(role, tokens=frozenset())
             for name, role in roles.items()}  # fmt: skip
    dtype = None if recipe.makes_skill else recipe.output.dtype
    # Different architectures differ in nearly everything, so the rest is shown only after `accept`.
    settled = "architecture" in recipe.accept
    found = compare_config(
        without_rows(checkpoints), donor, roles, dtype, foreign=settled, written=recipe.model_lines(),
        others=leveled_parts(recipe, checkpoints, donor, roles),
    )  # fmt: skip
    foreign = not settled and any(it.name == "architecture" for it in found)
    vocabulary = vocabulary_of(own)
    files = own.small_files if isinstance(own, ByToken) else SmallFiles()
    names = [donor, *(name for name, role in roles.items() if role.used and name != donor and model_of(name) == name)]
    if not foreign:
        merged = {tensor for role in roles.values() for tensor in role.tokens}
        without = _advice(recipe, checkpoints, donor, merged, roles, lenient)
        found += compare_tokens(
            checkpoints, donor, roles, files, carried=dtype is not None, lenient=lenient, without=without,
            by_token=vocabulary is not None,
        )  # fmt: skip
        found += vocabulary.problems(vocabulary_file(own.store.list())) if vocabulary is not None else ()
    found += check_complete({name: checkpoints[name] for name in names}, donor, files)
    found += compare_parts(recipe, checkpoints, names)
    found = [_told(recipe, it, lenient) for it in found]
    subjects, uncompared = _subjects(checkpoints, names, roles, foreign)
    return Comparison(tuple(found), tuple(names), tuple(subjects), tuple(uncompared))


def _told(recipe: Recipe, it: Compared, lenient: bool) -> Compared:
    """Return a difference in the words of the recipe's author, and whether they have accepted it."""
    level = "warning" if lenient and it.level == "problem" else it.level
    message, help = recipe.in_words(it.message), recipe.in_words(it.help or "") or None
    return replace(it, level=level, accepted=it.name in recipe.accept and level != "note", message=message, help=help)


def _advice(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    donor: str,
    matrices: Collection[str],
    roles: Roles,
    lenient: bool,
) -> str | None:
    """Return what to do about rows of other tokens. lenient: leaving them out is no way, as nothing is written."""
    if lenient and not recipe.of_command:
        return None
    readers = {donor, *(name for name, role in roles.items() if role.tokens and name in checkpoints)}
    advice = (
        None if lenient else leaving_out(recipe, donor, matrices),
        by_token_advice(recipe, map(checkpoints.__getitem__, readers)),
    )
    return "\n".join(filter(None, advice)) or None


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


def _moves_rows(name: str, checkpoints: Mapping[str, Checkpoint]) -> bool:
    """Return whether a model has rows of tokens to add: all but skills whose update of these rows is zero."""
    planes = [checkpoints[it] for it in (model_of(name), minus_of(model_of(name))) if it in checkpoints]
    return any(
        plane.same is None or any(map(plane.cost, token_matrices(plane.tensors.values(), plane.config)))
        for plane in planes
    )


def _line(compared: Comparison) -> str:
    counts = []
    for level in ("problem", "warning", "note"):
        count = sum(it.level == level and not it.accepted for it in compared.found)
        counts += [f"{count} {level}{'s' if count > 1 else ''}"] if count else []
    accepted = sum(it.accepted for it in compared.found)
    counts += [f"{accepted} accepted"] if accepted else []
    what, result = ", ".join(compared.subjects) or "nothing", ", ".join(counts) or "no differences"
    left = f"; not compared: {'; '.join(compared.uncompared)}" if compared.uncompared else ""
    return f"compared {', '.join(compared.names)}: {what}: {result}{left}"


_Subjects = tuple[list[str], list[str]]
"""What was compared, each with what was left out, and what was not compared at all, each with the reason."""


def _subjects(checkpoints: Mapping[str, Checkpoint], names: Sequence[str], roles: Roles, foreign: bool) -> _Subjects:
    skills = [name for name in names if checkpoints[name].same is not None]
    models = [name for name in names if name not in skills]
    parts = [_configuration(checkpoints, names)]
    if not foreign:
        parts += [_tokens(checkpoints, models, roles)] if len(models) > 1 or not skills else []
        parts += [_skills(checkpoints, models[:1], skills, roles)] if skills else []
    return list(dict.fromkeys(it for done, _ in parts for it in done)), [it for _, left in parts for it in left]


def _configuration(checkpoints: Mapping[str, Checkpoint], names: Sequence[str]) -> _Subjects:
    without = [name for name in names if not checkpoints[name].config]
    if names[0] in without:  # the others are compared with the donor, which comes first
        return [], [f"configuration ({_reason('no config.json', names, without)})"]
    return [f"configuration (not of {_listed(without)}: no config.json)" if without else "configuration"], []


def _tokens(checkpoints: Mapping[str, Checkpoint], names: Sequence[str], roles: Roles) -> _Subjects:
    without = [name for name in names if not vocabulary_file(checkpoints[name].store.list())]
    left = [name for name in names if name not in without]
    if len(left) < 2:
        return ["chat template", "stop tokens"], [f"tokenizer ({_reason('no tokenizer files', names, without)})"]
    gaps = [f"not of {_listed(without)}: no tokenizer files"] if without else []
    others = [name for name in left if name != names[0]]
    if unmerged := [name for name in others if not roles[name].tokens]:
        which = f"not of {_listed(unmerged)}" if len(unmerged) < len(others) else "not compared"
        gaps.append(f"ids {which}: embedding and head stay")
    gaps += ["rows by token"] if vocabulary_of(checkpoints[names[0]]) is not None else []
    return [f"tokenizer ({'; '.join(gaps)})" if gaps else "tokenizer", "chat template", "stop tokens"], []


def _skills(
    checkpoints: Mapping[str, Checkpoint], donor: Sequence[str], skills: Sequence[str], roles: Roles
) -> _Subjects:
    """Return the subjects of stored skills. donor: the model that they are compared with, unless that is a skill."""
    moving = [name for name in skills if name in roles and roles[name].tokens]
    holders = {*donor, *moving} if moving else set()
    unknown = [name for name in (*donor, *skills) if name in holders and not _says_tokens(checkpoints[name])]
    known = [name for name in moving if name not in unknown]
    left = [f"token ids (unknown in {_listed(unknown)})"] if unknown else []
    # A skill keeps its models' config.json, which mostly says where answers stop, and no other small file.
    stops = all(
        any(section.get("eos_token_id") is not None for _, section in sections(checkpoints[name].config))
        for name in skills
    )
    rest = ["tokenization", "chat template", *([] if stops else ["stop tokens"])]
    left.append(f"{', '.join(rest)} of {_listed(skills)}")
    done = [f"token ids of {_listed(known)}"] if len(holders) - len(unknown) > 1 else []
    return [*done, *(["stop tokens"] if stops else [])], left


def _says_tokens(checkpoint: Checkpoint) -> bool:
    return bool(vocabulary_file(checkpoint.store.list()))


def _reason(why: str, names: Sequence[str], having: Sequence[str]) -> str:
    """Return why something is not compared. having: those of `names` that are the reason."""
    return f"{why} in {_listed(having)}" if len(having) != len(names) else why


def _listed(names: Sequence[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)
