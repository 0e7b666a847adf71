"""A trillion parameters: headers of 61 layers of 256 experts in 163 files a model, whose weights are holes in the disk.

The quick form has a tenth of the layers. Times are those of processors, so that other work on the machine does not
count as much; the limits are those of the long form.
"""

from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
from clusters import save
from conftest import PEAK_MEMORY, write_recipe
from observing import staging_of

from skillmerge.checkpoints.safetensors import build_header
from skillmerge.engine.destination import ShardRecord
from skillmerge.engine.rounding_statistics import TensorStatistics
from skillmerge.outputs import manifest
from skillmerge.outputs.attempts import Attempt
from skillmerge.outputs.journal import Header
from skillmerge.plans import saved
from skillmerge.plans.opening import Access
from skillmerge.plans.tasks.division import divide
from skillmerge.plans.tasks.part import part_of
from skillmerge.verbs.tasks.shard import conditions

pytestmark = pytest.mark.timeout(600)
HIDDEN, EXPERT, EXPERTS, FILES = 7168, 3072, 256, 163
Described = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape of a tensor."""


def tensors(layers: int) -> list[Described]:
    found: list[Described] = []
    for layer in range(layers):
        block = f"model.layers.{layer}"
        found += [(f"{block}.self_attn.{kind}_proj.weight", "BF16", (HIDDEN, 2048)) for kind in "qkvo"]
        found += [(f"{block}.input_layernorm.weight", "BF16", (HIDDEN,))]
        for expert in range(EXPERTS):
            names = (f"{block}.mlp.experts.{expert}.{kind}_proj.weight" for kind in ("gate", "up", "down"))
            found += [(name, "BF16", (HIDDEN, EXPERT)) for name in names]
    return found


def packed(layers: int) -> list[Described]:
    """The same with the experts of a layer in two tensors, whose matrices are those of the library: out x in."""
    found = [it for it in tensors(layers) if ".experts." not in it[0]]
    for layer in range(layers):
        at = f"model.layers.{layer}.mlp.experts"
        found += [(f"{at}.gate_up_proj", "BF16", (EXPERTS, 2 * EXPERT, HIDDEN))]
        found += [(f"{at}.down_proj", "BF16", (EXPERTS, HIDDEN, EXPERT))]
    return found


def one_by_one(layers: int) -> list[Described]:
    return [
        (name, dtype, shape if ".experts." not in name or "down" in name else shape[::-1])
        for name, dtype, shape in tensors(layers)
    ]


def write_hollow(
    folder: Path, layers: int, files: int, every_of: Mapping[str, list[Described]] = MappingProxyType({})
) -> Path:
    """A family of headers, each with as large a hole behind it as its tensors would take."""
    for model in ("target", "rl", "sft"):
        every = every_of.get(model) or tensors(layers)
        count = -(-len(every) // files)
        (folder / model).mkdir()
        index = {}
        for number in range(files):
            file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
            part = every[number * count : (number + 1) * count]
            if not part:
                break
            header, specs = build_header(part, file)
            with open(folder / model / file, "wb") as stream:
                stream.write(header)
                stream.truncate(specs[-1].end)
            index |= {name: file for name, _, _ in part}
        (folder / model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        (folder / model / "config.json").write_text("{}")
    return write_recipe(folder, output=None)


def record_all(plan: saved.SavedPlan, output: Path) -> None:
    """What tasks leave, without their work: hollow shards, and records that nobody has reread."""
    digests = plan.digests()
    attempt = Attempt(output, Header(digests[0], conditions(plan.document["versions"], "sampled", False)))
    with part_of(plan, digests, list(plan.sizes), Access(commits=plan.commits)) as (whole, _):
        for shard in whole.shards:
            attempt.open_shard(shard).finish()
            row = TensorStatistics(9, 3, 2, 1, 1, 1 / 3, 1 / 4, 1 / 5, 1 / 6)
            digest = hashlib.sha256(shard.file.encode()).hexdigest()
            attempt.record(ShardRecord(shard.file, shard.size, digest, {spec.name: row for spec in shard.specs}))
    attempt.close()


def test_a_trillion_parameters(tmp_path: Path, request: pytest.FixtureRequest, tally: Callable[..., None]) -> None:
    is_long = request.config.getoption("--long")
    layers, files = (61, FILES) if is_long else (6, 17)
    recipe, output = write_hollow(tmp_path, layers, files), tmp_path / "merged"
    started = time.process_time()
    path = save(recipe)
    planning = time.process_time() - started

    started = time.process_time()
    plan = saved.read(path)
    (mine,) = divide(plan.sizes, files)[:1]
    with part_of(plan, plan.digests(), mine, Access(commits=plan.commits)) as (part, checkpoints):
        beginning = time.process_time() - started
        assert [len(checkpoint.files) for checkpoint in checkpoints.values()] == [1, 1, 1]
        assert len(part.tensors) == len(part.shards[0].specs)

    record_all(plan, output)
    command = [sys.executable, "-m", "skillmerge", "finish", str(path), "-o", str(output), "-q"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert subprocess.run(command, check=False).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    finishing = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert len(manifest.read(output).tensors) == len(tensors(layers))
    assert not staging_of(output).exists()
    tally(
        tensors=len(tensors(layers)), plan_s=f"{planning:.1f}", task_s=f"{beginning:.2f}", finish_s=f"{finishing:.1f}"
    )
    assert planning < 10
    assert beginning < 1
    assert finishing < 5


@pytest.mark.parametrize("donor", ["packed", "one by one"])
def test_a_trillion_parameters_in_two_layouts(
    tmp_path: Path, request: pytest.FixtureRequest, tally: Callable[..., None], donor: str
) -> None:
    """A plan of models that store their experts in other tensors than the donor, with a rule for some of them."""
    layers, files = (61, FILES) if request.config.getoption("--long") else (6, 17)
    apart, together = one_by_one(layers), packed(layers)
    own, other = (together, apart) if donor == "packed" else (apart, together)
    recipe = write_hollow(tmp_path, layers, files, {"target": own, "rl": other, "sft": other})
    rules = {"lam": {"default": 0.7, "rules": [{"experts": "0-3", "value": 0.0}]}}
    write_recipe(tmp_path, coefficients=rules, output=None)
    code = f"import re, resource, skillmerge; plan = skillmerge.plan({str(recipe)!r}); "
    code += "used = resource.getrusage(resource.RUSAGE_SELF); print(len(plan.problems), len(plan.tensors), "
    code += f"used.ru_utime + used.ru_stime, {PEAK_MEMORY})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    problems, count, seconds, memory = map(float, done.stdout.split())
    tally(tensors=int(count), plan_s=f"{seconds:.1f}", memory_mb=round(memory / 1e6))
    assert (problems, count) == (0, len(own))
    assert seconds < 10
    assert memory < 700e6
