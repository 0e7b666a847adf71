"""Every family that teams merge, tiny and real: saved by transformers, merged, loaded by transformers again.

Loads run in one helper process for the whole module, because starting transformers takes seconds; one test
goes the whole way through `apply` and `verify --load` on the command line.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import PAST, copy_with, read_checkpoint, write_recipe
from model_families import FAMILIES, KINDS, LAM, TIED_HEADS, UPDATES, inside_block

import skillmerge
from skillmerge.naming import layer_of, module_kind

pytestmark = pytest.mark.xdist_group("transformers")


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_family_loads_without_stray_keys(
    name: str, families: Callable[[str], Path], load: Callable[[Path], dict[str, Any]]
) -> None:
    report = load(families(name) / "merged")
    assert report["ok"], report["why"]
    assert report["class"] == FAMILIES[name].architecture
    assert report["finite"] is True
    assert report["shape"] == [1, 8, 64]
    assert not [key for key in report if key.endswith(("_keys", "_msgs"))]


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_family_equals_a_float64_merge(name: str, families: Callable[[str], Path]) -> None:
    folder = families(name)
    models = {model: read_checkpoint(folder / model) for model in UPDATES}
    merged = read_checkpoint(folder / "merged")
    assert merged.keys() == models["target"].keys()
    changed = total = 0
    for key, found in merged.items():
        inputs = {model: tensors[key] for model, tensors in models.items()}
        assert found.dtype == inputs["target"].dtype, key
        exact = oracle.evaluate(PAST, inputs, {"lam": LAM})
        # Rounded once, so half a unit; and what float32 loses where the terms cancel each other.
        magnitude = oracle.evaluate("abs(target) + lam * (abs(rl) + abs(sft))", inputs, {"lam": LAM, "abs": abs})
        allowed = oracle.unit(exact, found.dtype) / 2 + magnitude * 2.0**-22
        error = np.abs(found.to(torch.float64).numpy() - exact)
        assert (error <= allowed).all(), f"{key}: {(error / allowed).max()} times what is allowed"
        changed += int((found != inputs["target"]).sum())
        total += found.numel()
    assert changed > total / 2


@pytest.mark.parametrize("name", FAMILIES)
def test_family_merges_through_a_skill_as_it_does_directly(
    name: str, families: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = families(name)
    recipe = json.loads((folder / "recipe.yaml").read_text())
    skillmerge.extract(str(folder / "rl"), str(folder / "sft"), tmp_path / "math")
    recipe["models"] = {"target": str(folder / "target"), "math": {"skill": "math"}}
    recipe["merge"] = "target + lam * math"
    recipe["output"] = {**recipe.get("output", {}), "path": "stored"}
    recipe.pop("ignore", None)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    stored = skillmerge.apply(tmp_path / "recipe.yaml").output
    direct = folder / "merged"
    assert {p.name: p.read_bytes() for p in stored.glob("*.safetensors")} == {
        p.name: p.read_bytes() for p in direct.glob("*.safetensors")
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_family_keeps_files_and_layout(name: str, families: Callable[[str], Path]) -> None:
    folder = families(name)
    donor = {path.name: path for path in (folder / "target").iterdir()}
    merged = {path.name: path for path in (folder / "merged").iterdir()}
    assert donor.keys() == {file for file in merged if not file.startswith("skillmerge.")}
    family = FAMILIES[name]
    assert ("model.safetensors" in donor) == (family.shard_size == "5GB"), "sharded where it should be"
    wide = {torch.float32} if family.wide else set()
    assert {tensor.dtype for tensor in read_checkpoint(folder / "merged").values()} == {family.dtype} | wide
    for file in ("config.json", "generation_config.json"):
        assert file not in donor or merged[file].read_bytes() == donor[file].read_bytes()


@pytest.mark.parametrize("name", FAMILIES)
def test_family_names_tell_blocks_and_kinds(name: str, families: Callable[[str], Path]) -> None:
    family = FAMILIES[name]
    tensors = read_checkpoint(families(name) / "merged")
    blocks = {block for key in tensors if (block := layer_of(key)) is not None}
    assert Counter(stack for stack, _ in blocks) == family.stacks
    assert {index for _, index in blocks} == set(range(max(family.stacks.values())))
    assert {module_kind(key) for key in tensors} - {"other"} == family.kinds
    assert {key for key in tensors if module_kind(key) == "other"} == set(family.others)
    for stack, count in family.stacks.items():
        for index in range(count):
            inside = {module_kind(key) for key in tensors if layer_of(key) == (stack, index)}
            assert {"attention", "norm"} <= inside
            assert inside & {"mlp", "expert"}
            assert not inside & {"embedding", "head", "other"}


@pytest.mark.parametrize(("name", "key", "kind"), KINDS)
def test_family_tensor_is_of_its_kind(name: str, key: str, kind: str, families: Callable[[str], Path]) -> None:
    assert key in read_checkpoint(families(name) / "target")
    assert module_kind(key) == kind


@pytest.mark.parametrize("name", TIED_HEADS)
@pytest.mark.parametrize("writer", ["target", "rl"])
def test_tied_copies_of_the_embedding_are_accounted_for(
    name: str,
    writer: str,
    families: Callable[[str], Path],
    load: Callable[[Path], dict[str, Any]],
    tmp_path: Path,
) -> None:
    tied = TIED_HEADS[name]
    for model in UPDATES:
        tensors = read_checkpoint(families(name) / model)
        copies = {copy: tensors[key].clone() for copy, key in tied.items()} if model == writer else {}
        copy_with(families(name) / model, tmp_path / model, **copies)
    result = skillmerge.apply(write_recipe(tmp_path, coefficients={"lam": LAM}), device="cpu")
    merged = read_checkpoint(result.output)
    assert merged.keys() == read_checkpoint(tmp_path / "target").keys()
    for copy, key in tied.items():
        assert (copy in merged) == (writer == "target")
        assert copy not in merged or torch.equal(merged[copy], merged[key])
    report = load(result.output)
    assert report["ok"], report["why"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name, family in FAMILIES.items()
        for kind in ("attention", "expert", "norm")
        if kind in family.kinds
    ],
)
def test_load_names_a_missing_tensor(
    name: str,
    kind: str,
    families: Callable[[str], Path],
    load: Callable[[Path], dict[str, Any]],
    tmp_path: Path,
) -> None:
    merged = families(name) / "merged"
    keys = [key for key in read_checkpoint(merged) if layer_of(key) and module_kind(key) == kind]
    report = load(copy_with(merged, tmp_path / "broken", drop=keys[-1]))
    assert report["ok"] is False
    # Experts stored one by one are one tensor in memory: the runtime names that one.
    named = inside_block(keys[-1])
    expected = named if kind != "expert" else f"{named.split('.')[0]}.{named.split('.')[1]}.mlp."
    assert expected in report["why"]
