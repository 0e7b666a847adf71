"""What is fuzzed: everything that reads text from outside, with seeds, a vocabulary and an oracle for each.

A target takes any bytes and says whether it accepted them. It may refuse them with a SkillmergeError (or an
ExpressionError, which the recipe turns into one); any other exception, and an accepted input of which the
oracle thinks otherwise, is a finding. Knows nothing about where the bytes come from: `fuzz.py` lets atheris
make them, `test_fuzz.py` hypothesis.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from memory_files import weight_file
from safetensors import SafetensorError, deserialize

from skillmerge.checkpoints.checkpoint import INDEX_FILE
from skillmerge.checkpoints.kinds import dense
from skillmerge.checkpoints.safetensors import build_header, fetch_header, parse_header
from skillmerge.checkpoints.stores.memory import Memory
from skillmerge.errors import InputError, SkillmergeError
from skillmerge.methods.linear import compile_term
from skillmerge.methods.table import METHODS
from skillmerge.methods.terms import calls, degree, spread, weights
from skillmerge.outputs import manifest
from skillmerge.outputs.verify import check_structure
from skillmerge.plans import saved as savedplan
from skillmerge.plans.planner import plan_recipe
from skillmerge.recipes.formula.bind import bind
from skillmerge.recipes.formula.donor import donor_of
from skillmerge.recipes.formula.parser import MAX_OPERATIONS, parse
from skillmerge.recipes.formula.tree import ExpressionError, calls_in
from skillmerge.recipes.parse import parse_recipe
from skillmerge.verbs.apply import apply
from skillmerge.verbs.plan import plan as make_plan

SHAPES = {"model.embed_tokens.weight": (4, 2), "model.layers.0.mlp.up.weight": (2, 2), "model.layers.1.norm": (2,)}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_MAX_DATA = 1 << 16


@dataclass(frozen=True)
class Target:
    """accepts: whether bytes are taken. seeds: bytes that are. words: what a fuzzer may put in."""

    accepts: Callable[[bytes], bool]
    seeds: Sequence[bytes]
    words: Sequence[str]


_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\w.+-]+|\s+|[^\w\s]', re.DOTALL)


def edited(content: bytes, words: Sequence[str], dice: random.Random) -> bytes:
    """The same text with one token put in, taken out, doubled, exchanged, or another number."""
    parts = _TOKEN.findall(content) or [b""]
    at, other = dice.randrange(len(parts)), dice.randrange(len(parts))
    word = dice.choice(words).encode(errors="surrogatepass")
    match dice.randrange(6):
        case 0:
            parts[at] = word
        case 1:
            parts.insert(at, word)
        case 2:
            del parts[at : at + dice.choice((1, 1, 1, 2, 5))]
        case 3:
            parts.insert(other, parts[at])
        case 4:
            parts[at], parts[other] = parts[other], parts[at]
        case _:
            numbers = [place for place, part in enumerate(parts) if part.isdigit()] or [at]
            parts[dice.choice(numbers)] = dice.choice((b"0", b"1", b"2", b"8", b"-1", b"1.5", b"9" * 19))
    return b"".join(parts)


# ------------------------------------------------------------------------------------------------------ header


def header(content: bytes) -> bool:
    """A header's text, the data being as long as it says; or, where that does not begin as one, a whole file."""
    if content.startswith(b"{"):
        ends = [int(end) for end in re.findall(rb"(\d{1,5})\s*\]\s*\}", content)]
        content = len(content).to_bytes(8, "little") + content + bytes(min(_MAX_DATA, max(ends, default=0)))
    try:
        raw = fetch_header(lambda start, count: content[start : start + count], len(content), "file")
        specs = parse_header(raw[8:], len(content), "file", "file")
    except InputError:
        return False
    try:
        found = deserialize(content)
    except SafetensorError as error:
        raise AssertionError(f"accepted, and the safetensors library refuses it: {error}") from error
    theirs = {name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in found}
    ours = {spec.name: (spec.dtype, spec.shape, content[spec.start : spec.end]) for spec in specs}
    assert ours == theirs
    return True


_TENSORS = [("a", "F32", (2, 3)), ("b.ü", "BF16", (4,)), ("c", "U8", (0, 7)), ("d", "F4", (2,)), ("e", "I64", ())]
_ESCAPED = rb'{"__metadata__":{"a":"\u00e9"},"x\"\\y":{"dtype":"F8_E4M3","shape":[1,1],"data_offsets":[0,1]}}'
_HEADERS = [build_header(_TENSORS[:count])[0][8:] for count in range(len(_TENSORS) + 1)] + [_ESCAPED]
_HEADER_WORDS = [
    *('"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', "[0,0]", "[]", "{}", "-0", "1e0", "true", "null"),
    *('"U8"', '"F6_E2M3"', '"F64"', '"BOOL"', '"C64"', "18446744073709551615", "9223372036854775808", "4294967296"),
    *("\\u0000", "\\ud800", "\\ud83d\\ude00", "NaN", "Infinity", "\ufeff", "\u202e", "  ", "\f"),
]


# ------------------------------------------------------------------------------------------------------- index


_PLACES = dict(zip(SHAPES, (SHARDS[0], SHARDS[0], SHARDS[1]), strict=True))
_FILES = {
    file: weight_file({name: shape for name, shape in SHAPES.items() if _PLACES[name] == file}) for file in SHARDS
}


def index(content: bytes) -> bool:
    """An index is taken where it says exactly what the shards hold, and means that to any reader of
    JSON; files that it does not name are left out and said to be."""
    try:
        found = dense.open("memory", Memory({**_FILES, INDEX_FILE: content}))
    except InputError:
        return False
    named = {name: file for name, file in _PLACES.items() if file not in found.unread}
    assert {name: spec.file for name, spec in found.tensors.items()} == named
    assert json.loads(content)["weight_map"] == named
    return True


_INDEXES = [
    json.dumps({"metadata": {"total_size": 28}, "weight_map": _PLACES}).encode(),
    json.dumps({"weight_map": dict(reversed(_PLACES.items()))}, indent=2).encode(),
]
_INDEX_WORDS = [*(f'"{word}"' for word in (*SHAPES, *SHARDS, "weight_map", "metadata", "../x.safetensors")), "{}", "[["]


# ----------------------------------------------------------------------------------------------------- recipes


def recipe(content: bytes) -> bool:
    """A recipe, and, where it makes sense by itself and reads folders alone, its plan over models in memory."""
    try:
        parsed = parse_recipe(content.decode("utf-8-sig"), "recipe.yaml", Path())
        if parsed.skills or parsed.patches:
            return True
        for name in parsed.used_models():
            parsed.model_place(name)
        checkpoints = {name: dense.open(name, Memory(_MODEL)) for name in parsed.used_models()}
        plan = plan_recipe(parsed, checkpoints)
        plan.refuse_problems()
    except (SkillmergeError, UnicodeDecodeError):
        return False
    assert plan.tensors.keys() <= SHAPES.keys()
    assert all(math.isfinite(value) for tensor in plan.tensors.values() for value in tensor.coefficients)
    return True


_MODEL = {"model.safetensors": weight_file(SHAPES), "config.json": b'{"num_hidden_layers": 2}'}
_RECIPE = """\
skillmerge: 1
models:
  target: ./t
  rl: {path: ./rl}
  sft: hf://acme/sft@main
coefficients:
  lam:
    default: 1.0
    rules:
      - {layers: 0-1, value: 0.5}
      - {layers: [0, 1-], ramp: [0.5, 1e-3]}
      - {modules: [norm, mlp], tensors: "*.mlp.*", value: 0}
  λ: -.5
merge: target + lam * (rl - sft) / 2
copy:
  - {tensors: "*norm", from: target}
ignore: []
output: {path: ./merged, like: target, dtype: float32, rounding: stochastic, seed: 7, shard_size: 5GB}
"""
_SKILL_RECIPE = "{skillmerge: 1, models: {t: ./t, s: {skill: ./s}, p: {patch: p, onto: t}}, merge: t+0.5*s+(p-t)}"
_OUTPUT_RECIPE = (
    "skillmerge: 1\nmodels: &m\n  a: a\n  b: b\nmerge: 'a/2 + b*.5'\noutput: {push: {repo: a/b}, seed: 0x1F}"
)
_CALL_RECIPE = (
    "skillmerge: 1\nmodels: {t: t, a: a}\ncoefficients: {d: 0.5}\nmerge: t + trim(a - t, density=d)\noutput: {path: o}"
)
_RECIPES = [text.encode() for text in (_RECIPE, _SKILL_RECIPE, _OUTPUT_RECIPE, _CALL_RECIPE)]
_RECIPE_WORDS = [
    *(
        "!!python/object",
        "&a",
        "*a",
        "<<",
        "%YAML 1.1\n---\n",
        "---",
        "...",
        "? ",
        ": ",
        "- ",
        "|2\n",
        ">-\n",
        "#",
        "\t",
    ),
    *("yes", "~", "0x1F", "0o17", ".inf", ".nan", "1e999", "1_000", '"\\ud800"', "\ufeff", "\u2028", "\x85", "\x00"),
    *("ramp", "layers", "modules", "tensors", "default", "rules", "value", "copy", "ignore", "compression: zstd"),
    *("kind: skill", "keep: 0.1", "hf://", "../", "~root", "license", "card", "push", "9-0", "-1", "99999999999999999"),
]


# -------------------------------------------------------------------------------------------------- expression


class Form:
    """A combination of models with exact factors: what Python's own parser makes of an expression."""

    def __init__(self, factors: Mapping[str, Fraction], size: Fraction) -> None:
        self.factors, self.size = factors, size

    def __add__(self, other: Form) -> Form:
        names = {*self.factors, *other.factors}
        zero = Fraction()
        return Form(
            {name: self.factors.get(name, zero) + other.factors.get(name, zero) for name in names},
            self.size + other.size,
        )

    def __mul__(self, by: Fraction) -> Form:
        by = Fraction(by)
        return Form({name: factor * by for name, factor in self.factors.items()}, self.size * abs(by))

    __rmul__ = __mul__

    def __sub__(self, other: Form) -> Form:
        return self + other * Fraction(-1)

    def __truediv__(self, by: Fraction) -> Form:
        return self * (1 / Fraction(by))

    def __neg__(self) -> Form:
        return self * Fraction(-1)

    def __pos__(self) -> Form:
        return self


_VALUES = {"lam": 0.75, "λ": -0.5, "zero": 0.0}
_MODELS = ["t", "rl", "sft"]


def expression(content: bytes) -> bool:
    """An expression, its term, and the steps of that; its factors are those of Python's own arithmetic."""
    text = content.decode(errors="replace")
    try:
        node = parse(text, _MODELS, list(_VALUES))
        donor_of(node)
        term = bind(node, _VALUES)
    except ExpressionError:
        return False
    if term is None:
        return True
    factors = weights(term)
    degree(term)
    program = compile_term(term)
    assert set(program.models) <= set(_MODELS)
    assert program.registers <= MAX_OPERATIONS
    if any(calls_in(node)):  # even where they fall away
        spread(term)
        assert len(program.calls) == len(list(calls(term)))
        return True
    numbers = [abs(float(number)) for number in re.findall(r"[\d.]+(?:[eE][+-]?\d+)?", text)]
    if len(numbers) <= 8 and all(number == 0 or 1e-6 < number < 1e6 for number in numbers):
        _compare(text, factors)
    return True


def _compare(text: str, factors: Mapping[str, float]) -> None:
    names: dict[str, Any] = {name: Form({name: Fraction(1)}, Fraction(1)) for name in _MODELS}
    names |= {name: Fraction(value) for name, value in _VALUES.items()}
    # Every number exact: Python would refuse a leading zero, and round.
    exact = re.sub(r"(?<![\w.])(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", r"Fraction('\g<0>')", " ".join(text.split()))
    wanted = eval(exact, {"__builtins__": {}, "Fraction": lambda number: Fraction(float(number))}, names)
    for name in _MODELS:
        error = abs(Fraction(factors.get(name, 0.0)) - wanted.factors.get(name, Fraction()))
        assert error <= wanted.size * Fraction(1, 10**9), (text, factors)


_CALLS = [
    b"t + lam * ties(rl - sft, t - sft, density=lam, weights=[1, .5], normalize=no)",
    b"slerp(t, median(rl, sft), t=lam / 2) + zero * drop(rl - sft, density=.5, spread=.2, seed=7)",
    b"t + match(trim(rl - sft, density=.3, rescale=l2), to=elect(rl - sft, t - sft, pick=max))",
]
_EXPRESSIONS = [
    b"t + lam * (rl - sft)",
    b"-(t/2 - -rl*.5e1)*2 + 0*sft",
    "t + λ*(rl-sft)/(1-0.75)".encode(),
    b"t",
    *_CALLS,
]
_EXPRESSION_WORDS = [
    "lam",
    "zero",
    "λ",
    "µ",
    "t",
    "rl",
    "sft",
    "1e308",
    ".5",
    "1.",
    "(",
    ")",
    "**",
    "//",
    "−",
    "\u2028",
    *(f"{name}(" for name in METHODS),
    *sorted({f"{keyword}=" for method in METHODS.values() for keyword in method.keywords}),
    *("(rl - sft)", "(t - sft),", "[1, 2]", "[", "]", ",", "=", "yes", "l2", "row", "model", "1e300", "keep"),
]


# --------------------------------------------------------------------------------- manifests and saved plans


class Finished:
    """A small output with its proof, and the saved plan that it was made by, in a folder that goes away."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="torture-"))
        for name in ("target", "rl", "sft"):
            (self.folder / name).mkdir()
            (self.folder / name / "model.safetensors").write_bytes(weight_file(SHAPES))
            (self.folder / name / "config.json").write_text("{}")
        recipe_file = self.folder / "recipe.yaml"
        recipe_file.write_text(
            "skillmerge: 1\nmodels: {target: target, rl: rl, sft: sft}\ncoefficients: {lam: 0.5}\n"
            "merge: target + lam * (rl - sft)\noutput: {path: merged}\n"
        )
        self.output = apply(recipe_file, device="cpu", threads=1).output
        self.plan = make_plan(recipe_file)
        self.manifest = manifest.read(self.output)
        document = {"ok": True, **savedplan.describe(self.plan)}
        self.saved = (json.dumps(document, indent=1) + "\n").encode()
        self.plan_file = self.folder / "plan.json"

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def manifest_of(finished: Finished) -> Callable[[bytes], bool]:
    """A manifest as it is, and as a forger would have it, who knows how its digest is made."""

    def accepts(content: bytes) -> bool:
        try:
            document = manifest.parse(content, "manifest")
            assert document == finished.manifest, "a byte was changed, and nobody noticed"
            return True
        except SkillmergeError:
            pass
        try:
            forged = json.loads(content)
            del forged["digest"]
            text = json.dumps(forged, ensure_ascii=False, allow_nan=False, separators=(", ", ": "))
            forged["digest"] = hashlib.sha256(text.encode()).hexdigest()
            written = manifest.to_bytes(forged)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return False
        try:
            check_structure(finished.output, manifest.parse(written, "manifest"))
        except SkillmergeError:
            return False
        return True

    return accepts


def plan_of(finished: Finished) -> Callable[[bytes], bool]:
    """A saved plan, read, and compared with what the same recipe gives now."""

    def accepts(content: bytes) -> bool:
        finished.plan_file.write_bytes(content)
        try:
            saved = savedplan.read(finished.plan_file)
            saved.check(finished.plan)
        except SkillmergeError:
            return False
        return True

    return accepts


_MANIFEST_WORDS = [
    '"name"',
    '"files"',
    '"tensors"',
    '"environment"',
    '"digest"',
    "null",
    "[]",
    "{}",
    "7",
    "NaN",
    "1e999",
]


def targets(finished: Finished) -> dict[str, Target]:
    small = json.dumps(
        {**finished.manifest.as_dict(), "inputs": [], "statistics": {"mode": "off", "modules": {}, "all": {}}}
    ).encode()
    return {
        "header": Target(header, _HEADERS, _HEADER_WORDS),
        "index": Target(index, _INDEXES, _INDEX_WORDS),
        "recipe": Target(recipe, _RECIPES, _RECIPE_WORDS),
        "expression": Target(expression, _EXPRESSIONS, _EXPRESSION_WORDS),
        "manifest": Target(manifest_of(finished), [finished.manifest.to_bytes(), small], _MANIFEST_WORDS),
        "plan": Target(plan_of(finished), [finished.saved], _MANIFEST_WORDS),
    }
