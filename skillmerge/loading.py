"""Load a model folder with transformers and run it once. A program of its own: `python -m skillmerge.loading DIR`.

Runs in a separate process, so that a broken model or library cannot take its caller along. Prints one JSON
line: ok, why, the class, and the sets of keys that must be empty. Knows no architecture: the class is the one
that the config names, and the inputs are made from what the model says it takes.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

_KEY_SETS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs", "conversion_errors")
_TOKENS = [[1, 2, 3, 4, 5, 6, 7, 8]]


def main(folder: str) -> dict[str, Any]:
    try:
        import transformers
    except ImportError:
        return {"ok": False, "absent": True, "why": "transformers is not installed"}
    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(folder)
    names = getattr(config, "architectures", None) or []
    kind = getattr(transformers, names[0], None) if names else None
    kind = kind or transformers.AutoModel
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    wrong = {key: sorted(map(str, info[key])) for key in _KEY_SETS if info.get(key)}
    report: dict[str, Any] = {"ok": not wrong, "class": type(model).__name__, "why": "", **wrong}
    if wrong:
        report["why"] = "; ".join(f"{key}: {', '.join(values[:5])}" for key, values in wrong.items())
        return report
    values = _first_output(model)
    finite = bool(values.isfinite().all())
    report.update(shape=list(values.shape), finite=finite, ok=finite)
    report["why"] = "" if finite else "its outputs are not finite on a short input"
    return report


def _first_output(model: Any) -> Any:
    """The first floating tensor of one forward pass on fixed token ids."""
    import torch

    model.eval()
    tokens = torch.tensor(_TOKENS)
    config = model.config
    inputs: dict[str, Any] = {}
    if model.main_input_name == "input_features":
        bins, length = config.num_mel_bins, 2 * config.max_source_positions
        inputs["input_features"] = torch.zeros(1, bins, length, dtype=model.dtype)
    else:
        inputs["input_ids"] = tokens
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens
    with torch.inference_mode():
        outputs = model(**inputs)
    return next(
        value for value in outputs.to_tuple() if hasattr(value, "isfinite") and value.is_floating_point()
    )


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        try:
            outcome = main(sys.argv[1])
        except Exception as error:
            outcome = {"ok": False, "why": f"{type(error).__name__}: {error}"}
    print(json.dumps(outcome))
