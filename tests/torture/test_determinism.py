"""One digest: whatever the threads, tiles, orders, hash seeds and Python versions."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import read_checkpoint, tensor_shapes, write_checkpoint, write_family

import skillmerge
from skillmerge.engine.runners import threads as runner
from skillmerge.plans.budget import Budget
from skillmerge.tensors import BLOCK

pytestmark = pytest.mark.timeout(1800)

ROOT = Path(__file__).parents[2]
SHAPES = {**tensor_shapes(layers=2, hidden=64), "model.layers.0.mlp.wide.weight": (300, 517)}

PROGRAM = """
import sys
sys.path.insert(0, {root!r})
import skillmerge
skillmerge.apply({recipe!r}, {output!r}, device="cpu", threads=2)
"""


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = write_family(tmp_path_factory.mktemp("family"), SHAPES, shards=3)
    document = json.loads(recipe.read_text())
    document["coefficients"] = {"lam": {"default": 0.7, "rules": [{"layers": "0-1", "ramp": [0.1, 0.9]}]}}
    document["output"] = {"path": "merged", "rounding": "stochastic", "seed": 3}
    recipe.write_text(json.dumps(document))
    return recipe


def digest(folder: Path, *, weights_alone: bool = False) -> str:
    """Of everything that is in an output but for its run log and what its manifest says of the run."""
    told = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        if path.name == "skillmerge.run.json" or (weights_alone and path.suffix != ".safetensors"):
            continue
        if path.name == "skillmerge.manifest.json":
            document = json.loads(content)
            del document["environment"], document["digest"]
            content = json.dumps(document).encode()
        told.update(path.name.encode() + content)
    return told.hexdigest()


def _chosen(budget: Budget, plan: object, **limits: object) -> Budget:
    return budget


def test_threads_and_tiles_change_no_byte(
    blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Callable[..., None]
) -> None:
    digests = set()
    combinations = list(itertools.product((1, 2, 8), (BLOCK, 3 * BLOCK, 64 * BLOCK)))
    for threads, tile in combinations:
        with monkeypatch.context() as patch:
            patch.setattr(runner, "budget", partial(_chosen, Budget(threads, tile, 0)))
            digests.add(digest(skillmerge.apply(blocks, tmp_path / f"{threads}-{tile}").output))
    tally(runs=len(combinations), digests=len(digests))
    assert len(digests) == 1


def test_order_and_number_of_shards_change_no_byte_of_a_tensor(
    blocks: Path, tmp_path: Path, tally: Callable[..., None]
) -> None:
    """The inputs other than the donor are laid out anew: other shards, other order in them."""
    digests = set()
    for shards in (1, 2, 5, 11):
        folder = tmp_path / str(shards)
        shutil.copytree(blocks.parent / "target", folder / "target")
        for name in ("rl", "sft"):
            tensors = list(read_checkpoint(blocks.parent / name).items())
            ordered = dict(tensors[::-1] if shards % 2 else tensors[3:] + tensors[:3])
            write_checkpoint(folder / name, ordered, shards=shards)
        shutil.copy(blocks, folder / "recipe.yaml")
        digests.add(digest(skillmerge.apply(folder / "recipe.yaml").output, weights_alone=True))
    tally(layouts=4, digests=len(digests))
    assert len(digests) == 1


def pythons() -> list[Path]:
    """Interpreters on the path that can run skillmerge, one of each version."""
    needed = "import torch, numpy, safetensors, huggingface_hub, click, rich, tqdm, ruamel.yaml, pydantic"
    places = [Path(folder) for folder in os.get_exec_path()]
    found: dict[str, Path] = {}
    for version in ("3.10", "3.11", "3.12", "3.13"):
        for place in places:
            python = place / f"python{version}"
            if version in found or not os.access(python, os.X_OK):
                continue
            done = subprocess.run([python, "-c", needed], capture_output=True, check=False, timeout=120)
            if done.returncode == 0:
                found[version] = python
    return list(found.values())


def test_hash_seed_changes_no_byte(
    blocks: Path, tmp_path: Path, request: pytest.FixtureRequest, tally: Callable[..., None]
) -> None:
    seeds = range(40) if request.config.getoption("--long") else range(2)
    for seed in seeds:
        _run(Path(sys.executable), blocks, tmp_path / str(seed), PYTHONHASHSEED=str(seed))
    digests = {digest(tmp_path / str(seed)) for seed in seeds}
    tally(seeds=len(seeds), digests=len(digests))
    assert len(digests) == 1


def test_python_version_changes_no_byte(blocks: Path, tmp_path: Path, tally: Callable[..., None]) -> None:
    others = pythons()
    if len(others) < 2:
        pytest.skip("only one version of Python here has torch and what else skillmerge needs")
    for number, python in enumerate(others):
        _run(python, blocks, tmp_path / str(number))
    assert len({digest(tmp_path / str(number)) for number in range(len(others))}) == 1
    tally(versions=len(others), digests=1)


def _run(python: Path, recipe: Path, output: Path, **environment: str) -> None:
    program = PROGRAM.format(root=str(ROOT), recipe=str(recipe), output=str(output))
    subprocess.run([python, "-c", program], env={**os.environ, **environment}, check=True, timeout=300)
