"""How well a merged model does: a command that prints numbers, a Python function, or one of the built-in measures.

    'python eval.py {}'       the folder stands for {} (or behind the command); it prints a number, or one JSON object
    module:function           function(model) or function(model, tokenizer) -> a number, or names -> numbers
    perplexity:FILE.txt       of a text (less is better)
    qa:FILE.jsonl             closed book: {"question": …, "answer": …} in each line, exact match, greedy decoding
    lm-eval:TASKS             lm-evaluation-harness, which has to be installed

All but commands work on a transformers model in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from skillmerge.errors import CheckFailed, SkillmergeError, UsageError

QUESTIONS_AT_ONCE = 64
_WINDOW = 1024
_NEW_TOKENS = 32
_SHOWN = 2000
_PRINTED = 1 << 20
"""Bytes of a command's output that are looked at: its last."""
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
CONFIDENCE = 1.959964
"""Standard errors on each side of a 95 % interval."""


class NotFinite(ValueError):
    """A score that is no number: what a merge that has broken gets."""


@dataclass(frozen=True, slots=True)
class Score:
    """A number, and its standard error where that is known. Raises NotFinite for what is no number."""

    value: float
    error: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.value) or not math.isfinite(self.error or 0.0):
            raise NotFinite(f"a score of {self.value} (error {self.error})")

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
    minimise: whether less is better. digest: of the file or module that it reads, which its name does not tell."""

    name: str
    command: str | None = None
    function: Callable[[Any, Any, int], Scores] | None = None
    minimise: bool = False
    digest: str = ""

    def score(self, model: Any, tokenizer: Any, seed: int) -> Scores:
        """Score a model in memory. What it prints goes to stderr. Raises CheckFailed where it fails, NotFinite."""
        assert self.function is not None
        try:
            with contextlib.redirect_stdout(sys.stderr):
                return self.function(model, tokenizer, seed)
        except (SkillmergeError, NotFinite):
            raise
        except (Exception, SystemExit) as error:
            where = "".join(traceback.format_exception(error)[-4:]).strip()
            raise CheckFailed(
                f"--score {self.name} failed: {type(error).__name__}: {error}\n{where[-_SHOWN:]}",
                fix="mend it, then run the same sweep again: it goes on where it stopped",
            ) from error


def find_scorer(text: str) -> Scorer:
    """What `--score` means. Raises UsageError for files and functions that are not there."""
    kind, colon, rest = text.partition(":")
    if colon and kind == "perplexity":
        content = _text_of(rest)
        return Scorer(
            text,
            function=lambda model, tokenizer, seed: perplexity(model, tokenizer, content),
            minimise=True,
            digest=_digest(content),
        )
    if colon and kind == "qa":
        rows = _rows_of(rest)
        return Scorer(
            text,
            function=lambda model, tokenizer, seed: answers(model, tokenizer, rows),
            digest=_digest(_text_of(rest)),
        )
    if colon and kind == "lm-eval":
        files = "".join(_text_of(name) for name in rest.split(",") if name.endswith(".yaml"))
        return Scorer(
            text,
            function=lambda model, tokenizer, seed: _harness(model, tokenizer, rest, seed),
            digest=_digest(files),
        )
    if _FUNCTION.fullmatch(text):
        return _function_of(text)
    if not text.strip():
        raise UsageError(
            "--score is empty", fix="give a command, module:function, qa:FILE.jsonl or perplexity:FILE.txt"
        )
    return Scorer(text, command=text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def run_command(
    scorer: Scorer, folder: Path, seed: int, *, timeout: float | None = None, where: Path | None = None
) -> Scores:
    """Run the scoring command on a model's folder. timeout: seconds. where: the folder that it runs in.

    Raises CheckFailed where it fails, prints no number, or takes longer.
    """
    assert scorer.command is not None
    quoted = shlex.quote(str(folder))
    command = scorer.command.replace("{}", quoted) if "{}" in scorer.command else f"{scorer.command} {quoted}"
    environment = {**os.environ, "SKILLMERGE_SEED": str(seed)}
    # Into files: a pipe would be waited for as long as anything that the command has left behind holds it.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        status = _run(command, out, err, environment, timeout, where)
        printed, complained = _end_of(out), _end_of(err)
    if status:
        raise CheckFailed(
            f"the command failed with exit status {status}: {command}\n{complained.strip()[-_SHOWN:]}",
            fix="mend it, then run the same sweep again: it goes on where it stopped",
        )
    lines = printed.strip().splitlines()
    for text in (lines[-1] if lines else "", printed):
        try:
            return as_scores(json.loads(text))
        except NotFinite:
            raise
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            continue
    raise CheckFailed(
        f"the command printed no number: {command}",
        fix='it must print a number, or one JSON object such as {"skill": 0.8, "retention": 0.9}, in its last line',
    )


def _run(
    command: str,
    out: IO[bytes],
    err: IO[bytes],
    environment: Mapping[str, str],
    timeout: float | None,
    where: Path | None,
) -> int:
    """The exit status of a shell's command. Raises CheckFailed where it takes too long."""
    process = subprocess.Popen(
        command, shell=True, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
        start_new_session=True, cwd=where,
    )  # fmt: skip
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        raise CheckFailed(f"the command was not done after {timeout:g} seconds: {command}") from None
    finally:  # whatever it has started goes with it: it might still write into the model
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end_of(stream: IO[bytes]) -> str:
    """The last of what was printed."""
    stream.seek(max(0, stream.seek(0, os.SEEK_END) - _PRINTED))
    return stream.read().decode(errors="replace")


def as_scores(found: Any) -> dict[str, Score]:
    """A number, items (of which the mean counts), or a table of them. Raises TypeError, ValueError, KeyError."""
    if isinstance(found, Mapping) and set(found) != {"value", "error"}:
        names = [str(name) for name in found]
        if not names or any(not name or len(name) > 100 or not name.isprintable() for name in names):
            raise ValueError(f"scores need plain names, not {names!r:.200}")
        return {str(name): _as_score(value) for name, value in found.items()}
    return {"score": _as_score(found)}


def _as_score(value: Any) -> Score:
    if isinstance(value, Score):
        return value
    if isinstance(value, Mapping):
        return Score(float(value["value"]), float(value["error"]))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return of_items([float(item) for item in value])
    if isinstance(value, str | bool) or value is None:
        raise TypeError(f"{value!r} is no score")
    return Score(float(value))


def of_items(values: Sequence[float]) -> Score:
    """The mean of independent items, and its standard error.

    Of items that are right or wrong the error is Agresti and Coull's (1998), which does not vanish where all agree.
    """
    count, mean = len(values), sum(values) / len(values)
    if set(values) <= {0.0, 1.0}:
        share = (sum(values) + 2) / (count + 4)
        return Score(mean, math.sqrt(share * (1 - share) / (count + 4)))
    if not math.isfinite(mean):
        return Score(mean)
    return Score(mean, statistics.stdev(values) / math.sqrt(count) if count > 1 else None)


def together(repeats: Sequence[Scores]) -> dict[str, Score]:
    """Scores of several runs: their means. The error is the greater of what the runs show and what each says of
    itself, since the runs may all have the same questions."""
    if len(repeats) == 1:
        return dict(repeats[0])
    if any(list(scores) != list(repeats[0]) for scores in repeats):
        raise CheckFailed("the repeats of one candidate have scores of different names")
    result = {}
    for name in repeats[0]:
        values = [scores[name].value for scores in repeats]
        own = statistics.fmean(scores[name].error or 0.0 for scores in repeats)
        between = statistics.stdev(values) / math.sqrt(len(values))
        result[name] = Score(statistics.fmean(values), max(own, between))
    return result


def _function_of(text: str) -> Scorer:
    module, _, name = text.partition(":")
    if os.getcwd() not in sys.path:  # and stays there: the function may import more when it runs
        sys.path.insert(0, os.getcwd())
    try:
        home = importlib.import_module(module)
        function = getattr(home, name)
        parameters = inspect.signature(function).parameters.values()
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"--score {text}: {type(error).__name__}: {error}",
            fix="module:function is looked for in the current folder and among installed ones",
        ) from error
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    takes = sum(parameter.kind in places for parameter in parameters)

    def score(model: Any, tokenizer: Any, seed: int) -> Scores:
        return as_scores(function(model, tokenizer) if takes > 1 else function(model))

    path = getattr(home, "__file__", None)
    return Scorer(text, function=score, digest=_digest(_text_of(path)) if path else "")


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
    for number, line in enumerate(_text_of(path).split("\n"), start=1):
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


def tokenizer_of(folder: Path) -> Any:
    """A folder's tokenizer as tokenizer.json says (AutoTokenizer rebuilds some from the name of the model's type
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
        raise UsageError("perplexity: the model's folder has no tokenizer", fix="put its files beside the weights")
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
    """The share of questions whose greedy answer is one of those wanted, but for case and spaces.

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
    """Greedy continuations of prompts, whatever the model's own settings for sampling are.

    Prompts of one length go together, so that none is padded and each has the room that it has alone. Raises
    UsageError for a prompt that leaves none.
    """
    import torch
    from transformers import GenerationConfig

    if tokenizer is None:
        raise UsageError("qa: the model's folder has no tokenizer", fix="put the tokenizer's files beside its weights")
    tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    context = int(getattr(model.config, "max_position_embeddings", None) or 1 << 30)
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(tokens):
        if not 0 < len(row) < context:
            raise UsageError(
                f"qa: question {index + 1} has {len(row)} tokens, and the model reads {context} with its answer",
                fix="shorten it or leave it out",
            )
        by_length.setdefault(len(row), []).append(index)
    end = model.generation_config.eos_token_id
    end = end if end is not None else tokenizer.eos_token_id
    result = [""] * len(prompts)
    own = model.generation_config
    try:
        for length, indices in by_length.items():
            # What is left open here would be taken from the model's own.
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
    """What stands behind an answer that is done: the token that ended it, or any."""
    return int(end[0]) if isinstance(end, list) else int(end or 0)


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
