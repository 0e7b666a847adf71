"""How the same weights are stored as other tensors: experts one by one or packed, transposed, interleaved; fused
projections. Names and shapes only.

A *part* is a matrix that every layout holds: one projection of one expert, or of one layer. It is called what
checkpoints call it that store each part as a tensor of its own:

    model.layers.0.mlp.experts.7.gate_proj.weight     in Mixtral model.layers.0.block_sparse_moe.experts.7.w1.weight
    model.layers.0.mlp.experts.gate_up_proj           [E, 2I, H], of every expert the rows of gate, then of up
                                                      [E, H, 2I] transposed, and of gpt-oss with gate and up in turn
    model.layers.0.self_attn.qkv_proj.weight          the rows of q, k and v

`transformers.conversion_mapping` has the same relations, and the tests compare the two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from skillmerge.tensors import DTYPES, TensorSpec


@dataclass(frozen=True, slots=True)
class Relation:
    """A tensor that holds several parts.

    pattern: of its whole name. parts: their names, in their order, as replacements for the pattern; with `{}` for the
    expert where the first axis counts experts.
    """

    pattern: re.Pattern[str]
    parts: tuple[str, ...]

    @property
    def is_stacked(self) -> bool:
        return "{}" in self.parts[0]


def _relation(pattern: str, *parts: str) -> Relation:
    return Relation(re.compile(pattern), parts)


RELATIONS = (
    _relation(r"(.*\bexperts)\.gate_up_proj", r"\1.{}.gate_proj.weight", r"\1.{}.up_proj.weight"),
    _relation(r"(.*\bexperts)\.gate_up_proj_bias", r"\1.{}.gate_proj.bias", r"\1.{}.up_proj.bias"),
    _relation(r"(.*\bexperts)\.((?:gate|up|down)_proj)", r"\1.{}.\2.weight"),
    _relation(r"(.*\bexperts)\.((?:gate|up|down)_proj)_bias", r"\1.{}.\2.bias"),
    _relation(r"(.*)\.gate_up_proj\.(weight|bias)", r"\1.gate_proj.\2", r"\1.up_proj.\2"),
    _relation(
        r"(.*\bself_attn)\.qkv_proj\.(weight|bias)", r"\1.q_proj.\2", r"\1.k_proj.\2", r"\1.v_proj.\2"
    ),
)  # fmt: skip

SYNONYMS = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"\.block_sparse_moe\.input_linear\.weight$", ".mlp.experts.gate_up_proj"),  # Granite
        (r"\.block_sparse_moe\.output_linear\.weight$", ".mlp.experts.down_proj"),
        (r"\.block_sparse_moe\.router\.layer\.", ".mlp.gate."),
        (r"\.block_sparse_moe\.", ".mlp."),  # Mixtral, MiniMax
        (r"\.moe\.((?:gate|up|down)_proj)\.weight$", r".mlp.experts.\1"),  # Step 3
        (r"\.moe\.gate\.", ".mlp.gate."),
        (r"\.moe\.router_bias$", ".mlp.gate.e_score_correction_bias"),
        (r"\.share_expert\.", ".mlp.shared_experts."),
        (r"\.mlp\.shared_(?:expert|mlp)\.", ".mlp.shared_experts."),  # Laguna, Hunyuan 3
        (r"\.mlp\.router\.(?:gate\.)?", ".mlp.gate."),  # PhiMoE, Hunyuan 3
        (
            r"\.mlp\.(?:gate\.|experts\.)?(?:moe_statics\.)?(?:e_score_correction|expert)_bias$",  # Ernie, EXAONE
            ".mlp.gate.e_score_correction_bias",
        ),
        (r"\.self_attn\.(?:attention_sink_bias|softmax_offset)$", ".self_attn.sinks"),  # MiMo, Flint
        (r"(\.experts\.\d+)\.(?:w1|fc1)\.", r"\1.gate_proj."),
        (r"(\.experts\.\d+)\.(?:w3|fc3)\.", r"\1.up_proj."),
        (r"(\.experts\.\d+)\.(?:w2|fc2)\.", r"\1.down_proj."),
        (r"\.experts\.w1$", ".experts.gate_proj"),  # of trainers
        (r"\.experts\.w3$", ".experts.up_proj"),
        (r"\.experts\.w2$", ".experts.down_proj"),
        (r"\.experts\.fc1\.weight$", ".experts.gate_up_proj"),  # Aria
        (r"\.experts\.fc2\.weight$", ".experts.down_proj"),
    )
)
"""Other names of the same tensors, replaced one after the other."""

_WIDE = {"gate_up": 2, "gate": 1, "up": 1}
"""Packed tensors that hold rows of the inner size, and how many parts each holds."""

MOST_EXPERTS = 1 << 14
"""Most experts of a packed tensor: more than any model has, and few enough to look at each."""

EXPERT = re.compile(r"(.*\bexperts)\.(\d{1,9})\..*")


@dataclass(frozen=True, slots=True)
class Window:
    """A part inside a stored tensor: element [r, c] of the part is element `first + r * row + c * column` of it. A
    vector is a matrix of one column."""

    tensor: str
    first: int
    shape: tuple[int, int]
    row: int
    column: int

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def last(self) -> int:
        """The end of the stretch that holds it."""
        return self.first + (self.shape[0] - 1) * self.row + (self.shape[1] - 1) * self.column + 1

    @property
    def is_run(self) -> bool:
        """Whether its elements follow each other, row by row."""
        return self.last - self.first == self.elements and self.column == 1


class Layout:
    """The parts of some tensors.

    parts: windows by the names of parts. holds: the parts of each stored tensor, in their order. experts: their
    numbers, by the module that they are in. unclear: packed tensors whose shapes fit two layouts.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorSpec],
        sizes: Mapping[str, Sequence[int]],
        beside: Mapping[str, TensorSpec] = MappingProxyType({}),
    ) -> None:
        """sizes: shapes of parts, where another checkpoint stores them one by one. beside: further tensors of the same
        checkpoint, which tell how these are stored."""
        self.parts: dict[str, Window] = {}
        self.holds: dict[str, list[str]] = {}
        self.unclear: list[str] = []
        self.experts: dict[str, set[int]] = {}
        self._sizes = sizes
        names = {name: common_name(name) for name in tensors}
        self._packed = {
            name: (relation, match)
            for name, common in names.items()
            for relation in RELATIONS
            if (match := relation.pattern.fullmatch(common)) is not None
        }
        self._shapes = _packed_shapes(beside) | {names[name]: tensors[name].shape for name in self._packed}
        taken: set[str] = set()
        for name, spec in tensors.items():
            found = list(self._windows(name, names[name], spec)) if DTYPES[spec.dtype].is_float else []
            for part, window in found:
                if part in self.parts or part in taken:  # two tensors with one meaning: it is not clear which is meant
                    taken.add(part)
                    self._forget(part)
                else:
                    self.parts[part] = window
                    self.holds.setdefault(name, []).append(part)
        for match in map(EXPERT.fullmatch, self.parts):
            if match is not None:
                self.experts.setdefault(match[1], set()).add(int(match[2]))

    def _forget(self, part: str) -> None:
        if (window := self.parts.pop(part, None)) is not None:
            self.holds.pop(window.tensor, None)

    def _windows(self, name: str, common: str, spec: TensorSpec) -> Iterator[tuple[str, Window]]:
        if name not in self._packed:
            yield common, _whole(spec)
            return
        relation, match = self._packed[name]
        if not relation.is_stacked:
            parts = [match.expand(part) for part in relation.parts]
            yield from zip(parts, self._fused(spec, parts), strict=False)
            return
        vector = common.endswith("_bias")
        if not experts_in(name, spec.shape):
            return
        count, *matrix = spec.shape
        shape = (matrix[0], 1) if vector else (matrix[0], matrix[1])
        parts = [match.expand(part) for part in relation.parts]
        crossed = False if vector else self._is_crossed(match[1], matrix, parts)
        if crossed is None:
            self.unclear.append(name)
            return
        in_turn = len(parts) > 1 and f"{match[1]}.gate_up_proj_bias" in self._shapes
        for expert in range(count):
            windows = _cut(spec.name, expert * math.prod(shape), shape, len(parts), crossed, in_turn)
            yield from zip((part.format(expert) for part in parts), windows, strict=False)

    def _fused(self, spec: TensorSpec, parts: Sequence[str]) -> Iterator[Window]:
        """Yield the windows of parts that are rows of one matrix, if their numbers are known."""
        rows = spec.shape[0] if spec.shape else 0
        columns = math.prod(spec.shape[1:])
        sizes = [self._sizes[part][0] for part in parts if self._sizes.get(part)]
        if len(sizes) < len(parts):
            sizes = [rows // len(parts)] * len(parts) if len(parts) == 2 else []
        if not rows or sum(sizes) != rows:
            return
        first = 0
        for size in sizes:
            yield Window(spec.name, first * columns, (size, columns), columns, 1)
            first += size

    def _is_crossed(self, at: str, shape: Sequence[int], parts: Sequence[str]) -> bool | None:
        """Return whether a packed tensor holds its experts' matrices transposed; None if its shape fits both.

        Two packed tensors of one layer tell it together; else the same part of another checkpoint does.
        """
        found = _orientation(self._shapes, at)
        if found is None and len(part := self._sizes.get(parts[0].format(0), ())) == 2:
            found = _only(shape, (len(parts) * part[0], part[1]))
        return found


def _orientation(shapes: Mapping[str, Sequence[int]], at: str) -> bool | None:
    """Return whether the packed experts `at` are stored transposed, by their own shapes; None if these do not tell."""
    down, found = shapes.get(f"{at}.down_proj", ()), set()
    for what, count in _WIDE.items():
        wide = shapes.get(f"{at}.{what}_proj", ())
        if len(down) == len(wide) == 3:
            found |= {False} if (wide[1], wide[2]) == (count * down[2], down[1]) else set()
            found |= {True} if (wide[2], wide[1]) == (count * down[1], down[2]) else set()
    return found.pop() if len(found) == 1 else None


def _only(shape: Sequence[int], straight: tuple[int, int]) -> bool | None:
    """Return whether a matrix has the sizes of another one the other way round; None if both fit or neither."""
    fits = [tuple(shape) == straight, tuple(shape) == straight[::-1]]
    return fits[1] if fits[0] != fits[1] else None


def turned(ours: Mapping[str, TensorSpec], theirs: Mapping[str, TensorSpec]) -> set[str]:
    """Return the packed tensors that have one name in both and are transposed in one, whatever their shapes."""
    shapes = [_packed_shapes(side) for side in (ours, theirs)]
    found = set()
    for name in (it.name for it in ours.values() if len(it.shape) == 3 and it.name in theirs and is_packed(it.name)):
        at = common_name(name).rpartition(".")[0]
        orientations = [_orientation(side, at) for side in shapes]
        if None not in orientations and orientations[0] != orientations[1]:
            found.add(name)
    return found


def _packed_shapes(tensors: Mapping[str, TensorSpec]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of packed tensors, by the names that layouts share."""
    may_be = (it for it in tensors.values() if len(it.shape) == 3 or it.name.endswith("_bias"))
    return {common_name(it.name): it.shape for it in may_be if is_packed(it.name)}


def is_packed(name: str) -> bool:
    """Return whether a name is that of a tensor with one matrix, or vector, for each expert."""
    common = common_name(name)
    return any(it.is_stacked and it.pattern.fullmatch(common) for it in RELATIONS)


def experts_in(name: str, shape: Sequence[int]) -> int:
    """Return how many experts a tensor packs; 0 if it packs none."""
    axes = 2 if name.endswith("_bias") else 3
    fits = len(shape) == axes and 0 < shape[0] <= MOST_EXPERTS and math.prod(shape) > 0
    return shape[0] if fits and is_packed(name) else 0


def common_name(name: str) -> str:
    """Return a tensor's name in the words that layouts share."""
    for pattern, ours in SYNONYMS:
        name = pattern.sub(ours, name)
    return name


def layouts(ours: Mapping[str, TensorSpec], theirs: Mapping[str, TensorSpec]) -> tuple[Layout, Layout]:
    """Return the layouts of what is `apart` in two checkpoints."""
    left, right = apart(ours, theirs)
    if not left or not right:
        left, right = {}, {}
    return whole_layouts(left, right, (ours, theirs))


def apart(
    ours: Mapping[str, TensorSpec], theirs: Mapping[str, TensorSpec]
) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """Return the tensors of two checkpoints that have no partner of the same layout in the other."""
    crossed = turned(ours, theirs)
    alike = {name for name, spec in ours.items() if name in theirs and theirs[name].shape == spec.shape} - crossed
    left, right = ({name: it for name, it in side.items() if name not in alike} for side in (ours, theirs))
    return left, right


def whole_layouts(
    ours: Mapping[str, TensorSpec],
    theirs: Mapping[str, TensorSpec],
    beside: tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec]] = ({}, {}),
) -> tuple[Layout, Layout]:
    """Return the layouts of two checkpoints, each with the sizes that the other one tells. beside: their other
    tensors, where these are not all of them."""
    shapes = [{common_name(name): spec.shape for name, spec in side.items()} for side in (ours, theirs)]
    first = Layout(ours, shapes[1], beside[0])
    # Of packed tensors the one side may be clear only by itself, and tell the other.
    told = shapes[0] | {part: window.shape for part, window in first.parts.items()}
    second = Layout(theirs, told, beside[1])
    if first.unclear:
        first = Layout(ours, shapes[1] | {part: window.shape for part, window in second.parts.items()}, beside[0])
    return first, second


def _whole(spec: TensorSpec) -> Window:
    if len(spec.shape) < 2:
        return Window(spec.name, 0, (spec.elements, 1), 1, 1)
    columns = spec.shape[-1]
    return Window(spec.name, 0, (math.prod(spec.shape[:-1]), columns), columns, 1)


def _cut(tensor: str, first: int, shape: tuple[int, int], count: int, crossed: bool, in_turn: bool) -> Iterator[Window]:
    """Yield `count` parts of equal size of one matrix, which begins at `first`: of its rows, or of its columns if it is
    transposed; one below the other, or row by row in turn."""
    length, across = (shape[1], shape[0]) if crossed else shape
    step, column = (1, shape[1]) if crossed else (shape[1], 1)
    if length % count:
        return
    rows = length // count
    for index in range(count):
        at, row = (index, step * count) if in_turn else (index * rows, step)
        yield Window(tensor, first + at * step, (rows, across), row, column)
