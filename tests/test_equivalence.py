"""Streamed = oracle; and the same bytes for any thread count, tile size, shard layout and device."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from conftest import random_tensors, read_checkpoint, write_checkpoint, write_recipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import skillmerge
from skillmerge.plans import budget

EXPRESSIONS = (
    "target + lam * (rl - sft)",
    "rl - sft + target",
    "target - lam * (sft - rl)",
    "(target + rl + sft) / 3",
    "lam * target + (1 - lam) * rl",
    "0.5 * target + 0.5 * (rl + lam * (sft - rl))",
    "target + lam * (rl - sft) - (lam / 4) * (target - sft)",
    "-(sft - rl) / 2 + target",
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Below, at and above one block of 65,536 elements, and a tensor of several tiles.
SHAPES = {
    "model.embed_tokens.weight": (1000, 70),
    "model.layers.0.mlp.up_proj.weight": (256, 256),
    "model.layers.0.input_layernorm.weight": (7,),
    "model.layers.1.mlp.up_proj.weight": (530, 530),
    "model.layers.1.self_attn.scale": (),
    "model.empty": (0, 4),
}


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    expression=st.sampled_from(EXPRESSIONS),
    lam=st.sampled_from([1.0, 0.7, -0.3, 0.5, 1e-3, 2.0]),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    shards=st.tuples(*[st.integers(1, 3)] * 3),
    threads=st.sampled_from([1, 2, 8]),
    tile=st.sampled_from([1 << 16, 1 << 18, 1 << 22]),
    seed=st.integers(0, 1000),
)
def test_streamed_merge_equals_the_oracle(
    tmp_path_factory: pytest.TempPathFactory,
    expression: str,
    lam: float,
    dtypes: tuple[torch.dtype, ...],
    shards: tuple[int, ...],
    threads: int,
    tile: int,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("equivalence")
    models = {}
    for number, name in enumerate(("target", "rl", "sft")):
        models[name] = random_tensors(SHAPES, dtypes[number], seed + number)
        write_checkpoint(folder / name, models[name], shards=shards[number])
    uses_lam = {"lam": lam} if "lam" in expression else {}
    recipe = write_recipe(folder, expression, coefficients=uses_lam)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "TILE_BYTES", tile)
        skillmerge.apply(recipe, threads=threads, device="cpu")
    merged = read_checkpoint(folder / "merged")
    assert merged.keys() == models["target"].keys()
    for name, tensor in merged.items():
        inputs = {model: tensors[name] for model, tensors in models.items() if model in expression}
        exact = oracle.evaluate(expression, inputs, uses_lam)
        wide = torch.float32 if all(value.dtype.itemsize == 2 for value in inputs.values()) else torch.float64
        narrow = {model: value.to(wide).numpy() for model, value in inputs.items()}
        plain = np.asarray(eval(expression, {}, {**narrow, **uses_lam}))
        wanted = oracle.rounded(exact, tensor.dtype)
        found = tensor.to(torch.float64).numpy()
        same = plain.astype(np.float64) == exact
        assert np.array_equal(found[same], wanted[same])
        # Elsewhere the wide evaluation may land on the other side of a tie, or lose bits by cancelling.
        slack = oracle.unit(wanted, tensor.dtype) + 2.0**-21 * np.max(
            [np.abs(v).max(initial=0) for v in narrow.values()]
        )
        assert np.all(np.abs(found - wanted) <= slack)


def write_models(folder: Path, shards: int = 2, dtype: torch.dtype = torch.bfloat16) -> Path:
    for number, name in enumerate(("target", "rl", "sft")):
        write_checkpoint(folder / name, random_tensors(SHAPES, dtype, number), shards=shards)
    return write_recipe(folder)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_output_bytes_do_not_depend_on_threads_and_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounding: str
) -> None:
    write_models(tmp_path)
    recipe = write_recipe(tmp_path, output={"path": "merged", "rounding": rounding})
    found = set()
    for threads in (1, 2, 8):
        for tile in (1 << 17, 1 << 19, 1 << 23):
            monkeypatch.setattr(budget, "TILE_BYTES", tile)
            result = skillmerge.apply(recipe, tmp_path / f"{threads}-{tile}", threads=threads, device="cpu")
            statistics = str(result.manifest.statistics)
            found.add((tuple(sorted(digests(result.output).items())), statistics))
    assert len(found) == 1


def test_output_tensors_do_not_depend_on_the_inputs_shards(tmp_path: Path) -> None:
    outputs = []
    for shards in (1, 2, 3):
        (tmp_path / str(shards)).mkdir()
        recipe = write_models(tmp_path / str(shards), shards)
        outputs.append(read_checkpoint(skillmerge.apply(recipe, device="cpu").output))
    for other in outputs[1:]:
        assert other.keys() == outputs[0].keys()
        assert all(torch.equal(other[name].view(torch.int16), outputs[0][name].view(torch.int16)) for name in other)


def test_output_shards_of_an_asked_size_hold_the_same_tensors(tmp_path: Path) -> None:
    recipe = write_models(tmp_path)
    plain = read_checkpoint(skillmerge.apply(recipe).output)
    write_recipe(tmp_path, output={"path": "split", "shard_size": "150KB"})
    split = skillmerge.apply(recipe).output
    files = sorted(path.name for path in split.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    again = read_checkpoint(split)
    assert all(torch.equal(again[name], plain[name]) for name in plain)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("source", DTYPES)
def test_output_dtype_is_rounded_once(tmp_path: Path, source: torch.dtype, dtype: str) -> None:
    recipe = write_models(tmp_path, dtype=source)
    write_recipe(tmp_path, output={"path": "merged", "dtype": dtype}, coefficients={"lam": 1 / 3})
    merged = read_checkpoint(skillmerge.apply(recipe, device="cpu").output)
    models = {name: read_checkpoint(tmp_path / name) for name in ("target", "rl", "sft")}
    wide = np.float32 if source.itemsize == 2 else np.float64
    for name, tensor in merged.items():
        assert tensor.dtype == getattr(torch, dtype)
        t, r, s = (models[model][name].to(torch.float64).numpy().astype(wide) for model in ("target", "rl", "sft"))
        value = t + wide(1 / 3) * (r - s)
        assert np.array_equal(tensor.to(torch.float64).numpy(), oracle.rounded(value.astype(np.float64), tensor.dtype))


def test_copied_tensors_are_the_donors_bytes(tmp_path: Path) -> None:
    write_models(tmp_path)
    recipe = write_recipe(tmp_path, coefficients={"lam": 0})
    result = skillmerge.apply(recipe)
    assert {tensor.action for tensor in result.manifest.tensors} == {"copy"}
    assert digests(result.output) == digests(tmp_path / "target")
