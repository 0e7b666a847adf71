"""The verb export: a stored skill in a format of others. Knows which one was asked for, and leaves it to its module."""

from __future__ import annotations

import os

from skillmerge.errors import UsageError
from skillmerge.reporter import Reporter
from skillmerge.verbs.export.lora import Exported, export_lora
from skillmerge.verbs.export.patch import Patch, export_patch


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
    """Write a stored skill into a new folder: the best LoRA adapter of rank `lora_rank`, or a sparse patch of `onto`.

    onto: the checkpoint that was subtracted when the skill was cut. base: of an adapter, what its config names as the
    model to put it on; by default what the skill was cut from. seed: of the randomized decomposition.
    Raises CheckFailed if `onto` is another checkpoint; UsageError, InputError, ResourceError.
    """
    if (lora_rank is None) == (onto is None):
        raise UsageError("say what to write", fix="give --lora-rank R (an adapter) or --onto SFT (a sparse patch)")
    if lora_rank is not None:
        return export_lora(
            skill, output, lora_rank=lora_rank, base=base, seed=seed, follow_links=follow_links, reporter=reporter
        )
    if base is not None:
        raise UsageError("--base is of an adapter", fix="leave it out: a patch is for the model of --onto")
    return export_patch(skill, output, onto=str(onto), follow_links=follow_links, reporter=reporter)
