"""The model card of a merge, written from its manifest: metadata that the Hub understands, and what was done.

It contains only what was measured or given. A card written by hand keeps its text and its metadata; missing
metadata is added. Metadata: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from skillmerge.checkpoints.place import Location, looks_like_repository, on_hub
from skillmerge.checkpoints.schemes import is_path
from skillmerge.engine.measures.cells import DEVIATION, cells, rows_of
from skillmerge.engine.measures.skill_statistics import SkillStatistics
from skillmerge.engine.rounding_statistics import LOSSES, Statistics
from skillmerge.errors import UsageError
from skillmerge.outputs.manifest import Input, Manifest
from skillmerge.outputs.staging import MANIFEST_FILE
from skillmerge.plans.depth import number, over_depth
from skillmerge.plans.plan import InputPlan, coefficients_of
from skillmerge.recipes.recipe import Push
from skillmerge.tensors import format_bytes

CARD_FILE = "README.md"
_CELLS = 8
"""Most layers for which a card shows the effect of rounding."""


_KINDS = {
    "model": ("transformers", "merge", "merge"),
    "skill": ("skillmerge", "task-vector", None),  # the Hub has no relation between a difference and its parents
    "adapter": ("peft", "lora", "merge"),
}
"""Kind of an output -> the library that loads it, its tag, its relation to its parents."""

IN_THE_RECIPE = "declare it in the recipe:\noutput:\n  license: apache-2.0"


def license_of(inputs: Sequence[Input | InputPlan], declared: str | None, how: str = IN_THE_RECIPE) -> str:
    """Return the license of a merge of these parents. how: how to declare one, in the command that was run.

    Raises UsageError if they do not agree and none is declared.
    """
    if declared is not None:
        return declared
    found = {item.name: item.license for item in inputs}
    if len(set(found.values())) == 1 and not {None, "other"} & set(found.values()):
        return str(next(iter(found.values())))
    told = ", ".join(f"{name}: {license or 'none'}" for name, license in found.items())
    raise UsageError(
        f"the license of the merge is undeclared, and the parents' licenses differ or are missing ({told})",
        fix=f"check the parents' licenses, then {how}",
    )


def write_card(
    manifest: Manifest,
    push: Push,
    declared: str | None,
    by_hand: str | None = None,
    how: str = IN_THE_RECIPE,
    base: str | None = None,
) -> str:
    """Return the text of the card. base: of an adapter, what its configuration calls the model that it is for.

    Raises UsageError if the license is not settled or `by_hand` is no card.
    """
    library, tag, relation = _KINDS[manifest.output.kind]
    parents = [place for item in manifest.inputs if (place := on_hub(item.uri)) is not None]
    metadata: dict[str, Any] = {
        "license": None,
        "library_name": library,
        "tags": list(dict.fromkeys([tag, "skillmerge", *push.tags])),
    }
    if parents:
        metadata["base_model"] = list(dict.fromkeys(parent.repository for parent in parents))
        if relation is not None:
            metadata["base_model_relation"] = relation
    base = base if base is not None and looks_like_repository(base) else None  # a folder is of this machine
    if base is not None:
        metadata |= {"base_model": [base], "base_model_relation": "adapter"}
    if push.new_version is not None:
        metadata["new_version"] = push.new_version
    if by_hand is None:
        metadata["license"] = license_of(manifest.inputs, declared, how)
        return str(
            ModelCard(f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n\n{_body(manifest, push, base)}").content
        )
    card, written = read_metadata(by_hand)
    metadata["license"] = written.get("license") or license_of(manifest.inputs, declared, how)
    tags = [*(written.get("tags") or []), *metadata["tags"]]
    card.data = ModelCardData(**{**metadata, **written, "tags": list(dict.fromkeys(tags))})
    return str(card.content)


def read_metadata(card: str) -> tuple[ModelCard, dict[str, Any]]:
    """Return a card written by hand, and its metadata. Raises UsageError."""
    try:
        parsed = ModelCard(card)
        return parsed, dict(parsed.data.to_dict())  # type: ignore[no-untyped-call]
    except Exception as error:  # any error of its YAML parser
        raise UsageError(f"the card's metadata cannot be read: {error}") from error


def _body(manifest: Manifest, push: Push, base: str | None) -> str:
    if manifest.makes_skill:
        return _skill_body(manifest, push)
    name = push.repository.split("/")[-1]
    sections = [
        f"# {name}",
        f"A merge of {_merged(manifest)} by `{manifest.expression}`, computed by "
        f"skillmerge {manifest.tool.version}: {len(manifest.tensors)} tensors, {format_bytes(manifest.size)}.",
        "## Parents",
        _parents(manifest),
        "## Recipe",
        f"```yaml\n{manifest.recipe.text.strip()}\n```",
    ]
    if manifest.overrides:
        told = ", ".join(f"{key} = {number(value)}" for key, value in manifest.overrides.items())
        sections.append(f"Overridden: {told}.")
    sections += [_coefficient(manifest, name, index) for index, name in enumerate(manifest.coefficients)]
    sections += [
        *_rows_by_token(manifest),
        *_accepted(manifest),
        *_rounding(manifest),
        "## Use",
        _use(manifest, push, base),
        "## Proof",
        f"`{MANIFEST_FILE}` names every input with its commit and digests, the action on each tensor, and the\n"
        f"sha256 of every file. Plan `{manifest.plan_digest}`. `skillmerge verify` checks every byte. With the recipe\n"
        "and the commits above, `skillmerge apply` reproduces the same bytes.",
    ]
    return "\n\n".join(sections) + "\n"


def _merged(manifest: Manifest) -> str:
    """Return what was merged, and how many of it."""
    if manifest.output.kind != "adapter":
        return f"{sum(not item.stack for item in manifest.inputs)} models"
    count = len({model for tensor in manifest.tensors for model, _ in tensor.sources})
    return f"{count} LoRA adapter{'s' if count != 1 else ''}"


def _use(manifest: Manifest, push: Push, base: str | None) -> str:
    lines = ["from transformers import AutoModelForCausalLM  # or the class for its task", ""]
    load = 'AutoModelForCausalLM.from_pretrained("{}")'
    if manifest.output.kind == "adapter":
        which = "" if base is not None else "  # the model that the adapters were trained on"
        lines = ["from peft import PeftModel", *lines, f"base = {load.format(base or 'BASE')}{which}"]
        load = 'PeftModel.from_pretrained(base, "{}")'
    return "\n".join(["```python", *lines, f"model = {load.format(push.repository)}", "```"])


def _skill_body(manifest: Manifest, push: Push) -> str:
    name = push.repository.split("/")[-1]
    statistics = manifest.statistics
    assert isinstance(statistics, SkillStatistics)
    total, lost = statistics.all, statistics.all.relative_error
    kept = f"rounded ({lost:.2g} of its norm was lost)" if lost else "kept exactly"
    rows = [(label, str(group.tensors), *group.shown) for label, group in statistics.rows]
    sections = [
        f"# {name}",
        f"A skill: the difference of models `{manifest.expression}`, {kept} by skillmerge "
        f"{manifest.tool.version}: {total.tensors} tensors, {format_bytes(manifest.size)} of the "
        f"{format_bytes(total.dense_bytes)} that they would take uncompressed. It is not a model; add it to one.",
        "## Parents",
        _parents(manifest),
        "## What it changes",
        _table(("module", "tensors", "changed", "norm", "stored"), rows),
        "## Use",
        f"```yaml\nskillmerge: 1\nmodels:\n  target: {Location('your/model')}\n"
        f"  skill: {{skill: {Location(push.repository)}}}\ncoefficients: {{lam: 1.0}}\nmerge: target + lam * skill\n"
        "output: {path: ./merged}\n```",
        "## Proof",
        f"`{MANIFEST_FILE}` names the parents with their commits, and the sha256 of every file; `skill.json` has the\n"
        f"digests of the parents' tensors (`skillmerge verify --parent`). Plan `{manifest.plan_digest}`.",
    ]
    return "\n\n".join(sections) + "\n"


def _parents(manifest: Manifest) -> str:
    rows = []
    for item in manifest.inputs:
        place = on_hub(item.uri)
        if item.stack:
            where = item.uri
        elif place is not None:
            where = f"[{place.repository}](https://huggingface.co/{place.repository})"
        else:
            sizes = [file.size for file in item.files]
            kind = "local" if is_path(item.uri) else "in a bucket"
            where = f"{kind}: {len(sizes)} file{'s' if len(sizes) > 1 else ''}, {format_bytes(sum(sizes))}"
        donor = " (donor)" if item.name == manifest.donor else ""
        commit = f"`{item.revision}`" if item.revision else "-"
        rows.append((f"`{item.name}`{donor}", where, commit, item.license or "-"))
    return _table(("name", "model", "commit", "license"), rows)


def _coefficient(manifest: Manifest, name: str, index: int) -> str:
    found = (
        row for it in manifest.tensors for row in coefficients_of(it.name, it.shape, it.coefficients, it.slices or ())
    )
    depth = over_depth((tensor, shape, values[index]) for tensor, shape, values in found if index < len(values))
    pictures = "\n".join(f"{name} over {stack}: {picture}" for stack, picture in depth.pictures)
    rows = [(label, *(cells[kind] for kind in depth.kinds)) for label, cells in depth.rows]
    return (f"```\n{pictures}\n```\n\n" if pictures else "") + _table((name, *depth.kinds), rows)


def _rows_by_token(manifest: Manifest) -> list[str]:
    """Return which rows of embedding and head follow the formula, where they are matched by token."""
    if manifest.vocabulary is None:
        return []
    rows = []
    for name, it in manifest.vocabulary["matrices"].items():
        taken = "; ".join(f"{model}: {len(tokens)}" for model, tokens in it.get("taken", {}).items())
        rows.append((name, *(f"{it[key]:,}" for key in ("rows", "merged", "donor")), taken or "-"))
    told = f"Tokens that a parent lacks, and padding, have the rows of `{manifest.donor}`."
    head = ("matrix", "rows", "merged", f"as in {manifest.donor}", "from other models")
    return ["## Rows by token", told, _table(head, rows)]


def _accepted(manifest: Manifest) -> list[str]:
    """Return the differences between the parents that the recipe accepts."""
    rows = []
    for found in manifest.accepted:
        values = ", ".join(f"{model}: {value}" for model, value in found.values.items())
        rows.append((found.name or "", found.key, values))
    return ["## Accepted differences", _table(("name", "difference", "values"), rows)] if rows else []


def _rounding(manifest: Manifest) -> list[str]:
    statistics = manifest.statistics
    assert isinstance(statistics, Statistics)
    rows = [(name, *group.shown) for name, group in statistics.rows if group.lambdas is not None]
    if not rows:
        return []
    measured = "a sample of blocks" if statistics.mode == "sampled" else "every element"
    told = f"Measured on {measured}."
    off = [cell for cell in cells(rows_of(manifest.tensors)) if cell.is_off]
    off = sorted(off, key=lambda cell: -abs((cell.group.realised or 0.0) - 1))
    shown = [(cell.label, *cell.group.shown[2:], f"{cell.group.realised:.2f}") for cell in off[:_CELLS]]
    return [
        "## Effect of rounding",
        told,
        _table(("module", *LOSSES), rows),
        *([f"More than {DEVIATION:.0%} off in {len(off)} layers and kinds of module. The largest deviations:",
           _table(("layer", *LOSSES[2:], "effective λ / requested λ"), shown)] if off else ()),
    ]  # fmt: skip


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))
