"""The recipes that are recorded, and the script that scores merges."""

from __future__ import annotations

FAMILY = "models: {target: ./target, rl: ./rl, sft: ./sft}"
PAST = f"""\
# Parametric Skill Transfer.
skillmerge: 1
{FAMILY}
coefficients:
  lam: 0.7
merge: target + lam * (rl - sft)
output:
  path: ./merged
"""
RAMP = f"""\
skillmerge: 1
{FAMILY}
coefficients:
  λ:
    default: 1.0
    rules:
      - {{layers: 0-, ramp: [0.2, 1.0]}}
      - {{modules: [norm, embedding], value: 0.0}}
      - {{tensors: "*.q_proj.*", layers: [1], value: 1.5}}
merge: target + λ * (rl - sft)
output: {{path: ./merged}}
"""
TWO = """\
skillmerge: 1
models: {target: ./target, a: ./rl, b: ./rl2, sft: ./sft}
coefficients: {math: 1.0, tools: 0.7}
merge: target + math * (a - sft) + tools * (b - sft)
output: {path: ./merged, shard_size: 20KB}
"""
AVERAGE = """\
skillmerge: 1
models: {a: ./target, b: ./rl, c: ./sft}
merge: (a + b + c) / 3
output: {path: ./merged, like: b}
"""
CHAT = """\
skillmerge: 1
models: {continued: ./continued, chat: ./rl, base: ./base}
coefficients: {lam: 1.0}
merge: continued + lam * (chat - base)
copy:
  - {tensors: ["*embed_tokens*", "lm_head*"], from: continued}
output: {path: ./merged}
"""
REMOVAL = """\
skillmerge: 1
models: {model: ./target, rl: ./rl, sft: ./sft}
coefficients:
  lam:
    default: -0.5
    rules:
      - {modules: router, value: 0.0}
      - {modules: expert, value: -0.25}
merge: model + lam * (rl - sft)
output: {path: ./merged}
"""
COPY = f"""\
skillmerge: 1
{FAMILY}
coefficients: {{lam: 0.8}}
merge: target + lam * (rl - sft)
copy:
  - {{tensors: "*.router_bias", from: rl}}
ignore: ["layers.9.*", value_head.weight]
output: {{path: ./merged, like: target}}
"""
WIDE = PAST.replace("path: ./merged", "path: ./merged\n  dtype: float32\n  shard_size: 20KB")
STOCHASTIC = PAST.replace("path: ./merged", "path: ./merged\n  rounding: stochastic\n  seed: 3")
GATES = (
    PAST
    + """\
gates:
  changed: {min: 0.01}
  vanished: {max: 0.9}
  realised: {min: 0.5, max: 1.5}
  realised_lambda: {min: 0.3, max: 1.1}
  norm_ratio: {max: 0.5, modules: [attention, mlp]}
  cosine_z: {max: 8, base: ./base}
  finite: true
  commands:
    - {name: probe, run: "python3 score.py {}", min: -10, score: skill}
"""
)
WITH_SKILL = """\
skillmerge: 1
models:
  target: ./target
  math: {skill: ./skill}
coefficients: {lam: 0.7}
merge: target + lam * math
output: {path: ./merged}
"""
PATCHED = """\
skillmerge: 1
models:
  sft: ./sft
  rl: {patch: ./patch, onto: sft}
  target: ./target
merge: target + 0.5 * (rl - sft)
output: {path: ./from-patch}
"""
BLEND = """\
skillmerge: 1
models:
  math: {skill: ./skill}
  code: {skill: ./code}
coefficients:
  share: {default: 0.7, rules: [{modules: norm, value: 0.0}]}
merge: share * math + 0.3 * code
output: {kind: skill, path: ./blend}
"""
ZSTD = BLEND.replace("path: ./blend", "path: ./packed, compression: zstd, dtype: bfloat16")
KEEP = """\
skillmerge: 1
models: {rl: ./rl, sft: ./sft}
merge: rl - sft
output: {kind: skill, path: ./kept, keep: 0.2, compression: none}
"""
SWEPT = RAMP.replace("value: 1.5", "value: 1.25")
SCORE = """\
import json, struct, sys
from pathlib import Path
data = (Path(sys.argv[1]) / "model.safetensors").read_bytes()
start = 8 + int.from_bytes(data[:8], "little")
words = struct.unpack_from("<64H", data, start + 5000)
mean = sum(struct.unpack("<f", struct.pack("<I", word << 16))[0] for word in words) / 64
print("scoring", file=sys.stderr)
print(json.dumps({"skill": round(1 - (mean - 0.004) ** 2, 9), "mean": round(mean, 9)}))
"""
