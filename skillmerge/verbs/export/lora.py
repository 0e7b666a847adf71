"""The verb export --lora-rank: a stored skill -> the best LoRA adapter of that rank, in PEFT's format.

Every matrix of a linear module (attention, mlp, expert) is approximated by B @ A of rank r, by truncated SVD
(`spectrum`). What an adapter cannot hold (norms, embeddings, biases, heads, routers, fused experts) is left out
and counted. Format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillmerge.brief import brief, drawn
from skillmerge.checkpoints.checkpoint import Checkpoint
from skillmerge.checkpoints.kinds.skill import summary
from skillmerge.checkpoints.place import on_hub
from skillmerge.checkpoints.safetensors import build_header
from skillmerge.checkpoints.schemes import is_path
from skillmerge.claim import new_folder
from skillmerge.engine.runner import check_words
from skillmerge.errors import InputError, UsageError
from skillmerge.naming import module_kind
from skillmerge.plans.budget import check_disk
from skillmerge.plans.opening import Access, close_all, open_models
from skillmerge.recipes.parse import recipe_of
from skillmerge.reporter import Reporter, default_reporter
from skillmerge.tensors import StoredTensor, TensorSpec
from skillmerge.verbs.target import output_folder

if TYPE_CHECKING:
    from torch import Tensor


ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_KINDS = ("attention", "mlp", "expert")
_TRANSPOSED = {"gpt2", "decision_transformer", "imagegpt", "openai-gpt"}
"""Model types whose linear modules store their weights transposed."""

_TABLES = ("relative_attention_bias.weight",)
"""Embeddings inside linear modules."""

_TASKS = {"ForCausalLM": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM",
          "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Exported:
    """An adapter that was written. energy: the share of the skill's squared norm that it holds; modules: the same for
    each matrix (by tensor name), with its norm; left: tensors that an adapter cannot hold, and their share."""

    output: Path
    rank: int
    energy: float
    modules: Mapping[str, Mapping[str, float]]
    left: tuple[str, ...]
    left_energy: float

    __repr__ = brief
    _repr_html_ = drawn

    def as_dict(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "rank": self.rank,
            "energy": self.energy,
            "modules": {name: dict(row) for name, row in self.modules.items()},
            "left": list(self.left),
            "left_energy": self.left_energy,
        }


def export_lora(
    skill: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    lora_rank: int,
    base: str | None = None,
    seed: int = 0,
    follow_links: bool = False,
    reporter: Reporter | None = None,
) -> Exported:
    """Write the skill's best LoRA adapter of rank `lora_rank` into a new folder.

    base: the base model that its config names [default: the checkpoint that was subtracted]. One matrix is in
    memory at a time. Raises UsageError, InputError, ResourceError.
    """
    check_words(lora_rank=lora_rank, seed=seed)
    reporter = reporter or default_reporter("exporting")
    recipe = recipe_of({"skill": {"skill": os.fspath(skill)}}, "skill", {"kind": "skill"}, "skillmerge export")
    checkpoints = open_models(recipe, Access(follow_links=follow_links), reporter.note)
    try:
        target = output_folder(recipe, output, checkpoints)
        plus, minus = checkpoints.values()
        _refuse_transposed(plus)
        named, revision = _named(base) if base is not None else _parent(summary(plus.store))
        if named is None:
            reporter.note(
                "the adapter names no base model, because the skill was not extracted from a single one; pass `--base`"
            )
        chosen = _linear_modules(plus)
        header, specs = build_header(_layout(chosen, lora_rank))
        check_disk(target, specs[-1].end, "the adapter")
        document = _config(chosen, lora_rank, plus.config, named, revision)
        with new_folder(target, reporter) as folder:
            rows, left = _write(folder / ADAPTER_FILE, header, specs, (plus, minus), lora_rank, seed, reporter)
            (folder / ADAPTER_CONFIG).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    finally:
        close_all(checkpoints)
    whole = math.fsum(row["norm"] ** 2 for row in (*rows.values(), *left.values()))
    kept = math.fsum(row["energy"] * row["norm"] ** 2 for row in rows.values())
    lost = math.fsum(row["norm"] ** 2 for row in left.values())
    return Exported(
        target, lora_rank, kept / whole if whole else 0.0, rows, tuple(left), lost / whole if whole else 0.0
    )


def _refuse_transposed(skill: Checkpoint) -> None:
    """Raise InputError for a model type that stores its matrices transposed."""
    if str(skill.config.get("model_type")) in _TRANSPOSED:
        raise InputError(
            f"{skill.place}: {skill.config['model_type']} stores its matrices transposed, which is not supported",
            fix="use the skill itself in a recipe, or a sparse patch: `skillmerge export SKILL --onto SFT`",
        )


def _linear_modules(skill: Checkpoint) -> list[TensorSpec]:
    """Return the matrices that an adapter can hold. Raises InputError if there is none."""
    chosen = [spec for spec in skill.tensors.values() if _is_linear(spec)]
    if not chosen:
        raise InputError(
            f"{skill.place}: the skill has no matrix of a linear module for an adapter",
            fix="use the skill itself in a recipe",
        )
    return chosen


def _parent(document: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return the model that was subtracted, and its revision; None if it is not one model, or PEFT cannot name
    it."""
    planes = document.get("planes") or {}
    for parent in document["parents"]:
        if parent["name"] == planes.get("minus"):
            with suppress(UsageError):
                named, revision = _named(str(parent["uri"]))
                return named, parent["revision"] or revision
    return None, None


def _named(uri: str) -> tuple[str, str | None]:
    """Return a folder or org/name, and the revision. Raises UsageError for what PEFT cannot name."""
    try:
        location = on_hub(uri)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if location is None and not is_path(uri):
        raise UsageError(f"{uri}: an adapter cannot name a bucket", fix="pass another name of the model with `--base`")
    if location is None:
        return uri, None
    if location.subfolder:
        raise UsageError(
            f"{uri}: an adapter cannot name a subfolder", fix="pass another name of the model with `--base`"
        )
    return location.repository, location.revision or None


def _is_linear(spec: TensorSpec) -> bool:
    return (
        len(spec.shape) == 2
        and spec.elements > 0
        and spec.name.endswith(".weight")
        and module_kind(spec.name) in _KINDS
        and not spec.name.endswith(_TABLES)
    )


def _layout(chosen: list[TensorSpec], rank: int) -> list[tuple[str, str, tuple[int, ...]]]:
    layout: list[tuple[str, str, tuple[int, ...]]] = []
    for spec in chosen:
        rows, columns = spec.shape
        name = _module(spec.name)
        layout += [(f"{name}.lora_A.weight", "F32", (rank, columns)), (f"{name}.lora_B.weight", "F32", (rows, rank))]
    return layout


def _module(tensor: str) -> str:
    return "base_model.model." + tensor.removesuffix(".weight")


def _config(
    chosen: list[TensorSpec], rank: int, config: Mapping[str, Any], base: str | None, revision: str | None
) -> dict[str, Any]:
    written = config.get("architectures")
    architecture = str(written[0]) if isinstance(written, list) and written else ""
    return {
        "peft_type": "LORA",
        "task_type": next((task for ending, task in _TASKS.items() if architecture.endswith(ending)), None),
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": sorted({spec.name.removesuffix(".weight") for spec in chosen}),
    }


def _write(
    path: Path,
    header: bytes,
    specs: tuple[StoredTensor, ...],
    planes: tuple[Checkpoint, Checkpoint],
    rank: int,
    seed: int,
    reporter: Reporter,
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Write the adapter's file. Returns norm and energy kept of each matrix, and norms of what is left out."""
    from skillmerge.bits import memory_of
    from skillmerge.engine.stream import Stream

    places = {spec.name: spec for spec in specs}
    rows: dict[str, dict[str, float]] = {}
    left: dict[str, dict[str, float]] = {}
    done = 0
    every = planes[0].tensors.values()
    approximate = partial(_approximate, planes=planes, rank=rank, seed=seed)
    # One at a time, in a thread of our own, so that the caller's torch settings change no byte.
    with (
        Stream(planes) as stream,
        open(path, "wb") as file,
        reporter.bar(sum(spec.nbytes for spec in every)) as progress,
    ):
        file.write(header)
        for spec, (row, parts) in zip(every, stream.map(approximate, every, threads=1, ahead=1), strict=True):
            (rows if parts else left)[spec.name] = row
            for part, values in parts.items():
                file.seek(places[f"{_module(spec.name)}.{part}.weight"].start)
                file.write(memory_of(values))
            done += spec.nbytes
            progress(done)
    return rows, left


def _approximate(
    spec: TensorSpec, planes: tuple[Checkpoint, Checkpoint], rank: int, seed: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return a tensor's norm and, of a matrix that an adapter can hold, the energy kept and the two factors by their
    names."""
    import torch

    from skillmerge.study.spectrum import truncated_svd

    update = _update(spec.name, planes)
    if not bool(update.isfinite().all()):
        raise InputError(
            f"tensor `{spec.name}` of the skill is too large for an adapter's float32",
            fix="use the skill in a recipe, or leave the tensor out: `skillmerge extract … --ignore GLOB`",
        )
    norm = float(torch.linalg.vector_norm(update, dtype=torch.float64))
    if not _is_linear(spec):
        return {"norm": norm}, {}
    u, s, v = truncated_svd(update, rank, seed ^ zlib.crc32(spec.name.encode()))
    root = s.sqrt()
    b, a = update.new_zeros(spec.shape[0], rank), update.new_zeros(rank, spec.shape[1])
    b[:, : len(s)], a[: len(s)] = u * root, (v * root).T
    kept = float((s.double() ** 2).sum()) / norm**2 if norm else 1.0
    return {"norm": norm, "energy": min(1.0, kept)}, {"lora_A": a, "lora_B": b}


def _update(name: str, planes: tuple[Checkpoint, Checkpoint]) -> Tensor:
    """Return a whole tensor of the skill, in float32."""
    import torch

    from skillmerge.engine.values import read_values

    plus, minus = (read_values(plane, name).to(torch.float32) for plane in planes)
    return (plus - minus).view(planes[0].tensors[name].shape)
