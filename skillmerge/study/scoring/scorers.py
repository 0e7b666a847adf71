"""What scores a merged model: a command that prints numbers, a Python function, or a built-in measure.

    'python eval.py {}'       the folder stands for {} (or behind the command); it prints a number, or one JSON object
    module:function           function(model) or function(model, tokenizer) -> a number, or names -> numbers
    perplexity:FILE.txt       of a text (lower is better)
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
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from skillmerge.durable import scratch_file
from skillmerge.errors import CheckFailed, SkillmergeError, UsageError
from skillmerge.study.scoring.built_in import answers, harness, perplexity, rows_of, text_of
from skillmerge.study.scoring.scores import NotFinite, Scores, as_scores

_SHOWN = 2000
_PRINTED = 1 << 20
"""Number of bytes that are read from the end of a command's output."""
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


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
        """Score a model in memory. What it prints goes to stderr. Raises CheckFailed if it fails, NotFinite."""
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
                fix="fix it and run the same sweep again; finished candidates are kept",
            ) from error


def find_scorer(text: str) -> Scorer:
    """Return what `--score` means. Raises UsageError for files and functions that are not there."""
    kind, colon, rest = text.partition(":")
    if colon and kind == "perplexity":
        content = text_of(rest)
        return Scorer(
            text,
            function=lambda model, tokenizer, seed: perplexity(model, tokenizer, content),
            minimise=True,
            digest=_digest(content),
        )
    if colon and kind == "qa":
        rows = rows_of(rest)
        return Scorer(
            text,
            function=lambda model, tokenizer, seed: answers(model, tokenizer, rows),
            digest=_digest(text_of(rest)),
        )
    if colon and kind == "lm-eval":
        if find_spec("lm_eval") is None:
            raise UsageError("`--score lm-eval` needs lm-evaluation-harness", fix="pip install 'skillmerge[lm-eval]'")
        files = "".join(text_of(name) for name in rest.split(",") if name.endswith(".yaml"))
        return Scorer(
            text,
            function=lambda model, tokenizer, seed: harness(model, tokenizer, rest, seed),
            digest=_digest(files),
        )
    if _FUNCTION.fullmatch(text):
        return _function_of(text)
    if not text.strip():
        raise UsageError(
            "--score is empty", fix="pass a command, module:function, qa:FILE.jsonl or perplexity:FILE.txt"
        )
    if Path(text).is_file() and shutil.which(text) is None:  # the shell would not find it, or not run it
        scored_by = {".jsonl": "qa:{}", ".txt": "perplexity:{}", ".py": "python {}", ".yaml": "lm-eval:{}"}
        meant = scored_by.get(Path(text).suffix, "").replace("{}", text)
        fix = f"did you mean `{meant}`?" if meant else "pass a command, module:function, qa:FILE or perplexity:FILE"
        raise UsageError(f"`--score {text}` is a file, not a command", fix=fix)
    return Scorer(text, command=text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def run_command(
    scorer: Scorer, folder: Path, seed: int, *, timeout: float | None = None, where: Path | None = None
) -> Scores:
    """Run the scoring command on a model's folder. timeout: seconds. where: the folder that it runs in.

    Raises CheckFailed if it fails, prints no number, or takes longer.
    """
    assert scorer.command is not None
    quoted = shlex.quote(str(folder))
    command = scorer.command.replace("{}", quoted) if "{}" in scorer.command else f"{scorer.command} {quoted}"
    environment = {**os.environ, "SKILLMERGE_SEED": str(seed)}
    # Into files: a pipe would block as long as any process that the command left behind holds it.
    with scratch_file() as out, scratch_file() as err:
        status = _run(command, out, err, environment, timeout, where)
        printed, complained = _end_of(out), _end_of(err)
    if status:
        raise CheckFailed(
            f"the command failed with exit status {status}: {command}\n{complained.strip()[-_SHOWN:]}",
            fix="fix it and run the same sweep again; finished candidates are kept",
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
    """Return the exit status of a shell's command. Raises CheckFailed if it takes too long."""
    process = subprocess.Popen(
        command, shell=True, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
        start_new_session=True, cwd=where,
    )  # fmt: skip
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        raise CheckFailed(f"the command took longer than {timeout:g} seconds: {command}") from None
    finally:  # with all processes that it has started, which might still write to the model
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end_of(stream: IO[bytes]) -> str:
    """Return the last of what was printed."""
    stream.seek(max(0, stream.seek(0, os.SEEK_END) - _PRINTED))
    return stream.read().decode(errors="replace")


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
    return Scorer(text, function=score, digest=_digest(text_of(path)) if path else "")
