"""The built-in scores of a model in memory: questions and answers, perplexity, lm-evaluation-harness."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skillmerge.errors import CheckFailed, UsageError
from skillmerge.study.scoring.scores import Score, of_items

QUESTIONS_AT_ONCE = 64
_WINDOW = 1024
_NEW_TOKENS = 32


# The built-in measures.


def text_of(path: str) -> str:
    """Return the text of a file that a score reads. Raises UsageError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        where = "paths start at the folder where you run the command"
        raise UsageError(f"`--score`: file `{path}` does not exist", fix=f"check the path; {where}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"`--score`: `{path}` is not text in UTF-8", fix="save it as UTF-8") from error
    except OSError as error:
        fix = "pass a text file that you may read"
        raise UsageError(f"`--score`: `{path}` cannot be read: {error.strerror}", fix=fix) from error
    if not text.strip():
        raise UsageError(f"`--score`: `{path}` is empty", fix="pass a file with text")
    return text


def rows_of(path: str) -> list[dict[str, Any]]:
    """Return the questions of a JSONL file, checked."""
    rows = []
    for number, line in enumerate(text_of(path).split("\n"), start=1):
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
                fix='write lines such as {"question": "…", "answer": "…"}; "pattern" may hold a regular expression',
            ) from error
        rows.append(row)
    return rows


def tokenizer_of(folder: Path) -> Any:
    """Return a folder's tokenizer as tokenizer.json says (AutoTokenizer rebuilds some from the name of the model's type
    alone), or None."""
    import transformers

    kinds: Any = transformers
    if (folder / "tokenizer.json").exists():
        return kinds.PreTrainedTokenizerFast.from_pretrained(folder)
    if any((folder / name).exists() for name in ("tokenizer.model", "vocab.json", "tokenizer_config.json")):
        return kinds.AutoTokenizer.from_pretrained(folder)
    return None


def perplexity(model: Any, tokenizer: Any, text: str) -> dict[str, Score]:
    """exp of the mean negative log likelihood of each token but a window's first, in windows that do not overlap."""
    import torch

    if tokenizer is None:
        raise UsageError(
            "perplexity: the model's folder has no tokenizer", fix="add the tokenizer's files beside the weights"
        )
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
    value = math.exp(mean) if mean < 700 else math.inf
    return {"perplexity": Score(value, None if error is None else value * error)}


def answers(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
    """Return the share of questions with a correct greedy answer, ignoring case and spaces.

    The answer ends at the first line's end; `pattern`, where a question has one, picks its first group.
    """
    right: list[float] = []
    said = generate(model, tokenizer, [row["question"] for row in rows])
    for row, text in zip(rows, said, strict=True):
        line = (text.strip().split("\n") or [""])[0]
        if row["pattern"] is not None:
            match = row["pattern"].search(line)
            line = (match[1] if match.re.groups else match[0]) or "" if match else ""
        right.append(float(_plain(line) in map(_plain, row["answers"])))
    return {"accuracy": of_items(right)}


def generate(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int = _NEW_TOKENS) -> list[str]:
    """Return greedy continuations of prompts, whatever the model's own settings for sampling are.

    Prompts of one length go together, so that none is padded and each has the room that it has alone. Raises
    UsageError for a prompt that leaves none.
    """
    import torch
    from transformers import GenerationConfig

    if tokenizer is None:
        raise UsageError("qa: the model's folder has no tokenizer", fix="add the tokenizer's files beside the weights")
    tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    context = int(getattr(model.config, "max_position_embeddings", None) or 1 << 30)
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(tokens):
        if not 0 < len(row) < context:
            raise UsageError(
                f"qa: question {index + 1} has {len(row)} tokens, but the model reads {context}, answer included",
                fix="shorten it or leave it out",
            )
        by_length.setdefault(len(row), []).append(index)
    end = model.generation_config.eos_token_id
    end = end if end is not None else tokenizer.eos_token_id
    result = [""] * len(prompts)
    own = model.generation_config
    try:
        for length, indices in by_length.items():
            # Anything left unset would come from the model's own settings.
            model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
                max_new_tokens=min(new_tokens, context - length), do_sample=False, eos_token_id=end,
                pad_token_id=_pad(end),
            )  # fmt: skip
            for start in range(0, len(indices), QUESTIONS_AT_ONCE):
                some = indices[start : start + QUESTIONS_AT_ONCE]
                batch = torch.tensor([tokens[index] for index in some], device=model.device)
                with torch.inference_mode():
                    made = model.generate(batch, attention_mask=torch.ones_like(batch))[:, length:]
                for index, text in zip(some, tokenizer.batch_decode(made, skip_special_tokens=True), strict=True):
                    result[index] = text
    finally:
        model.generation_config = own
    return result


def _pad(end: Any) -> int:
    """Return the padding behind a finished answer: the token that ended it, or any."""
    return int(end[0]) if isinstance(end, list) else int(end or 0)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def harness(model: Any, tokenizer: Any, tasks: str, seed: int) -> dict[str, Score]:
    """lm-evaluation-harness: names of tasks, or files of tasks (*.yaml), with commas between."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

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
