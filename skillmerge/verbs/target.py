"""The output's folder: where it may be, whether it is up to date, what must not be replaced."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.place import Bucket
from skillmerge.checkpoints.schemes import output_place
from skillmerge.errors import CheckFailed, UsageError, some
from skillmerge.outputs import manifest
from skillmerge.outputs.manifest import Manifest
from skillmerge.outputs.output import RunLog
from skillmerge.outputs.staging import MANIFEST_FILE, Staging
from skillmerge.outputs.verify import check_structure, is_intact
from skillmerge.plans.plan import Plan
from skillmerge.recipes.recipe import Recipe


def output_folder(recipe: Recipe, output: str | os.PathLike[str] | None, checkpoints: Mapping[str, Checkpoint]) -> Path:
    """Return the output's folder. Raises UsageError if there is none, or it would replace an input."""
    refuse_bucket(output_bucket(recipe, output))
    try:
        path = Path(output).expanduser() if output is not None else recipe.output.path
        str(path).encode()
    except (RuntimeError, UnicodeEncodeError) as error:
        raise UsageError(f"the output {os.fspath(output or '')!r} cannot be used: {error}") from error
    if output == "-":
        fix = "name a folder; `./-` is one of this name"
        raise UsageError("the output is a folder, which cannot go to standard output", fix=fix)
    if path is None:
        raise UsageError("the recipe names no output", fix="add `output: {path: ./merged}`, or pass `--output DIR`")
    path = Path(os.path.abspath(path))
    try:
        path.resolve()
    except (OSError, RuntimeError) as error:
        raise UsageError(f"the output {path} cannot be used: {error}") from error
    precious = {"the recipe": Path(os.path.abspath(recipe.document.name))}
    precious |= {
        f"model `{name}`": Path(os.path.abspath(item.at.root))
        for name, item in checkpoints.items()
        if item.at.root is not None
    }
    for folder in path.parents:
        if os.path.isfile(folder / MANIFEST_FILE):
            raise UsageError(
                f"the output {path} is inside a finished output, `{folder}`", fix="choose another folder for the output"
            )
    here = Path.cwd()
    if path in (here, *here.parents):
        raise UsageError(
            f"the output {path} would replace the current folder", fix="choose another folder for the output"
        )
    for what, place in precious.items():
        for ours in (path, Staging.folder_of(path)) if path.name else (path,):
            for inner, outer in ((place, ours), (place.resolve(), ours.resolve())):
                if inner == outer or outer in inner.parents:
                    raise UsageError(
                        f"the output {ours} would replace {what} ({place})", fix="choose another folder for the output"
                    )
    return path


def output_bucket(recipe: Recipe, output: str | os.PathLike[str] | None) -> Bucket | None:
    """Return the output's place in a bucket, or None if it is a folder. Raises UsageError."""
    return output_place(output) if output is not None else recipe.output.bucket


def refuse_bucket(place: Bucket | None) -> None:
    """Raise UsageError for an output in a bucket."""
    if place is not None:
        raise UsageError(
            f"the output {place} is in a bucket, which this command does not write to",
            fix="choose a folder with `--output`; `skillmerge apply` and `skillmerge extract` write to buckets",
        )


def finished_output(
    folder: Path, plan_digest: str, conditions: Mapping[str, Any], hash_inputs: bool
) -> Manifest | None:
    """Return the manifest in `folder` if it belongs to this plan, these files and these options, and the output looks
    complete without rereading the weights (`verify` does that)."""
    if not (folder / MANIFEST_FILE).is_file():
        return None
    try:
        proof = manifest.read(folder)
        check_structure(folder, proof)
    except CheckFailed:
        return None
    if any(not outcome.passed for outcome in RunLog.read(folder).gates):
        return None  # it failed a gate, and was moved here by hand
    known = proof.environment.conditions
    same = proof.plan_digest == plan_digest and all(known.get(key) == conditions[key] for key in conditions)
    hashed = all(file.sha256 for item in proof.inputs for file in item.files)
    return proof if same and (hashed or not hash_inputs) else None


def is_done(plan: Plan, output: str | os.PathLike[str] | None = None, stats: str = "sampled") -> bool:
    """Return whether the output is up to date: made by this plan from these files, with every byte unchanged."""
    target = output if output is not None else plan.recipe.output.path
    if target is None or output_bucket(plan.recipe, output) is not None:
        return False
    conditions = {"inputs": plan.versions, "stats": stats, "allow_nonfinite": False}
    proof = finished_output(Path(target), plan.digest, conditions, hash_inputs=False)
    return proof is not None and is_intact(Path(target), proof)


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Raise UsageError if the output would replace something that it must not."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target} exists and is not a folder", fix="choose another folder with `--output`")
    if target.is_mount():
        raise UsageError(
            f"{target} is a mount point, which cannot be replaced", fix="choose a folder in it with `--output`"
        )
    names = [path.name for path in target.iterdir()] if target.is_dir() else []
    if names and not overwrite:
        raise UsageError(
            f"output `{target}` already exists",
            fix="pass `--overwrite` to replace it, or choose another folder with `--output`",
        )
    if names and not any(name == MANIFEST_FILE or name.endswith(".safetensors") for name in names):
        raise UsageError(
            f"{target} holds no model, and `--overwrite` replaces only models; it has {some(sorted(names), 4)}",
            fix="choose another folder with `--output`, or remove this one yourself",
        )
