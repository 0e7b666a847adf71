"""Words of other tools, and their spelling here: numbers, words, signs, methods.

Tables of data. Knows text only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from skillmerge.errors import did_you_mean

_LATER = "write weights of 16 or 32 bits, and quantize the output afterwards"
_WORDS = {
    "dtype": {
        "fp16 f16 half torch.float16 torch.half float_16 16": "float16",
        "bf16 b16 bfloat torch.bfloat16 brain": "bfloat16",
        "fp32 f32 float single full torch.float32 torch.float 32": "float32",
        "fp64 f64 float64 double torch.float64": "float32",
        "auto none keep original donor default": "same",
        "fp8 float8 e4m3 fp8_e4m3 int8 int4 nf4 fp4 4bit 8bit q4 q8": _LATER,
    },
    "kind": {
        "task_vector task-vector taskvector delta difference diff update vector": "skill",
        "lora peft": "adapter",
        "merge full checkpoint": "model",
    },
    "compression": {"zst zstandard": "zstd", "gzip gz lz4 xz bz2 true": "zstd", "false no off": "none"},
    "rounding": {"round round_nearest even rne default": "nearest", "random sr": "stochastic"},
    "modules": {
        "attn self_attn self-attention self_attention": "attention",
        "ffn feed_forward feedforward mlps": "mlp",
        "norms layernorm layer_norm rmsnorm ln": "norm",
        "embed embeddings embed_tokens wte tokens": "embedding",
        "lm_head heads output unembed": "head",
        "gate routers": "router",
        "experts moe": "expert",
    },
}
"""Key -> words of others -> ours, or what to do."""

_KEYS = {
    "default": "value lam lambda weight scale", "like": "donor base base_model template", "rules": "layers schedule",
    "dtype": "torch_dtype out_dtype precision", "path": "folder dir output_path save_path model",
    "repo": "repo_id name",
    "merge": "formula expression equation method merge_method", "models": "model checkpoints inputs",
    "modules": "module kind kinds", "layers": "layer blocks block layer_range",
    "experts": "expert expert_range expert_ids",
    "tensors": "tensor names pattern glob filter",
    "ramp": "gradient linear schedule range", "value": "weight scale lambda",
    "coefficients": "coefs weights lambdas params parameters",
    "shard_size": "max_shard_size out_shard_size", "license": "licence", "output": "out target destination",
}  # fmt: skip
"""Key of ours -> what others call it."""

_MEAN = "for an average write (a + b) / 2"
_LINE = "for the straight line between two models write (1 - t) * a + t * b"
_SUM = "for the plain sum of updates write base + lam * (a - base) + lam * (b - base)"
_CALLS = {
    "mean average avg soup model_soup uniform": _MEAN,
    "linear weighted weighted_average": "for a weighted average write (2 * a + b) / 3",
    "lerp mix interpolate blend": _LINE,
    "task_arithmetic sum add": _SUM,
    "nuslerp": "write base + slerp(a - base, b - base, t=0.5)",
    "dare dare_linear": "write base + lam * (drop(a - base, density=0.5) + drop(b - base, density=0.5))",
    "dare_ties": "write base + elect(drop(a - base, density=0.5), drop(b - base, density=0.5))",
    "della della_linear": "write base + lam * (drop(a - base, density=0.5, spread=0.15) + "
    "drop(b - base, density=0.5, spread=0.15))",
    "ramplus_tl ramplus ram_plus": "write base + ram(a - base, b - base, boost=0.1, cap=0.2)",
    "breadcrumbs": "write base + lam * (band(a - base, density=0.9) + band(b - base, density=0.9))",
    "breadcrumbs_ties": "write base + elect(band(a - base, density=0.9), band(b - base, density=0.9))",
    "ties_merging merge_ties": "write base + ties(a - base, b - base, density=0.3)",
    "derive": "write match(v, to=u) for the size of another update, project(v, off=u) to take its direction away",
    "stock": "write base + model_stock(a - base, b - base)",
    "magmax emr": "write base + pick(a - base, b - base), or elect with pick=max",
    "nearswap": "write a + clip(b - a, at=0.001)",
    "arcee_fusion": "it is not offered: on updates of RL's size its scores are noise",
    "diff difference delta task_vector sub subtract": "for a difference write a - b",
    "scale mul multiply": "write a factor and `*`: 0.5 * (a - b)",
    "max min abs clamp sqrt norm exp log round": "the expression computes no functions of weights: + - * / alone",
}
_SIGNS = {
    "−": "write -", "–": "write -", "—": "write -", "×": "write *", "·": "write *", "∗": "write *", "÷": "write /",
    "^": "there are no powers: write lam * lam", "%": "write percent as a number: 0.5 for 50%",
    "=": "write the arithmetic alone, such as target + lam * (rl - sft)",
    ":": "write the arithmetic alone, such as target + lam * (rl - sft)",
    "[": "write parentheses: ( and )", "{": "write parentheses: ( and )",
    "]": "write parentheses: ( and )", "}": "write parentheses: ( and )",
    "$": "names stand alone: leave `$` out", "'": "names stand alone: leave the quotes out",
    '"': "names stand alone: leave the quotes out", "@": "only + - * / and parentheses",
    ".": "models are added whole: for some tensors give a coefficient `rules`",
}  # fmt: skip


def sign_meant(sign: str) -> str | None:
    """Return what to write for a character that the expression does not have, or None."""
    return _SIGNS.get(sign)


def call_meant(name: str, methods: list[str]) -> str:
    """Return what to write for a method of other tools, or for a misspelled one of ours."""
    return (
        _row(_CALLS, name) or did_you_mean(name.lower(), methods) or "`skillmerge methods` lists those that there are"
    )


def word_meant(key: str, word: str, known: Sequence[str]) -> str | None:
    """Return what to write for a word that is not one of the `known` values of a key, or None."""
    found = _row(_WORDS.get(key, {}), word)
    if found is None:
        return None
    return f"did you mean `{found}`?" if found in known else found


def kind_meant(word: str) -> str | None:
    """Return the kind of module that a word means, or None."""
    kinds = _WORDS["modules"]
    return word if word in kinds.values() else _row(kinds, word)


def key_meant(key: str, known: Sequence[str]) -> str | None:
    """Return the key of ours, among the `known`, that others call so."""
    found = next((ours for ours, theirs in _KEYS.items() if ours in known and key.lower() in theirs.split()), None)
    return f"did you mean `{found}`?" if found else None


def number_meant(text: str) -> str | None:
    """Return what to write for text that means a number, such as 50%, 0,5 or 1/2; None if it means none."""
    plain = text.strip().replace("−", "-").replace("–", "-").replace("_", "")
    if match := re.fullmatch(r"([-+]?[\d.,]+) ?%", plain):
        plain, percent = match[1], True
    else:
        percent = False
    if re.fullmatch(r"[-+]?\d+,\d+", plain):
        plain = plain.replace(",", ".")
    over = re.fullmatch(r"([-+]?\d+(?:\.\d+)?) ?/ ?(\d+(?:\.\d+)?)", plain)
    try:
        value = float(over[1]) / float(over[2]) if over else float(re.sub(r"(?<=\d)[fdFD]$", "", plain))
    except (ValueError, ZeroDivisionError):
        return None
    return f"write {value / 100 if percent else value:.10g}" if abs(value) < float("inf") else None


def numbers_meant(name: str, values: Sequence[object]) -> str:
    """Return what to write where several numbers stand in the place of one coefficient."""
    listed = [repr(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(listed) < 2 or len(listed) != len(values):
        return "a coefficient is one number, or a table with `rules`"
    ramp = f"`{name}: {{rules: [{{layers: 0-, ramp: [{', '.join(listed)}]}}]}}`"
    tried = f"`skillmerge sweep RECIPE --set {name}={','.join(listed)}`"
    return f"to change it over the layers, write {ramp}; to try each: {tried}"


def _row(table: dict[str, str], word: str) -> str | None:
    return next((ours for theirs, ours in table.items() if word.lower() in theirs.split()), None)
