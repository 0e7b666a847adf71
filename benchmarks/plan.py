"""Planning a large family: 50,000 tensors in each of three models, and three unequal tokenizers of 150,000 tokens.

    python benchmarks/plan.py [--rounds 3] [--tensors 50000] [--tokens 150000]

Prints wall and CPU seconds and the peak memory of `skillmerge plan --json`, with the tokenizers and without.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from skillmerge.checkpoints.safetensors import build_header

MODELS = ("target", "rl", "sft")
RECIPE = """\
skillmerge: 1
models: {target: target, rl: rl, sft: sft}
coefficients: {lam: {default: 0.7, rules: [{modules: [embedding, head], value: 0}]}}
merge: target + lam * (rl - sft)
accept: [tokenization]
"""
RULE = ", rules: [{modules: [embedding, head], value: 0}]"


def write_model(folder: Path, tensors: int, rows: int) -> None:
    """A checkpoint of matrices of one element; its file is sparse."""
    folder.mkdir()
    layers = tensors // 500
    tokens = {"model.embed_tokens.weight": (rows, 1)}
    experts = (f"{layer}.mlp.experts.{expert}" for layer in range(layers) for expert in range(500))
    shapes = {**tokens, **{f"model.layers.{name}.up_proj.weight": (1, 1) for name in experts}}
    header, specs = build_header((name, "BF16", shape) for name, shape in shapes.items())
    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(header)
        stream.truncate(specs[-1].end)
    config = {"model_type": "qwen3_moe", "num_hidden_layers": layers, "vocab_size": rows, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))


def write_tokenizer(folder: Path, tokens: int, seed: int) -> None:
    """A byte-pair tokenizer; the last thousand tokens and a few merges are this model's own."""
    draw = random.Random(0)
    words = list(dict.fromkeys("".join(draw.choices("abcdefghijklmnopqrstuvwxyzĠ", k=9)) for _ in range(tokens)))
    own = [f"{word}{seed}" for word in words[-1000:]]
    vocabulary = {word: number for number, word in enumerate(words[:-1000] + own)}
    merges = [[word[:4], word[4:]] for word in words]
    merges[seed], merges[seed + 1] = merges[seed + 1], merges[seed]
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges}
    document = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False))


def measure(folder: Path) -> tuple[float, float, float, int]:
    """Wall and CPU seconds, peak megabytes and exit status of a plan."""
    command = [sys.executable, "-m", "skillmerge", "plan", str(folder / "recipe.yaml"), "--json"]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    cpu = usage.ru_utime + usage.ru_stime
    return time.monotonic() - started, cpu, usage.ru_maxrss / 1e3, os.waitstatus_to_exitcode(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tensors", type=int, default=50_000)
    parser.add_argument("--tokens", type=int, default=150_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for part in ("without", "rows left out", "rows merged"):
            folder = Path(name) / part.replace(" ", "-")
            folder.mkdir()
            for seed, model in enumerate(MODELS, 1):
                write_model(folder / model, options.tensors, options.tokens)
                if part != "without":
                    write_tokenizer(folder / model, options.tokens, seed)
            (folder / "recipe.yaml").write_text(RECIPE.replace(RULE, "") if part == "rows merged" else RECIPE)
            for _ in range(options.rounds):
                wall, cpu, peak, status = measure(folder)
                print(f"tokenizers: {part:13}  {wall:5.2f} s wall  {cpu:5.2f} s CPU  {peak:4.0f} MB  status {status}")


if __name__ == "__main__":
    main()
