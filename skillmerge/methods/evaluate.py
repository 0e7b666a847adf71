"""Run a compiled term on tiles, as it is written, in the dtype of accumulation; `rounding` rounds the result.

Every operation here is a separate elementwise kernel of IEEE 754 arithmetic (no fused multiply-add, no
reductions but to a yes or no, or in a fixed order), so that CPU and CUDA and any cutting into tiles give the
same bytes. Knows nothing about files, models or threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from skillmerge.methods.linear import Program


def accumulation_dtype(dtypes: list[torch.dtype]) -> torch.dtype:
    """float32 where every input has 16 bits or fewer, float64 otherwise."""
    return torch.float32 if all(dtype.itemsize <= 2 for dtype in dtypes) else torch.float64


class Scratch:
    """The registers and temporaries of one worker on one device, made once and used for every tile.

    Register i holds up to `elements` numbers in the accumulation dtype; temporaries are per item size.
    """

    def __init__(self, device: torch.device, elements: int) -> None:
        self.device, self.elements = device, elements
        self._made: dict[tuple[str, int, torch.dtype], Tensor] = {}

    def get(self, purpose: str, index: int, dtype: torch.dtype, count: int) -> Tensor:
        key = (purpose, index, dtype)
        if key not in self._made:
            self._made[key] = torch.empty(self.elements, dtype=dtype, device=self.device)
        return self._made[key][:count]

    def clear(self) -> None:
        self._made.clear()


CallRunner = Callable[[int, list[Tensor]], Tensor | None]
"""Number of a call in its program, its operands -> its result; None where nothing more is wanted."""


def evaluate(
    program: Program, inputs: Mapping[str, Tensor], scratch: Scratch, call: CallRunner | None = None
) -> tuple[Tensor, Tensor | None]:
    """Run the program's steps on tiles of equal length. call: runs the calls of methods, if there are any.

    Returns the unrounded value and, where the program has one, what was subtracted from its base; both live
    in `scratch` until the next call. A program that only loads gives the input itself.
    """
    if len(program.steps) == 1:
        return inputs[program.steps[0].model], None
    count = next(iter(inputs.values())).numel()
    dtype = accumulation_dtype([tensor.dtype for tensor in inputs.values()])
    registers = [scratch.get("register", index, dtype, count) for index in range(program.registers)]
    for step in program.steps:
        register = registers[step.register]
        if step.op == "load":
            register.copy_(inputs[step.model])
        elif step.op == "add":
            register.add_(registers[step.other])
        elif step.op == "subtract":
            register.sub_(registers[step.other])
        elif step.op == "multiply":
            register.mul_(step.factor)
        elif step.op == "reverse":
            register.neg_().add_(0.0)  # of zero it is +0
        elif step.op == "call":
            assert call is not None, "a program with calls needs who runs them"
            result = call(step.other, [registers[index] for index in step.operands])
            if result is None:
                break
            register.copy_(result)
        else:
            # A tensor, not a number: CUDA would multiply by the reciprocal of a number.
            register.div_(torch.full((1,), step.factor, dtype=torch.float64, device=register.device).to(dtype))
    return registers[program.result], registers[program.update] if program.update >= 0 else None
