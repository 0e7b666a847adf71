"""The verb export: convert a stored skill, by the module of the requested format."""

from __future__ import annotations

import os

from skillmerge.checkpoints.schemes import output_place
from skillmerge.errors import UsageError
from skillmerge.reporter import Reporter
from skillmerge.verbs.export.lora import Exported, export_lora
from skillmerge.verbs.export.patch import Patch, export_patch
from skillmerge.verbs.target import refuse_bucket


def export(
    skill: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    lora_rank: int | None = None,
    onto: str | None = None,
    base: str | None = None,
    seed: int = 0,
    follow_links: bool = False,
    reporter: Reporter | None = None,
) -> Exported | Patch:
    """Convert a stored skill to the best LoRA adapter of rank `lora_rank`, or to a sparse patch of `onto`.

    onto: the checkpoint that was subtracted when the skill was extracted. base: for an adapter, the base model that its
    config names [default: the checkpoint that was subtracted]. seed: of the randomized decomposition.
    Raises CheckFailed if `onto` is another checkpoint; UsageError, InputError, ResourceError.
    """
    if (lora_rank is None) == (onto is None):
        raise UsageError(
            "no format was given", fix="pass `--lora-rank R` for an adapter, or `--onto SFT` for a sparse patch"
        )
    refuse_bucket(output_place(output))
    if lora_rank is not None:
        return export_lora(
            skill, output, lora_rank=lora_rank, base=base, seed=seed, follow_links=follow_links, reporter=reporter
        )
    if base is not None:
        raise UsageError("`--base` applies only to adapters", fix="leave it out; a patch is for the model of `--onto`")
    return export_patch(skill, output, onto=str(onto), follow_links=follow_links, reporter=reporter)
