"""Keys that say where positions are and what is computed, each compared; keys that mean nothing here, each noted; and
what the table of differences shows of tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_checkpoint
from pair_cases import WORDS, tokenizer

from skillmerge.checkpoints.kinds.table import open_folder
from skillmerge.checkpoints.tokenizers.tokenization import described, tokenization
from skillmerge.methods.terms import Leaf, Scaled, Sum
from skillmerge.plans.compare.config import compare_config
from skillmerge.plans.compare.found import Compared
from skillmerge.plans.compare.roles import roles_of
from skillmerge.plans.compare.tokens import compare_tokens

EMBEDDING = "model.embed_tokens.weight"
PAST = Sum(Leaf("target"), Scaled(Sum(Leaf("rl"), Leaf("sft"), minus=True), 0.7, divide=False), minus=False)
ROLES = roles_of({EMBEDDING: PAST}, matrices=[EMBEDDING])


def compared(folder: Path, donor: dict[str, Any], rl: dict[str, Any], **options: Any) -> list[Compared]:
    """What is found between the configurations of a donor, another model, and a third that is the donor's."""
    models = {}
    for name, config in (("target", donor), ("rl", rl), ("sft", donor)):
        write_checkpoint(folder / name, {EMBEDDING: torch.zeros(16, 2)}, config=config)
        models[name] = open_folder(name, folder / name)
    return compare_config(models, "target", ROLES, "same", **options)


ODD = {"model_type": "odd"}
LLAMA = {"model_type": "llama", "num_hidden_layers": 2}
LONG = {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}

KEYS: list[tuple[str, dict[str, Any], dict[str, Any], str, str]] = [
    ("rope_ratio", ODD | {"rope_ratio": 1}, ODD | {"rope_ratio": 500}, "rope", "rope_ratio"),
    *(
        (key, ODD | {key: 10000}, ODD | {key: 160000}, "rope", key)
        for key in ("global_rope_theta", "local_rope_theta", "compress_rope_theta", "rotary_base", "rope_base")
    ),
    ("rope_freq_base", ODD | {"rope_freq_base": 1e4}, ODD | {"rope_freq_base": 1e5}, "rope", "rope_freq_base"),
    *(
        (key, ODD | {key: 0.25}, ODD | {key: 1.0}, "rope", key)
        for key in ("rope_pct", "rotary_percent", "rotary_emb_fraction")
    ),
    ("rotary_dim", ODD | {"rotary_dim": 32}, ODD | {"rotary_dim": 64}, "rope", "rotary_dim"),
    ("rotary_emb_base", ODD | {"rotary_emb_base": 1e4}, ODD | {"rotary_emb_base": 1e6}, "rope", "rope base"),
    ("rotary_pct", ODD | {"rotary_pct": 0.25}, ODD | {"rotary_pct": 0.5}, "rope", "rope partial"),
    ("a base inside rope_scaling", ODD | {"rope_scaling": {"rope_theta": 1e4}},
     ODD | {"rope_scaling": {"rope_theta": 1e6}}, "rope", "rope base"),
    ("a base of nested rope_parameters", ODD | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
     ODD | {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope", "rope base"),
    ("longrope's length", LLAMA | {"rope_scaling": LONG, "original_max_position_embeddings": 4096},
     LLAMA | {"rope_scaling": LONG, "original_max_position_embeddings": 8192}, "rope", "rope trained scaling"),
    *(
        (key, ODD | {key: "silu"}, ODD | {key: "gelu"}, "activation", "activation")
        for key in ("hidden_act", "hidden_activation", "activation_function", "activation", "activation_type",
                    "ff_activation", "ffn_act_fn", "dense_act_fn", "feed_forward_proj")
    ),
    *(
        (key, ODD | {key: "silu"}, ODD | {key: "gelu"}, "activation", key)
        for key in ("encoder_activation_function", "decoder_activation_function", "mlp_hidden_act", "mamba_hidden_act",
                    "projector_hidden_act")
    ),
    ("a second activation", ODD | {"hidden_act": "silu", "mlp_hidden_act": "relu2"},
     ODD | {"hidden_act": "silu", "mlp_hidden_act": "gelu"}, "activation", "mlp_hidden_act"),
    ("a flag", ODD | {"attn_temperature_tuning": False}, ODD | {"attn_temperature_tuning": 4}, "scales",
     "attn_temperature_tuning"),
    ("a table of an activation", ODD | {"ffn_act_fn": {"name": "silu"}}, ODD | {"ffn_act_fn": {"name": "gelu"}},
     "activation", "activation"),
    ("the activation of a nested part", ODD | {"ffn_config": {"ffn_act_fn": "silu"}},
     ODD | {"ffn_config": {"ffn_act_fn": "gelu"}}, "activation", "ffn_config: activation"),
    ("the heads of a nested part", ODD | {"attn_config": {"kv_n_heads": 8, "clip_qkv": 8.0}},
     ODD | {"attn_config": {"kv_n_heads": 8, "clip_qkv": 4.0}}, "scales", "attn_config: clip_qkv"),
    ("a part of any name", ODD | {"qformer_config": {"num_attention_heads": 12}},
     ODD | {"qformer_config": {"num_attention_heads": 6}}, "heads", "qformer_config: attention heads"),
    ("an encoder", ODD | {"audio_encoder": {"num_attention_heads": 12}},
     ODD | {"audio_encoder": {"num_attention_heads": 6}}, "heads", "audio_encoder: attention heads"),
    ("a part of a part", ODD | {"talker_config": {"text_config": {"hidden_act": "silu"}}},
     ODD | {"talker_config": {"text_config": {"hidden_act": "gelu"}}}, "activation",
     "talker_config.text_config: activation"),
]  # fmt: skip


@pytest.mark.parametrize(("donor", "rl", "name", "key"), [case[1:] for case in KEYS], ids=[case[0] for case in KEYS])
def test_key_of_positions_or_activations_is_a_problem_where_it_differs(
    donor: dict[str, Any], rl: dict[str, Any], name: str, key: str, tmp_path: Path
) -> None:
    [found] = compared(tmp_path / "other", donor, rl)
    assert (found.name, found.key, found.level) == (name, key, "problem")
    assert compared(tmp_path / "same", donor, donor) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"hidden_act": "silu"}, {"hidden_activation": "swish"}),
        ({"hidden_act": "gelu_new"}, {"ff_activation": "gelu_pytorch_tanh"}),
        ({"activation_function": "swiglu"}, {"activation_type": "silu"}),
        ({"rope_theta": 1e6}, {"rope_parameters": {"rope_theta": 1e6}}),
        ({"rope_theta": 1e6}, {"rotary_emb_base": 1e6}),
        ({"partial_rotary_factor": 0.5}, {"rotary_pct": 0.5}),
        ({"attn_temperature_tuning": 4}, {"attn_temperature_tuning": True}),
        ({"use_qk_norm": False}, {"use_qk_norm": 0}),
        ({"feed_forward_proj": "gated-gelu"}, {"dense_act_fn": "gelu_new"}),
        ({"feed_forward_proj": "gated-silu"}, {"dense_act_fn": "silu"}),
        ({"decoder_activation_function": "swish"}, {"decoder_activation_function": "silu"}),
    ],
)
def test_spellings_of_one_value_are_one(one: dict[str, Any], other: dict[str, Any], tmp_path: Path) -> None:
    assert compared(tmp_path, ODD | one, ODD | other) == []


def test_two_architectures_are_compared_where_that_is_asked(tmp_path: Path) -> None:
    donor, rl = LLAMA | {"rope_theta": 1e4}, LLAMA | {"model_type": "olmo2", "rope_theta": 5e5}
    assert [it.name for it in compared(tmp_path / "alone", donor, rl)] == ["architecture"]
    found = compared(tmp_path / "all", donor, rl, foreign=True)
    assert [(it.name, it.key) for it in found] == [("architecture", "model_type"), ("rope", "rope base")]


UNKNOWN: list[tuple[Any, Any, str, str]] = [
    (1, 2, "1", "2"),
    ("a", "b", "a", "b"),
    (True, False, "yes", "no"),
    ([1, 2], [2, 1], "[1, 2]", "[2, 1]"),
    (["a"], [], '["a"]', "[]"),
    ({"a": 1, "b": [2]}, {"a": 1}, '{"a": 1, "b": [2]}', '{"a": 1}'),
    ([3, [1, 2]], [4, [1, 2]], "[3, [1, 2]]", "[4, [1, 2]]"),
    (1, [1], "1", "[1]"),
    ("x", ["y" * 200], "x", '["' + "y" * 97 + "…"),
]


@pytest.mark.parametrize(("ours", "theirs", "shown", "other"), UNKNOWN)
def test_unknown_key_that_differs_is_a_note(ours: Any, theirs: Any, shown: str, other: str, tmp_path: Path) -> None:
    [note] = compared(tmp_path, ODD | {"mystery": ours}, ODD | {"mystery": theirs})
    assert note == Compared(
        None,
        "mystery",
        "config.json",
        "note",
        {"target": shown, "rl": other, "sft": shown},
        False,
        "`mystery` differs, which skillmerge does not know the meaning of: the donor's is used",
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [([1, 2], [1, 2]), ({"a": 1, "b": 2}, {"b": 2, "a": 1}), (None, [1]), ([1.0], [1]), ({}, {})],
)
def test_unknown_key_that_says_the_same_or_nothing_is_no_note(ours: Any, theirs: Any, tmp_path: Path) -> None:
    assert compared(tmp_path, ODD | {"mystery": ours}, ODD | {"mystery": theirs}) == []


def test_models_that_leave_a_key_out_are_named_in_a_sentence(tmp_path: Path) -> None:
    said = ODD | {"mlp_hidden_act": "relu"}
    [several], [one] = compared(tmp_path / "several", ODD, said), compared(tmp_path / "one", said, ODD)
    rest = "not say it, and what that means is not known"
    assert several.message == f"mlp_hidden_act: `target` and `sft` do {rest}"
    assert one.message == f"mlp_hidden_act: `rl` does {rest}"


def test_nested_parts_are_no_unknown_keys(tmp_path: Path) -> None:
    """They are compared by their own keys, each once."""
    donor, rl = ({**ODD, "encoder": {"model_type": "odd", "mystery": number}} for number in (1, 2))
    assert [it.key for it in compared(tmp_path, donor, rl)] == ["encoder: mystery"]


# What the table shows of tokenizers.


def shown(folder: Path, rl: dict[str, Any], **ours: Any) -> dict[str, str]:
    """The row on tokenization between models of which one has another `tokenizer.json`."""
    models = {}
    for name in ("target", "rl", "sft"):
        write_checkpoint(folder / name, {EMBEDDING: torch.zeros(16, 2)})
        (folder / name / "tokenizer.json").write_text(json.dumps(rl if name == "rl" else tokenizer(**ours)))
        models[name] = open_folder(name, folder / name)
    [found] = compare_tokens(models, "target", ROLES)
    assert (found.name, found.level) == ("tokenization", "warning")
    return {name: value for name, value in found.values.items() if name != "sft"}


def bpe(*merges: str) -> dict[str, Any]:
    return {"type": "BPE", "vocab": {word: number for number, word in enumerate(WORDS)}, "merges": list(merges)}


SPLIT = {"type": "Split", "pattern": {"Regex": "\\d{1,3}"}, "behavior": "Isolated", "invert": False}

SHOWN: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({}, {"normalizer": {"type": "Lowercase"}}, "NFC", "Lowercase"),
    ({}, {"normalizer": None}, "NFC", "none"),
    (
        {},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}},
        "NFC",
        "NFC + Lowercase",
    ),
    (
        {},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        "ByteLevel, add_prefix_space: false",
        "ByteLevel, add_prefix_space: true",
    ),
    (
        {"pre_tokenizer": SPLIT},
        {"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "\\d"}}},
        r'Split, pattern: {"Regex": "\\d{1,3}"}',
        r'Split, pattern: {"Regex": "\\d"}',
    ),
    ({}, {"normalizer": {"type": "x\ny\x1b[1m" + "z" * 90}}, "NFC", r"x y\x1b[1m" + "z" * 69 + "…"),
    (
        {},
        {"model": bpe("c d", "a b", "ab cd")},
        "3 merges, number 1 is a b",
        "3 merges, number 1 is c d",
    ),
    ({}, {"model": bpe("a b", "c d")}, "3 merges, number 3 is ab cd", "2 merges"),
    (
        {"model": {"type": "Unigram", "vocab": [[word, -1.0] for word in WORDS]}},
        {"model": {"type": "Unigram", "vocab": [[word, -1.5 if word == "c" else -1.0] for word in WORDS]}},
        "11 scores, number 3 is -1",
        "11 scores, number 3 is -1.5",
    ),
]


@pytest.mark.parametrize(("ours", "theirs", "target", "rl"), SHOWN)
def test_table_shows_what_a_person_can_compare(
    ours: dict[str, Any], theirs: dict[str, Any], target: str, rl: str, tmp_path: Path
) -> None:
    assert shown(tmp_path, tokenizer(**theirs), **ours) == {"target": target, "rl": rl}


def test_steps_whose_names_hide_their_number_are_shown() -> None:
    one = tokenization({"normalizer": {"type": "Sequence", "normalizers": [{"type": "A"}, {"type": "B"}]}})
    other = tokenization({"normalizer": {"type": "A + B"}})
    said = {"one": one["normalizer"], "other": other["normalizer"]}
    assert described("normalizer", said) == {"one": "A + B", "other": "A + B"}
