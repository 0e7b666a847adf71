"""What to write so that an output has the donor's rows of tokens, where other models have other tokens."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterable

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.tokenizers.tokenizer import vocabulary_file
from skillmerge.checkpoints.tokenizers.vocabulary import SKILL_TOKENS
from skillmerge.methods.terms import sole_model
from skillmerge.naming import module_kind
from skillmerge.plans.compare.roles import ADDED
from skillmerge.recipes.formula.tree import ExpressionError
from skillmerge.recipes.recipe import Recipe

_KINDS = ("embedding", "head")


def leaving_out(recipe: Recipe, donor: str, matrices: Collection[str]) -> str:
    """Return what takes these matrices of tokens out of the formula.

    Modules that a rule cannot select by kind (`output.weight`, `head.weight`) are named, as all are where the formula
    has no coefficient that leaves the donor alone.
    """
    names = sorted(matrices)
    listed = ", ".join(json.dumps(name, ensure_ascii=False) for name in names)
    if recipe.of_command:
        return "to leave those rows out, pass: " + " ".join(f"--ignore {shlex.quote(name)}" for name in names)
    if recipe.makes_skill:
        return f"to leave those rows out of the skill, add to the recipe `ignore: [{listed}]`"
    if not _is_donor_at_zero(recipe, donor):
        return f"to take those rows from the donor, add to the recipe `copy: [{{tensors: [{listed}], from: {donor}}}]`"
    which = (
        "modules: [embedding, head]" if all(module_kind(name) in _KINDS for name in names) else f"tensors: [{listed}]"
    )
    return f"to leave those rows as they are in the donor, add the rule `{{{which}, value: 0}}` to the coefficient"


BY_TOKEN_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json", SKILL_TOKENS)
"""Files that name the rows of all tokens. Others leave those of added tokens, or a shift of all, to code."""


def by_token_advice(recipe: Recipe, checkpoints: Iterable[Checkpoint]) -> str | None:
    """Return what gives each token its own row, if the files of these models say which that is."""
    read = [*checkpoints]
    named = all(vocabulary_file(it.store.list()) in BY_TOKEN_FILES for it in read)
    if recipe.by_token or not named or any(tensor.endswith(ADDED) for it in read for tensor in it.tensors):
        return None
    if recipe.of_command:
        return "to give each token its own row, pass: --vocabulary by-token"
    return "to give each token its own row, add to the recipe `vocabulary: by-token`"


def _is_donor_at_zero(recipe: Recipe, donor: str) -> bool:
    """Return whether the formula is the donor where its coefficients are 0."""
    try:
        term = recipe.term(dict.fromkeys(recipe.coefficients, 0.0))
    except ExpressionError:
        return False
    return term is not None and sole_model(term) == donor
