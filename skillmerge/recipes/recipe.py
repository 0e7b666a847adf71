"""The recipe as frozen types. Knows where in the text each part is; `parse` makes it, `planner` gives it meaning."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath

from skillmerge.checkpoints.place import Bucket, Local, ModelPlace, PlaceError
from skillmerge.checkpoints.schemes import parse_place
from skillmerge.errors import Place, RecipeError
from skillmerge.methods.terms import Call, Term, calls, expand_skills
from skillmerge.recipes.entries import KINDS, Entry, Part, stacks_in_order
from skillmerge.recipes.formula.bind import bind
from skillmerge.recipes.formula.donor import donor_of, is_donor_unclear
from skillmerge.recipes.formula.parser import grouped
from skillmerge.recipes.formula.tree import ExpressionError, Node, names_in, normalise_name
from skillmerge.recipes.gate_table import Gate
from skillmerge.recipes.schedules import Schedule, matcher
from skillmerge.recipes.yamltext import Document, Path
from skillmerge.remarks import Remark, warning


@dataclass(frozen=True, slots=True)
class CopyRule:
    tensors: tuple[str, ...]
    model: str


@dataclass(frozen=True, slots=True)
class Push:
    """The destination on the Hub. revision: a branch, or None. pull_request: None means if the repository has a
    model."""

    repository: str
    private: bool | None = None
    revision: str | None = None
    pull_request: bool | None = None
    message: str | None = None
    tags: tuple[str, ...] = ()
    new_version: str | None = None


@dataclass(frozen=True, slots=True)
class Output:
    kind: str
    compression: str
    keep: float | None
    """For a skill: the share of each tensor's elements to keep."""
    path: FilePath | None
    bucket: Bucket | None
    """The place in a bucket, where the output has no path."""
    like: str | None
    dtype: str
    keep_dtype: tuple[str, ...]
    """Globs over tensors that keep the donor's dtype whatever `dtype` says."""
    rounding: str
    seed: int
    shard_size: int | None
    """Bytes per shard, or None for the donor's layout."""
    license: str | None
    card: FilePath | None
    push: Push | None


_ACCEPT = re.compile(r"write `accept: \[([\w-]+)\]`")
_ADVICE_TO_ACCEPT = re.compile(r"(?:^|; |, or )(?:if [^;]*, )?" + _ACCEPT.pattern)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe whose text makes sense by itself. `entries` says what each name of a model stands for."""

    document: Document
    folder: FilePath
    entries: Mapping[str, Entry]
    coefficients: Mapping[str, Schedule]
    expression: Node
    copy: tuple[CopyRule, ...]
    ignore: tuple[str, ...]
    accept: frozenset[str]
    """Names of differences between the models that a person has looked at; see `remarks.ACCEPTABLE`."""
    output: Output
    gates: tuple[Gate, ...]
    overrides: Mapping[str, float]
    """Coefficients that override the recipe's."""
    rules_overridden: Mapping[str, int]
    """How many rules of the recipe each of them replaces."""
    settled: str | None = None
    """The donor of an earlier plan."""
    unwrapped: Mapping[str, tuple[str, ...]] | None = None
    """The wrappers that an earlier plan left out of each model's names. None: all that are found."""
    by_token: bool = False
    """Whether rows of embedding and head are matched by token, and not by id."""
    tokens: Mapping[str, str] = field(default_factory=dict)
    """Tokens whose rows are taken from one model, and that model."""

    @property
    def models(self) -> dict[str, str]:
        """The models, and where each is, as it is written."""
        return {name: entry.place for name, entry in self.entries.items()}

    @property
    def skills(self) -> frozenset[str]:
        """Those of the models that are differences in themselves: stored skills, and adapters that are put onto
        nothing."""
        return frozenset(name for name, entry in self.entries.items() if entry.is_difference)

    @property
    def patches(self) -> dict[str, str]:
        """Those of the models that are sparse patches or adapters, and the models that they are put onto."""
        return {name: entry.onto for name, entry in self.entries.items() if entry.onto}

    @property
    def adapters(self) -> list[str]:
        """Those of the models that are adapters."""
        return [name for name, entry in self.entries.items() if entry.kind == "adapter"]

    @property
    def stacks(self) -> dict[str, tuple[Part, ...]]:
        """Those of the models that are stacks of others' layers, each behind those that it is made of."""
        return stacks_in_order(self.entries)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.document.text.encode()).hexdigest()

    @property
    def formula(self) -> str:
        """The text of the expression without spaces, which mean nothing in it."""
        return "".join(self.expression_text.split())

    @property
    def expression_text(self) -> str:
        """The text of the expression as it is written."""
        return str(self.document.data["merge"])

    @property
    def of_command(self) -> bool:
        """Whether a command line defines it, not a file."""
        return self.document.name.startswith("skillmerge ")

    def command(self, verb: str) -> str:
        """Return the command that does `verb` with this recipe and the same coefficients."""
        numbers = [f"--set {name}={value!r}" for name, value in self.overrides.items()]
        return " ".join(["skillmerge", verb, shlex.quote(self.document.name), *numbers])

    def in_words(self, text: str) -> str:
        """Return a message for the person who ran a command: the places that were typed, not the names it gave to
        them."""
        if not self.of_command:
            return text
        text = text.replace(": the donor's is used", "").replace("name that under `ignore`", "pass `--ignore GLOB`")
        # `inspect` only warns, and has nothing to accept.
        accept = _ADVICE_TO_ACCEPT if self.document.name == "skillmerge inspect" else _ACCEPT
        text = accept.sub("" if accept is _ADVICE_TO_ACCEPT else r"pass `--accept \1`", text)
        names = "|".join(map(re.escape, self.models))
        return re.sub(rf"(?:the donor |model )?`({names})`", lambda name: f"`{self.models[name[1]]}`", text)

    @property
    def makes_skill(self) -> bool:
        """Whether the output is a difference to store."""
        return self.output.kind == "skill"

    @property
    def makes_adapter(self) -> bool:
        """Whether the output is a LoRA adapter. If it is not a skill either, it is a model."""
        return self.output.kind == "adapter"

    @property
    def degrees(self) -> tuple[int, ...]:
        """How many models' worth of weights the formula may give: none of a difference, one of a model."""
        return {"model": (1,), "skill": (0,), "adapter": (0, 1)}[self.output.kind]

    def term(self, values: Mapping[str, float]) -> Term | None:
        """Return the expression with these coefficients, stored skills as the differences that they are.

        None if everything fell away. Raises ExpressionError as `bind` does.
        """
        return expand_skills(bind(self.expression, values, self.skills), self.skills)

    def refuse_unequal_calls(self, terms: Iterable[Term | None]) -> None:
        """Raise RecipeError for a call that takes the whole model as one, with other arguments for some tensors, or
        other operands that are zero."""
        known: dict[int, Call] = {}
        for call in (call for term in terms for call in calls(term) if call.by_model):
            first = known.setdefault(call.position, call)
            if first.arguments != call.arguments or first.left != call.left:
                other = "numbers" if first.left == call.left else "operands"
                what = f"gives `{call.method}` other {other} for some tensors, and with scope=model it takes all as one"
                fix = "use coefficients without rules there, or scope=matrix"
                raise self.expression_error(ExpressionError(what, call.position, len(call.method.name), fix))

    def left_out(self, tensors: Iterable[str]) -> set[str]:
        """Return those of the donor's tensors that a skill or an adapter does without, as `ignore` says; a model has
        all of them."""
        if not (self.makes_skill or self.makes_adapter) or not self.ignore:
            return set()
        pattern = matcher(self.ignore)
        return {name for name in tensors if pattern.match(name)}

    def used_models(self) -> list[str]:
        """Return the models that the output depends on, in the order of the recipe."""
        used = {name.name for name in names_in(self.expression) if name.is_model}
        used |= {rule.model for rule in self.copy} | ({self.output.like} if self.output.like else set())
        used |= {*self.tokens.values()}
        beneath = list(used)
        for name in beneath:  # which grows
            entry = self.entries[name]
            found = {*(part.model for part in entry.stack), *([entry.onto] if entry.onto else ())} - used
            used |= found
            beneath += found
        return [name for name in self.models if name in used]

    def stored_models(self) -> list[str]:
        """Return those of the used models that are somewhere, which stacks are not."""
        return [name for name in self.used_models() if not self.entries[name].stack]

    def as_planned(self, donor: str, inputs: Mapping[str, Sequence[str]]) -> Recipe:
        """Return the recipe with what a plan of it has settled: its donor, and the wrappers left out of its models'
        names."""
        names = {model: tuple(wrappers) for model, wrappers in inputs.items()}
        return replace(self, settled=donor if donor in self.models else None, unwrapped=names)

    @property
    def donor(self) -> str | None:
        """The model that the output is like; None if the expression multiplies everything by zero."""
        return self.output.like or self.settled or donor_of(self.expression, self.skills)

    def error(self, path: Path, message: str, fix: str | None = None) -> RecipeError:
        """Return an error about the part of the recipe at `path`."""
        return self.document.error(message, self.document.place(path), fix)

    def expression_error(self, error: ExpressionError) -> RecipeError:
        return expression_error(self.document, error)

    def model_place(self, name: str) -> ModelPlace:
        """Return where the model `name` lies, on this disk or on the Hub. Raises RecipeError for other places."""
        uri = self.models[name]
        try:
            place = parse_place(uri)
        except PlaceError as error:
            raise self.error(self.place_path(name), str(error), error.fix) from error
        return place or Local(local_path(self.document, ("models", name), self.folder, uri))

    def model_lines(self) -> dict[str, str]:
        """Return the recipe's line for each model, with its number; nothing for the words of a command."""
        places = {name: self.document.place(self.place_path(name)) for name in self.models}
        return {
            name: f"{self.document.name}:{place.line + 1}: `{name}: {self.models[name]}`"
            for name, place in places.items()
            if place is not None and not self.of_command
        }

    def place_path(self, name: str) -> Path:
        """Return where in the document the place of a model is written, whose name may be spelled in another form
        there."""
        written = next((key for key in self.document.data["models"] if normalise_name(key) == name), name)
        entry = self.document.data["models"].get(written)
        keys = [key for key in KINDS if isinstance(entry, dict) and entry.get(key) is not None]
        return ("models", written, *keys[:1])


def unused_names(recipe: Recipe) -> list[str]:
    """Return models and coefficients that stand in the recipe and do nothing: allowed, but worth a warning."""
    named = {name.name for name in names_in(recipe.expression)} | set(recipe.used_models())
    named |= {normalise_name(gate.model) for gate in recipe.gates if gate.model}
    return [name for name in (*recipe.models, *recipe.coefficients) if name not in named]


def unclear_donor(recipe: Recipe) -> Remark | None:
    """Return a warning where the text of a merge does not show which of its models is the donor."""
    unclear = is_donor_unclear(recipe.expression, recipe.skills)
    donor = donor_of(recipe.expression, recipe.skills)
    if recipe.output.like is not None or recipe.output.kind != "model":
        return None
    if recipe.donor != donor:  # version 0.1 took another one from some texts
        return warning(
            f"the donor is `{recipe.donor}`, as in the earlier plan; for `{recipe.document.data['merge']}` it would "
            f"be `{donor}` now: the output takes its names, dtypes, config and tokenizer from `{recipe.donor}`",
            f"keep it with `output: {{like: {recipe.donor}}}` in the recipe, or plan the recipe again",
            name="donor",
            of_recipe=True,
        )
    if not unclear:
        return None
    return warning(
        f"the donor is `{donor}`, the first model that `{recipe.document.data['merge']}` adds: the output takes its "
        "names, dtypes, config and tokenizer",
        f"confirm it with `output: {{like: {donor}}}`, or put the difference in parentheses: target + (rl - sft)",
        name="donor",
        of_recipe=True,
    )


def one_model_meant(recipe: Recipe, found: float) -> str:
    """Return what to write for a formula that should be one model. found: how many models' worth of weights it is."""
    if (meant := grouped(recipe.expression_text, recipe.models)) is not None:
        return meant
    named = [name.name for name in names_in(recipe.expression) if name.is_model]
    differences = [name for name in named if name in recipe.skills]
    if found == 0:
        kind = "adapter" if named and {recipe.entries[name].kind for name in named} == {"adapter"} else "skill"
        update = differences[0] if differences else "(rl - sft)"
        return f"add it to a model: target + lam * {update}; or store it with `output: {{kind: {kind}}}`"
    if found == 2:
        return "did you mean the average, (a + b) / 2?"
    if differences:
        counts = f"`{differences[0]}` is a difference already, which counts as no model"
        return f"{counts}: write target + lam * {differences[0]}, so that the factors of models add up to 1"
    return "the factors must add up to 1"


def local_path(document: Document, path: Path, folder: FilePath, written: str) -> FilePath:
    try:
        return folder / FilePath(written).expanduser()
    except RuntimeError as error:
        raise document.error(f"`{written}` is in a home folder that does not exist", document.place(path)) from error


def add_coefficient(name: str) -> str:
    """Return how to give a name to a number of an expression, for a recipe without coefficients."""
    return f"name a number of the recipe: `coefficients: {{{name}: 0.7}}` and `merge: target + {name} * (rl - sft)`"


def expression_error(document: Document, error: ExpressionError) -> RecipeError:
    """Point into the expression where it stands on one line as it is; else at its start."""
    place = document.place(("merge",))
    if place is not None:
        line = document.line(place.line)
        written = str(document.data["merge"])
        offset = line.find(written, place.column)
        if offset >= 0:
            place = Place(place.line, offset + error.position, error.width)
    return document.error(f"the expression {error}", place, error.fix)
