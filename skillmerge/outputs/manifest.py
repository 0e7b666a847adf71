"""The proof beside the weights: what went in, what was done, what came out. Build, write, read, compare.

Nothing outside `environment` depends on time, host, device or thread count, so that a rebuild gives the same
manifest. `digest` covers everything else in the file, and the file is written in one canonical form, so that
no byte of it can change unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skillmerge.checkpoints.safetensors import unique_keys
from skillmerge.engine.destination import ShardRecord
from skillmerge.engine.rounding_statistics import summarise, summarise_skill
from skillmerge.errors import CheckFailed, some
from skillmerge.outputs.manifest_schema import has_shape_of_manifest
from skillmerge.outputs.staging import MANIFEST_FILE
from skillmerge.plans.plan import Plan
from skillmerge.plans.side_files import SideFile
from skillmerge.recipes.parse import parse_recipe
from skillmerge.recipes.recipe import Recipe
from skillmerge.threads import hash_file
from skillmerge.version import __version__

MANIFEST_VERSION = 1
RUN_LOG_FILE = "skillmerge.run.json"


def build(
    plan: Plan,
    finished: Mapping[str, ShardRecord],
    side_files: Sequence[SideFile],
    stats: str,
    input_digests: Mapping[tuple[str, str], str],
) -> dict[str, Any]:
    """All of an output's manifest that does not depend on where and when it was made; `finished` are the
    records by shard."""
    files = [
        {"name": shard.file, "size": finished[shard.file].size, "sha256": finished[shard.file].sha256}
        for shard in plan.shards
    ]
    files += [{"name": file.name, "size": file.size, "sha256": file.digest[1]} for file in side_files]
    measured = {name: row for done in finished.values() for name, row in done.statistics.items()}
    described = plan.as_dict()
    inputs = [
        {
            **item,
            "license": source.license,
            "files": [
                {
                    **file,
                    "stated_sha256": known.stated_sha256,
                    "sha256": input_digests.get((item["name"], file["name"])),
                }
                for file, known in zip(item["files"], source.files, strict=True)
            ],
        }
        for item, source in zip(described["inputs"], plan.inputs, strict=True)
    ]
    tensors = [
        {**tensor, "statistics": measured[tensor["name"]]} if tensor["name"] in measured else tensor
        for tensor in described["tensors"]
    ]
    if plan.makes_skill:
        rows = {name: row for done in finished.values() for name, row in (done.tensors or {}).items()}
        statistics = {"mode": "full", **summarise_skill(rows)}
    else:
        statistics = {"mode": stats, **summarise(plan, measured)}
    return {
        "manifest_version": MANIFEST_VERSION,
        "tool": {"name": "skillmerge", "version": __version__},
        "recipe": {"text": plan.recipe.document.text, "sha256": plan.recipe.sha256},
        "expression": plan.recipe.document.data["merge"],
        "coefficients": described["coefficients"],
        "overrides": described["overrides"],
        "plan_digest": plan.digest,
        "donor": plan.donor,
        "output": described["output"],
        "inputs": inputs,
        "files": sorted(files, key=lambda file: file["name"]),
        "tensors": tensors,
        "statistics": statistics,
    }


def seal(body: Mapping[str, Any], environment: Mapping[str, Any], run_log: bytes) -> dict[str, Any]:
    """The manifest, with what it was made in and the digest of all of it."""
    log = {"name": RUN_LOG_FILE, "sha256": hashlib.sha256(run_log).hexdigest()}
    document = {**body, "environment": {**environment, "run_log": log}}
    return {**document, "digest": hashlib.sha256(_canonical(document)).hexdigest()}


def recorded_recipe(
    document: Mapping[str, Any], folder: Path, base: Path | None = None
) -> tuple[Recipe, dict[str, str]]:
    """The recipe that the output in `folder` was made from, and the commits of its models on the Hub.

    base: what the recipe's relative paths start from now, in place of the folder that it lay in, seen from the output.
    Raises RecipeError, CheckFailed where the manifest holds none.
    """
    try:
        text, overrides = document["recipe"]["text"], document["overrides"]
        commits = {item["name"]: item["revision"] for item in document["inputs"] if item["revision"]}
        start = base if base is not None else folder.resolve() / document["environment"].get("recipe_folder", "..")
        start = Path(os.path.abspath(start))
        return parse_recipe(text, str(start / "recipe.yaml"), start, overrides), commits
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckFailed(f"{folder}: its manifest holds no recipe") from error


def gate_outcomes(folder: Path) -> list[dict[str, Any]]:
    """What became of each gate when the output in `folder` was made; its run log says it."""
    try:
        found = json.loads((folder / RUN_LOG_FILE).read_bytes()).get("gates", [])
    except (OSError, ValueError, AttributeError):
        return []
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def refuse_failed(folder: Path) -> None:
    """Raise CheckFailed for an output that its own gates refused: it was kept to be looked at."""
    failed = [str(row.get("gate")) for row in gate_outcomes(folder) if not row.get("passed")]
    if failed:
        raise CheckFailed(
            f"{folder} was refused by its gates: {some(failed)}", fix="apply the recipe again with gates that it passes"
        )


def compare(place: Path, document: Mapping[str, Any], again: Mapping[str, Any]) -> None:
    """Raise CheckFailed where two manifests differ in more than where and with what version they were made."""
    again = json.loads(json.dumps(again))
    for key in document.keys() | again.keys():
        if key not in ("tool", "environment", "digest") and document.get(key) != again.get(key):
            raise CheckFailed(f"{place / MANIFEST_FILE}: `{key}` differs when it is built again")


def file_names(document: Mapping[str, Any]) -> set[str]:
    """Every file that an output with this manifest has, itself included."""
    return {file["name"] for file in document["files"]} | {MANIFEST_FILE, RUN_LOG_FILE}


def digests(folder: Path, document: Mapping[str, Any]) -> dict[str, str]:
    """The sha256 of every file of an output, itself included, as this manifest of it says."""
    log = document["environment"]["run_log"]
    files = {file["name"]: file["sha256"] for file in document["files"]}
    return {**files, log["name"]: log["sha256"], MANIFEST_FILE: hash_file(folder / MANIFEST_FILE)}


def to_bytes(document: Mapping[str, Any]) -> bytes:
    """The one form in which a manifest is written: a line per entry of its long lists, so that it can be
    read by people and compared by diff."""
    lines = []
    for key, value in document.items():
        if isinstance(value, list) and value:
            items = ",\n".join("    " + _dump(item) for item in value)
            lines.append(f"  {json.dumps(key)}: [\n{items}\n  ]")
        else:
            lines.append(f"  {json.dumps(key)}: {_dump(value)}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def read(folder: Path) -> dict[str, Any]:
    """The manifest in `folder`. Raises CheckFailed where there is none or a byte of it was changed."""
    path = folder / MANIFEST_FILE
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise CheckFailed(f"{path}: is not a plain file")
        content = path.read_bytes()
    except OSError as error:
        raise CheckFailed(
            f"{folder} has no readable {MANIFEST_FILE}: {error.strerror}",
            fix="only outputs of `skillmerge apply` can be verified",
        ) from error
    return parse(content, str(path))


def parse(content: bytes, path: str) -> dict[str, Any]:
    """A manifest's content. Raises CheckFailed where a byte of it was changed."""
    try:
        document: Any = json.loads(content, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckFailed(f"{path}: is not valid JSON: {error}") from error
    version = document.get("manifest_version") if isinstance(document, dict) else None
    if version != MANIFEST_VERSION:
        raise CheckFailed(f"{path}: manifest version {version!r} is not known to this version of skillmerge")
    if not _is_intact(document, content):
        raise CheckFailed(f"{path}: was changed after it was written")
    return dict(document)


def _is_intact(document: dict[str, Any], content: bytes) -> bool:
    """Whether the digest holds, `content` is the canonical form, and what `verify` relies on is there."""
    body = {key: value for key, value in document.items() if key != "digest"}
    try:
        return (
            hashlib.sha256(_canonical(body)).hexdigest() == document["digest"]
            and to_bytes(document) == content
            and has_shape_of_manifest(document)
            and document["environment"]["run_log"]["name"] == RUN_LOG_FILE
        )
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return False


def _canonical(document: Mapping[str, Any]) -> bytes:
    return _dump(document).encode()


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(", ", ": "))
