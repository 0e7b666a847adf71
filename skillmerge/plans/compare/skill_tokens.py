"""The tokens that a new skill's rows belong to, kept beside it: a skill is merged long after its models are gone."""

from __future__ import annotations

from collections.abc import Mapping

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.tokenizers.small_files import SmallFiles
from skillmerge.checkpoints.tokenizers.tokenizer import read_tokenizer
from skillmerge.checkpoints.tokenizers.vocabulary import SKILL_TOKENS, skill_tokens_text
from skillmerge.plans.compare.roles import row_count, token_matrices
from skillmerge.plans.plan import Plan
from skillmerge.plans.side_files import SideFile


def token_files(plan: Plan, checkpoints: Mapping[str, Checkpoint]) -> tuple[SideFile, ...]:
    """Return the file that says which token each row of a skill belongs to; none if it has no such rows, or its models
    do not say.

    It is not part of the plan, so that skills of earlier versions can be rebuilt. Raises StalePlan, TemporaryError.
    """
    donor = checkpoints[plan.donor]
    matrices = token_matrices(donor.tensors.values(), donor.config)
    moved = [it for name in sorted(matrices & plan.tensors.keys()) if (it := plan.tensors[name]).action != "zero"]
    models = dict.fromkeys(source.model for tensor in moved for source in tensor.sources)
    if plan.vocabulary is not None:
        models = dict.fromkeys([plan.donor])  # all rows are in its order
    rows = max((row_count(tensor.name, donor.tensors) for tensor in moved), default=0)
    files, tokens = SmallFiles(), dict[int, str]()
    # The donor's name counts where names differ: the comparison has found the models to agree, or was told to accept.
    for model in sorted(models, key=lambda model: model != plan.donor):
        tokens = {**read_tokenizer(checkpoints[model], files).tokens, **tokens}
    tokens = {number: text for number, text in tokens.items() if number < rows}
    return (SideFile.of(SKILL_TOKENS, skill_tokens_text(tokens).encode()),) if tokens else ()
