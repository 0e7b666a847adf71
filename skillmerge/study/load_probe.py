"""Load a model folder with transformers and run it once; `loading` starts it as a program of its own.

Of its own, so that a broken model or library cannot take its caller along. Prints one JSON line:
ok, why, the class, the sets of keys that must be empty, named as the loaded model names them, and the perplexity
of the text in the file TEXT. Knows no
architecture: the class is the one that the config names, and the inputs are made from what the model says it
takes. Pictures beside text are not made up: a vision tower is loaded but not run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

from skillmerge.errors import is_machine
from skillmerge.study.scoring.built_in import perplexity, tokenizer_of

_KEY_SETS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
_TOKENS = [[1, 2, 3, 4, 5, 6, 7, 8]]
_AUDIO_SAMPLES = 16000
_SHOWN = 5


class _Warnings(logging.Handler):
    """What transformers warns of while it loads: for some troubles, its exception only points to that."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.table_rows: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        lines = record.getMessage().splitlines()
        cells = ([cell.strip() for cell in line.split(" | ")] for line in lines if " | " in line)
        self.table_rows += [": ".join(filter(None, row)) for row in cells if row[0] != "Key"]


def main(folder: str, text: str | None = None) -> dict[str, Any]:
    """The report of one load. Whatever goes wrong with the model is in the report, never raised."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            return {"ok": False, "why": f"transformers cannot be imported: {error}"}
        return {"ok": False, "absent": True, "why": "transformers is not installed"}
    log: Any = transformers.utils.logging
    log.set_verbosity_warning()
    log.disable_default_handler()
    log.disable_progress_bar()
    warnings = _Warnings()
    log.add_handler(warnings)
    try:
        return {"transformers": transformers.__version__, **_load(transformers, folder, text)}
    except Exception as error:
        details = [*warnings.table_rows[:_SHOWN], f"{type(error).__name__}: {error}"]
        return {"ok": False, "why": "; ".join(details), **({"machine": True} if is_machine(error) else {})}
    finally:
        log.remove_handler(warnings)


def _load(transformers: Any, folder: str, text: str | None) -> dict[str, Any]:
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    names = getattr(config, "architectures", None) or ["AutoModel"]
    kind = getattr(transformers, names[0], None)
    if kind is None:
        return {"ok": False, "why": f"config.json names `{names[0]}`, a class that transformers lacks"}
    # With sizes ignored, tensors of other sizes are named in the report instead of raised without a name.
    model, info = kind.from_pretrained(folder, dtype="auto", ignore_mismatched_sizes=True, output_loading_info=True)
    wrong = {key: sorted(map(_described, info[key])) for key in _KEY_SETS if info.get(key)}
    report: dict[str, Any] = {"ok": not wrong, "class": type(model).__name__, "why": "", **wrong}
    if wrong:
        report["why"] = "; ".join(f"{key}: {', '.join(found[:_SHOWN])}" for key, found in wrong.items())
        return report
    try:
        values = _first_output(model)
    except Exception as error:
        why = f"its weights load, but it does not run on made-up inputs: {type(error).__name__}: {error}"
        return {**report, "ok": False, "why": why}
    finite = bool(values.isfinite().all())
    why = "" if finite else "its outputs are not finite on a short input"
    report |= {"ok": finite, "why": why, "shape": list(values.shape), "finite": finite}
    if text is not None:
        try:
            content = Path(text).read_text(encoding="utf-8")
            report["perplexity"] = perplexity(model, tokenizer_of(Path(folder)), content)["perplexity"].value
        except Exception as error:
            report["no_perplexity"] = f"{type(error).__name__}: {error}"
    return report


def _described(key: Any) -> str:
    """A key, with both shapes where transformers gives them."""
    if not isinstance(key, tuple):
        return str(key)
    name, found, wanted = key
    return f"{name} {list(found)} instead of {list(wanted)}"


def _first_output(model: Any) -> Any:
    """The first floating tensor of one forward pass on fixed inputs."""
    import torch

    with torch.inference_mode():
        outputs = model.eval()(**_inputs(model))
    for value in outputs.to_tuple():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
    raise ValueError("it returns no floating-point tensor")


def _inputs(model: Any) -> dict[str, Any]:
    """The smallest inputs of the kind that the model names as its main one."""
    import torch

    config, name, tokens = model.config, model.main_input_name, torch.tensor(_TOKENS)
    inputs = {}
    if name == "input_ids":
        inputs[name] = tokens
    elif name == "input_features":
        inputs[name] = torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions, dtype=model.dtype)
    elif name == "input_values":
        inputs[name] = torch.zeros(1, _AUDIO_SAMPLES, dtype=model.dtype)
    elif name == "pixel_values":
        inputs[name] = torch.zeros(1, config.num_channels, config.image_size, config.image_size, dtype=model.dtype)
    else:
        raise ValueError(f"no input of the kind `{name}` can be made up")
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens
    return inputs


def run() -> None:
    """The separate process: its arguments are the folder and, where there is one, the text; its answer is one line."""
    with contextlib.redirect_stdout(sys.stderr):
        outcome = main(*sys.argv[1:])
    print(json.dumps(outcome))
