"""The verb export --onto: a stored skill and the checkpoint that was subtracted -> a sparse patch of that checkpoint.

The patch holds the positions and values of the other parent's elements that differ; see `checkpoints.kinds.patch`.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillmerge.brief import drawn
from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.kinds.patch import INDICES, PATCH_FILE, VALUES, samples
from skillmerge.checkpoints.kinds.skill import summary, tensor_digest
from skillmerge.checkpoints.safetensors import build_header
from skillmerge.claim import new_folder
from skillmerge.durable import write_all
from skillmerge.errors import CheckFailed, InputError
from skillmerge.plans.budget import check_disk
from skillmerge.plans.opening import Access, close_all, open_models
from skillmerge.recipes.parse import recipe_of
from skillmerge.reporter import Reporter, default_reporter
from skillmerge.tensors import UNIT, StoredTensor
from skillmerge.threads import in_threads
from skillmerge.verbs.target import output_folder

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Patch:
    """A patch that was written. elements: how many of `of` it changes; bytes: size of its files."""

    output: Path
    tensors: int
    elements: int
    of: int
    bytes: int

    _repr_html_ = drawn

    def as_dict(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "tensors": self.tensors,
            "elements": self.elements,
            "of": self.of,
            "bytes": self.bytes,
        }


def export_patch(
    skill: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    onto: str,
    follow_links: bool = False,
    reporter: Reporter | None = None,
) -> Patch:
    """Write a sparse patch that turns `onto`, the checkpoint that was subtracted, into the one that has the skill.

    Raises CheckFailed if `onto` is another checkpoint; UsageError, InputError, ResourceError.
    """
    reporter = reporter or default_reporter("exporting")
    models = {"skill": {"skill": os.fspath(skill)}, "onto": os.fspath(onto)}
    recipe = recipe_of(models, "onto + skill", {"path": "nowhere"}, "skillmerge export")
    checkpoints = open_models(recipe, Access(follow_links=follow_links), reporter.note)
    try:
        target = output_folder(recipe, output, checkpoints)
        plus, base = checkpoints["skill"], checkpoints["onto"]
        document = _exact(plus)
        headers, jobs = _lay_out(document, base)
        size = sum(map(len, headers.values())) + sum(spec.nbytes for job in jobs for spec in job.parts)
        check_disk(target, size, "the patch")
        from skillmerge.bits import settle_thread

        with new_folder(target, reporter) as folder:
            for name, header in headers.items():
                (folder / name).write_bytes(header)
            shapes = {name: list(spec.shape) for name, spec in base.tensors.items()}
            base_samples = samples(base, [job.tensor for job in jobs])
            metadata = {"format": "indices and values", "shapes": shapes, "base": base_samples}
            (folder / PATCH_FILE).write_text(json.dumps(metadata) + "\n", encoding="utf-8")
            done = 0
            with reporter.bar(sum(base.tensors[job.tensor].nbytes for job in jobs)) as progress:
                write = _Writer(folder, checkpoints, document["planes"]["minus"])
                for job, _ in zip(jobs, in_threads(write, jobs, settle_thread), strict=True):
                    done += base.tensors[job.tensor].nbytes
                    progress(done)
    finally:
        close_all(checkpoints)
    elements = sum(job.row["changed"] for job in jobs)
    return Patch(target, len(jobs), elements, sum(spec.elements for spec in plus.tensors.values()), size)


@dataclass(frozen=True, slots=True)
class _Job:
    """A tensor to write: its entry in `skill.json`, its file, and the offsets of its two parts."""

    tensor: str
    row: Mapping[str, Any]
    file: str
    indices: StoredTensor
    values: StoredTensor

    @property
    def parts(self) -> tuple[StoredTensor, StoredTensor]:
        return self.indices, self.values


def _exact(skill: Checkpoint) -> Mapping[str, Any]:
    """Return the skill's `skill.json`. Raises InputError if the skill does not determine elements exactly."""
    document = summary(skill.store)
    if not document["exact"] or not document.get("planes"):
        raise InputError(
            f"{skill.place} is not the exact difference of two checkpoints, which a patch needs",
            fix="extract it again from two models: `skillmerge extract --from RL --minus SFT`; for an adapter, make a "
            "model of it first, with a recipe",
        )
    return document


def _lay_out(document: Mapping[str, Any], base: Checkpoint) -> tuple[dict[str, bytes], list[_Job]]:
    """Return the patch's files by name, with their headers, and what to write into them: one file for each of the
    skill's."""
    rows = {name: row for name, row in document["tensors"].items() if row["changed"]}
    moved = [
        name for name, row in rows.items() if "digests" in row and document["planes"]["minus"] not in row["digests"]
    ]
    if moved:
        raise InputError(
            f"the skill's rows of `{moved[0]}` were matched by token: they are not where {base.place} has them, and a "
            "patch replaces elements where they are",
            fix="add the skill in a recipe with `vocabulary: by-token`",
        )
    jobs: list[_Job] = []
    headers: dict[str, bytes] = {}
    for number, file in enumerate(document["files"], start=1):
        inside = {name: row for name, row in rows.items() if row["file"] == file}
        name = f"delta-{number:05d}-of-{len(document['files']):05d}.safetensors"
        headers[name], specs = build_header(entry for item in inside.items() for entry in _layout(*item, base))
        places = {spec.name: spec for spec in specs}
        jobs += [_Job(it, row, name, places[it + INDICES], places[it + VALUES]) for it, row in inside.items()]
    return headers, jobs


def _layout(name: str, row: Mapping[str, Any], base: Checkpoint) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return a tensor's positions and values. Raises InputError if the patch does not fit `base`."""
    spec, count = base.tensors.get(name), row["changed"]
    if spec is None or list(spec.shape) != row["shape"] or not row["dtype"] == row["minus_dtype"] == spec.dtype:
        raise InputError(
            f"a patch replaces elements by others of their dtype: tensor `{name}` of the skill "
            f"({row['dtype']} - {row['minus_dtype']}, {row['shape']}) does not fit "
            + (f"{base.place} ({spec.dtype}, {list(spec.shape)})" if spec else f"{base.place}, which lacks it"),
            fix="name the checkpoint that was subtracted with `--onto`",
        )
    kind = "I32" if spec.elements <= 1 << 31 else "I64"
    return [(name + INDICES, kind, (count,)), (name + VALUES, spec.dtype, (count,))]


class _Writer:
    """Writes tensors' positions and values to their files, from any number of threads."""

    def __init__(self, folder: Path, checkpoints: Mapping[str, Checkpoint], subtracted: str) -> None:
        """subtracted: the base's name in the skill's digests."""
        self._folder, self._subtracted = folder, subtracted
        self._planes = list(checkpoints.values())  # plus, minus, and the base

    def __call__(self, job: _Job, stop: threading.Event) -> None:
        """Raises CheckFailed if the base's tensor is not what the skill was extracted from."""
        import torch

        from skillmerge.bits import memory_of
        from skillmerge.engine.values import read_values

        elements = self._planes[-1].tensors[job.tensor].elements
        at = [part.start for part in job.parts]
        width = torch.int32 if job.indices.dtype == "I32" else torch.int64
        digests, left = [], job.row["changed"]
        with open(self._folder / job.file, "rb+", buffering=0) as stream:
            for first in range(0, elements, UNIT):
                if stop.is_set():
                    return
                plus, minus, base = (
                    read_values(plane, job.tensor, first, min(UNIT, elements - first)) for plane in self._planes
                )
                digests.append(hashlib.sha256(memory_of(base)).hexdigest())
                places, values = _changed(plus, minus, base)
                left -= len(places)
                if left < 0:
                    break
                for part, content in enumerate(((places + first).to(width), values)):
                    stream.seek(at[part])
                    view = memory_of(content)
                    at[part] += len(view)
                    write_all(stream, view)
        if tensor_digest(digests) != job.row.get("digests", {}).get(self._subtracted):
            raise CheckFailed(
                f"{self._planes[-1].place} is not the checkpoint that {self._planes[0].place} was extracted from: "
                f"tensor `{job.tensor}` differs",
                fix="name the checkpoint that was subtracted with `--onto`",
            )
        if left:
            raise InputError(f"{self._planes[0].place}: tensor `{job.tensor}` does not match its skill.json")


def _changed(plus: Tensor, minus: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions that the skill changes in `base`, and the new elements there."""
    from skillmerge.bits import bit_view
    from skillmerge.checkpoints.kinds.sparse import places_of

    places = places_of((bit_view(plus) != 0) | (bit_view(minus) != 0))
    plus, minus, base = plus[places], minus[places], base[places]
    # A pair holds the element itself: one whose minus is not 0, or that no sum gives (-0).
    pairs = (bit_view(minus) != 0) | ((plus == 0) & plus.signbit())
    return places, plus.where(pairs, base + plus)
