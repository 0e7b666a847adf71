"""The token matrices of a formula's models: which of them it reads, and which token each of their rows belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.model_config import ties_embeddings
from skillmerge.checkpoints.tokenizers.matching import Tokens
from skillmerge.checkpoints.tokenizers.small_files import SmallFiles
from skillmerge.checkpoints.tokenizers.tokenizer import read_tokenizer, vocabulary_file
from skillmerge.errors import InputError
from skillmerge.methods.terms import Leaf, minus_of, model_of, models_of
from skillmerge.naming import layer_of, module_kind, part_of
from skillmerge.plans.accounting import copy_rules, models_in
from skillmerge.plans.compare.roles import ADDED, heads_and_embeddings
from skillmerge.plans.compare.rows import BY_TOKEN_FILES, leaving_out
from skillmerge.recipes.formula.tree import ExpressionError
from skillmerge.recipes.recipe import Recipe
from skillmerge.recipes.schedules import ScheduleError
from skillmerge.tensors import DTYPES

_LEAVE_OUT = "leave `vocabulary` out of the recipe"

_PER_LAYER = "embed_tokens_per_layer.weight"
"""Gemma 3n's rows for all layers, in a matrix with fewer rows than its embedding."""

_NO_HEAD = re.compile(r"norm|dense|transform\.|connector|merger|(?<!vocab_)projector", re.IGNORECASE)
"""What has a bias beside the layers, and is no head."""


def matrices_of(checkpoint: Checkpoint) -> list[str]:
    """Return the tensors with a row for each token: embeddings, heads and the biases of heads, which are all that is
    stored of a tied head."""
    tensors = {name: spec for name, spec in checkpoint.tensors.items() if spec.shape and DTYPES[spec.dtype].is_float}
    named = heads_and_embeddings(tensors.values(), checkpoint.config)
    matrices = [*named, *(name for name in tensors if name.endswith(_PER_LAYER))]
    beside = {name.removesuffix("weight") + "bias" for name in matrices}
    rows = {tensors[name].shape[:1] for name in matrices}
    biases = (name for name, spec in tensors.items() if name.endswith("bias") and spec.shape in rows)
    return list(dict.fromkeys([*matrices, *(name for name in biases if name in beside or _is_of_head(name))]))


def _is_of_head(bias: str) -> bool:
    apart = layer_of(bias) is None and part_of(bias) == "text"
    return apart and _NO_HEAD.search(bias) is None and module_kind(bias) in ("head", "embedding", "other")


def _with_columns(checkpoint: Checkpoint, matrices: Iterable[str]) -> list[str]:
    """Return the tensors with a column for each token, such as `final_logits_bias`."""
    tensors = checkpoint.tensors
    shapes = [tensors[name].shape for name in matrices]
    rows = {shape[0] for shape in shapes} - {shape[-1] for shape in shapes if len(shape) > 1}
    wide = [name for name, spec in tensors.items() if len(spec.shape) > 1 and spec.shape[-1] in rows]
    return [name for name in wide if layer_of(name) is None and part_of(name) == "text"]


def matrix_in(checkpoint: Checkpoint, name: str, row: tuple[int, ...]) -> str | None:
    """Return what is read for a donor's token matrix in a model: the tensor of that name, or the one that its config
    ties it to; None if there is none with rows of this shape."""
    tensors = checkpoint.tensors
    if name in tensors:
        fits = tensors[name].shape[1:] == row and DTYPES[tensors[name].dtype].is_float
        return name if fits and tensors[name].shape else None
    if not ties_embeddings(checkpoint.config):
        return None
    tied = [it for it in matrices_of(checkpoint) if tensors[it].shape[1:] == row]
    return tied[0] if len(tied) == 1 else None


def used_in(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], donor: str) -> dict[str, list[str]]:
    """Return the models that the formula reads in each token matrix of the donor, but for matrices that are the
    donor's as they are."""
    tensors = checkpoints[donor].tensors
    left_out = recipe.left_out(tensors)
    names = [name for name in tensors if name not in left_out]
    matrices = matrices_of(checkpoints[donor])
    turned = _with_columns(checkpoints[donor], matrices)
    wanted = [name for name in (*matrices, *turned) if name not in left_out]
    copied = copy_rules(recipe, checkpoints[donor])
    found = {}
    try:
        columns = {name: schedule.resolve(names) for name, schedule in recipe.coefficients.items()}
        for name in wanted:
            values = {coefficient: column[name] for coefficient, column in columns.items()}
            term = Leaf(copied[name]) if name in copied else recipe.term(values)
            found[name] = models_of(term) if term is not None else []
    except (ScheduleError, ExpressionError):  # planning says what is wrong
        every = [name for name in checkpoints if model_of(name) in models_in(recipe)]
        found = dict.fromkeys(wanted, every)
    own = {donor, minus_of(donor)} if donor in recipe.skills else {donor}
    read = [name for name, models in found.items() if {*models} - own]
    if odd := [name for name in read if name in turned]:
        raise InputError(
            f"model `{donor}`: `{odd[0]}` {list(tensors[odd[0]].shape)} has a column for each token, and `by-token` "
            "reads rows",
            fix=leaving_out(recipe, donor, odd),
        )
    return {name: found[name] for name in matrices if found.get(name) and (recipe.tokens or name in read)}


def refuse_added(name: str, checkpoint: Checkpoint) -> None:
    """Raise InputError for a model that keeps the rows of added tokens in matrices of their own, as Idefics does."""
    apart = [it for it in checkpoint.tensors if it.endswith(ADDED)]
    if apart:
        raise InputError(
            f"model `{name}` keeps the rows of added tokens apart, in `{apart[0]}`, which `by-token` does not read",
            fix=_LEAVE_OUT,
        )


def tokens_of(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], name: str, files: SmallFiles) -> Tokens:
    """Return which token each row of a model belongs to. Raises InputError if its files do not say; StalePlan,
    TemporaryError."""
    checkpoint, skill = checkpoints[name], name in recipe.skills
    file = vocabulary_file(checkpoint.store.list())
    what = f"model `{name}` ({checkpoint.place})"
    if not file and skill:
        planes = [checkpoints[it] for it in (name, minus_of(name)) if it in checkpoints]
        if not any(plane.cost(it) for plane in planes for it in matrices_of(plane)):
            return Tokens({}, {})  # its rows are all zero
        done = "extract it again from models with tokenizers"
        if recipe.entries[name].kind == "adapter":
            done = "copy the tokenizer that it was trained with into its folder"
        fix = f"{done}, or {_LEAVE_OUT}"
        raise InputError(f"{what} does not say which token each of its rows belongs to", fix=fix)
    if not file:
        fix = f"copy the tokenizer that it was trained with into its folder, or {_LEAVE_OUT}"
        raise InputError(f"{what} has no tokenizer files, so its rows cannot be matched by token", fix=fix)
    if file not in BY_TOKEN_FILES:
        fix = "write its tokenizer.json with transformers: `AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)`"
        raise InputError(f"{what} has only {file}, which does not name the rows of all tokens",
                         fix=f"{fix}; or {_LEAVE_OUT}")  # fmt: skip
    read = read_tokenizer(checkpoint, files)
    if not read.tokens:
        reason = next(iter(read.unread), f"{file} has no tokens")
        done = read.pointers.get(reason) or "save the tokenizer again"
        raise InputError(f"{what}: its rows cannot be matched by token: {reason}", fix=f"{done}, or {_LEAVE_OUT}")
    return Tokens.of(read.tokens)
