"""Hostile and broken inputs: each a clear error with the right exit status, quickly, and nothing written.

One line per case: what somebody did to a good family of checkpoints (or to its recipe), the exit status, and
words that the message must hold. What is refused from headers and text alone leaves no trace on the disk;
what only the weights can show leaves no output and never stands in the way of the cure.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_checkpoint, run_cli, write_family
from inputs import BEFORE_WEIGHTS
from spoils import (
    BF16,
    CONFIG,
    EMBEDDING,
    FIRST,
    HEAD,
    I64,
    INDEX,
    NORM,
    SECOND,
    Hostile,
    Spoil,
    all_of,
    cases,
    config_has,
    config_is,
    copy_rule,
    file_is,
    merge,
    models,
    moved_and_linked,
    output,
    recipe_has,
    tensors_edited,
    with_tensor,
)

import skillmerge
from skillmerge.errors import SkillmergeError
from skillmerge.reporter import Reporter

CPU_SECONDS = 2.0
"""The promise. In CPU time, so that a busy machine does not fail it; what hangs runs into the timeout."""
pytestmark = pytest.mark.timeout(30)


def table(rows: list[Hostile]) -> list[Any]:
    """Parameters with the cases' names."""

    def marks(name: str) -> list[pytest.MarkDecorator]:
        impossible = sys.platform == "darwin" and name.endswith("bytes in its name")
        return [pytest.mark.skipif(impossible, reason="this system has no such names")]

    return [pytest.param(row, id=row.name, marks=marks(row.name)) for row in rows]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_family(folder, config=CONFIG)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A good family of one's own, to be spoilt."""
    return Path(shutil.copytree(good, tmp_path / "family"))


def listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Everything in a folder: kind, size and time of change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        time_of_change = 0 if path.is_dir() and not path.is_symlink() else status.st_mtime_ns
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_size, time_of_change)
    return found


def refused(folder: Path, **options: Any) -> SkillmergeError:
    """The error that apply ends with, after checks that hold for each of them."""
    started = time.process_time()
    with pytest.raises(SkillmergeError) as caught:
        skillmerge.apply(folder / "recipe.yaml", **options)
    assert time.process_time() - started < CPU_SECONDS
    error = caught.value
    assert not re.search(r"[^\n\t -~…µ-￿]|[\ud800-\udfff]", str(error)), "raw control characters in a message"
    assert len(str(error)) < 8_000 + len(str(folder)) * 4
    assert not (folder / "merged").is_dir() or not list((folder / "merged").glob("*.safetensors"))
    return error


@pytest.mark.parametrize("case", table(BEFORE_WEIGHTS))
def test_hostile_input_is_refused_before_anything_is_written(case: Hostile, folder: Path) -> None:
    case.spoil(folder)
    before = listing(folder)
    error = refused(folder, **case.options)
    assert (error.exit_status, case.phrase in str(error)) == (case.status, True), str(error)
    assert listing(folder) == before


def test_hostile_cases_have_names_of_their_own() -> None:
    names = [case.name for case in (*BEFORE_WEIGHTS, *NONFINITE, *DIFFERING)]
    assert len(names) == len(set(names)) >= 60


def test_family_that_nobody_spoilt_is_merged(folder: Path) -> None:
    assert skillmerge.apply(folder / "recipe.yaml").output == folder / "merged"


# What only the weights show: there is no output, and nothing stands in the way of the cure.


def poisoned(model: str, name: str, index: int, value: float, dtype: torch.dtype = BF16) -> Spoil:
    """All models are of `dtype`, and one element of one tensor of `model` is `value`."""

    def cast(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()})

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[index] = value

    return all_of(tensors_edited(cast), tensors_edited(poison, model))


def large_poisoned(model: str, index: int) -> Spoil:
    """A tensor of several tiles, with one NaN in it."""
    return all_of(
        with_tensor("large.weight", torch.ones(600_000, dtype=BF16)),
        tensors_edited(lambda tensors: tensors["large.weight"].__setitem__(index, NAN), model),
    )


def differing(dtype: torch.dtype, model: str) -> Spoil:
    """A tensor that no arithmetic is meant for, whose last element is another in one model."""
    return all_of(
        with_tensor("ids", torch.ones(70_000, dtype=dtype)),
        tensors_edited(lambda tensors: tensors["ids"].__setitem__(-1, 0), model),
    )


def holds(what: str, model: str, tensor: str, index: int) -> str:
    return f"model `{model}` holds {what} in tensor `{tensor}` at element {index} ("


def overflows(dtype: str, index: int) -> str:
    return f"tensor `{NORM}` overflows {dtype} at element {index}\n"


NAN, INF = float("nan"), float("inf")
NONFINITE = cases(4, [
    ("weights: NaN first", holds("nan", "target", EMBEDDING, 0), poisoned("target", EMBEDDING, 0, NAN)),
    ("weights: NaN last", holds("nan", "rl", HEAD, 511), poisoned("rl", HEAD, 511, NAN)),
    ("weights: Inf in float16", holds("inf", "sft", NORM, 3), poisoned("sft", NORM, 3, INF, torch.float16)),
    ("weights: -Inf in float32", holds("-inf", "target", NORM, 15), poisoned("target", NORM, 15, -INF, torch.float32)),
    ("weights: NaN in float64", holds("nan", "rl", NORM, 1), poisoned("rl", NORM, 1, NAN, torch.float64)),
    ("weights: NaN, copied by a rule", holds("nan", "rl", HEAD, 7),
        all_of(poisoned("rl", HEAD, 7, NAN), recipe_has(copy=[{"tensors": HEAD, "from": "rl"}]))),
    ("weights: Inf, copied for a coefficient of 0", holds("inf", "target", NORM, 0),
        all_of(poisoned("target", NORM, 0, INF, torch.float16), merge("target + lam * (rl - sft)", lam=0))),
    ("weights: -Inf, cast", holds("-inf", "target", NORM, 2),
        all_of(poisoned("target", NORM, 2, -INF), merge("target"), output("merged", dtype="float32"))),
    ("weights: the same NaN in a difference", f"holds nan in tensor `{NORM}` at element 4",
        all_of(poisoned("rl", NORM, 4, NAN), poisoned("sft", NORM, 4, NAN))),
    ("weights: the same NaN in terms that cancel", f"holds nan in tensor `{NORM}` at element 4",
        all_of(poisoned("rl", NORM, 4, NAN), poisoned("sft", NORM, 4, NAN), merge("target - sft + rl"))),
    ("weights: the same Inf in terms that cancel", f"holds inf in tensor `{NORM}` at element 4",
        all_of(poisoned("rl", NORM, 4, INF), poisoned("sft", NORM, 4, INF), merge("target - sft + rl"))),
    ("weights: NaN after several tiles", holds("nan", "sft", "large.weight", 599_999), large_poisoned("sft", 599_999)),
    ("weights: NaN amid several tiles", holds("nan", "rl", "large.weight", 262_149), large_poisoned("rl", 262_149)),
    ("weights: float16 too narrow", overflows("F16", 5),
        all_of(poisoned("target", NORM, 5, 70_000.0, torch.float32), output("merged", dtype="float16"))),
    ("weights: float16 overflows on the way", overflows("F16", 5),
        all_of(poisoned("rl", NORM, 5, 60_000.0, torch.float16), merge("target + lam * (rl - sft)", lam=2.0))),
    ("weights: float32 overflows", overflows("F32", 6),
        all_of(poisoned("rl", NORM, 6, 3e38, torch.float32), merge("target + lam * (rl - sft)", lam=3.0))),
])  # fmt: skip
DIFFERING = cases(4, [
    ("weights: integers differ", "`ids` holds I64 and differs between models `target` and `rl`", differing(I64, "rl")),
    ("weights: booleans differ", "`ids` holds BOOL and differs", differing(torch.bool, "sft")),
    ("weights: bytes differ", "`ids` holds U8 and differs", differing(torch.uint8, "target")),
])  # fmt: skip


def refused_for_its_weights(case: Hostile, folder: Path) -> None:
    """There is no output; a staging folder is the only thing that may be left."""
    case.spoil(folder)
    before = listing(folder)
    error = refused(folder)
    assert (error.exit_status, case.phrase in str(error)) == (case.status, True), str(error)
    left = {name: entry for name, entry in listing(folder).items() if not name.startswith("merged.partial")}
    assert left == before


def merged_after_all(folder: Path, **options: Any) -> None:
    """The cure works, and takes whatever the refused run left with it."""
    assert skillmerge.apply(folder / "recipe.yaml", **options).output == folder / "merged"
    assert not (folder / "merged.partial").exists()


@pytest.mark.parametrize("case", table(NONFINITE))
def test_weights_that_are_not_finite_are_refused_until_they_are_allowed(case: Hostile, folder: Path) -> None:
    refused_for_its_weights(case, folder)
    merged_after_all(folder, allow_nonfinite=True)


@pytest.mark.parametrize("case", table(DIFFERING))
def test_weights_that_cannot_be_merged_must_be_equal_until_a_rule_says_whose(case: Hostile, folder: Path) -> None:
    refused_for_its_weights(case, folder)
    copy_rule("ids")(folder)
    merged_after_all(folder)


# An input that changes while it is in use.


class Saboteur(Reporter):
    """Does something between the plan and the first byte of weights, or between the last and the end."""

    def __init__(self, first: Callable[[], object] = lambda: None, last: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.first, self.last = first, last

    @contextmanager
    def bar(self, total: int) -> Iterator[Callable[[int], None]]:
        self.first()
        yield lambda done: None
        self.last()


def rewritten(path: Path) -> None:
    """Other bytes, the same size, and a later time (kernels keep time in ticks)."""
    path.write_bytes(path.read_bytes()[:-2] + b"\x80\x3f")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def replaced(path: Path) -> None:
    """Another file of the same name and size, moved into its place as downloads are."""
    shutil.copy(path, path.with_name("new"))
    os.rename(path.with_name("new"), path)


def swapped(path: Path) -> None:
    """A pipe in its place: whoever opens it like a file waits for ever."""
    path.unlink()
    os.mkfifo(path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "rewritten": rewritten,
    "replaced": replaced,
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 2),
    "grown": lambda path: os.truncate(path, path.stat().st_size + 2),
    "emptied": lambda path: os.truncate(path, 0),
    "removed": lambda path: path.unlink(),
    "a pipe": swapped,
}


@pytest.mark.parametrize("when", ["first", "last"])
@pytest.mark.parametrize("change", CHANGES)
def test_shard_that_changes_during_the_run_is_noticed(change: str, when: str, folder: Path) -> None:
    path = folder / "rl" / SECOND
    good = path.read_bytes()
    error = refused(folder, reporter=Saboteur(**{when: lambda: CHANGES[change](path)}))
    assert error.exit_status == 7
    assert f"{path} changed while it was in use" in str(error)
    path.unlink(missing_ok=True)
    path.write_bytes(good)
    merged_after_all(folder)


def test_shard_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int, buffers: Any, offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    error = refused(folder, reporter=Saboteur(first=lambda: monkeypatch.setattr(os, "preadv", broken)))
    assert error.exit_status == 5
    assert re.search(r"safetensors: Input/output error\ncheck it with `skillmerge doctor ", str(error))


# What looks alike and is allowed.


def test_links_that_lead_out_are_followed_when_allowed(folder: Path) -> None:
    expected = skillmerge.apply(folder / "recipe.yaml", folder / "expected").manifest.files
    for name in (FIRST, INDEX, "config.json"):
        moved_and_linked(f"target/{name}", f"elsewhere/{name}")(folder)
    assert refused(folder).exit_status == 4
    found = skillmerge.apply(folder / "recipe.yaml", follow_links=True).manifest.files
    assert found == expected


def as_hub_cache(model: str, repository: str) -> Spoil:
    """`model` becomes a snapshot of a Hub cache whose files are links to `repository`'s blobs."""

    def spoil(folder: Path) -> None:
        snapshot = folder / "hub" / f"models--acme--{model}" / "snapshots" / ("c0ffee" * 7)[:40]
        blobs = folder / "hub" / f"models--acme--{repository}" / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(sorted((folder / model).iterdir())):
            path.rename(blobs / f"{model}{number}")
            (snapshot / path.name).symlink_to(os.path.relpath(blobs / f"{model}{number}", snapshot))
        models(**{model: str(snapshot)})(folder)

    return spoil


def test_hub_cache_links_are_followed_within_their_repository(folder: Path) -> None:
    as_hub_cache("target", "target")(folder)
    merged_after_all(folder)


def test_hub_cache_links_into_another_repository_are_refused(folder: Path) -> None:
    as_hub_cache("target", "other")(folder)
    before = listing(folder)
    error = refused(folder)
    assert (error.exit_status, error.fix) == (4, "if you trust it, pass `--follow-links`")
    assert listing(folder) == before
    merged_after_all(folder, follow_links=True)


def test_hub_cache_link_past_its_blobs_is_refused(folder: Path) -> None:
    as_hub_cache("target", "target")(folder)
    (blob,) = (folder / "hub" / "models--acme--target" / "blobs").glob("target0")
    blob.rename(folder / "elsewhere")
    blob.symlink_to(folder / "elsewhere")
    assert refused(folder).exit_status == 4


def test_config_with_code_is_carried_with_its_code_when_allowed(folder: Path) -> None:
    config_has(auto_map={"AutoModel": "odd.Model"})(folder)
    file_is("target/odd.py", "class Model: ...")(folder)
    merged_after_all(folder, allow_code=True)
    for name in ("config.json", "odd.py"):
        assert (folder / "merged" / name).read_bytes() == (folder / "target" / name).read_bytes()


def test_config_with_infinity_is_what_some_models_have(folder: Path) -> None:
    config_is('{"vocab_size": 32, "time_step_limit": [0.0, Infinity]}')(folder)
    merged_after_all(folder)


def test_config_that_only_speaks_of_auto_map_runs_no_code(folder: Path) -> None:
    config_has(note="no auto_map here", letters="\\u0061")(folder)
    merged_after_all(folder)


def test_zero_sized_and_scalar_tensors_are_merged(folder: Path) -> None:
    all_of(with_tensor("empty", torch.zeros(0, 4)), with_tensor("scalar", torch.tensor(2.5)))(folder)
    merged_after_all(folder)
    assert read_checkpoint(folder / "merged")["scalar"].item() == 2.5


# As a person or a pipeline sees it.

SEEN = [
    "index: a file in the parent folder",
    "header: terminal escape in a name",
    "shard: a pipe",
    "config: auto_map",
    "misfit: shape",
    "recipe: a billion laughs",
    "recipe: python/object",
    "expression: 4,000 parentheses",
    "output: an input",
    "resources: a memory limit of 1 MB",
]


@pytest.mark.parametrize("name", SEEN)
def test_command_line_tells_what_is_wrong(name: str, folder: Path) -> None:
    (case,) = (case for case in BEFORE_WEIGHTS if case.name == name)
    case.spoil(folder)
    before = listing(folder)
    options = [part for key, value in case.options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    done = run_cli("apply", folder / "recipe.yaml", "--json", *options)
    assert done.returncode == case.status, done.stderr
    assert done.stderr.startswith("error: ")
    assert case.phrase in done.stderr
    told = json.loads(done.stdout)
    assert (told["ok"], told["exit_status"]) == (False, case.status)
    assert case.phrase in told["message"] + str(told["fix"])
    assert listing(folder) == before


def test_command_line_tells_of_nan(folder: Path) -> None:
    case = NONFINITE[0]
    case.spoil(folder)
    done = run_cli("apply", folder / "recipe.yaml", "--device", "cpu")
    assert done.returncode == 4
    assert case.phrase in done.stderr
    assert not (folder / "merged").exists()
