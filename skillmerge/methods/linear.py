"""The steps of one tensor: a term compiled for a few registers, with the signs turned so that the laws hold.

Registers hold tiles in the accumulation dtype; two to four of them are enough for any recipe that people
write. `evaluate` runs the steps; nothing here knows values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from skillmerge.methods.terms import Call, Leaf, Scaled, Sum, Term, calls, degree, has_calls, weights


@dataclass(frozen=True, slots=True)
class Step:
    """One operation on registers: load (register <- model), add, subtract, multiply, divide, reverse (0 - register),
    in place; and call (register <- method number `other` of its `operands`)."""

    op: str
    register: int
    other: int = -1
    model: str = ""
    factor: float = 1.0
    operands: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Program:
    """How to compute one tensor.

    result: the register that holds the value.
    base, update, asked (lambda): if the expression is one model plus a difference, that model, the register that
    holds what was subtracted from it (`-lambda * v`), and lambda; else "", -1 and 1.
    same_bits: triples (a, b, keep): where models a and b hold the same bits, the element is that of model
    keep. Together with the turning of signs they make the laws hold bit for bit, signs of zeros included.
    calls: the methods that it calls, inner ones first. readings: how often a tensor is read for these before.
    """

    models: tuple[str, ...]
    steps: tuple[Step, ...]
    registers: int
    result: int
    base: str
    update: int
    asked: float
    same_bits: tuple[tuple[str, str, str], ...]
    calls: tuple[Call, ...] = ()
    readings: int = 0


def compile_term(term: Term) -> Program:
    """Return the steps that evaluate `term` as it is written.

    Signs are the one freedom taken. A difference that is added is computed the other way round and
    subtracted: t + lam * (rl - sft) becomes t - lam * (sft - rl), which rounds alike everywhere, and where
    rl = sft it is t - (+0), which keeps the sign of a zero in t; t + (+0) would not.
    """
    compiler = _Compiler()
    result = compiler.run(term, negate=False)
    total = weights(term)
    return Program(
        models=tuple(dict.fromkeys(step.model for step in compiler.steps if step.op == "load")),
        steps=tuple(compiler.steps),
        registers=compiler.most,
        result=result,
        base=compiler.base,
        update=compiler.update,
        asked=compiler.asked,
        same_bits=() if has_calls(term) else tuple(_cancelling(total, compiler.free_pairs)),
        calls=tuple(compiler.calls),
        readings=max((call.readings for call in calls(term) if call.by_model), default=0) + _readings(term),
    )


class _Compiler:
    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.calls: list[Call] = []
        self.free: list[int] = []
        self.most = 0
        self.base, self.update, self.asked = "", -1, 1.0
        self.free_pairs: set[frozenset[str]] = set()

    def run(self, term: Term, negate: bool, inside: bool = False) -> int:
        """Emit the steps for `term` (or for its negative); the register that will hold it."""
        if isinstance(term, Leaf):
            register = self._register()
            self.steps.append(Step("load", register, model=term.model))
            if negate:
                self.steps.append(Step("multiply", register, factor=-1.0))
            return register
        if isinstance(term, Scaled):
            factor = -term.factor if negate else term.factor
            # A negative factor of a difference turns the difference round instead: zeros stay +0.
            turn = factor < 0 and degree(term.inner) == 0
            register = self.run(term.inner, negate=turn, inside=True)
            factor = -factor if turn else factor
            if factor != 1:
                op = "divide" if term.divide else "multiply"
                self.steps.append(Step(op, register, factor=factor))
            return register
        if isinstance(term, Call):
            return self._call(term, negate)
        return self._sum(term, negate, inside)

    def _call(self, call: Call, negate: bool) -> int:
        operands = tuple(self.run(operand, negate=False, inside=True) for operand in call.operands)
        result = operands[0]
        self.steps.append(Step("call", result, other=len(self.calls), operands=operands))
        self.calls.append(call)
        self.free += operands[1:]
        if negate:
            self.steps.append(Step("reverse", result))
        return result

    def _sum(self, term: Sum, negate: bool, inside: bool) -> int:
        left, right, minus = term.left, term.right, term.minus
        if not minus and degree(left) == 0 and degree(right) != 0:
            left, right = right, left
        if negate and minus:
            return self._subtract(right, left, False, inside)
        if not negate and not minus and degree(right) == 0 and degree(left) != 0:
            return self._subtract(left, right, True, inside)
        if minus:
            return self._subtract(left, right, False, inside)
        first, second = self._both((left, negate), (right, negate))
        self.steps.append(Step("add", first, second))
        self.free.append(second)
        return first

    def _subtract(self, left: Term, right: Term, negate_right: bool, inside: bool) -> int:
        first, second = self._both((left, False), (right, negate_right))
        self.steps.append(Step("subtract", first, second))
        if isinstance(left, Leaf) and isinstance(right, Leaf):
            self.free_pairs.add(frozenset((left.model, right.model)))
        if not inside and isinstance(left, Leaf) and degree(right) == 0:
            self.base, self.update = left.model, second
            self.asked = _factor(right) if negate_right else -_factor(right)
        else:
            self.free.append(second)
        return first

    def _both(self, left: tuple[Term, bool], right: tuple[Term, bool]) -> tuple[int, int]:
        """Evaluate the side that needs more registers first (Sethi and Ullman 1970)."""
        if _need(right[0]) > _need(left[0]):
            second = self.run(*right, inside=True)
            return self.run(*left, inside=True), second
        first = self.run(*left, inside=True)
        return first, self.run(*right, inside=True)

    def _register(self) -> int:
        if self.free:
            return self.free.pop()
        self.most += 1
        return self.most - 1


def _factor(term: Term) -> float:
    if not isinstance(term, Scaled):
        return 1.0
    return 1.0 / term.factor if term.divide else term.factor


def _need(term: Term) -> int:
    if isinstance(term, Leaf):
        return 1
    if isinstance(term, Scaled):
        return _need(term.inner)
    if isinstance(term, Call):
        return max(index + _need(operand) for index, operand in enumerate(term.operands))
    left, right = _need(term.left), _need(term.right)
    return max(left, right) if left != right else left + 1


def _readings(term: Term) -> int:
    """Calls side by side are answered in one reading; one that is inside another has to be ready before. Those of the
    whole model are all answered before others ask, and do not count."""
    if isinstance(term, Leaf):
        return 0
    if isinstance(term, Scaled):
        return _readings(term.inner)
    if isinstance(term, Sum):
        return max(_readings(term.left), _readings(term.right))
    return max(map(_readings, term.operands)) + (0 if term.by_model else term.readings)


def _cancelling(total: Mapping[str, float], free_pairs: set[frozenset[str]]) -> list[tuple[str, str, str]]:
    """Return pairs of models whose equal bits cancel and leave one model with factor 1, except those that the
    arithmetic itself already gets right."""
    names = list(total)
    rules = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            rest = {name: factor for name, factor in total.items() if name not in (a, b) and factor != 0}
            cancels = total[a] == -total[b] != 0
            if cancels and list(rest.values()) == [1.0] and frozenset((a, b)) not in free_pairs:
                rules.append((a, b, next(iter(rest))))
    return rules
