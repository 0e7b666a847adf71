"""Load a model folder with transformers and run it once; `child` gives it a process of its own.

The report has ok, why, the class, the sets of keys that must be empty, named as the loaded model names them, what
`tokenizer_probe` says, the perplexity of a text, and what the model generates. Knows no
architecture: the class is the one that the config names, and the inputs are made from what the model says it
takes. Pictures beside text are not made up: a vision tower is loaded but not run.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from skillmerge.study.loads.child import told
from skillmerge.study.loads.generation import LIKELY
from skillmerge.study.loads.tokenizer_probe import TEXTS, probe
from skillmerge.study.scoring.built_in import perplexity, tokenizer_of

_KEY_SETS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
_TOKENS = [[1, 2, 3, 4, 5, 6, 7, 8]]
_AUDIO_SAMPLES = 16000
_SHOWN = 5


class _Warnings(logging.Handler):
    """Collects the warnings of transformers while it loads: some of its exceptions only refer to them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        self.table_rows: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        lines = self.messages[-1].splitlines()
        cells = ([cell.strip() for cell in line.split(" | ")] for line in lines if " | " in line)
        self.table_rows += [": ".join(filter(None, row)) for row in cells if row[0] != "Key"]


def main(folder: str, text: str | None = None, tokens: int = 0) -> dict[str, Any]:
    """Load a model and return a report. Faults of the model are in the report, never raised.

    text: a file to measure the perplexity of. tokens: how many to generate.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            return {"ok": False, "machine": f"transformers cannot be imported: {error}"}
        return {"ok": False, "absent": True, "why": "transformers is not installed"}
    log: Any = transformers.utils.logging
    log.set_verbosity_warning()
    log.disable_default_handler()
    log.disable_progress_bar()
    warnings = _Warnings()
    log.add_handler(warnings)
    try:
        model, report = _load(transformers, folder)
        report = {
            "transformers": transformers.__version__,
            **report,
            "tokenizer": probe(Path(folder), model, warnings.messages),
        }
        return report if model is None or not report["ok"] else {**report, **_run(model, Path(folder), text, tokens)}
    except Exception as error:
        failed = told(error)
        if "why" in failed:
            failed["why"] = "; ".join([*warnings.table_rows[:_SHOWN], failed["why"]])
        return failed
    finally:
        log.remove_handler(warnings)


def _load(transformers: Any, folder: str) -> tuple[Any, dict[str, Any]]:
    """Return the model, or None if there is no class for it, and the report on its keys."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    names = getattr(config, "architectures", None) or ["AutoModel"]
    kind = getattr(transformers, names[0], None)
    if kind is None:
        return None, {"ok": False, "why": f"config.json names `{names[0]}`, a class that transformers lacks"}
    # With sizes ignored, tensors of other sizes are named in the report instead of raised without a name.
    model, info = kind.from_pretrained(folder, dtype="auto", ignore_mismatched_sizes=True, output_loading_info=True)
    wrong = {key: sorted(map(_described, info[key])) for key in _KEY_SETS if info.get(key)}
    why = "; ".join(f"{key}: {', '.join(found[:_SHOWN])}" for key, found in wrong.items())
    return model.eval(), {"ok": not wrong, "class": type(model).__name__, "why": why, **wrong}


def _run(model: Any, folder: Path, text: str | None, tokens: int) -> dict[str, Any]:
    """Run the model on made-up inputs, on a text, and to continue a prompt."""
    try:
        values = _first_output(model)
    except Exception as error:
        failed = told(error)
        if "why" in failed:
            failed["why"] = f"its weights load, but it fails on made-up inputs: {failed['why']}"
        return failed
    finite = bool(values.isfinite().all())
    why = "" if finite else "its outputs are not finite on a short input"
    report: dict[str, Any] = {"ok": finite, "why": why, "shape": list(values.shape), "finite": finite}
    if text is not None:
        try:
            content = Path(text).read_text(encoding="utf-8")
            report["perplexity"] = perplexity(model, tokenizer_of(folder), content)["perplexity"].value
        except Exception as error:
            report["no_perplexity"] = f"{type(error).__name__}: {error}"
    if tokens and finite:
        report["generated"] = _generated(model, _prompt(model, folder), tokens) if _writes_text(model) else None
    return report


def _writes_text(model: Any) -> bool:
    """Return whether the model generates tokens from tokens."""
    encodes = getattr(model.config, "is_encoder_decoder", False)
    return bool(model.can_generate() and not encodes and model.main_input_name == "input_ids")


def _prompt(model: Any, folder: Path) -> list[int]:
    """Return ids of a short text, or any that the model has."""
    from transformers import AutoTokenizer

    rows = model.get_input_embeddings().num_embeddings
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        ids = list(tokenizer.encode(TEXTS[0]))
    except Exception:  # `probe` has reported why
        ids = []
    return ids if len(ids) > 1 and max(ids) < rows else [token % rows for token in _TOKENS[0]]


def _generated(model: Any, prompt: list[int], tokens: int) -> dict[str, Any]:
    """Return the greedy continuation of a prompt, with what `generation` compares.

    Every step reads all that comes before it: no cache, and none of the model's own settings for generation.
    """
    import torch

    ids, steps = list(prompt), []
    with torch.inference_mode():
        for _ in range(tokens):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
            best = logits.log_softmax(-1).topk(min(LIKELY, len(logits)))
            likely = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            steps.append({"likely": likely, "largest": float(logits.abs().max())})
            ids.append(int(logits.argmax()))
    dtype = str(model.dtype).removeprefix("torch.")
    return {"prompt": prompt, "dtype": dtype, "tokens": ids[len(prompt) :], "steps": steps}


def _described(key: Any) -> str:
    """Return a key, with both shapes where transformers gives them."""
    if not isinstance(key, tuple):
        return str(key)
    name, found, wanted = key
    return f"{name} {list(found)} instead of {list(wanted)}"


def _first_output(model: Any) -> Any:
    """Return the first floating tensor of one forward pass on fixed inputs."""
    import torch

    with torch.inference_mode():
        outputs = model(**_inputs(model))
    for value in outputs.to_tuple():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
    raise ValueError("it returns no floating-point tensor")


def _inputs(model: Any) -> dict[str, Any]:
    """Return the smallest inputs of the kind that the model names as its main one."""
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
