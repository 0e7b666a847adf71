"""Schedules: selection, last match wins, ramps, and rules that cannot be meant."""

from __future__ import annotations

import pytest
from conftest import tensor_shapes

from skillmerge.recipes.schedules import Numbers, Rule, Schedule, ScheduleError, parse_numbers

NAMES = list(tensor_shapes(layers=6))


def resolve(*rules: Rule, default: float = 1.0) -> dict[str, float]:
    return Schedule(default, rules).resolve(NAMES)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("7", [(7, 7)]),
        ("0-3", [(0, 3)]),
        ("4-", [(4, None)]),
        ("0-3, 8-11", [(0, 3), (8, 11)]),
    ],
)
def test_layers_are_read(text: str, wanted: list[tuple[int, int | None]]) -> None:
    assert [(part.first, part.last) for part in parse_numbers(text)] == wanted


@pytest.mark.parametrize("text", ["", "a", "3-1", "1.5", "0-3-4", "-", "-1", "-3", "1 2", "0-3,"])
def test_layers_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"layers|backwards"):
        parse_numbers(text)


def test_last_rule_that_matches_wins() -> None:
    values = resolve(
        Rule(layers=(Numbers(0, 3),), value=0.0),
        Rule(tensors=("*.mlp.*",), value=0.8),
        Rule(tensors=("*embed_tokens*", "*lm_head*"), value=0.25),
    )
    assert values["model.layers.2.self_attn.q_proj.weight"] == 0.0
    assert values["model.layers.2.mlp.up_proj.weight"] == 0.8
    assert values["model.layers.5.self_attn.q_proj.weight"] == 1.0
    assert values["lm_head.weight"] == values["model.embed_tokens.weight"] == 0.25
    assert values["model.norm.weight"] == 1.0


def test_selectors_of_one_rule_must_all_match() -> None:
    values = resolve(Rule(layers=(Numbers(1, 2),), modules=("mlp",), value=0.0))
    assert [name for name, value in values.items() if value == 0.0] == [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
    ]


def test_ramp_includes_both_ends_and_leaves_what_is_outside_blocks() -> None:
    values = resolve(Rule(layers=(Numbers(2, None),), ramp=(0.5, 1.1)), default=0.0)
    found = [values[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(6)]
    assert found == [0.0, 0.0, 0.5, pytest.approx(0.7), pytest.approx(0.9), 1.1]
    assert values["model.norm.weight"] == 0.0


def test_ramp_over_one_block_is_its_first_end() -> None:
    assert resolve(Rule(layers=(Numbers(3, 3),), ramp=(0.5, 1.0)))["model.layers.3.mlp.up_proj.weight"] == 0.5


def test_ramp_of_several_points_has_their_values_at_their_layers() -> None:
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(9)]
    values = Schedule(0.0, (Rule(ramp=(0.1, 0.7, 0.3, 0.9, 0.2)),)).resolve(names)
    assert [values[name] for name in names[::2]] == [0.1, 0.7, 0.3, 0.9, 0.2]
    assert [values[name] for name in names[1::2]] == pytest.approx([0.4, 0.5, 0.6, 0.55])
    between = Schedule(0.0, (Rule(ramp=(0.0, 1.0, 0.0)),)).resolve(names[:4])
    assert [between[name] for name in names[:4]] == pytest.approx([0, 2 / 3, 2 / 3, 0])


def test_ramp_runs_over_each_stack_by_itself() -> None:
    names = [f"encoder.layers.{i}.w" for i in range(3)] + [f"decoder.layers.{i}.w" for i in range(5)]
    values = Schedule(0.0, (Rule(ramp=(0.0, 1.0)),)).resolve(names)
    assert [values[name] for name in names] == [0.0, 0.5, 1.0, 0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(layers=(Numbers(4, 40),)), "layer 40 is past the last layer, which is 5"),
        (Rule(layers=(Numbers(6, None),)), "layer 6 is past the last layer"),
        (Rule(tensors=("*.mpl.*",)), "matches no tensor"),
        (Rule(modules=("router",)), "matches no tensor"),
        (Rule(layers=(Numbers(0, 1),), tensors=("lm_head.weight",)), "matches no tensor"),
        (Rule(tensors=("model.norm.weight",), ramp=(0.0, 1.0)), "matches no tensor"),
    ],
)
def test_rule_that_cannot_be_meant_is_refused(rule: Rule, message: str) -> None:
    with pytest.raises(ScheduleError, match=message) as error:
        resolve(Rule(modules=("mlp",)), rule)
    assert error.value.rule == 1


def test_globs_match_whole_names() -> None:
    with pytest.raises(ScheduleError, match="matches no tensor"):
        resolve(Rule(tensors=("mlp",)))


EXPERTS = [f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight" for expert in range(4) for part in ("up", "down")]


def test_experts_are_selected_by_number_packed_or_not() -> None:
    rule = Rule(experts=(Numbers(1, 2),), value=0.0)
    values = Schedule(1.0, (rule,)).resolve([*EXPERTS, "model.layers.0.mlp.shared_expert.up_proj.weight"])
    assert [name for name, value in values.items() if value == 0] == EXPERTS[2:6]
    packed = [f"model.layers.0.mlp.experts.down_proj[{expert}]" for expert in range(4)]
    assert list(Schedule(1.0, (rule,)).resolve(packed).values()) == [1, 0, 0, 1]
    named = Rule(tensors=("*down_proj",), experts=(Numbers(3, None),), value=0.5)
    assert list(Schedule(1.0, (named,)).resolve(packed).values()) == [1, 1, 1, 0.5]


def test_an_expert_past_the_last_is_a_mistake() -> None:
    with pytest.raises(ScheduleError, match="expert 4 is past the last expert, which is 3"):
        Schedule(1.0, (Rule(experts=(Numbers(0, 4),)),)).resolve(EXPERTS)
    with pytest.raises(ScheduleError) as raised:
        Schedule(1.0, (Rule(experts=(Numbers(0, 4),)),)).resolve(["model.norm.weight"])
    assert raised.value.fix == "this model is no mixture of experts: none of its tensors is of a numbered expert"
