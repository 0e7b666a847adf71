"""A naive merge of whole models in float64, which shares no code with the package.

Expressions are evaluated by Python itself, rounding is done on integers scaled by powers of two, with numpy.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

# precision in bits (hidden one included), smallest normal exponent
FORMATS = {torch.bfloat16: (8, -126), torch.float16: (11, -14), torch.float32: (24, -126)}


def evaluate(merge: str, tensors: Mapping[str, torch.Tensor], coefficients: Mapping[str, float]) -> np.ndarray:
    """The expression in float64, unrounded."""
    values = {name: tensor.to(torch.float64).numpy() for name, tensor in tensors.items()}
    return np.asarray(eval(merge, {"__builtins__": {}}, {**values, **coefficients}), dtype=np.float64)


def unit(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The unit in the last place of `dtype` at each value."""
    precision, smallest = FORMATS[dtype]
    _, exponent = np.frexp(values)
    return np.ldexp(1.0, np.maximum(exponent - 1, smallest) - precision + 1)


def rounded(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Nearest value of `dtype`, ties to even, still as float64."""
    step = unit(values, dtype)
    return np.rint(values / step) * step


def merge(
    expression: str, models: Mapping[str, Mapping[str, torch.Tensor]], coefficients: Mapping[str, float], donor: str
) -> dict[str, np.ndarray]:
    """Every tensor of the donor, correctly rounded to the donor's dtype."""
    return {
        name: rounded(
            evaluate(expression, {model: tensors[name] for model, tensors in models.items()}, coefficients),
            tensor.dtype,
        )
        for name, tensor in models[donor].items()
    }
