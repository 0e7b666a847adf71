"""The manifest beside the weights: inputs, actions, outputs. Types, build, seal, read, write, compare.

Nothing outside `environment` depends on time, host, device or thread count, so that a rebuild gives the same
manifest. `digest` covers everything else in the file, and the file is written in one canonical form, so that
no byte of it can change unnoticed. Fields have the names and the order of the JSON's keys.
"""

from __future__ import annotations

import hashlib
import json
import platform
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from skillmerge.brief import brief
from skillmerge.checkpoints.safetensors import unique_keys
from skillmerge.engine.destination import ShardRecord
from skillmerge.engine.measures.skill_statistics import SkillStatistics, summarise_skill
from skillmerge.engine.rounding_statistics import Statistics, TensorStatistics, summarise
from skillmerge.errors import CheckFailed, is_machine, unusable
from skillmerge.methods.method import Scalars
from skillmerge.outputs.canonical import digest_of, lines_of, pieces_of, to_bytes
from skillmerge.outputs.staging import MANIFEST_FILE
from skillmerge.plans.compare.found import Compared
from skillmerge.plans.plan import InputPlan, Plan, Slice, slices_of
from skillmerge.plans.side_files import SideFile
from skillmerge.version import __version__

MANIFEST_VERSION = 1
RUN_LOG_FILE = "skillmerge.run.json"


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    version: str


@dataclass(frozen=True, slots=True)
class RecipeText:
    text: str
    sha256: str


@dataclass(frozen=True, slots=True)
class OutputSettings:
    """The settings of `output` that decide bytes. keep, compression: of a stored skill."""

    dtype: str
    rounding: str = "nearest"
    seed: int = 0
    kind: str = "model"
    compression: str = "none"
    keep: int | float | None = None

    def as_dict(self) -> dict[str, Any]:
        kind = {"kind": self.kind, "compression": self.compression} if self.kind != "model" else {}
        keep = {"keep": self.keep} if self.keep is not None else {}
        return {**kind, **keep, "dtype": self.dtype, "rounding": self.rounding, "seed": self.seed}


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """A weight file of an input. stated_sha256: as the Hub states it; sha256: as computed here, if it was hashed."""

    name: str
    size: int
    header_sha256: str
    bytes_read: int = 0
    stated_sha256: str | None
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Input:
    """An input model. revision: its commit on the Hub, or None. From `rename` on: see `Naming`."""

    name: str
    uri: str
    revision: str | None
    files: tuple[InputFile, ...]
    license: str | None
    rename: list[dict[str, str]] | None = None
    unwrapped: list[str] | None = None
    stack: list[dict[str, str]] | None = None
    config_edits: list[dict[str, Any]] | None = None
    layout: list[str] | None = None

    def as_dict(self) -> dict[str, Any]:
        row = {"name": self.name, "uri": self.uri, "revision": self.revision}
        names = {it.name: value for it in fields(self)[5:] if (value := getattr(self, it.name))}
        return {**row, "files": [asdict(file) for file in self.files], "license": self.license, **names}


@dataclass(frozen=True, slots=True)
class File:
    """A file of the output."""

    name: str
    size: int
    sha256: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Tensor:
    """The action on one tensor of the output; see `TensorPlan`. statistics: of rounding, if measured. scalars: what
    methods found of it, for each of its matrices: thresholds, cosines, factors. slices: see `TensorPlan`."""

    name: str
    file: str
    action: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[tuple[str, str], ...]
    coefficients: tuple[int | float, ...] = ()
    statistics: TensorStatistics | None = None
    scalars: dict[str, list[float]] | None = None
    slices: list[Slice] | None = None

    def as_dict(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            "name": self.name,
            "file": self.file,
            "action": self.action,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "sources": [list(source) for source in self.sources],
            "coefficients": list(self.coefficients),
        }
        if self.slices:
            row["slices"] = [it.as_dict() for it in self.slices]
        if self.statistics is not None:
            row["statistics"] = self.statistics.as_dict()
        return {**row, "scalars": self.scalars} if self.scalars else row


@dataclass(frozen=True, slots=True)
class LogFile:
    name: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Software, device and conditions of the run. recipe_folder: the recipe's folder, relative to the output."""

    python: str
    platform: str
    torch: str
    safetensors: str
    device: str
    recipe_folder: Annotated[str, Field(pattern=r"^[^\x00]+$")] = ".."
    inputs: dict[str, dict[str, Any]]
    stats: Literal["full", "sampled", "off"]
    allow_nonfinite: bool
    only_on: str | None = None
    run_log: LogFile

    @property
    def conditions(self) -> dict[str, Any]:
        """The conditions that a later run compares."""
        row = {"inputs": self.inputs, "stats": self.stats, "allow_nonfinite": self.allow_nonfinite}
        return {**row, "only_on": self.only_on} if self.only_on is not None else row

    def as_dict(self) -> dict[str, Any]:
        names = ("python", "platform", "torch", "safetensors", "device", "recipe_folder")
        return {**{name: getattr(self, name) for name in names}, **self.conditions, "run_log": asdict(self.run_log)}


@dataclass(frozen=True, slots=True)
class ManifestBody:
    """The part of a manifest that does not depend on where and when the output was made."""

    tool: Tool
    recipe: RecipeText
    expression: str
    coefficients: tuple[str, ...]
    overrides: dict[str, int | float]
    plan_digest: str
    donor: str
    output: OutputSettings
    inputs: tuple[Input, ...]
    files: tuple[File, ...]
    tensors: tuple[Tensor, ...]
    statistics: Annotated[SkillStatistics | Statistics, Field(union_mode="left_to_right")]
    accepted: tuple[Compared, ...] = field(default=(), kw_only=True)
    """Differences between the models that the recipe accepts."""
    warnings: tuple[str, ...] = field(default=(), kw_only=True)
    """Warnings of the plan and of the weights."""
    vocabulary: dict[str, Any] | None = field(default=None, kw_only=True)
    """How rows were matched by token, if they were; see `Vocabulary.as_dict`."""

    __repr__ = brief

    @property
    def makes_skill(self) -> bool:
        return self.output.kind == "skill"

    @property
    def size(self) -> int:
        """Total bytes of all files in the manifest."""
        return sum(file.size for file in self.files)

    @property
    def file_names(self) -> set[str]:
        """Every file that an output with this manifest has, the manifest included."""
        return {file.name for file in self.files} | {MANIFEST_FILE, RUN_LOG_FILE}

    @property
    def inputs_hashed(self) -> bool:
        """Whether any input's weights were hashed."""
        return any(file.sha256 for item in self.inputs for file in item.files)

    def as_dict(self) -> dict[str, Any]:
        """Return the manifest as JSON data."""
        return {
            "manifest_version": MANIFEST_VERSION,
            "tool": asdict(self.tool),
            "recipe": asdict(self.recipe),
            "expression": self.expression,
            "coefficients": list(self.coefficients),
            "overrides": dict(self.overrides),
            "plan_digest": self.plan_digest,
            "donor": self.donor,
            "output": self.output.as_dict(),
            "inputs": [item.as_dict() for item in self.inputs],
            "files": [file.as_dict() for file in self.files],
            "tensors": [tensor.as_dict() for tensor in self.tensors],
            "statistics": self.statistics.as_dict(),
            **({"accepted": [found.as_dict() for found in self.accepted]} if self.accepted else {}),
            **({"warnings": list(self.warnings)} if self.warnings else {}),
            **({"vocabulary": self.vocabulary} if self.vocabulary is not None else {}),
        }


@dataclass(frozen=True, slots=True)
class Manifest(ManifestBody):
    """A manifest, sealed by the digest of everything else in it."""

    environment: Environment
    digest: str

    __repr__ = brief

    def as_dict(self) -> dict[str, Any]:
        return {**ManifestBody.as_dict(self), "environment": self.environment.as_dict(), "digest": self.digest}

    def to_bytes(self) -> bytes:
        return to_bytes(self.as_dict())


def build(
    plan: Plan,
    finished: Mapping[str, ShardRecord],
    side_files: Sequence[SideFile],
    stats: str,
    input_digests: Mapping[tuple[str, str], str],
) -> ManifestBody:
    """Return a manifest's body. finished: the records by shard."""
    recipe, shards = plan.recipe, [finished[shard.file] for shard in plan.shards]
    files = [File(done.file, done.size, done.sha256) for done in shards]
    files += [File(file.name, file.size, file.digest[1]) for file in side_files]
    measured = {name: row for done in finished.values() for name, row in done.statistics.items()}
    cut = {name: row for done in finished.values() for name, row in (done.tensors or {}).items()}
    inputs = {name: row for done in finished.values() for name, row in done.inputs.items()}
    return ManifestBody(
        tool=Tool("skillmerge", __version__),
        recipe=RecipeText(recipe.document.text, recipe.sha256),
        expression=recipe.document.data["merge"],
        coefficients=tuple(plan.coefficients),
        overrides=dict(recipe.overrides),
        plan_digest=plan.digest,
        donor=plan.donor,
        output=OutputSettings(**{name: getattr(recipe.output, name) for name in OutputSettings.__slots__}),
        inputs=tuple(_input(item, input_digests) for item in plan.inputs),
        files=tuple(sorted(files, key=lambda file: file.name)),
        tensors=_tensors(plan, measured, {name: row for done in shards for name, row in done.scalars.items()}),
        vocabulary=plan.vocabulary.as_dict() if plan.vocabulary is not None else None,
        accepted=tuple(replace(found, help=None) for found in plan.compared.found if found.accepted),
        statistics=summarise_skill(cut, inputs) if plan.makes_skill else summarise(plan, measured, stats),
    )


def _input(item: InputPlan, digests: Mapping[tuple[str, str], str]) -> Input:
    files = tuple(InputFile(**asdict(file), sha256=digests.get((item.name, file.name))) for file in item.files)
    return Input(item.name, item.uri, item.revision, files, item.license, **item.naming.as_dict())


def _tensors(
    plan: Plan, measured: Mapping[str, TensorStatistics], scalars: Mapping[str, Scalars]
) -> tuple[Tensor, ...]:
    found = []
    for spec in (spec for shard in plan.shards for spec in shard.specs):
        tensor, row = plan.tensors[spec.name], measured.get(spec.name)
        numbers = {name: list(values) for name, values in scalars.get(spec.name, {}).items()}
        found.append(
            Tensor(
                tensor.name, spec.file, tensor.action, tensor.dtype, tensor.shape, tensor.sources,
                tensor.coefficients, row, numbers or None, slices_of(tensor) or None,
            )
        )  # fmt: skip
    return tuple(found)


def seal(body: ManifestBody, environment: Mapping[str, Any], run_log: bytes) -> Manifest:
    """Return the manifest, with its environment and its digest."""
    return sealed(body, environment, run_log)[0]


def sealed(body: ManifestBody, environment: Mapping[str, Any], run_log: bytes) -> tuple[Manifest, bytes]:
    """Return the manifest, with its environment and its digest, and the bytes of its file: those of `to_bytes`, but of
    large models that takes as long as the digest, which needs the same pieces."""
    log = LogFile(RUN_LOG_FILE, hashlib.sha256(run_log).hexdigest())
    made_in = Environment(**environment, run_log=log)
    document = {**body.as_dict(), "environment": made_in.as_dict()}
    content = {part.name: getattr(body, part.name) for part in fields(ManifestBody)}
    pieces = pieces_of(document)
    digest = digest_of(pieces)
    return Manifest(**content, environment=made_in, digest=digest), lines_of(
        {**pieces, **pieces_of({"digest": digest})}
    )


def resealed(proof: Manifest, run_log: bytes) -> Manifest:
    """Return the same manifest over another run log."""
    body = ManifestBody(**{part.name: getattr(proof, part.name) for part in fields(ManifestBody)})
    made_in = {part.name: getattr(proof.environment, part.name) for part in fields(Environment)}
    return seal(body, {key: value for key, value in made_in.items() if key != "run_log"}, run_log)


def read(folder: Path) -> Manifest:
    """Read the manifest in `folder`. Raises CheckFailed if there is none or a byte of it was changed, ResourceError."""
    path = folder / MANIFEST_FILE
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise CheckFailed(f"{path}: is not a plain file")
        content = path.read_bytes()
    except OSError as error:
        if is_machine(error):
            raise unusable(str(path), error) from error
        raise CheckFailed(
            f"{folder} has no readable {MANIFEST_FILE}: {error.strerror}",
            fix="name the folder of an output of `skillmerge apply`",
        ) from error
    return parse(content, str(path))


def parse(content: bytes, path: str) -> Manifest:
    """Parse a manifest; keys of later versions are left out. Raises CheckFailed if a byte of it
    was changed."""
    try:
        document: Any = json.loads(content, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckFailed(f"{path}: is not valid JSON: {error}") from error
    version = document.get("manifest_version") if isinstance(document, dict) else None
    if version != MANIFEST_VERSION:
        raise CheckFailed(f"{path}: manifest version {version!r} is unknown to this version of skillmerge")
    try:
        pieces = pieces_of(document)
        intact = lines_of(pieces) == content and digest_of({**pieces, "digest": None}) == document["digest"]
        found = _reader().validate_json(content, strict=True) if intact else None
    except (ValidationError, KeyError, TypeError, ValueError, RecursionError):
        found = None
    if found is None or found.environment.run_log.name != RUN_LOG_FILE or not _agrees(found):
        raise CheckFailed(f"{path}: was changed after it was written")
    return found


def _agrees(found: Manifest) -> bool:
    """Return whether the statistics match the kind of the output."""
    return found.makes_skill == isinstance(found.statistics, SkillStatistics)


@cache
def _reader() -> TypeAdapter[Manifest]:
    """Made when the first manifest is read: a run that makes one may need none."""
    return TypeAdapter(Manifest)


def versions() -> dict[str, str]:
    """Return what an output is made with, for its manifest."""
    from importlib.metadata import version

    return {
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "torch": version("torch"),
        "safetensors": version("safetensors"),
    }
