"""The relations between layouts, against those that the installed transformers converts checkpoints by."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import layouts as made
import pytest

from skillmerge.checkpoints.views.relations import RELATIONS, common_name, experts_in, is_packed, layouts, whole_layouts
from skillmerge.tensors import TensorSpec

AT = "model.layers.0"
PACKING = (["MergeModulelist"], ["MergeModulelist", "Concatenate"], ["Concatenate"])
ELSEWHERE = {
    "ernie4_5_vl_moe": "experts of text and of pictures in one list",
    "nemo_speechlm": "experts under names of their own, transposed",
}
"""Models whose packed experts are not read in another layout."""


def plain(pattern: str, expert: int) -> str:
    """A converter's pattern as the name of a tensor."""
    text = re.sub(r"\\(.)", r"\1", pattern).lstrip(".").replace("*", str(expert))
    return f"{AT}.{text}" if re.match(r"mlp|feed_forward|mixer|moe", text) else f"{AT}.mlp.{text}"


def part_of(name: str) -> str:
    """What a tensor holds of expert 3: itself, or a matrix of it where each projection is packed by itself."""
    name = common_name(name)
    found = [(it, match) for it in RELATIONS if (match := it.pattern.fullmatch(name))]
    return found[0][1].expand(found[0][0].parts[0]).format(3) if found else name


def converters() -> Iterator[tuple[str, Any]]:
    mapping = pytest.importorskip("transformers.conversion_mapping")
    names = pytest.importorskip("transformers.models.auto.configuration_auto").CONFIG_MAPPING_NAMES
    for model in sorted(names):
        for each in mapping.get_checkpoint_conversion_mapping(model) or ():
            if getattr(each, "operations", None) and re.search(r"experts|gate_up", " ".join(each.target_patterns)):
                yield model, each


def test_every_way_of_packing_experts_that_transformers_knows_is_known_here() -> None:
    checked = set()
    for model, each in converters():
        operations = [type(it).__name__ for it in each.operations]
        if model in ELSEWHERE or "weight_scale" in str(each.source_patterns) or operations not in PACKING:
            continue
        (target,) = each.target_patterns
        packed = common_name(plain(target, 0))
        relation = next(it for it in RELATIONS if it.pattern.fullmatch(packed))
        match = relation.pattern.fullmatch(packed)
        assert match is not None
        parts = [match.expand(part).format(3) for part in relation.parts]
        assert [part_of(plain(source, 3)) for source in each.source_patterns] == parts, model
        dims = {type(it).__name__: it.dim for it in each.operations}
        assert dims.get("MergeModulelist", 0) == 0
        assert dims.get("Concatenate", int(relation.is_stacked)) == int(relation.is_stacked)  # rows, behind the experts
        checked.add(model)
    assert {"qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "phimoe", "minimax", "lfm2_moe", "nemotron_h"} <= checked
    assert len(checked) > 30


def test_what_transformers_transposes_is_read_transposed() -> None:
    found = {
        (model, *each.target_patterns)
        for model, each in converters()
        if [type(it).__name__ for it in each.operations] == ["Transpose"] and model not in ELSEWHERE
    }
    assert found == {("qwen3_vl_moe", f"mlp.experts.{part}_proj") for part in ("gate_up", "down")}


def test_renamed_tensors_have_one_name_here() -> None:
    mapping = pytest.importorskip("transformers.conversion_mapping")
    for model, source, target in (
        ("granitemoe", "block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
        ("granitemoe", "block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
        ("granitemoe", "block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"),
        ("aria_text", "mlp.experts.fc1.weight", "mlp.experts.gate_up_proj"),
        ("aria_text", "mlp.experts.fc2.weight", "mlp.experts.down_proj"),
        ("mixtral", "block_sparse_moe.gate.weight", "mlp.gate.weight"),
        ("phimoe", "block_sparse_moe.gate.weight", "mlp.router.weight"),
        ("step3p7", "moe.gate.weight", "mlp.gate.weight"),
        ("step3p7", "moe.router_bias", "mlp.gate.e_score_correction_bias"),
        ("step3p7", "moe.down_proj.weight", "mlp.experts.down_proj"),
        ("step3p7", "share_expert.up_proj.weight", "mlp.shared_experts.up_proj.weight"),
        ("minimax_m2", "block_sparse_moe.e_score_correction_bias", "mlp.e_score_correction_bias"),
        ("ernie4_5_moe", "mlp.moe_statics.e_score_correction_bias", "mlp.gate.moe_statics.e_score_correction_bias"),
        ("exaone_moe", "mlp.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),
        ("laguna", "mlp.experts.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),
        ("laguna", "mlp.shared_expert.up_proj.weight", "mlp.shared_experts.up_proj.weight"),
        ("hy_v3", "mlp.router.gate.weight", "mlp.gate.weight"),
        ("hy_v3", "mlp.expert_bias", "mlp.e_score_correction_bias"),
        ("hy_v3", "mlp.shared_mlp.up_proj.weight", "mlp.shared_experts.up_proj.weight"),
        ("mimo_v2_flash", "self_attn.attention_sink_bias", "self_attn.sinks"),
        ("flint", "self_attn.softmax_offset", "self_attn.sinks"),
    ):
        name = f"{AT}.{source}"
        for each in mapping.get_checkpoint_conversion_mapping(model):
            if not getattr(each, "operations", None):
                name = re.sub(each.source_patterns[0], each.target_patterns[0].replace("\\.", "."), name)
        assert name.replace("model.language_model.", "model.") == f"{AT}.{target}"
        assert common_name(f"{AT}.{source}") == common_name(f"{AT}.{target}")


def of(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, "BF16", it, "any") for name, it in shapes.items()}


EXPERTS = "model.layers.0.mlp.experts"


def test_a_shape_that_fits_two_layouts_is_left_alof() -> None:
    """Square matrices of experts without a gate: nothing tells whether they are transposed."""
    packed = of({f"{EXPERTS}.up_proj": (2, 4, 4), f"{EXPERTS}.down_proj": (2, 4, 4)})
    split = of({f"{EXPERTS}.{it}.{part}_proj.weight": (4, 4) for it in range(2) for part in ("up", "down")})
    stored, _ = layouts(packed, split)
    assert stored.unclear == [f"{EXPERTS}.up_proj", f"{EXPERTS}.down_proj"]
    assert stored.parts == {}


@pytest.mark.parametrize("size", [(2, 4, 8), (2, 6, 6), (2, 8, 4)])
def test_two_packed_tensors_tell_together_how_they_are_stored(size: tuple[int, int, int]) -> None:
    """Where 2I = H the packed gate and up are square, and their shape alone fits both."""
    it = made.experts(*size)
    for make, crossed in ((made.packed, False), (made.transposed, True)):
        shapes = {name: tuple(tensor.shape) for name, tensor in make(it).items()}
        part = whole_layouts(of(shapes), {})[0].parts[f"{EXPERTS}.1.up_proj.weight"]
        assert (part.row < part.column) == crossed
        assert part.shape == (size[1], size[2])


def test_names_of_packed_experts() -> None:
    packed = ("experts.gate_up_proj", "experts.down_proj_bias", "experts.up_proj")
    assert all(is_packed(f"{AT}.mlp.{name}") for name in packed)
    assert is_packed(f"{AT}.block_sparse_moe.input_linear.weight")
    others = ("experts.0.up_proj.weight", "shared_experts.up_proj.weight", "experts.gate_up_proj_blocks", "gate.weight")
    assert not any(is_packed(f"{AT}.mlp.{name}") for name in others)


def test_a_matrix_is_no_vector_of_each_expert() -> None:
    """As of MegaBlocks, which has the rows of all experts below each other."""
    assert experts_in(f"{EXPERTS}.w1", (64, 8)) == experts_in(f"{EXPERTS}.down_proj_bias", (4, 8, 8)) == 0
    assert experts_in(f"{EXPERTS}.w1", (4, 16, 8)) == experts_in(f"{EXPERTS}.down_proj_bias", (4, 8)) == 4
