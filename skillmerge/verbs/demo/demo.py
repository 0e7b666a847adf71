"""The verb demo: four small trained models, the recipe of Parametric Skill Transfer, a control.

The models are base; the source's SFT and RL, which answers questions about people it has read about; and the target's
SFT, which has read about other people and cannot answer. `experiments/past_miniature` trained them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillmerge.brief import brief, drawn
from skillmerge.checkpoints.kinds.table import open_folder
from skillmerge.checkpoints.safetensors import read_header
from skillmerge.durable import disk_errors
from skillmerge.errors import UsageError
from skillmerge.outputs.verify import Verdict
from skillmerge.reporter import Reporter
from skillmerge.verbs.apply import apply
from skillmerge.verbs.result import Result
from skillmerge.verbs.verify import verify

if TYPE_CHECKING:
    from skillmerge.verbs.demo.miniature import Question

RECIPE = """\
# Parametric Skill Transfer: put what RL taught the source into the target.
skillmerge: 1
models:
  target: ./target-sft      # has read about the people in the questions; answers badly
  rl: ./source-rl           # has learned to answer, about other people
  sft: ./source-sft         # the same model before it learned that
coefficients:
  lam: 1.0
merge: target + lam * (rl - sft)
output:
  path: ./{output}
"""

SCORE = """\
# Print which questions a model answers correctly: python eval.py FOLDER
import json
import sys

from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
with open("questions.jsonl") as lines:
    rows = [json.loads(line) for line in lines]
tokens = tokenizer([row["question"] for row in rows], return_tensors="pt")  # all have the same length
made = model.generate(**tokens, max_new_tokens=5, do_sample=False)[:, tokens["input_ids"].shape[1] :]
answers = tokenizer.batch_decode(made, skip_special_tokens=True)
print(json.dumps({"accuracy": [int(text.split()[-1:] == [row["answer"]]) for text, row in zip(answers, rows)]}))
"""

_EVERY = 8
"""A sweep asks one of this many questions."""

SENTENCE = (
    "The world is made up, and the models have 78,000 parameters. The skill elicits a habit that the base model "
    "already "
    "has and seldom shows."
)
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Shown:
    """One model's results: shares of questions answered correctly, and the greedy answers."""

    name: str
    greedy: float
    sampled: float
    answers: tuple[tuple[str, ...], ...]
    right: tuple[bool, ...]

    __repr__ = brief
    _repr_html_ = drawn


@dataclass(frozen=True, slots=True)
class Demo:
    """The demo's recipe, merge, and the answers of three models.

    answers: of the target before, the control, and the merged model.
    """

    recipe: Path
    result: Result
    verdict: Verdict
    answers: tuple[Shown, ...]

    __repr__ = brief
    _repr_html_ = drawn

    def as_dict(self) -> dict[str, Any]:
        return {
            "recipe": str(self.recipe),
            "output": str(self.result.output),
            "answers": [{"model": it.name, "greedy": it.greedy, "sampled": it.sampled} for it in self.answers],
        }


def demo(
    folder: str | os.PathLike[str] = "skillmerge-demo",
    *,
    reporter: Reporter | None = None,
    finished: Callable[[Path | Result | Verdict], None] = lambda part: None,
) -> Demo:
    """Write four small trained models to a new folder, transfer a skill between them, and let them answer questions.

    finished: called with each part as soon as it is ready: the recipe's path, the merge, the verdict.
    Raises UsageError if the folder is not empty.
    """
    root = Path(folder)
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise UsageError(f"{folder} already exists", fix="choose another folder: `skillmerge demo my-demo`")
    with disk_errors(root):
        recipe, control = write_family(root)
        for name, text in score_files().items():
            (root / name).write_text(text, encoding="utf-8")
    finished(recipe)
    result = apply(recipe, reporter=reporter, stats="full")
    finished(result)
    verdict = verify(result.output)
    finished(verdict)
    shuffled = apply(control).output
    answers = (
        run("target-sft, before", root / "target-sft"),
        run("with the skill's elements shuffled", shuffled),
        run("merged, with the skill", result.output),
    )
    return Demo(recipe, result, verdict, answers)


def write_family(folder: Path) -> tuple[Path, Path]:
    """Write base, source-sft, source-rl, target-sft and a control, `source-shuffled`, into `folder`. Return the recipes
    of the merge and of the control."""
    from skillmerge.verbs.demo.miniature import FAMILY, MODELS

    for name in MODELS:
        shutil.copytree(FAMILY / name, folder / name)
    _write_shuffled(folder)
    recipe, control = folder / "recipe.yaml", folder / "control.yaml"
    recipe.write_text(RECIPE.format(output="merged"), encoding="utf-8")
    text = RECIPE.format(output="shuffled").replace("./source-rl  ", "./source-shuffled")
    control.write_text(text, encoding="utf-8")
    return recipe, control


def score_files() -> dict[str, str]:
    """Return what a sweep can score the models with, by file name: some questions, and a command that asks them."""
    from skillmerge.verbs.demo.miniature import questions

    rows = [{"question": " ".join(it.words), "answer": it.wanted, "pattern": r"(\S+)$"} for it in questions()[::_EVERY]]
    return {"questions.jsonl": "".join(json.dumps(row) + "\n" for row in rows), "eval.py": SCORE}


def _write_shuffled(folder: Path) -> None:
    """Write a control: the source's SFT model plus the skill with shuffled elements, which has the same sizes only."""
    import torch

    from skillmerge.bits import memory_of
    from skillmerge.engine.values import read_values

    out = folder / "source-shuffled"
    shutil.copytree(folder / "source-rl", out)
    generator = torch.Generator().manual_seed(0)
    models = [open_folder(str(folder / name), folder / name) for name in ("source-sft", "source-rl")]
    with open(out / "model.safetensors", "rb+") as stream:
        for spec in read_header(stream.name, "model.safetensors").tensors:
            sft, rl = (read_values(model, spec.name) for model in models)
            update = (rl.float() - sft.float())[torch.randperm(spec.elements, generator=generator)]
            stream.seek(spec.start)
            moved = (sft.float() + update).to(sft.dtype)  # must outlive the view of its memory
            stream.write(memory_of(moved))
    for model in models:
        model.close()


def run(name: str, folder: Path) -> Shown:
    """Ask a model all questions about the target's people, once greedily and four times by sampling."""
    import torch

    from skillmerge.verbs.demo.miniature import Miniature, questions

    asked = questions()
    model = Miniature(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # A model this small is slower with more threads, ten times so on a busy machine.
    try:
        greedy = model.answer(asked, greedy=True)
        sampled = [model.answer(asked, greedy=False, seed=seed).share for seed in range(4)]
    finally:
        torch.set_num_threads(threads)
    return Shown(name, greedy.share, sum(sampled) / 4, tuple(greedy.words), tuple(greedy.right))


def examples(before: Shown, after: Shown) -> list[tuple[Question, str, str]]:
    """Pick questions about different people, with the answers before and after, in the order of the file."""
    from skillmerge.verbs.demo.miniature import questions

    asked = questions()
    chosen = range(0, len(asked), len(asked) // _SHOWN + 1)
    return [(asked[i], " ".join(before.answers[i]), " ".join(after.answers[i])) for i in chosen]
