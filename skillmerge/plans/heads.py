"""A head and the embedding that it is tied to: what runtimes make of a file that holds both.

A tied configuration tells most runtimes to leave the stored head alone and use the embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from skillmerge.checkpoints.checkpoint import Checkpoint, read_bytes
from skillmerge.checkpoints.model_config import tied_source
from skillmerge.naming import module_kind
from skillmerge.plans.compare.found import Compared
from skillmerge.plans.plan import Plan, TensorPlan
from skillmerge.remarks import Remark, warning

_SAMPLE = 1 << 14
"""Elements compared at the beginning, in the middle and at the end: trained matrices that differ do so everywhere."""


def driven_apart(donor: Checkpoint, tensors: Mapping[str, TensorPlan]) -> Iterator[Remark]:
    """Yield a warning where the recipe treats a tied head and its embedding differently."""
    for head, source in _tied_pairs(donor):
        if head in tensors and source in tensors and tensors[source].coefficients != tensors[head].coefficients:
            yield warning(
                f"config.json ties `{head}` to `{source}`, but the recipe gives them different coefficients: "
                "runtimes will not agree which of the two to use",
                "give both the same coefficient: {modules: [embedding, head], value: …}",
                name="ties",
            )


def with_heads_read(plan: Plan, donor: Checkpoint) -> Plan:
    """Return the plan with a warning where the donor's tied head is not its embedding, which only the weights show.

    Reads a few samples of both. Raises what reading raises.
    """
    if plan.makes_skill:
        return plan
    accepted = "ties" in plan.recipe.accept
    compared, warnings = [*plan.compared.found], [*plan.warnings]
    for head, source in _tied_pairs(donor):
        if not _differ(donor, head, source):
            continue
        found = warning(
            f"config.json of the donor `{plan.donor}` ties `{head}` to `{source}`, but the two differ: "
            "runtimes will not agree which of them to use",
            "set `tie_word_embeddings` to false in the donor's config.json, or leave its head out of the file",
            name="ties",
        )
        values = {plan.donor: f"tied, another `{head}`"}
        compared.append(Compared("ties", head, "weights", "warning", values, accepted, found.message, found.fix))
        warnings += [] if accepted else [found]
    return replace(plan, warnings=tuple(warnings), compared=replace(plan.compared, found=tuple(compared)))


def _tied_pairs(donor: Checkpoint) -> Iterator[tuple[str, str]]:
    """The heads that the configuration ties, of those that are stored all the same, and what they are tied to."""
    for name in donor.tensors:
        if module_kind(name) == "head":
            others = {other: spec for other, spec in donor.tensors.items() if other != name}
            source = tied_source(name, donor.tensors[name].shape, donor.config, others)
            if source is not None:
                yield name, source


def _differ(donor: Checkpoint, head: str, source: str) -> bool:
    one, other = donor.tensors[head], donor.tensors[source]
    count = min(_SAMPLE, one.elements)
    places = {0, (one.elements - count) // 2, one.elements - count}
    return one.dtype != other.dtype or any(
        read_bytes(donor, head, first, count) != read_bytes(donor, source, first, count) for first in sorted(places)
    )
