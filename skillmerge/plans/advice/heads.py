"""A head that is tied to the embedding: what runtimes do with a file that holds both.

A tied configuration tells most runtimes to leave the stored head alone and use the embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from skillmerge.checkpoints.checkpoint import Checkpoint, read_bytes
from skillmerge.checkpoints.model_config import tied_source, ties_embeddings
from skillmerge.checkpoints.views.by_token import ByToken
from skillmerge.naming import module_kind
from skillmerge.plans.compare.config import spare_heads
from skillmerge.plans.compare.found import Compared
from skillmerge.plans.compare.roles import heads_and_embeddings
from skillmerge.plans.plan import Plan, TensorPlan
from skillmerge.remarks import Remark, warning

_SAMPLE = 1 << 14
"""Elements compared at the beginning, in the middle and at the end: trained matrices that differ do so everywhere."""


def driven_apart(donor: Checkpoint, tensors: Mapping[str, TensorPlan]) -> Iterator[Remark]:
    """Yield a warning where the recipe treats a tied head and its embedding differently."""
    for head, source in _tied_pairs(donor):
        if head in tensors and source in tensors and tensors[source].coefficients != tensors[head].coefficients:
            usual = (module_kind(source), module_kind(head)) == ("embedding", "head")
            both = "modules: [embedding, head]" if usual else f'tensors: ["{source}", "{head}"]'
            yield warning(
                f"config.json ties `{head}` to `{source}`, but the recipe gives them different coefficients, "
                "so runtimes may use either",
                f"give both the same coefficient: {{{both}, value: …}}",
                name="ties",
            )


def stored_heads(
    donor: str, tensors: Mapping[str, TensorPlan], checkpoints: Mapping[str, Checkpoint]
) -> dict[tuple[str, str], list[str]]:
    """Return heads that are stored although the configuration ties them, with what they are tied to -> the models.

    The donor's are in the output; of other models those count that the formula reads.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for model, checkpoint in checkpoints.items():
        for head, source in _tied_pairs(checkpoint if model == donor else _stored(checkpoint)):
            if model == donor or any((model, head) in tensor.sources for tensor in tensors.values()):
                found.setdefault((head, source), []).append(model)
    return found


def with_heads_read(plan: Plan, checkpoints: Mapping[str, Checkpoint]) -> Plan:
    """Return the plan with a warning where a tied head is not its embedding, which only the weights show.

    Where the donor's is not, its family has two matrices, and no other model is looked at. Reads a few samples of
    both. What the configurations alone have led to is replaced, or dropped where head and embedding are equal. Raises
    what reading raises.
    """
    if plan.recipe.output.kind != "model" or not (heads := stored_heads(plan.donor, plan.tensors, checkpoints)):
        return plan
    accepted = "ties" in plan.recipe.accept
    read = {model for models in heads.values() for model in models}
    settled = [it for it in plan.compared.found if (spare := spare_heads(it)) and read.issuperset(spare)]
    compared = [it for it in plan.compared.found if it not in settled]
    warnings = [it for it in plan.warnings if it.message not in {it.message for it in settled}]
    for (head, source), models in heads.items():
        differing = [plan.donor] if plan.donor in models and _differ(checkpoints[plan.donor], head, source) else []
        differing = differing or [
            it for it in models if it != plan.donor and _differ(_stored(checkpoints[it]), head, source)
        ]
        for found in _apart(plan.donor, differing, head, source):
            compared.append(replace(found, accepted=accepted))
            warnings += [] if accepted else [warning(found.message, found.help, name="ties")]
    idle = accepted and not any(it.name == "ties" and it.accepted for it in (*compared, *settled))
    notes = [*plan.notes, *(["`accept: [ties]` settles nothing here"] if idle else [])]
    comparison = replace(plan.compared, found=tuple(compared))
    return replace(plan, warnings=tuple(warnings), notes=tuple(notes), compared=comparison)


def _apart(donor: str, models: Sequence[str], head: str, source: str) -> Iterator[Compared]:
    """Yield the warnings for a head that these models tie, but that differs from the matrix it is tied to."""
    values = dict.fromkeys(models, f"tied, another `{head}`")
    if [*models] == [donor]:
        yield Compared(
            "ties", head, "weights", "warning", values, False,
            f"config.json of the donor `{donor}` ties `{head}` to `{source}`, but the two differ, "
            "so runtimes may use either",
            "set `tie_word_embeddings` to false in the donor's config.json, or remove its head from the file",
        )  # fmt: skip
    elif models:
        yield Compared(
            "ties", head, "weights", "warning", values, False,
            f"config.json of {' and '.join(f'`{name}`' for name in models)} ties `{head}` to `{source}`, but the two "
            "differ; the formula reads the stored head, which runtimes may ignore",
            "set `tie_word_embeddings` to false there if the stored head is the trained one; otherwise remove it from "
            "the file",
        )  # fmt: skip


def _stored(checkpoint: Checkpoint) -> Checkpoint:
    """Return a model with its own rows: with the donor's among them, head and embedding differ."""
    return checkpoint.beneath if isinstance(checkpoint, ByToken) else checkpoint


def _tied_pairs(donor: Checkpoint) -> Iterator[tuple[str, str]]:
    """Yield the heads that are stored although the configuration ties them, and what they are tied to."""
    if not ties_embeddings(donor.config):
        return
    known = heads_and_embeddings(donor.tensors.values(), donor.config)
    for name in (name for name in donor.tensors if known.get(name) or module_kind(name) == "head"):
        shape = donor.tensors[name].shape
        others = {other: spec for other, spec in donor.tensors.items() if other != name}
        alike = [other for other, is_head in known.items() if not is_head and donor.tensors[other].shape == shape]
        source = tied_source(name, shape, donor.config, others) or (alike[0] if len(alike) == 1 else None)
        if source is not None:
            yield name, source


def _differ(donor: Checkpoint, head: str, source: str) -> bool:
    one, other = donor.tensors[head], donor.tensors[source]
    count = min(_SAMPLE, one.elements)
    places = {0, (one.elements - count) // 2, one.elements - count}
    return one.dtype != other.dtype or any(
        read_bytes(donor, head, first, count) != read_bytes(donor, source, first, count) for first in sorted(places)
    )
