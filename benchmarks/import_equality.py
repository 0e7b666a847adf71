"""`skillmerge import` against mergekit 0.1.5: both merge the same files, and every tensor is compared.

    python benchmarks/import_equality.py MERGEKIT_YAML [--only TEXT] [--work DIR]

MERGEKIT_YAML is the program of an environment of its own (`make import-equality` makes one); it runs as another process.
Each case is a configuration. mergekit merges it, skillmerge imports it and applies the recipe, over a small family of
Llama models in float32. A tensor's difference is the largest of its elements, over the largest value of the tensor.

Equal is up to 5e-7, but for elements whose size ties at a threshold, and for signs where updates cancel to 2^-22 of their
sizes. Random methods are compared by their law: the share that is kept, one factor for a tensor, the 1-norm.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import skillmerge

LIMIT, LAYERS, HIDDEN = 5e-7, 4, 64
A, B, C = ({"model": f"./{name}"} for name in "abc")
BASE = {"base_model": "./base"}


def given(entry: dict[str, Any], **parameters: Any) -> dict[str, Any]:
    return {**entry, "parameters": parameters}


def weighed(*weights: Any, **others: Any) -> list[dict[str, Any]]:
    return [given(entry, weight=weight, **others) for entry, weight in zip((A, B, C), weights, strict=False)]


def sliced(*ranges: tuple[int, int], sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"sources": [{**source, "layer_range": [*ends]} for source in sources]} for ends in ranges]


GRADIENT = [0.2, 1.0, 0.4]
FILTERS = [{"filter": "self_attn", "value": GRADIENT}, {"filter": "mlp", "value": 0.3}, {"value": [0.5, 0.9]}]
CASES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": weighed(0.3, 0.5, 0.6)},
    "linear, sum 1": {"merge_method": "linear", "models": weighed(0.3, 0.7), "parameters": {"normalize": False}},
    "linear, gradient and filters": {"merge_method": "linear", "models": weighed(FILTERS, GRADIENT)},
    "linear, base listed": {"merge_method": "linear", **BASE, "models": [given({"model": "./base"}, weight=2), *weighed(1, 1)]},
    "task_arithmetic": {"merge_method": "task_arithmetic", **BASE, "models": weighed(0.7, -0.4), "parameters": {"lambda": 0.9}},
    "task_arithmetic, normalize": {"merge_method": "task_arithmetic", **BASE, "models": weighed(0.7, 0.4), "parameters": {"normalize": True, "lambda": 1.5}},
    "task_arithmetic, normalize, sum 0": {"merge_method": "task_arithmetic", **BASE, "models": weighed(0.7, -0.7), "parameters": {"normalize": True}},
    "task_arithmetic, gradient": {"merge_method": "task_arithmetic", **BASE, "models": weighed(GRADIENT, [0, 1, 0, 1, 0])},
    "task_arithmetic, filters": {"merge_method": "task_arithmetic", **BASE, "models": weighed(FILTERS, [{"filter": "embed", "value": 0.1}, {"filter": "q_proj", "value": 0.9}]), "parameters": {"weight": 0.25}},
    "task_arithmetic, norms and head": {"merge_method": "task_arithmetic", **BASE, "models": weighed([{"filter": "norm", "value": 0.1}, {"filter": "lm_head", "value": 0.9}, {"value": GRADIENT}])},
    "task_arithmetic, base listed": {"merge_method": "task_arithmetic", **BASE, "models": [given({"model": "./base"}, weight=0.5), *weighed(0.5, 0.5)]},
    "task_arithmetic, slices": {"merge_method": "task_arithmetic", **BASE, "slices": sliced((0, 1), (1, 4), sources=[{"model": "./base"}, *weighed(GRADIENT, 0.5)])},
    "task_arithmetic, precedence": {"merge_method": "task_arithmetic", **BASE, "slices": [
        {"sources": [{**given(A, weight=[{"filter": "mlp", "value": 0.9}]), "layer_range": [0, 2]}, {**B, "layer_range": [0, 2]}], "parameters": {"weight": [{"filter": "self_attn", "value": 0.1}]}},
        {"sources": [{**A, "layer_range": [2, 4]}, {**given(B, weight=GRADIENT), "layer_range": [2, 4]}], "parameters": {"lambda": 0.5}},
    ], "parameters": {"weight": 0.3, "lambda": 2}},
    "ties": {"merge_method": "ties", **BASE, "models": weighed(0.5, 0.3, 0.2, density=0.4)},
    "ties, weights 1": {"merge_method": "ties", **BASE, "models": weighed(1, 1, 1), "parameters": {"density": 0.3}},
    "ties, normalize: false": {"merge_method": "ties", **BASE, "models": weighed(0.5, 0.3, density=0.5), "parameters": {"normalize": False, "lambda": 1.2}},
    "ties, rescale": {"merge_method": "ties", **BASE, "models": weighed(0.5, 0.3, density=0.5), "parameters": {"rescale": True}},
    "ties, density 1": {"merge_method": "ties", **BASE, "models": weighed(0.5, 0.3, density=1)},
    "ties, gradients and a filter": {"merge_method": "ties", **BASE, "models": [given(A, density=[1, 0.7, 0.1], weight=1.0), given(B, density=0.5, weight=[0, 0.3, 0.7, 1]), given(C, density=0.33, weight=[{"filter": "mlp", "value": 0.5}, {"value": 0}])], "parameters": {"normalize": True, "int8_mask": True}},
    "ties, one model": {"merge_method": "ties", **BASE, "models": weighed(0.5, density=0.4)},
    "breadcrumbs": {"merge_method": "breadcrumbs", **BASE, "models": weighed(0.5, 0.3, density=0.6), "parameters": {"lambda": 1.1}},
    "breadcrumbs, gamma": {"merge_method": "breadcrumbs", **BASE, "models": weighed(0.5, 0.3, density=0.6, gamma=0.1)},
    "breadcrumbs_ties": {"merge_method": "breadcrumbs_ties", **BASE, "models": weighed(0.5, 0.3, density=0.9, gamma=0.02)},
    "breadcrumbs_ties, gamma 0": {"merge_method": "breadcrumbs_ties", **BASE, "models": weighed(0.5, 0.3, density=0.5, gamma=0), "parameters": {"normalize": True}},
    "dare_linear, density 1": {"merge_method": "dare_linear", **BASE, "models": weighed(0.5, 0.3, density=1), "parameters": {"lambda": 1.1}},
    "dare_ties, density 1": {"merge_method": "dare_ties", **BASE, "models": weighed(1, 0.846, density=1), "parameters": {"rescale": False}},
    "dare_linear, lots": {"merge_method": "dare_linear", **BASE, "models": weighed(1, density=0.6)},
    "dare_linear, lots, no rescale": {"merge_method": "dare_linear", **BASE, "models": weighed(1, density=0.6), "parameters": {"rescale": False}},
    "dare_ties, lots": {"merge_method": "dare_ties", **BASE, "models": weighed(1, density=0.3)},
    "della, density 1": {"merge_method": "della", **BASE, "models": weighed(0.5, 0.3, density=1), "parameters": {"lambda": 0.9}},
    "della, lots": {"merge_method": "della", **BASE, "models": weighed(1, density=0.6, epsilon=0.2)},
    "della_linear, lots": {"merge_method": "della_linear", **BASE, "models": weighed(1, density=0.5)},
    "sce": {"merge_method": "sce", **BASE, "models": [A, B, C]},
    "sce, select_topk": {"merge_method": "sce", **BASE, "models": [A, B, C], "parameters": {"select_topk": 0.4}},
    "model_stock": {"merge_method": "model_stock", **BASE, "models": [A, B]},
    "model_stock, three": {"merge_method": "model_stock", **BASE, "models": [A, B, C]},
    "model_stock, filter_wise": {"merge_method": "model_stock", **BASE, "models": [A, B, C], "parameters": {"filter_wise": True}},
    "slerp": {"merge_method": "slerp", "base_model": "./a", "models": [A, {"model": "./far"}], "parameters": {"t": 0.3}},
    "slerp, close": {"merge_method": "slerp", "base_model": "./a", "models": [B], "parameters": {"t": 0.3}},
    "slerp, gradients and filters": {"merge_method": "slerp", "base_model": "./far", "slices": sliced((0, 4), sources=[{"model": "./far"}, B]), "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]}, {"value": 0.5}]}},
    "nuslerp": {"merge_method": "nuslerp", "models": weighed(0.4, 0.8)},
    "nuslerp, base": {"merge_method": "nuslerp", **BASE, "models": weighed(0.4, 0.8)},
    "nuslerp, gradient": {"merge_method": "nuslerp", **BASE, "models": weighed(GRADIENT, 0.8)},
    "nuslerp, rows": {"merge_method": "nuslerp", **BASE, "models": weighed(0.4, 0.8), "parameters": {"nuslerp_flatten": False}},
    "multislerp": {"merge_method": "multislerp", "models": weighed(0.2, 0.3, 0.9)},
    "multislerp, base": {"merge_method": "multislerp", **BASE, "models": weighed(0.2, 0.3, 0.9)},
    "karcher": {"merge_method": "karcher", "models": [A, {"model": "./far"}, C]},
    "karcher, base": {"merge_method": "karcher", **BASE, "models": [A, {"model": "./far"}], "parameters": {"max_iter": 5}},
    "nearswap": {"merge_method": "nearswap", "base_model": "./a", "models": [A, B], "parameters": {"t": 0.001}},
    "nearswap, gradient": {"merge_method": "nearswap", "base_model": "./a", "models": [B], "parameters": {"t": [0.0001, 0.01]}},
    "ram": {"merge_method": "ram", **BASE, "models": [A, B, C], "parameters": {"epsilon": 0.004}},
    "ramplus_tl": {"merge_method": "ramplus_tl", **BASE, "models": [A, B, C], "parameters": {"epsilon": 0.004, "r": 0.3, "alpha": 0.5}},
    "passthrough": {"merge_method": "passthrough", "models": [A]},
    "passthrough, slices": {"merge_method": "passthrough", "slices": [*sliced((0, 2), sources=[A]), *sliced((2, 4), sources=[B])]},
    "tokenizer_source: base": {"merge_method": "task_arithmetic", **BASE, "models": weighed(0.5), "dtype": "float32", "out_dtype": "bfloat16"},
}  # fmt: skip
LOTS = {"dare_linear": 0.6, "dare_ties": 0.3, "della": 0.6, "della_linear": 0.5}
"""Methods whose cases named `lots` have one model, and the density there."""


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (96, HIDDEN)}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found[f"{block}.self_attn.{name}.weight"] = (HIDDEN, HIDDEN)
        for name in ("gate_proj", "up_proj"):
            found[f"{block}.mlp.{name}.weight"] = (2 * HIDDEN, HIDDEN)
        found[f"{block}.mlp.down_proj.weight"] = (HIDDEN, 2 * HIDDEN)
        found[f"{block}.input_layernorm.weight"] = (HIDDEN,)
        found[f"{block}.post_attention_layernorm.weight"] = (HIDDEN,)
    return {**found, "model.norm.weight": (HIDDEN,), "lm_head.weight": (96, HIDDEN)}


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 96,
    "tie_word_embeddings": False, "torch_dtype": "float32", "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
}  # fmt: skip


def make(work: Path) -> None:
    """Write base, a, b and c, which are updates of it, and far, which is another model. In one matrix the updates of a
    and b are opposite, in one they are the same, in one there are none, and some are sparse."""
    generator = torch.Generator().manual_seed(0)

    def normal(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    base = {name: normal(shape, 0.05) + (len(shape) == 1) for name, shape in shapes().items()}
    models = {"base": base, "far": {name: normal(shape, 0.05) for name, shape in shapes().items()}}
    for model in "abc":
        updates = {name: normal(shape, 0.01) for name, shape in shapes().items()}
        for name in updates:
            if "up_proj" in name:
                updates[name] *= torch.rand(updates[name].shape, generator=generator) < 0.3
        models[model] = {name: base[name] + update for name, update in updates.items()}
    first = "model.layers.1.self_attn"
    models["b"][f"{first}.q_proj.weight"] = base[f"{first}.q_proj.weight"] * 2 - models["a"][f"{first}.q_proj.weight"]
    models["b"][f"{first}.k_proj.weight"] = models["a"][f"{first}.k_proj.weight"].clone()
    models["c"][f"{first}.v_proj.weight"] = base[f"{first}.v_proj.weight"].clone()
    for name, tensors in models.items():
        (work / name).mkdir(parents=True, exist_ok=True)
        save_file(tensors, work / name / "model.safetensors", metadata={"format": "pt"})
        (work / name / "config.json").write_text(json.dumps(CONFIG, indent=1))


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def run(program: str, work: Path, name: str, config: dict[str, Any]) -> tuple[dict[str, torch.Tensor], ...]:
    """Let both merge a case, and return mergekit's tensors and ours."""
    config = {"dtype": "float32", **config}
    file, theirs, ours = work / "mergekit.json.yml", work / "theirs", work / "merged"
    file.write_text(json.dumps(config, indent=1))
    for folder in (theirs, ours):
        shutil.rmtree(folder, ignore_errors=True)
    command = [program, file.name, theirs.name, "--no-copy-tokenizer", "--no-write-model-card"]
    process = subprocess.run(command, cwd=work, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{name}: mergekit: {process.stderr.strip().splitlines()[-1]}")
    skillmerge.import_recipe(file, work / "recipe.yaml", overwrite=True)
    skillmerge.apply(work / "recipe.yaml")
    return load(theirs), load(ours)


def largest_difference(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> tuple[float, int, str]:
    """Return the largest difference, how many elements are above the limit, and in which tensor most are."""
    assert theirs.keys() == ours.keys(), theirs.keys() ^ ours.keys()
    largest, beyond, where = 0.0, 0, ""
    for name, tensor in theirs.items():
        scale = tensor.double().abs().max().item() or 1.0
        apart = (tensor.double() - ours[name].double()).abs() / scale
        largest = max(largest, apart.max().item())
        count = int((apart > LIMIT).sum())
        beyond, where = beyond + count, where if not count else f"{where} {name} ({count})".strip()
    return largest, beyond, where


def law(work: Path, made: dict[str, torch.Tensor], density: float) -> str:
    """Return what is wrong with lots: the share kept, one factor in each tensor, the 1-norm; or nothing."""
    base, model = load(work / "base"), load(work / "a")
    kept = total = 0
    for name, tensor in made.items():
        update, found = model[name].double() - base[name].double(), tensor.double() - base[name].double()
        chosen = found.abs() > 1e-7
        kept, total = kept + int(chosen.sum()), total + int((update.abs() > 1e-7).sum())
        large = chosen & (update.abs() > 1e-3)
        if large.any():
            factors = found[large] / update[large]
            if (factors.max() - factors.min()) / factors.mean() > 1e-3:
                return f"{name}: factors from {factors.min():.4f} to {factors.max():.4f}"
    deviation = (kept - density * total) / math.sqrt(total * density * (1 - density))
    return f"kept {kept / total:.3f}, {deviation:+.1f} sigma" if abs(deviation) > 4 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mergekit", help="mergekit-yaml of another environment")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "skillmerge-import-equality")
    arguments = parser.parse_args()
    make(arguments.work)
    wrong = 0
    print("| case | largest difference | elements above 5e-7 | verdict |\n| --- | --- | --- | --- |")
    for name, config in CASES.items():
        if arguments.only not in name:
            continue
        try:
            theirs, ours = run(arguments.mergekit, arguments.work, name, config)
        except (RuntimeError, skillmerge.SkillmergeError) as error:
            print(f"| {name} | | | failed: {' '.join(str(error).split())} |", flush=True)
            wrong += 1
            continue
        if "lots" in name:
            density = LOTS[config["merge_method"]]
            bad = [f"{who}: {what}" for who, made in (("mergekit", theirs), ("skillmerge", ours))
                   if (what := law(arguments.work, made, density))]  # fmt: skip
            print(f"| {name} | | | {'; '.join(bad) or 'same law'} |", flush=True)
            wrong += bool(bad)
            continue
        largest, beyond, where = largest_difference(theirs, ours)
        print(f"| {name} | {largest:.1e} | {beyond} | {'equal' if not beyond else where} |", flush=True)
        wrong += beyond > 0
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
