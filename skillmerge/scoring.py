"""How well a merged model does: a command that prints numbers, a Python function, or one of the built-in measures.

    'python eval.py {}'       the folder stands for {} (or behind the command); it prints a number, or one JSON object
    module:function           function(model) or function(model, tokenizer) -> a number, or names -> numbers
    perplexity:FILE.txt       of a text (less is better)
    qa:FILE.jsonl             closed book: {"question": …, "answer": …} in each line, exact match, greedy decoding
    lm-eval:TASKS             lm-evaluation-harness, which has to be installed

All but commands work on a transformers model in memory.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillmerge.errors import CheckFailed, UsageError

QUESTIONS_AT_ONCE = 64
_WINDOW = 1024
_NEW_TOKENS = 32
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
CONFIDENCE = 1.959964
"""Standard errors on each side of a 95 % interval."""


@dataclass(frozen=True, slots=True)
class Score:
    """A number, and its standard error where that is known."""

    value: float
    error: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 %, as far as errors are normal."""
        if self.error is None:
            return None
        return self.value - CONFIDENCE * self.error, self.value + CONFIDENCE * self.error


Scores = Mapping[str, Score]


@dataclass(frozen=True, slots=True)
class Scorer:
    """name: as it was asked for. Exactly one of `command` (of a shell) and `function` (of a model and a tokenizer).
    minimise: whether less is better."""

    name: str
    command: str | None = None
    function: Callable[[Any, Any, int], Scores] | None = None
    minimise: bool = False


def find_scorer(text: str) -> Scorer:
    """What `--score` means. Raises UsageError for files and functions that are not there."""
    kind, colon, rest = text.partition(":")
    if colon and kind == "perplexity":
        content = _text_of(rest)
        return Scorer(
            text, function=lambda model, tokenizer, seed: perplexity(model, tokenizer, content), minimise=True
        )
    if colon and kind == "qa":
        rows = _rows_of(rest)
        return Scorer(text, function=lambda model, tokenizer, seed: answers(model, tokenizer, rows))
    if colon and kind == "lm-eval":
        return Scorer(text, function=lambda model, tokenizer, seed: _harness(model, tokenizer, rest, seed))
    if _FUNCTION.fullmatch(text):
        return Scorer(text, function=_function_of(text))
    if not text.strip():
        raise UsageError(
            "--score is empty", fix="give a command, module:function, qa:FILE.jsonl or perplexity:FILE.txt"
        )
    return Scorer(text, command=text)


def run_command(scorer: Scorer, folder: Path, seed: int) -> Scores:
    """Run the scoring command on a model's folder. Raises CheckFailed where it fails or prints no number."""
    assert scorer.command is not None
    quoted = shlex.quote(str(folder))
    command = scorer.command.replace("{}", quoted) if "{}" in scorer.command else f"{scorer.command} {quoted}"
    environment = {**os.environ, "SKILLMERGE_SEED": str(seed)}
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise CheckFailed(
            f"the scoring command failed with exit status {done.returncode}: {command}\n{done.stderr.strip()[-2000:]}",
            fix="mend it, then run the same sweep again: it goes on where it stopped",
        )
    lines = done.stdout.strip().splitlines()
    for text in (lines[-1] if lines else "", done.stdout):
        try:
            return as_scores(json.loads(text))
        except (ValueError, TypeError):
            continue
    raise CheckFailed(
        f"the scoring command printed no number: {command}",
        fix='it must print a number, or one JSON object such as {"skill": 0.8, "retention": 0.9}, in its last line',
    )


def as_scores(found: Any) -> dict[str, Score]:
    """A number, items (of which the mean counts), or a table of them. Raises TypeError, ValueError."""
    if isinstance(found, Mapping) and set(found) != {"value", "error"}:
        if not found:
            raise ValueError("no score")
        return {str(name): _as_score(value) for name, value in found.items()}
    return {"score": _as_score(found)}


def _as_score(value: Any) -> Score:
    if isinstance(value, Score):
        return value
    if isinstance(value, Mapping):
        return Score(float(value["value"]), float(value["error"]))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return of_items([float(item) for item in value])
    if isinstance(value, str):
        raise TypeError(value)
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is not a score")
    return Score(number)


def of_items(values: Sequence[float]) -> Score:
    """The mean of independent items, and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Score(statistics.fmean(values), error)


def together(repeats: Sequence[Scores]) -> dict[str, Score]:
    """Scores of several runs: their means, with the error that the runs show; of one run, its own."""
    if len(repeats) == 1:
        return dict(repeats[0])
    return {name: of_items([scores[name].value for scores in repeats]) for name in repeats[0]}


def _function_of(text: str) -> Callable[[Any, Any, int], Scores]:
    module, _, name = text.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"--score {text}: {error}",
            fix="module:function is looked for in the current folder and among installed ones",
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    takes = len(inspect.signature(function).parameters)

    def score(model: Any, tokenizer: Any, seed: int) -> Scores:
        try:
            return as_scores(function(model, tokenizer) if takes > 1 else function(model))
        except (TypeError, ValueError) as error:
            raise CheckFailed(
                f"--score {text}: {type(error).__name__}: {error}", fix="it must return a number, or names -> numbers"
            ) from error

    return score


# The built-in measures.


def _text_of(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--score: {path} cannot be read: {error}") from error
    if not text.strip():
        raise UsageError(f"--score: {path} is empty")
    return text


def _rows_of(path: str) -> list[dict[str, Any]]:
    """The questions of a JSONL file, checked."""
    rows = []
    for number, line in enumerate(_text_of(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            row["answers"] = [row["answer"]] if isinstance(row["answer"], str) else list(row["answer"])
            good = (
                isinstance(row["question"], str) and row["question"] and all(isinstance(a, str) for a in row["answers"])
            )
            row["pattern"] = re.compile(row["pattern"]) if row.get("pattern") else None
            if not good or not row["answers"]:
                raise ValueError("question and answer must be text")
        except (ValueError, KeyError, TypeError, re.error) as error:
            raise UsageError(
                f"--score: {path}:{number}: is not a question: {error}",
                fix='a line is {"question": "…", "answer": "…"}; "pattern" may hold a regular expression',
            ) from error
        rows.append(row)
    return rows


def perplexity(model: Any, tokenizer: Any, text: str) -> dict[str, Score]:
    """exp of the mean negative log likelihood of each token but a window's first, in windows that do not overlap."""
    import torch

    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    window = min(_WINDOW, int(getattr(model.config, "max_position_embeddings", None) or _WINDOW))
    if len(tokens) < 2:
        raise UsageError("perplexity: the text has fewer than two tokens")
    losses: list[float] = []
    weights: list[int] = []
    with torch.inference_mode():
        for start in range(0, len(tokens), window):
            piece = tokens[start : start + window][None].to(model.device)
            if piece.shape[1] > 1:
                logits = model(input_ids=piece).logits[0, :-1].float()
                losses.append(float(torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum")))
                weights.append(piece.shape[1] - 1)
    mean = math.fsum(losses) / sum(weights)
    error = of_items([loss / weight for loss, weight in zip(losses, weights, strict=True)]).error
    value = math.exp(min(mean, 700.0))
    return {"perplexity": Score(value, None if error is None else value * error)}


def answers(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
    """The share of questions whose greedy answer is one of those wanted, but for case and spaces.

    The answer ends at the first line's end; `pattern`, where a question has one, picks its first group.
    """
    right: list[float] = []
    for start in range(0, len(rows), QUESTIONS_AT_ONCE):
        some = rows[start : start + QUESTIONS_AT_ONCE]
        for row, said in zip(some, generate(model, tokenizer, [row["question"] for row in some]), strict=True):
            line = said.strip().split("\n")[0]
            if row["pattern"] is not None:
                match = row["pattern"].search(line)
                line = (match[1] if match.groups() else match[0]) if match else ""
            right.append(float(_plain(line) in map(_plain, row["answers"])))
    return {"accuracy": of_items(right)}


def generate(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int = _NEW_TOKENS) -> list[str]:
    """Greedy continuations of prompts, all at once."""
    import torch

    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    inputs.pop("token_type_ids", None)
    room = int(getattr(model.config, "max_position_embeddings", None) or 1 << 20) - inputs["input_ids"].shape[1]
    with torch.inference_mode():
        tokens = model.generate(
            **inputs, max_new_tokens=max(1, min(new_tokens, room)), do_sample=False, temperature=None, top_p=None,
            top_k=None, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    return list(tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _harness(model: Any, tokenizer: Any, tasks: str, seed: int) -> dict[str, Score]:
    """lm-evaluation-harness: names of tasks, or files of tasks (*.yaml), with commas between."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError("lm-eval: needs lm-evaluation-harness", fix="pip install 'skillmerge[lm-eval]'") from error
    names = [name for name in tasks.split(",") if name]
    folders = sorted({str(Path(name).parent) for name in names if name.endswith(".yaml")})
    wanted = [Path(name).stem if name.endswith(".yaml") else name for name in names]
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=QUESTIONS_AT_ONCE),
        tasks=wanted,
        task_manager=TaskManager(include_path=folders or None),
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        bootstrap_iters=0,
        log_samples=False,
    )
    scores: dict[str, Score] = {}
    for task, row in found["results"].items():
        for key, value in row.items():
            metric, _, how = key.partition(",")
            if (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and how
                and not metric.endswith("_stderr")
            ):
                spread = row.get(f"{metric}_stderr,{how}")
                name = f"{task}/{metric}" + ("" if how == "none" else f",{how}")
                scores[name] = Score(float(value), float(spread) if isinstance(spread, int | float) else None)
    if not scores:
        raise CheckFailed(f"lm-eval found no score for {tasks}")
    return scores
