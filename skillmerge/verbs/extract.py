"""The verb extract: two checkpoints -> a stored skill; and whether a skill was extracted from a checkpoint."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skillmerge.checkpoints.checkpoint import Checkpoint, read_bytes
from skillmerge.checkpoints.kinds.patch import PATCH_FILE
from skillmerge.checkpoints.kinds.skill import SKILL_FILE, summary, tensor_digest
from skillmerge.checkpoints.stores.folder import Folder
from skillmerge.checkpoints.views.arranged import in_layout_of
from skillmerge.checkpoints.views.fitting import Model
from skillmerge.checkpoints.views.renamed import wrappers_of
from skillmerge.engine.runner import Work, check_words
from skillmerge.errors import CheckFailed, UsageError, machine_errors
from skillmerge.plans.opening import Access, close_all, open_models
from skillmerge.recipes.parse import recipe_of
from skillmerge.recipes.recipe import Recipe
from skillmerge.reporter import Reporter, default_reporter
from skillmerge.study.places import is_adapter, is_difference
from skillmerge.tensors import UNIT, TensorSpec
from skillmerge.threads import in_threads
from skillmerge.verbs.apply import merge
from skillmerge.verbs.records import Checks, Publish
from skillmerge.verbs.result import Result
from skillmerge.version import __version__


def _models(rl: str, sft: str, access: Access) -> tuple[dict[str, Any], str, dict[str, str]]:
    """Return the models of an extraction, its formula, and the donor if that is not read off the formula.

    An adapter is a difference in itself, which needs no weights of the model. Where it replaces something it is put
    onto that.
    """
    models: dict[str, Any] = {"rl": rl, "sft": sft}
    if (Path(rl) / PATCH_FILE).is_file():
        models["rl"] = {"patch": rl, "onto": "sft"}
    elif is_adapter(rl, access):
        models["rl"] = {"adapter": rl}
        if is_adapter(sft, access):
            models["sft"] = {"adapter": sft}
        elif is_difference(rl, access):
            return models, "rl", {"like": "sft"}
        else:
            models["rl"]["onto"] = "sft"
    return models, "rl - sft", {}


@machine_errors()
def extract(
    rl: str,
    sft: str,
    output: str | os.PathLike[str],
    *,
    dtype: str = "same",
    ignore: Sequence[str] = (),
    accept: Sequence[str] = (),
    vocabulary: str = "by-id",
    zstd: bool = False,
    keep: float | None = None,
    threads: int | None = None,
    memory_limit: int | None = None,
    overwrite: bool = False,
    hash_inputs: bool = False,
    follow_links: bool = False,
    hub: str = "stream",
    reporter: Reporter | None = None,
) -> Result:
    """Store the difference `rl - sft` of two checkpoints (folders, or `hf://org/name[@revision][/subfolder]`).

    If `rl` is a folder with a sparse patch, it is read as a patch of `sft`; if it holds a LoRA adapter, as one that was
    trained on `sft`.
    dtype: `same` is exact; bfloat16, float16 or float32 round each element once. ignore: globs of tensors to leave
    out. accept: names of differences between the two to accept. vocabulary: `by-token` takes rows of tokens from each
    other, not rows of ids. zstd: compress the files. keep: the share of each tensor's elements to keep, the largest
    ones, rescaled to the tensor's norm. The other arguments and the errors are those of `apply`.
    """
    if dtype not in ("same", "bfloat16", "float16", "float32"):
        raise UsageError(f"dtype {dtype!r}: same, bfloat16, float16 or float32")
    check_words(vocabulary=vocabulary, keep=keep, threads=threads, memory_limit=memory_limit, hub=hub)
    access = Access(follow_links, download=hub == "download")
    models, formula, like = _models(os.fspath(rl), os.fspath(sft), access)
    made = {"kind": "skill", "dtype": dtype, "compression": "zstd" if zstd else "none", "keep": keep, **like}
    keys: dict[str, Any] = {"accept": list(accept)} if accept else {}  # left out, the text is that of earlier versions
    keys |= {"vocabulary": vocabulary} if vocabulary != "by-id" else {}
    recipe = recipe_of(models, formula, made, "skillmerge extract", ignore=list(ignore), **keys)
    reporter = reporter or default_reporter("extracting")
    reporter.event("started", skillmerge=__version__, recipe=recipe.document.name)
    return merge(
        recipe,
        output,
        access,
        Work("auto", threads, memory_limit),
        Checks(hash_inputs=hash_inputs),
        Publish(overwrite),
        reporter,
    )


def check_parent(skill: str | os.PathLike[str], parent: str, *, follow_links: bool = False) -> str:
    """Return which of the models of its expression `parent` is (`rl`), by the digests of all of its tensors.

    Raises CheckFailed if it is none of them, naming the tensor that shows it; UsageError, InputError.
    """
    if not (Path(skill) / SKILL_FILE).is_file():
        raise UsageError(f"{skill} is not a skill, and `--parent` applies only to skills", fix="leave `--parent` out")
    document = summary(Folder(Path(skill)))
    tensors = {name: row["digests"] for name, row in document["tensors"].items() if row.get("digests")}
    candidates = sorted({model for digests in tensors.values() for model in digests})
    proven = [_parent(item) for item in document["parents"] if item["name"] in candidates]
    if not candidates:
        raise UsageError(f"{skill} was made from other skills, which record their own parents")
    access = Access(follow_links=follow_links)
    recipe = _parent_alone(os.fspath(parent), access)
    if wrappers_of(tensors):  # extracted when names were read as stored
        recipe = recipe.as_planned("parent", {})
    # A parent may store the skill's tensors in another layout.
    shapes = {
        name: TensorSpec(name, row["dtype"], tuple(row["shape"]), "") for name, row in document["tensors"].items()
    }
    checkpoints = open_models(recipe, access, lambda message: None, Model(os.fspath(skill), shapes, {}))
    checkpoint = in_layout_of(checkpoints["parent"], shapes, whole=False)
    names = [name for name in tensors if name in checkpoint.tensors]
    missing = [name for name in tensors if name not in checkpoint.tensors]
    reason = f"it has no tensor `{missing[0]}`" if missing else ""
    try:
        digests = in_threads(lambda name, stop: _digest(checkpoint, name), names)
        for name, digest in zip(names, digests, strict=True):
            left = [model for model in candidates if tensors[name].get(model, digest) == digest]
            if not left and not reason:
                reason = f"tensor `{name}` differs"
            candidates = left
            if not candidates:
                break
    finally:
        close_all(checkpoints)
    if reason or not candidates:
        raise CheckFailed(
            f"{parent} is not a parent of {skill}: {reason}",
            fix=f"pass one of its parents: {', '.join(proven)}",
        )
    return str(candidates[0])


def _parent_alone(parent: str, access: Access) -> Recipe:
    """Return a recipe of nothing but one parent. Raises UsageError for an adapter that is no difference."""
    if not is_adapter(parent, access):
        return recipe_of({"parent": parent}, "parent", {"path": "nowhere"}, "skillmerge verify")
    if not is_difference(parent, access):
        raise UsageError(
            f"{parent} replaces parts of its model, so that its weights are not known without it",
            fix="pass the other parent",
        )
    return recipe_of({"parent": {"adapter": parent}}, "parent", {"kind": "skill"}, "skillmerge verify")


def _parent(item: Mapping[str, Any]) -> str:
    return f"{item['name']} = {item['uri']}" + (f" at {item['revision'][:12]}" if item["revision"] else "")


def _digest(checkpoint: Checkpoint, name: str) -> str:
    elements = checkpoint.tensors[name].elements
    pieces = (read_bytes(checkpoint, name, at, min(UNIT, elements - at)) for at in range(0, elements, UNIT))
    return tensor_digest([hashlib.sha256(piece).hexdigest() for piece in pieces])
