"""One file of a skill in the making, and `skill.json`, which describes all of them."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from skillmerge.bits import memory_of
from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.kinds.skill import SKILL_FILE, SKILL_VERSION, part_name, tensor_digest
from skillmerge.checkpoints.kinds.skill_planes import COMPRESSED, deflate
from skillmerge.checkpoints.kinds.sparse import Encoded
from skillmerge.engine.destination import Destination, ShardRecord
from skillmerge.engine.measures.input_rounding import Grain, input_rounding, joined
from skillmerge.engine.measures.skill_statistics import SkillInput, summarise_skill
from skillmerge.plans.dtypes.quantised import same_tensors
from skillmerge.plans.plan import Plan, ShardPlan, TensorPlan
from skillmerge.tensors import BLOCK, DTYPES, UNIT, TensorSpec

_NAMES = {dtype.torch_name: name for name, dtype in DTYPES.items() if dtype.torch_name}


@dataclass(frozen=True, slots=True)
class Unit:
    tensor: TensorPlan
    number: int
    spec: TensorSpec

    @property
    def length(self) -> int:
        return min(UNIT, self.spec.elements - self.number * UNIT)


@dataclass(slots=True)
class Cut:
    """An encoded unit: its planes, counts, sums of squares (of the update, of what rounding lost, of what was
    subtracted), the digest of what was read of each model, and its precision."""

    planes: dict[str, Encoded]
    stored: int = 0
    changed: int = 0
    pairs: int = 0
    squares: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    weights: list[float] = field(default_factory=list)
    grains: dict[str, Grain] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Kept:
    """The part of a tensor's update to keep: values of at least `least` in size, times `factor`; they are `share` of
    all."""

    least: float = 0.0
    factor: float = 1.0
    share: float = 1.0


def compressed(encoded: Encoded) -> Encoded:
    """With every part but `starts` as a zstd frame, where that is smaller."""
    parts: dict[str, Tensor] = {}
    for name, part in encoded.parts.items():
        frame = deflate(memory_of(part)) if name != "starts" else b""
        if frame and len(frame) + 16 < part.numel() * part.element_size():
            stored = len(frame).to_bytes(8, "little") + frame + bytes(-len(frame) % 8)
            parts[name + COMPRESSED] = torch.frombuffer(bytearray(stored), dtype=torch.uint8)
        else:
            parts[name] = part
    return Encoded(encoded.encoding, parts)


class SkillFile:
    """One file of a skill in the making: parts are appended, the header is written at the end."""

    def __init__(
        self,
        destination: Destination,
        shard: ShardPlan,
        plan: Plan,
        checkpoints: Mapping[str, Checkpoint],
        kept: Mapping[str, Kept],
    ) -> None:
        self.shard, self._kept = shard, kept
        self._dtypes = {spec.name: _plane_dtypes(plan.tensors[spec.name], checkpoints) for spec in shard.specs}
        self._header: dict[str, Any] = {"__metadata__": {"format": "skillmerge skill", "version": str(SKILL_VERSION)}}
        self._room = _largest_header(self._header, shard, self._dtypes)
        self._position = 0
        self._rows: dict[str, list[Cut]] = {spec.name: [] for spec in shard.specs}
        self._file = destination.open_stream(shard, 8 + self._room)

    def add(self, unit: Unit, cut: Cut) -> None:
        for plane, encoded in cut.planes.items():
            for part, values in encoded.parts.items():
                content = memory_of(values)
                self._file.append(content)
                self._header[part_name(unit.spec.name, unit.number, plane, part)] = {
                    "dtype": _NAMES[str(values.dtype).removeprefix("torch.")],
                    "shape": list(values.shape),
                    "data_offsets": [self._position, self._position + len(content)],
                }
                self._position += len(content)
        self._rows[unit.spec.name].append(
            Cut(
                {plane: Encoded(encoded.encoding, {}) for plane, encoded in cut.planes.items()},
                sum(encoded.nbytes for encoded in cut.planes.values()),
                cut.changed, cut.pairs, cut.squares, cut.lost, cut.digests, cut.weights, cut.grains,
            )
        )  # fmt: skip

    def finish(self, stop: threading.Event) -> ShardRecord:
        """Write the header, make the file durable, and digest it."""
        text = _dump(self._header)
        assert len(text) <= self._room
        self._file.put(self._room.to_bytes(8, "little") + text.ljust(self._room), 0)
        size, digest = self._file.finish(stop)
        tensors = {
            spec.name: {
                **_describe(spec, self.shard.file, self._dtypes[spec.name], self._rows[spec.name]),
                **({"kept": asdict(self._kept[spec.name])} if spec.name in self._kept else {}),
            }
            for spec in self.shard.specs
        }
        inputs = {name: made_of for name, rows in self._rows.items() if (made_of := _made_of(rows)) is not None}
        self._header.clear()
        self._rows.clear()
        return ShardRecord(self.shard.file, size, digest, {}, tensors, inputs=inputs)

    def close(self) -> None:
        self._file.close()


def _plane_dtypes(tensor: TensorPlan, checkpoints: Mapping[str, Checkpoint]) -> tuple[str, str]:
    if tensor.action != "cut":
        return tensor.dtype, tensor.dtype
    plus, minus = (checkpoints[model].tensors[source].dtype for model, source in tensor.sources)
    return plus, minus


def _largest_header(start: Mapping[str, Any], shard: ShardPlan, dtypes: Mapping[str, tuple[str, str]]) -> int:
    """Return a size for the header, a multiple of 8, that is enough whatever the encodings will be."""
    document = dict(start)
    end = 10**15
    for spec in shard.specs:
        for number in range(-(-spec.elements // UNIT)):
            for plane, dtype in zip(("plus", "minus"), dtypes[spec.name], strict=True):
                for part, kind, shape in (("values", dtype, [UNIT * 8]), ("starts", "I32", [2, 999]),
                                          ("gaps", "U8", [UNIT * 2])):  # fmt: skip
                    name = part_name(spec.name, number, plane, part + COMPRESSED)
                    document[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end]}
    return -(-len(_dump(document)) // 8) * 8


def _describe(spec: TensorSpec, file: str, dtypes: tuple[str, str], rows: Sequence[Cut]) -> dict[str, Any]:
    """Return what `skill.json` says of a tensor."""
    models = list(dict.fromkeys(model for row in rows for model in row.digests))
    described: dict[str, Any] = {
        "shape": list(spec.shape),
        "dtype": dtypes[0],
        "minus_dtype": dtypes[1],
        "file": file,
        "encoding": {
            plane: [row.planes[plane].encoding if plane in row.planes else "zero" for row in rows]
            for plane in ("plus", "minus")
        },
        "bytes": sum(row.stored for row in rows),
        "changed": sum(row.changed for row in rows),
        "pairs": sum(row.pairs for row in rows),
        "sum_of_squares": math.fsum(square for row in rows for square in row.squares),
        "digests": {model: tensor_digest([row.digests[model] for row in rows]) for model in models},
    }
    lost = math.fsum(square for row in rows for square in row.lost)
    return {**described, "lost_squares": lost} if any(row.lost for row in rows) else described


def _made_of(rows: Sequence[Cut]) -> SkillInput | None:
    """Return what is known of the two models of a tensor, the added and the subtracted one; None if they are
    none."""
    models = list(dict.fromkeys(model for row in rows for model in row.grains))
    if len(models) < 2:
        return None
    grains = {model: joined(row.grains[model] for row in rows if model in row.grains) for model in models}
    rounding = input_rounding(grains, dict(zip(models, (1.0, -1.0), strict=True)))
    sums = (math.fsum(square for row in rows for square in row.weights), rounding.of_all, rounding.of_added)
    weights, of_all, of_added = (value if math.isfinite(value) else None for value in sums)
    return SkillInput(weights, of_all, of_added, rounding.precisions)


def describe_skill(
    plan: Plan, checkpoints: Mapping[str, Checkpoint], finished: Mapping[str, ShardRecord]
) -> tuple[str, bytes]:
    """Name and content of `skill.json`."""
    tensors = {name: row for shard in plan.shards for name, row in (finished[shard.file].tensors or {}).items()}
    same = same_tensors({name: (it.action, it.sources) for name, it in plan.tensors.items()}, checkpoints)
    several = [tensor for tensor in plan.tensors.values() if len(tensor.sources) > 1]
    first = next((tensor for tensor in several if tensor.name not in same), None)
    models = [model for model, _ in first.sources] if first is not None else [plan.donor] * 2
    cut = first is not None and first.action == "cut" and not {*models} & plan.recipe.skills
    document = {
        "skill_version": SKILL_VERSION,
        "expression": plan.recipe.document.data["merge"],
        "exact": all(tensor.action in ("cut", "zero", "same") for tensor in plan.tensors.values()),
        "relative_error": summarise_skill(tensors).all.relative_error,
        "parents": [
            {"name": item.name, "uri": item.uri, "revision": item.revision, "license": item.license}
            for item in plan.inputs
        ],
        "planes": dict(zip(("plus", "minus"), models, strict=True)) if cut else None,
        "configs": {plane: checkpoints[model].config for plane, model in zip(("plus", "minus"), models, strict=False)},
        "compression": plan.recipe.output.compression,
        "unit": UNIT,
        "block": BLOCK,
        "files": [shard.file for shard in plan.shards],
        **({"same": same} if same else {}),
    }
    lines = [f" {json.dumps(key)}: {_dump(value).decode()}" for key, value in document.items()]
    rows = ",\n".join(
        f"  {json.dumps(name, ensure_ascii=False)}: {_dump(row).decode()}" for name, row in tensors.items()
    )
    return SKILL_FILE, ("{\n" + ",\n".join(lines) + ',\n "tensors": {\n' + rows + "\n }\n}\n").encode()


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
