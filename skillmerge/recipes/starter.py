"""The verb init, and the recipe that it writes: complete, commented, and one edit away from running."""

from __future__ import annotations

import os
from pathlib import Path

from skillmerge.durable import disk_errors
from skillmerge.errors import UsageError

RECIPE = """\
# A skillmerge recipe. `skillmerge plan FILE` shows what it would do, `skillmerge apply FILE` does it.
skillmerge: 1                       # format version

models:                             # name -> folder with *.safetensors; relative to this file
  target: ./path/to/target-sft      # the model that gets the skill, after its own SFT
  rl: ./path/to/source-rl           # a model that has the skill
  sft: ./path/to/source-sft         # the same model before it learnt the skill

coefficients:
  lam: 1.0                          # how much of the skill; or a schedule, block by block:
  # lam:
  #   default: 1.0
  #   rules:                        # the last rule that matches a tensor wins
  #     - {layers: 0-3, value: 0.0}
  #     - {layers: 4-, ramp: [0.5, 1.0]}
  #     - {modules: mlp, value: 0.8}        # attention, mlp, norm, embedding, head, router, expert
  #     - {tensors: ["*embed_tokens*", "*lm_head*"], value: 0}

merge: target + lam * (rl - sft)    # Parametric Skill Transfer (arXiv 2601.11258)

# copy:                             # tensors taken as they are from one model
#   - {tensors: "model.visual.*", from: target}
# ignore: ["lm_head.weight"]        # tensors of other models that the output does without

output:
  path: ./merged
  # dtype: same                     # same (as the donor) | bfloat16 | float16 | float32
  # rounding: nearest               # nearest | stochastic
  # seed: 0                         # of stochastic rounding
  # shard_size: same                # same (the donor's layout) | 5GB

# gates:                            # what must hold before the output is published (docs/gates.md)
#   vanished: {max: 0.2}            # share of the update that rounding took
#   norm_ratio: {max: 0.05}         # |change| / |weights|, of each kind of module
#   loads: true                     # in transformers
#   commands:
#     - {name: accuracy, run: "python eval.py {}", min: 0.6}
"""


def init(path: str | os.PathLike[str] = "recipe.yaml") -> Path:
    """Write a commented recipe to start from, and return its path. Raises UsageError where a file is there already."""
    target = Path(path)
    if target.exists():
        raise UsageError(f"{path} exists already", fix="name another file: skillmerge init my-recipe.yaml")
    with disk_errors(target):
        target.write_text(RECIPE, encoding="utf-8")
    return target
