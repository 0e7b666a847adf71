"""`skillmerge import` against mergekit 0.1.5: both merge the same files, and every tensor is compared.

    python benchmarks/import_equality.py PEER_PYTHON [--only TEXT] [--work DIR]

PEER_PYTHON is that of an environment with mergekit (`make import-equality` makes one), which runs as another process.
Each case is a configuration of `import_cases.yaml`. mergekit merges it, skillmerge imports it and applies the recipe,
over a small family of Llama models in float32. A tensor's difference is the largest of its elements, over the largest
value of the tensor.

Equal is up to 5e-7, but for elements whose size ties at a threshold, and for signs where updates cancel to 2^-22 of
their sizes. Random methods are compared by their law: the share that is kept, and one factor for a tensor.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import skillmerge
from skillmerge.recipes import yamltext

Tensors = dict[str, torch.Tensor]
LIMIT, LAYERS, HIDDEN = 5e-7, 4, 64
CASES = Path(__file__).with_name("import_cases.yaml")
PEER = """
import json, sys, traceback
OPTIONS = "--no-copy-tokenizer --no-write-model-card --quiet --lora-merge-cache adapted".split()
from mergekit.scripts.run_yaml import main
for line in sys.stdin:
    config, folder = json.loads(line)
    try:
        main([config, folder, *OPTIONS], standalone_mode=False)
        print("made", flush=True)
    except Exception as error:
        print("failed:", *str(error).split(), flush=True)
"""
"""mergekit's command line for one case after the other, in its own process and environment."""
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
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
    "intermediate_size": 2 * HIDDEN, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 96,
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
    make_adapter(work / "lora", normal)
    words = [f"w{number}" for number in range(96)]
    turned = [*range(48, 96), *range(48)]
    for name, tensors, rows in (
        ("base", base, [*range(96)]),
        ("turned", models["a"], turned),
        ("short", base, [*range(88)]),
    ):
        make_with_tokens(work / name, tensors, [words[row] for row in rows], rows)


def make_with_tokens(folder: Path, tensors: Tensors, words: list[str], rows: list[int]) -> None:
    """Write a model with some of the rows of embedding and head, in another order, and its tokenizer."""
    folder.mkdir(exist_ok=True)
    matrices = {name: tensors[name][rows] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file({**tensors, **matrices}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": len(rows)}, indent=1))
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def make_adapter(folder: Path, normal: Callable[[tuple[int, ...], float], torch.Tensor]) -> None:
    """Write an adapter of two kinds of modules, as PEFT saves it."""
    tensors: Tensors = {}
    for layer in range(LAYERS):
        for module in ("self_attn.q_proj", "mlp.down_proj"):
            begin = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{begin}.lora_A.weight"] = normal((8, HIDDEN * (1 + ("down" in module))), 0.1)
            tensors[f"{begin}.lora_B.weight"] = normal((HIDDEN, 8), 0.1)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "r": 8, "lora_alpha": 16,
        "target_modules": ["q_proj", "down_proj"], "bias": "none", "lora_dropout": 0.0, "fan_in_fan_out": False,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))


def load(folder: Path) -> Tensors:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@dataclass
class Found:
    """largest: difference, of what is not open to choice. excused: elements that are. steps: elements that are one step
    of bfloat16 apart. wrong: tensor -> elements."""

    largest: float = 0.0
    excused: int = 0
    steps: int = 0
    wrong: dict[str, int] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        if self.wrong:
            return ", ".join(self.wrong)
        if self.steps:
            return f"equal but for one bfloat16 step in {self.steps} element{'s' * (self.steps > 1)}"
        return "equal" if not self.excused else f"equal but for {self.excused} elements where updates cancel"


def merge(peer: subprocess.Popen[str], work: Path, config: dict[str, Any]) -> tuple[Tensors, Tensors]:
    """Let both merge a case, and return mergekit's tensors and ours."""
    file, theirs, ours = work / "mergekit.yml", work / "theirs", work / "merged"
    file.write_text(json.dumps({"dtype": "float32", **config}, indent=1))
    for folder in (theirs, ours):
        shutil.rmtree(folder, ignore_errors=True)
    assert peer.stdin is not None
    assert peer.stdout is not None
    print(json.dumps([file.name, theirs.name]), file=peer.stdin, flush=True)
    answer = next((line for line in peer.stdout if line.startswith(("made", "failed"))), "failed: it ended")
    if not answer.startswith("made"):
        raise RuntimeError(f"mergekit {answer.strip()}")
    skillmerge.import_recipe(file, work / "recipe.yaml", overwrite=True)
    skillmerge.apply(work / "recipe.yaml", stats="off")
    return load(theirs), load(ours)


def compare(work: Path, config: dict[str, Any], theirs: Tensors, ours: Tensors) -> Found:
    """Compare tensor by tensor."""
    assert theirs.keys() == ours.keys(), theirs.keys() ^ ours.keys()
    found = Found()
    for name, tensor in theirs.items():
        scale = tensor.double().abs().max().item() or 1.0
        apart = (tensor.double() - ours[name].double()).abs() / scale
        beyond = apart > LIMIT
        if tensor.dtype == torch.bfloat16:
            near = (tensor.double() - ours[name].double()).abs() <= 2**-7 * tensor.double().abs()
            found.steps += int((beyond & near).sum())
            beyond &= ~near
        if beyond.any():
            open_to_choice = beyond & either_answer(work, config, name)
            found.excused += int(open_to_choice.sum())
            if count := int((beyond & ~open_to_choice).sum()):
                found.wrong[name] = count
            apart = apart[~open_to_choice]
        found.largest = max(found.largest, apart.max().item() if apart.numel() else 0.0)
    return found


def either_answer(work: Path, config: dict[str, Any], name: str) -> torch.Tensor:
    """Return where either answer is right: where updates cancel, elements of an election or whole matrices."""
    base = load(work / "base")[name].double()
    models = [entry for entry in config.get("models", ()) if entry["model"] != config.get("base_model")]
    updates = [load(work / entry["model"])[name].double() - base for entry in models]
    for i, one in enumerate(updates):
        for other in updates[:i]:
            cosine = (one * other).sum() / one.norm() / other.norm()
            if config["merge_method"] in ("slerp", "nuslerp", "multislerp", "model_stock") and 1 - cosine.abs() < 1e-6:
                return torch.ones_like(base, dtype=torch.bool)
    if config["merge_method"] not in ("ties", "breadcrumbs_ties", "dare_ties", "della", "sce") or not updates:
        return torch.zeros_like(base, dtype=torch.bool)
    elected = torch.zeros_like(base), torch.zeros_like(base)
    for entry, update in zip(models, updates, strict=True):
        settings = {**config.get("parameters", {}), **entry.get("parameters", {})}
        weight, density = settings.get("weight", 1), settings.get("density", 1)
        if not isinstance(weight, float | int) or not isinstance(density, float | int):
            return torch.zeros_like(base, dtype=torch.bool)
        least = update.abs().flatten().topk(max(1, int(density * update.numel()))).values[-1]
        x = weight * update * (update.abs() >= least)
        elected = elected[0] + x, elected[1] + x.abs()
    return elected[0].abs() <= 2**-22 * elected[1]


def law(work: Path, made: Tensors, density: float) -> str:
    """Return what is wrong with lots: the share kept, one factor in each tensor, the 1-norm; or nothing."""
    base, model = load(work / "base"), load(work / "a")
    kept = total = 0
    for name, tensor in made.items():
        update, found = model[name].double() - base[name].double(), tensor.double() - base[name].double()
        chosen, changed = found.abs() > 1e-7, update.abs() > 1e-7
        if changed.double().mean() > 0.99:  # among many zeros, those of DELLA that are not zero have the high ranks
            kept, total = kept + int(chosen.sum()), total + int(changed.sum())
        large = chosen & (update.abs() > 1e-3)
        if large.any():
            factors = found[large] / update[large]
            if (factors.max() - factors.min()) / factors.mean() > 1e-3:
                return f"{name}: factors from {factors.min():.4f} to {factors.max():.4f}"
    deviation = (kept - density * total) / math.sqrt(total * density * (1 - density))
    return f"kept {kept / total:.3f}, {deviation:+.1f} sigma" if abs(deviation) > 4 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", help="the Python of an environment with mergekit")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "skillmerge-import-equality")
    arguments = parser.parse_args()
    make(arguments.work)
    peer = subprocess.Popen(
        [arguments.peer, "-c", PEER], cwd=arguments.work, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    wrong = 0
    print("| case | largest difference | elements above 5e-7 | verdict |\n| --- | --- | --- | --- |")
    for name, config in yamltext.read(CASES.read_text(), CASES.name).data.items():
        if arguments.only not in name:
            continue
        try:
            theirs, ours = merge(peer, arguments.work, config)
        except (RuntimeError, ArithmeticError, skillmerge.SkillmergeError) as error:
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
        found = compare(arguments.work, config, theirs, ours)
        print(f"| {name} | {found.largest:.1e} | {sum(found.wrong.values())} | {found.verdict} |", flush=True)
        wrong += bool(found.wrong)
    peer.kill()
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
