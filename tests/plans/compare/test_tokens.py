"""Tokenizers of a formula's models, compared: every row of the table, by its whole message, and what is left alone."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_checkpoint

from skillmerge.checkpoints.kinds.table import open_folder
from skillmerge.checkpoints.tokenizers.placeholders import is_placeholder
from skillmerge.methods.terms import Leaf, Scaled, Sum, Term
from skillmerge.plans.compare.found import Compared
from skillmerge.plans.compare.roles import Role, roles_of
from skillmerge.plans.compare.tokens import compare_tokens

EMBEDDING, HEAD, Q = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"
MATRICES = (EMBEDDING, HEAD)
WORDS = [*"abcdefgh", "ab", "cd", "abcd"]
MERGES = [["a", "b"], ["c", "d"], ["ab", "cd"]]
ROWS = 16
PAST = Sum(Leaf("target"), Scaled(Sum(Leaf("rl"), Leaf("sft"), minus=True), 0.7, divide=False), minus=False)
MODELS = ("target", "rl", "sft")


def tokenizer(
    words: Sequence[str] = WORDS, added: Mapping[int, str] | None = None, merges: Sequence[Any] = MERGES, **parts: Any
) -> dict[str, Any]:
    """A `tokenizer.json`."""
    return {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": text, "special": True} for number, text in (added or {}).items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {word: number for number, word in enumerate(words)}, "merges": list(merges)},
        **parts,
    }


def model(folder: Path, files: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Path:
    """A model of 16 rows with these side files: tables as JSON, texts as they are."""
    tensors = {EMBEDDING: torch.zeros(ROWS, 2), Q: torch.zeros(2, 2), HEAD: torch.zeros(ROWS, 2)}
    write_checkpoint(folder, tensors, config={"vocab_size": ROWS, **(config or {})})
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False))
    return folder


def compared(
    folder: Path, term: Term = PAST, donor: str = "target", rows: Term | None = None, **files: Mapping[str, Any]
) -> list[Compared]:
    """What is found between models with these side files, by their names; `config` among them is `config.json`'s.

    rows: the term of embedding and head, where it is another.
    """
    for name in MODELS:
        given = dict(files.get(name, {}))
        config = given.pop("config", {})
        model(folder / name, {"tokenizer.json": tokenizer(), **given}, config)
    models = {name: open_folder(name, folder / name) for name in MODELS}
    roles = roles_of({EMBEDDING: rows or term, HEAD: rows or term, Q: term}, matrices=MATRICES)
    return compare_tokens(models, donor, roles)


def said(found: Sequence[Compared]) -> list[tuple[str, str | None, str]]:
    return [(it.level, it.name, it.message) for it in found]


def test_models_of_one_tokenizer_differ_in_nothing(tmp_path: Path) -> None:
    assert said(compared(tmp_path)) == []


def test_added_tokens_in_another_order_are_a_problem_that_names_both_ids(tmp_path: Path) -> None:
    [problem] = compared(
        tmp_path,
        target={"tokenizer.json": tokenizer(added={11: "<tool>"})},
        sft={"tokenizer.json": tokenizer(added={11: "<think>", 12: "</think>"})},
        rl={"tokenizer.json": tokenizer(added={11: "</think>", 12: "<think>"})},
    )
    assert problem == Compared(
        "tokenizer",
        "tokens",
        "tokenizer.json",
        "problem",
        {"target": "11 <tool>", "rl": "11 </think>, 12 <think>", "sft": "11 <think>, 12 </think>"},
        False,
        "2 ids mean different tokens in models whose embedding or head is merged: `<tool>` is 11 in `target` only; "
        "`</think>` is 11 in `rl`, 12 in `sft`; `<think>` is 12 in `rl`, 11 in `sft`",
    )


def test_a_token_renamed_by_a_distill_is_a_problem(tmp_path: Path) -> None:
    renamed = tokenizer(added={0: "<｜end▁of▁sentence｜>"})
    [problem] = compared(tmp_path, target={"tokenizer.json": renamed})
    assert problem.level == "problem"
    assert problem.message == (
        "an id means different tokens in models whose embedding or head is merged: `<｜end▁of▁sentence｜>` is 0 in "
        "`target` only; `a` is 0 in `rl` and `sft`"
    )


def test_at_most_eight_tokens_are_named(tmp_path: Path) -> None:
    [problem] = compared(tmp_path, target={"tokenizer.json": tokenizer(WORDS[::-1], merges=[])})
    assert problem.message.startswith("10 ids mean different tokens")
    assert problem.message.count("` is ") == 8
    assert problem.message.endswith("; …")
    assert all(value.endswith(", …") for value in problem.values.values())


@pytest.mark.parametrize("model_name", ["rl", "sft"])
def test_rows_that_are_not_merged_may_belong_to_any_token(tmp_path: Path, model_name: str) -> None:
    other = {"tokenizer.json": tokenizer(WORDS[::-1])}
    assert compared(tmp_path, rows=Leaf("target"), **{model_name: other}) == []


def test_rows_that_are_copied_from_another_model_have_to_be_the_donors_tokens(tmp_path: Path) -> None:
    [problem] = compared(tmp_path, rows=Leaf("rl"), rl={"tokenizer.json": tokenizer(WORDS[::-1])})
    assert problem.name == "tokenizer"


def test_a_model_whose_coefficient_is_zero_is_not_compared(tmp_path: Path) -> None:
    other = {
        "tokenizer.json": tokenizer(WORDS[::-1], normalizer={"type": "NFC"}),
        "generation_config.json": {"eos_token_id": 5},
        "config": {"vocab_size": 12},
    }
    assert compared(tmp_path, term=Leaf("target"), rl=other, sft=other) == []
    assert said(compared(tmp_path, term=Sum(Leaf("target"), Scaled(Leaf("rl"), 0.0, False), False), rl=other)) == []


def test_a_model_whose_rows_stay_out_may_have_other_tokens(tmp_path: Path) -> None:
    mean = Scaled(Sum(Leaf("target"), Leaf("rl"), minus=False), 2.0, divide=True)
    assert said(compared(tmp_path, rows=mean, sft={"tokenizer.json": tokenizer(WORDS[::-1])})) == []


def test_ids_above_the_smallest_row_count_do_not_matter(tmp_path: Path) -> None:
    far = {name: {"tokenizer.json": tokenizer(added={ROWS: name})} for name in MODELS}
    assert said(compared(tmp_path, **far)) == []


def test_a_free_token_that_another_model_uses_is_a_note(tmp_path: Path) -> None:
    used = {"tokenizer.json": tokenizer(added={11: "<think>"})}
    free = {"tokenizer.json": tokenizer(added={11: "<|reserved_special_token_3|>"})}
    [note] = compared(tmp_path, target=free, rl=used, sft=used)
    assert said([note]) == [
        (
            "note",
            None,
            "an id is kept free in some models and used in others: `<|reserved_special_token_3|>` is 11 in `target` "
            "only; `<think>` is 11 in `rl` and `sft`",
        )
    ]


def test_a_free_token_that_only_one_side_of_the_difference_uses_is_a_warning(tmp_path: Path) -> None:
    used = {"tokenizer.json": tokenizer(added={11: "<think>"})}
    free = {"tokenizer.json": tokenizer(added={11: "<unused0>"})}
    [warning] = compared(tmp_path, target=free, rl=used, sft=free)
    assert said([warning]) == [
        (
            "warning",
            "tokenizer",
            "an id is kept free in some models and used in others: `<unused0>` is 11 in `target` and `sft`; "
            "`<think>` is 11 in `rl` only; the difference has rows of trained tokens minus rows of unused ones",
        )
    ]


@pytest.mark.parametrize(
    ("token", "free"),
    [
        ("<|reserved_special_token_250|>", True),
        ("<|text_post_train_reserved_special_token_0|>", True),
        ("<|reserved_200013|>", True),
        ("<unused7>", True),
        ("[unused12]", True),
        ("<unused_token_3>", True),
        ("[UNUSED_TOKEN_145]", True),
        (">>UNUSED_11<<", True),
        ("<extra_id_99>", True),
        ("<|extra_5|>", True),
        ("|||EXTRA_4|||", True),
        ("<SPECIAL_20>", True),
        ("<|dummy_3|>", True),
        ("<|placeholder1|>", True),
        ("<｜place▁holder▁no▁2｜>", True),
        ("[control_768]", True),
        ("[PAD151700]", True),
        ("madeupword0002", True),
        ("<think>", False),
        ("<0x0A>", False),
        ("<|im_start|>", False),
        ("<|endoftext|>", False),
        ("<s>", False),
        ("special1", False),
        ("<h1>", False),
        ("<image_1>", False),
        ("extra", False),
    ],
)
def test_placeholders_are_known_by_their_names(token: str, free: bool) -> None:
    assert is_placeholder(token) is free


def test_a_long_token_is_no_placeholder_and_costs_nothing() -> None:
    start = time.perf_counter()
    assert not is_placeholder("<" + "unused" * 20_000)
    assert time.perf_counter() - start < 1
    assert is_placeholder("<unused" + "7" * 92 + ">")
    assert not is_placeholder("<unused" + "7" * 93 + ">")


def test_tokens_that_only_some_models_have_are_a_note(tmp_path: Path) -> None:
    [note] = compared(tmp_path, rl={"tokenizer.json": tokenizer(added={11: "<think>"})})
    assert said([note]) == [
        ("note", None, "a token is not in every model, and the rows follow the formula: `<think>` is 11 in `rl` only"),
    ]


def test_merges_in_another_order_are_a_warning(tmp_path: Path) -> None:
    [warning] = compared(tmp_path, rl={"tokenizer.json": tokenizer(merges=[MERGES[1], MERGES[0], MERGES[2]])})
    assert said([warning]) == [
        (
            "warning",
            "tokenization",
            "`rl` cuts text in another way than `target`, whose tokenizer the output has: other merges",
        )
    ]


@pytest.mark.parametrize(
    ("parts", "key"),
    [
        ({"normalizer": {"type": "NFC"}}, "normalizer"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}}, "normalizer"),
        ({"pre_tokenizer": None}, "pre-tokenizer"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "pre-tokenizer"),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": "▁"}}, "pre-tokenizer"),
    ],
)
def test_another_normalizer_or_pre_tokenizer_is_a_warning(tmp_path: Path, parts: dict[str, Any], key: str) -> None:
    other = {"tokenizer.json": tokenizer(**parts)}
    [warning] = compared(tmp_path, rl=other, sft=other)
    assert (warning.level, warning.name, warning.key) == ("warning", "tokenization", key)
    assert warning.message == (
        f"`rl` and `sft` cut text in another way than `target`, whose tokenizer the output has: another {key}"
    )


@pytest.mark.parametrize("option", ["ignore_merges", "byte_fallback"])
def test_another_use_of_the_vocabulary_is_a_warning(tmp_path: Path, option: str) -> None:
    """An older library leaves the option out where it saves a tokenizer again."""
    words = [*WORDS, "<0x00>"]
    told, off, idle = tokenizer(words), tokenizer(words), tokenizer()
    told["model"][option], off["model"][option], idle["model"]["byte_fallback"] = True, False, True
    [warning] = compared(tmp_path, **{name: {"tokenizer.json": told if name == "rl" else off} for name in MODELS})
    assert (warning.level, warning.name) == ("warning", "tokenization")
    assert warning.values["rl"] == f"lookup, {option}: true"
    assert compared(tmp_path, **{name: {"tokenizer.json": off} for name in MODELS}) == []
    assert compared(tmp_path, rl={"tokenizer.json": idle}) == [], "there are no tokens for bytes"


@pytest.mark.parametrize(
    "same",
    [
        {"merges": ["a b", "c d", "ab cd"]},
        {"normalizer": {"type": "Sequence", "normalizers": []}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False}]}},
        {"post_processor": {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}},
        {"truncation": {"max_length": 8}, "padding": {"strategy": "BatchLongest"}},
        {"decoder": {"type": "ByteLevel"}},
    ],
)
def test_what_cuts_alike_is_alike(tmp_path: Path, same: dict[str, Any]) -> None:
    assert said(compared(tmp_path, rl={"tokenizer.json": tokenizer(**same)})) == []


def test_old_and_new_spellings_of_metaspace_are_alike(tmp_path: Path) -> None:
    spellings: list[dict[str, Any]] = [
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}},
        {"pre_tokenizer": {"type": "Metaspace", "str_rep": "▁", "add_prefix_space": True, "prepend_scheme": "always"}},
    ]
    files = {name: {"tokenizer.json": tokenizer(**it)} for name, it in zip(MODELS, spellings, strict=True)}
    assert said(compared(tmp_path, **files)) == []


@pytest.mark.parametrize("by", ["rl", "target"])
@pytest.mark.parametrize(
    "step",
    [
        {"type": "BertNormalizer", "lowercase": True, "strip_accents": None},
        {"type": "Replace", "pattern": {"String": "a"}, "content": "b", "another": None},
    ],
)
def test_an_option_that_is_null_is_one_that_is_absent(tmp_path: Path, step: dict[str, Any], by: str) -> None:
    without = {key: value for key, value in step.items() if value is not None}
    files = {name: {"tokenizer.json": tokenizer(normalizer=step if name == by else without)} for name in MODELS}
    assert said(compared(tmp_path, **files)) == []


# Where answers stop.


def test_a_stop_token_that_the_output_lacks_is_a_warning(tmp_path: Path) -> None:
    [warning] = compared(
        tmp_path,
        target={"generation_config.json": {"eos_token_id": 2}},
        rl={"generation_config.json": {"eos_token_id": [2, 5]}},
    )
    assert warning == Compared(
        "stop-tokens",
        "eos_token_id",
        "generation_config.json",
        "warning",
        {"target": "2", "rl": "2, 5"},
        False,
        "`rl` stops at 5 (`f`), and the output, which has the stop tokens of `target`, does not: it may go on where an "
        "answer ends",
        "add the id to `eos_token_id` in the generation_config.json of `target`, or write `accept: [stop-tokens]`",
    )


@pytest.mark.parametrize(
    ("target", "rl"),
    [
        ({"generation_config.json": {"eos_token_id": [5, 2]}}, {"generation_config.json": {"eos_token_id": [2, 5]}}),
        ({"generation_config.json": {"eos_token_id": [2, 5]}}, {"generation_config.json": {"eos_token_id": 2}}),
        ({"generation_config.json": {"eos_token_id": [2]}}, {"config": {"eos_token_id": 2}}),
        ({"generation_config.json": {"eos_token_id": None}, "config": {"eos_token_id": 2}},
         {"config": {"eos_token_id": 2}}),
        ({"config": {"text_config": {"eos_token_id": 2}}}, {"tokenizer_config.json": {"eos_token": {"content": "c"}}}),
        ({"config": {"eos_token_id": 2}}, {"special_tokens_map.json": {"eos_token": "c"}}),
        ({"config": {"eos_token_id": 2}}, {}),
    ],
)  # fmt: skip
def test_stop_tokens_that_the_output_has_too_are_fine(
    tmp_path: Path, target: dict[str, Any], rl: dict[str, Any]
) -> None:
    assert said(compared(tmp_path, target=target, rl=rl)) == []


def test_each_place_that_says_where_to_stop_is_read(tmp_path: Path) -> None:
    for number, rl in enumerate(
        [
            {"generation_config.json": {"eos_token_id": 5}, "config": {"eos_token_id": 2}},
            {"config": {"eos_token_id": 5}, "tokenizer_config.json": {"eos_token": "c"}},
            {"tokenizer_config.json": {"eos_token": "f"}},
            {"special_tokens_map.json": {"eos_token": {"content": "f"}}},
        ]
    ):
        [warning] = compared(tmp_path / str(number), target={"config": {"eos_token_id": 2}}, rl=rl)
        assert warning.message.startswith("`rl` stops at 5 (`f`), ")


def test_a_model_that_is_only_subtracted_may_stop_and_talk_as_it_likes(tmp_path: Path) -> None:
    other = {"generation_config.json": {"eos_token_id": 7}, "chat_template.jinja": "other"}
    ours = {"generation_config.json": {"eos_token_id": 2}, "chat_template.jinja": "ours"}
    assert said(compared(tmp_path, target=ours, rl=ours, sft=other)) == []


# How a conversation is written.


def test_another_chat_template_is_a_warning(tmp_path: Path) -> None:
    [warning] = compared(
        tmp_path, target={"chat_template.jinja": "ours"}, rl={"tokenizer_config.json": {"chat_template": "theirs"}}
    )
    assert warning == Compared(
        "chat-template",
        "chat_template",
        "tokenizer_config.json",
        "warning",
        {"target": "4 characters in chat_template.jinja", "rl": "6 characters in tokenizer_config.json"},
        False,
        "`rl` has another chat template than `target`; the output has that of `target`",
        "to take the side files of `rl`, write `output.like: rl`; to keep those of `target`, `accept: [chat-template]`",
    )


def test_a_chat_template_that_the_output_would_lack_is_a_warning(tmp_path: Path) -> None:
    [warning] = compared(tmp_path, rl={"chat_template.jinja": "theirs"})
    assert warning.message == "`rl` has a chat template and `target` has none; the output has none"


@pytest.mark.parametrize(
    "rl",
    [
        {"chat_template.jinja": "ours\n"},
        {"tokenizer_config.json": {"chat_template": "ours \n"}},
        {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "ours"}]}},
        {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "ours"},
                                                     {"name": "tool_use", "template": "tools"}]}},
        {"chat_template.json": {"chat_template": "ours"}},
        {},
    ],
)  # fmt: skip
def test_chat_templates_are_read_wherever_they_are(tmp_path: Path, rl: dict[str, Any]) -> None:
    assert said(compared(tmp_path, target={"chat_template.jinja": "ours"}, rl=rl)) == []
    if rl:
        [warning] = compared(tmp_path, target={"chat_template.jinja": "others"}, rl=rl)
        assert warning.name == "chat-template"


def named(**templates: str) -> dict[str, Any]:
    return {
        "tokenizer_config.json": {
            "chat_template": [{"name": name, "template": text} for name, text in templates.items()]
        }
    }


@pytest.mark.parametrize(
    ("target", "rl", "differ"),
    [
        (named(tool_use="tools"), named(default="theirs"), True),
        (named(tool_use="tools"), named(default="theirs", tool_use="tools"), True),
        (named(tool_use="tools"), named(tool_use="other"), True),
        (named(default="ours", tool_use="tools"), named(default="ours"), False),
        (named(tool_use="tools"), named(tool_use="tools"), False),
        (named(default="ours"), named(tool_use="tools"), False),
    ],
)
def test_the_usual_template_that_the_output_would_lack_is_a_difference(
    target: dict[str, Any], rl: dict[str, Any], differ: bool, tmp_path: Path
) -> None:
    found = compared(tmp_path, target=target, rl=rl)
    assert [it.message for it in found if it.name == "chat-template"] == [
        "`rl` has another chat template than `target`; the output has that of `target`"
    ] * differ


# What is only worth knowing.


def test_ids_of_padding_and_beginning_and_the_size_are_notes(tmp_path: Path) -> None:
    found = compared(
        tmp_path,
        target={"config": {"pad_token_id": 0, "bos_token_id": 1}},
        rl={"config": {"pad_token_id": 3, "vocab_size": 12}, "tokenizer_config.json": {"bos_token": "e"}},
        sft={"config": {"pad_token_id": None}},
    )
    assert said(found) == [
        ("note", None, "padding differs: 0 in `target`, 3 in `rl`; the output has that of `target`"),
        ("note", None, "the beginning of a text differs: 1 in `target`, 4 in `rl`; the output has that of `target`"),
        (
            "note",
            None,
            "the size of the vocabulary differs: 16 in `target`, 12 in `rl`, 16 in `sft`; the output has that of "
            "`target`",
        ),
    ]


def test_a_model_without_tokenizer_files_is_a_note(tmp_path: Path) -> None:
    for name in MODELS:
        model(tmp_path / name, {} if name == "rl" else {"tokenizer.json": tokenizer()})
    models = {name: open_folder(name, tmp_path / name) for name in MODELS}
    roles = roles_of({EMBEDDING: PAST, Q: PAST}, matrices=MATRICES)
    assert said(compare_tokens(models, "target", roles))[0] == (
        "note",
        None,
        "model `rl` has no tokenizer files: its ids are taken to be those of the other models",
    )
    without = {name: open_folder(name, model(tmp_path / "none" / name, {})) for name in MODELS}
    assert compare_tokens(without, "target", roles) == []


def test_a_skill_has_no_tokenizer_and_needs_none(tmp_path: Path) -> None:
    stored = Sum(Leaf("target"), Sum(Leaf("math"), Leaf("math:minus"), minus=True), minus=False)
    models = {"target": open_folder("target", model(tmp_path / "target", {"tokenizer.json": tokenizer()}))}
    models |= {name: open_folder(name, model(tmp_path / name, {})) for name in ("math", "math:minus")}
    assert compare_tokens(models, "target", roles_of({EMBEDDING: stored, Q: stored}, matrices=MATRICES)) == []


def test_roles_are_what_the_terms_of_all_tensors_say() -> None:
    assert roles_of({EMBEDDING: Leaf("target"), Q: PAST, HEAD: None}, matrices=MATRICES) == {
        "target": Role(True, False, frozenset([EMBEDDING])),
        "rl": Role(True, False, frozenset()),
        "sft": Role(False, True, frozenset()),
    }
    cancelled = Sum(PAST, Leaf("target"), minus=True)
    assert roles_of({EMBEDDING: cancelled})["target"] == Role()
