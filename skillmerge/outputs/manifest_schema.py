"""The shape of a manifest, as pydantic tables: what may be read without a look at every key."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError


class _Written(BaseModel):
    """What skillmerge itself writes: later versions may write more."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Tool(_Written):
    name: str
    version: str


class _Text(_Written):
    text: str
    sha256: str


class _OutputFile(_Written):
    name: str
    size: int
    sha256: str


class _InputFile(_Written):
    name: str
    size: int
    header_sha256: str
    stated_sha256: str | None
    sha256: str | None


class _Input(_Written):
    name: str
    uri: str
    revision: str | None
    license: str | None
    files: list[_InputFile]


class _Tensor(_Written):
    name: str
    file: str
    action: str
    dtype: str
    shape: list[int]
    sources: list[Annotated[list[str], Field(min_length=2, max_length=2)]]


class _Group(_Written):
    changed: float | None = None
    vanished: float | None = None
    realised: float | None = None
    realised_lambda: float | None = None
    norm_ratio: float | None = None


class _Statistics(_Written):
    mode: str
    modules: dict[str, _Group]
    all: _Group


class _Log(_Written):
    name: str
    sha256: str


class _Environment(_Written):
    python: str
    platform: str
    torch: str
    safetensors: str
    device: str
    recipe_folder: Annotated[str, Field(pattern=r"^[^\x00]+$")] = ".."
    inputs: dict[str, dict[str, Any]]
    stats: Literal["full", "sampled", "off"]
    allow_nonfinite: bool
    run_log: _Log


class _Made(_Written):
    dtype: str


class ManifestTable(_Written):
    """What everybody who reads a manifest relies on."""

    tool: _Tool
    recipe: _Text
    expression: str
    overrides: dict[str, FiniteFloat]
    plan_digest: str
    donor: str
    output: _Made
    inputs: list[_Input]
    files: list[_OutputFile]
    tensors: list[_Tensor]
    statistics: _Statistics
    environment: _Environment
    digest: str


def has_shape_of_manifest(document: dict[str, Any]) -> bool:
    """Whether all of it is there, and of the right kind."""
    try:
        ManifestTable.model_validate(document)
    except ValidationError:
        return False
    return True
