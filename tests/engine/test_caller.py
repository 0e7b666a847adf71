"""What the calling program has done to the process changes no byte, and is afterwards as it was."""

from __future__ import annotations

import locale
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from conftest import random_tensors, read_checkpoint, tensor_shapes, weights, write_checkpoint, write_recipe

import skillmerge
from skillmerge.bits import memory_of, settle_thread
from skillmerge.engine.shards import _Run
from skillmerge.engine.worker import Worker
from skillmerge.plans.opening import Access
from skillmerge.recipes.parse import load
from skillmerge.reporter import Reporter
from skillmerge.verbs.sweep.in_memory import MergedModel


def subnormal(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Numbers around the smallest that are normal: most of the differences of two are not."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(64, 16, generator=generator) * 2 * torch.finfo(dtype).tiny).to(dtype)


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    for seed, name in enumerate(("target", "rl", "sft")):
        tensors = random_tensors(tensor_shapes(2), request.param, seed)
        tensors["model.layers.0.mlp.down_proj.weight"] = subnormal(request.param, seed)
        write_checkpoint(tmp_path / name, tensors, shards=2)
    return write_recipe(tmp_path)


@contextmanager
def flushed() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def having(get: Callable[[], Any], change: Callable[[Any], Any], value: Any) -> Iterator[None]:
    """With a setting of the process, which has to be as it was set when all is done."""
    before = get()
    change(value)
    try:
        yield
        assert get() == value
    finally:
        change(before)


MODES: dict[str, Callable[[], Any]] = {
    "flush-denormal": flushed,
    "default-dtype": lambda: having(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default-device": lambda: torch.device("meta"),
    "threads": lambda: having(torch.get_num_threads, torch.set_num_threads, 5),
    "deterministic": lambda: having(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no-grad": torch.no_grad,
    "inference": torch.inference_mode,
    "matmul-precision": lambda: having(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "reduced-precision": lambda: having(
        lambda: torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        lambda value: setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", value),
        False,
    ),
    "numpy-errors": lambda: numpy.errstate(all="raise"),
    "locale": lambda: having(
        lambda: locale.setlocale(locale.LC_ALL), lambda value: locale.setlocale(locale.LC_ALL, value), "C"
    ),
}


def all_bytes(recipe: Path, into: Path) -> dict[str, dict[str, bytes]]:
    """What every verb that writes numbers makes of the family."""
    rl, sft, skill = str(recipe.parent / "rl"), str(recipe.parent / "sft"), into / "skill"
    skillmerge.apply(recipe, into / "merged", device="cpu")
    skillmerge.extract(rl, sft, skill)
    skillmerge.extract(rl, sft, into / "rounded", dtype="bfloat16", keep=0.5)
    skillmerge.export(skill, into / "patch", onto=sft)
    skillmerge.export(skill, into / "adapter", lora_rank=2)
    return {folder.name: weights(folder) for folder in sorted(into.iterdir())}


@pytest.mark.parametrize("mode", MODES)
def test_callers_settings_change_no_byte(recipe: Path, tmp_path: Path, mode: str) -> None:
    wanted = all_bytes(recipe, tmp_path / "plain")
    with MODES[mode]():
        found = all_bytes(recipe, tmp_path / "odd")
    del wanted["adapter"]["adapter_config.json"], found["adapter"]["adapter_config.json"]
    assert found == wanted


ABOUT_THE_CALLER = ["flush-denormal", "default-device", "default-dtype", "autocast", "inference", "matmul-precision"]


@pytest.mark.parametrize("mode", ABOUT_THE_CALLER)
def test_callers_settings_change_no_spectrum(tmp_path: Path, mode: str) -> None:
    for seed, name in enumerate(("rl", "sft")):
        write_checkpoint(tmp_path / name, {"w": subnormal(torch.float32, seed)})
    wanted = skillmerge.inspect(str(tmp_path / "sft"), str(tmp_path / "rl"), stats="off", spectral=2).as_dict()
    with MODES[mode]():
        found = skillmerge.inspect(str(tmp_path / "sft"), str(tmp_path / "rl"), stats="off", spectral=2).as_dict()
    assert found == wanted
    assert wanted["spectra"]


@pytest.mark.parametrize("mode", ABOUT_THE_CALLER)
def test_callers_settings_change_no_weight_in_memory(tmp_path: Path, demo: Path, mode: str) -> None:
    pytest.importorskip("transformers")
    names = {"target": "target-sft", "rl": "source-rl", "sft": "source-sft"}
    recipe = load(write_recipe(tmp_path, models={key: str(demo / name) for key, name in names.items()}))
    wanted = read_checkpoint(skillmerge.apply(recipe, tmp_path / "out", device="cpu").output)
    with MODES[mode]():
        model = MergedModel(recipe, Access(), "cpu", Reporter())
        model.use(recipe)
        found = {name: bytes(memory_of(value.data.contiguous())) for name, value in model.model.named_parameters()}
        model.close()
    assert found == {name: bytes(memory_of(value)) for name, value in wanted.items()}


def threads_of_a_new_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_merges_side_by_side_leave_torch_its_threads(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One begins while another works, and ends after it."""
    begun, go_on, real = threading.Event(), threading.Event(), _Run.start

    def start(run: _Run) -> None:
        real(run)
        begun.set()
        go_on.wait(10)

    with having(torch.get_num_threads, torch.set_num_threads, 3):
        monkeypatch.setattr(_Run, "start", start)
        other = threading.Thread(target=lambda: skillmerge.apply(recipe, recipe.parent / "one", device="cpu"))
        other.start()
        assert begun.wait(10)
        monkeypatch.setattr(_Run, "start", real)
        assert torch.get_num_threads() == 3
        assert threads_of_a_new_thread() == 3
        skillmerge.apply(recipe, recipe.parent / "two", device="cpu")
        go_on.set()
        other.join()
        assert torch.get_num_threads() == 3
        assert threads_of_a_new_thread() == 3
    assert weights(recipe.parent / "one") == weights(recipe.parent / "two")


def test_thread_of_ours_computes_alone_and_keeps_subnormal_numbers() -> None:
    found: list[Any] = []
    least = torch.tensor([2.0**-149])

    def body() -> None:
        found.append(float((least * 3).sum()))
        settle_thread()
        found.extend([float((least * 3).sum()), torch.get_num_threads()])

    with flushed(), having(torch.get_num_threads, torch.set_num_threads, 3):
        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        assert float((least * 3).sum()) == 0, "the caller's own mode is as it was"
    assert found == [0.0, 3 * 2.0**-149, 1]


def test_full_gpu_is_tried_again_when_the_failed_attempt_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error holds the frames that hold the tensors: what is freed before it is gone frees nothing."""
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def compute(*arguments: object) -> None:
        if not held:
            temporary = torch.zeros(8)
            held.append(weakref.ref(temporary))
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    worker: Any = SimpleNamespace(stream=object(), _on_stream=compute)
    worker._shrink = lambda: alive.append(held[0]() is not None)
    Worker._sized_to_fit(worker, lambda: None)
    assert alive == [False]
