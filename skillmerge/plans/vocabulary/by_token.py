"""`vocabulary: by-token`: the models of a formula, each with its token matrices in the donor's rows.

A row of the donor follows the formula if every model that the formula reads there has its token: each gives the row
that it has for that token. Every other row is the donor's as it is: those of tokens that some model lacks, and padding,
which no tokenizer names. There all models give the donor's row, and stored skills zeros. A skill that lacks a token
gives zeros too, but the rest of the formula stands. Rows in `tokens` are those of one model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.model_config import ties_embeddings
from skillmerge.checkpoints.tokenizers.matching import Matching, Tokens, matched, placed, shown
from skillmerge.checkpoints.tokenizers.small_files import SmallFiles
from skillmerge.checkpoints.tokenizers.vocabulary import MOST_TOKENS
from skillmerge.checkpoints.views.by_token import OWN, ZERO, ByToken, Matrix, RowMap
from skillmerge.errors import InputError, RecipeError, did_you_mean
from skillmerge.methods.terms import minus_of, model_of
from skillmerge.plans.vocabulary.picture import Rows, Vocabulary
from skillmerge.plans.vocabulary.readers import matrices_of, matrix_in, refuse_added, tokens_of, used_in
from skillmerge.recipes.recipe import Recipe
from skillmerge.tensors import TensorSpec

_DONOR = OWN + 1
"""The donor's matrix among a matrix's sources. The models of `tokens` come after it."""

_OFF = 3
"""Characters by which a token may be longer or shorter than the one that was meant."""


class Donor(ByToken):
    """The donor's view, which knows what all views of a recipe come to."""

    vocabulary: Vocabulary


def by_token(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], files: SmallFiles | None = None
) -> dict[str, Checkpoint]:
    """Return the models with their token matrices in the donor's rows, where the recipe says `vocabulary: by-token`.

    files: what is known of their tokenizers from an earlier call. Views of that are replaced. Raises RecipeError for a
    token of `tokens` that the donor or its model does not have just once, InputError for a model whose files do not say
    which token a row belongs to; StalePlan, TemporaryError.
    """
    found, donor = without_rows(checkpoints), recipe.donor
    if not recipe.by_token or donor is None:  # planning says what is wrong with it
        return found
    used = used_in(recipe, found, donor)
    return {**found, **_views(_Family(recipe, found, donor, used, files or SmallFiles()))} if used else found


def without_rows(checkpoints: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """Return models with their own rows again."""
    return {name: it.beneath if isinstance(it, ByToken) else it for name, it in checkpoints.items()}


def vocabulary_of(donor: Checkpoint) -> Vocabulary | None:
    """Return what the views of a recipe come to, by its donor; None where nothing is matched by token."""
    return donor.vocabulary if isinstance(donor, Donor) else None


@dataclass(frozen=True)
class _Family:
    """The models of one recipe. used: see `used_in`. files: of all of them, the donor's read first."""

    recipe: Recipe
    checkpoints: Mapping[str, Checkpoint]
    donor: str
    used: Mapping[str, Sequence[str]]
    files: SmallFiles

    @cached_property
    def tokens(self) -> dict[str, Tokens]:
        """The tokens of all models that are read, the donor's first, by the recipe's names."""
        names = [self.donor, *(it for models in self.used.values() for it in models), *self.recipe.tokens.values()]
        found = {}
        for name in dict.fromkeys(map(model_of, names)):
            refuse_added(name, self.checkpoints[name])
            found[name] = tokens_of(self.recipe, self.checkpoints, name, self.files)
        return found

    @cached_property
    def places(self) -> dict[str, dict[int, int]]:
        """The donor's ids -> each model's, for tokens that both have."""
        return {name: placed(self.tokens[self.donor], theirs) for name, theirs in self.tokens.items()}

    @cached_property
    def taken(self) -> dict[int, tuple[str, int]]:
        """The rows of `tokens`, by the donor's ids: the model, and the row there. Raises RecipeError."""
        found = {}
        for token, model in self.recipe.tokens.items():
            ours, theirs = (self.tokens[it].ids.get(token) for it in (self.donor, model))
            if ours is None and theirs is None:
                who, known = f"neither the donor `{self.donor}` nor `{model}`", self.tokens[model].ids
                fix = _near(token, known) or f"write it as the tokenizer of `{model}` does"
                raise self.recipe.error(("tokens", token), f"{who} has the token `{shown(token)}`", fix)
            if ours is None:
                fix = f"to have it, take the tokenizer of `{model}`: `output: {{like: {model}}}`"
                raise self.without(token, self.donor, f"the donor `{self.donor}`", fix)
            if theirs is None:
                raise self.without(token, model, f"model `{model}`", _near(token, self.tokens[model].ids))
            found[ours] = model, theirs
        return found

    def without(self, token: str, model: str, who: str, fix: str | None = None) -> RecipeError:
        """Return the error for a token of `tokens` that is not in a model, or not once."""
        twice = token in self.tokens[model].twice
        what = "more than one id for the token" if twice else "no token"
        fix = f"save the tokenizer of `{model}` again" if twice else fix
        return self.recipe.error(("tokens", token), f"{who} has {what} `{shown(token)}`", fix)

    def is_skill(self, name: str) -> bool:
        return model_of(name) in self.recipe.skills

    def is_donor(self, name: str) -> bool:
        """Return whether a name is that of the donor, or of a plane of it where it is a skill."""
        return name == self.donor or (name == minus_of(self.donor) and self.is_skill(name))

    def rows(self, name: str, tensor: str) -> int:
        return self.checkpoints[name].tensors[tensor].shape[0]

    def matchings(self, sources: Mapping[str, Sequence[str]]) -> dict[str, Matching]:
        """Return how each model lies beside the donor. sources: the matrices that are read of each model. The largest
        of them counts: some heads have no rows for tokens of images."""
        most = {model: max(self.rows(model, it) for it in names) for model, names in sources.items() if names}
        names = [name for name in self.tokens if name in most]
        ours = self.tokens[self.donor], most[self.donor]
        return {name: matched(*ours, self.tokens[name], most[name]) for name in names}


class _Rows:
    """One token matrix of the donor, and where each model has its rows."""

    def __init__(self, family: _Family, name: str) -> None:
        """Raises RecipeError if a model of `tokens` has no such row, InputError for a matrix that is none of tokens."""
        self.family, self.name = family, name
        self.spec = family.checkpoints[family.donor].tensors[name]
        if self.count > MOST_TOKENS:
            what = f"model `{family.donor}`: `{name}` has {self.count:,} rows, more than any vocabulary"
            raise InputError(what, fix="leave `vocabulary` out of the recipe")
        self.models = list(dict.fromkeys([family.donor, *family.used[name]]))
        self.sources = {it: matrix_in(family.checkpoints[it], name, self.spec.shape[1:]) for it in self.models}
        self.givers = list(dict.fromkeys(family.recipe.tokens.values()))
        self.given = {it: self._given(it) for it in self.givers}
        self.taken = {row: it for row, it in family.taken.items() if row < self.count}
        for row, (model, there) in self.taken.items():
            if there >= family.rows(model, self.given[model]):
                token = family.tokens[family.donor].texts[row]
                raise family.without(token, model, f"`{name}` of model `{model}`")
        self.merged = self._merged()

    @property
    def count(self) -> int:
        return self.spec.shape[0]

    def _given(self, model: str) -> str:
        found = matrix_in(self.family.checkpoints[model], self.name, self.spec.shape[1:])
        if found is None:
            token = next(it for it, giver in self.family.recipe.tokens.items() if giver == model)
            what = f"model `{model}` has no `{self.name}` with rows like the donor's"
            raise self.family.recipe.error(("tokens", token), f"{what}, so a row cannot be taken from it")
        return found

    def _merged(self) -> bytearray:
        """Return for each row whether it follows the formula: every whole model has its token, once."""
        family, merged = self.family, bytearray(self.count)
        others = [
            (family.places[it], family.rows(it, source))
            for it, source in self.sources.items()
            if not family.is_skill(it) and it != family.donor and source is not None
        ]
        for row in family.tokens[family.donor].ids.values():
            if row < self.count and row not in self.taken:
                merged[row] = all(places.get(row, rows) < rows for places, rows in others)
        return merged

    @cached_property
    def fixed(self) -> tuple[tuple[int, int], ...]:
        """Runs of elements that do not follow the formula."""
        width = self.spec.elements // max(1, self.count)
        runs, first = [], self.merged.find(0)
        while first >= 0:
            last = self.merged.find(1, first)
            last = last if last >= 0 else self.count
            runs.append((first * width, last * width))
            first = self.merged.find(0, last)
        return tuple(runs)

    def matrix(self, model: str, tensor: str, name: str) -> Matrix | None:
        """Return a model's tensor in the donor's rows, as `name`; None if these are its own."""
        family = self.family
        stored = family.checkpoints[model].tensors[tensor]
        rows = RowMap(self._rows_of(model, stored.shape[0]))
        if rows.is_identity and stored.shape[0] == self.count:
            return None
        names = [model, family.donor, *self.givers]
        tensors = [tensor, self.name, *(self.given[it] for it in self.givers)]
        sources = tuple((family.checkpoints[it], each) for it, each in zip(names, tensors, strict=True))
        dtypes = {sources[it][0].tensors[sources[it][1]].dtype for it in rows.sources if it != ZERO}
        spec = TensorSpec(name, _widest(dtypes or {stored.dtype}), (self.count, *stored.shape[1:]), stored.file)
        return Matrix(spec, rows, sources, tuple(names))

    def _rows_of(self, model: str, stored: int) -> Iterator[tuple[int, int]]:
        """Yield where each row of the donor is read for a model: a source of its matrix, and the row there."""
        family, places = self.family, self.family.places[model_of(model)]
        for row in range(self.count):
            if row in self.taken and not family.is_skill(model):
                giver, given = self.taken[row]
                yield _DONOR + 1 + self.givers.index(giver), given
            elif family.is_donor(model):
                yield OWN, row
            elif self.merged[row] and (there := places.get(row, stored)) < stored:
                yield OWN, there
            else:
                yield (ZERO, 0) if family.is_skill(model) else (_DONOR, row)

    @property
    def told(self) -> Rows:
        texts = self.family.tokens[self.family.donor].texts
        taken: dict[str, list[str]] = {}
        for row, (model, _) in sorted(self.taken.items()):
            taken.setdefault(model, []).append(shown(texts[row]))
        return Rows(self.count, sum(self.merged), taken)


def _views(family: _Family) -> dict[str, Checkpoint]:
    _refuse_skill_as_donor(family)
    matrices: dict[str, dict[str, Matrix]] = {family.donor: {}}
    fixed: dict[str, dict[str, Sequence[tuple[int, int]]]] = {family.donor: {}}
    sources: dict[str, list[str]] = {}
    told = {}
    for name in family.used:
        rows = _Rows(family, name)
        told[name] = rows.told
        for model, source in rows.sources.items():
            if source is None:
                continue  # accounting says what is wrong with it
            sources.setdefault(model, []).append(source)
            own = matrices.setdefault(model, {})
            # What stands for a head too has the donor's rows of the head there.
            for tensor, read in ((source, name), *((copy, copy) for copy in _copies(family, model, source))):
                if (matrix := rows.matrix(model, tensor, read)) is not None:
                    own[read] = matrix
            if not family.is_skill(model):
                fixed.setdefault(model, {})[name] = rows.fixed
    _refuse_lost(family, told)
    views: dict[str, Checkpoint] = {
        model: ByToken(family.checkpoints[model], found, fixed.get(model, {}), family.files)
        for model, found in matrices.items()
        if model != family.donor
    }
    donor = Donor(family.checkpoints[family.donor], matrices[family.donor], fixed[family.donor], family.files)
    donor.vocabulary = Vocabulary(family.donor, family.matchings(sources), told)
    return {**views, family.donor: donor}


def _copies(family: _Family, model: str, source: str) -> list[str]:
    """Return what else a model holds of a matrix, which the donor lacks: a head that its config ties to the embedding
    and that will be proved to be the same."""
    checkpoint, donor = family.checkpoints[model], family.checkpoints[family.donor]
    if not ties_embeddings(checkpoint.config):
        return []
    shape = checkpoint.tensors[source].shape
    found = [name for name in matrices_of(checkpoint) if name not in donor.tensors and name != source]
    return [name for name in found if checkpoint.tensors[name].shape == shape]


def _refuse_lost(family: _Family, told: Mapping[str, Rows]) -> None:
    """Raise RecipeError for a token of `tokens` whose id is beyond the rows of all matrices."""
    rows = max((it.rows for it in told.values()), default=0)
    for row in family.taken:
        if row >= rows:
            token = family.tokens[family.donor].texts[row]
            raise family.without(token, family.donor, f"the embedding of the donor `{family.donor}`")


def _near(token: str, known: Iterable[str]) -> str | None:
    """Return a token that was probably meant: of a whole vocabulary, only those that begin and are as long alike."""
    alike = (it for it in known if it[:1] == token[:1] and abs(len(it) - len(token)) <= _OFF)
    return did_you_mean(token, list(islice(alike, 1000)))


def _refuse_skill_as_donor(family: _Family) -> None:
    used = {it for models in family.used.values() for it in models}
    whole = sorted(it for it in used if not family.is_skill(it))
    if family.is_skill(family.donor) and whole:
        raise InputError(
            f"model `{family.donor}`: a skill cannot give its rows to whole models, and `by-token` needs that",
            fix=f"take a whole model as donor: `output: {{like: {whole[0]}}}`",
        )


def _widest(dtypes: set[str]) -> str:
    """Return a dtype that holds the numbers of all these exactly."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return "F64" if "F64" in dtypes else "F32"
