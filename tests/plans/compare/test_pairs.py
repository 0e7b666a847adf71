"""Models that do not belong together are told by name before weights are read, and a recipe can accept them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_cli, write_checkpoint, write_recipe
from old_configs import OLD
from pair_cases import CASES, GONE, REAL, ROWS, Case, tokenizer

from skillmerge.checkpoints.kinds.table import open_folder
from skillmerge.methods.terms import Leaf, Scaled, Sum
from skillmerge.outputs.hub.card import write_card
from skillmerge.outputs.manifest import read as read_manifest
from skillmerge.plans.compare.config import compare_config
from skillmerge.plans.compare.config_values import effective, layers
from skillmerge.plans.compare.found import Compared
from skillmerge.plans.compare.roles import roles_of
from skillmerge.plans.compare.table import ROWS as TABLE
from skillmerge.plans.compare.table import UNKNOWN, Row
from skillmerge.recipes.recipe import Push
from skillmerge.remarks import ACCEPTABLE

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PAST = Sum(Leaf("target"), Scaled(Sum(Leaf("rl"), Leaf("sft"), minus=True), 0.7, divide=False), minus=False)
FOUND_WHILE_COMPUTING = {"adapter-base", "donor", "update-size", "merged-share", "quantised-difference"}


def small(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration for two layers of 16 rows in bfloat16."""
    changed = {**config, "torch_dtype": "bfloat16", "eos_token_id": 11, "bos_token_id": None, "pad_token_id": None}
    for part in (changed, changed.get("text_config", {})):
        for key in ("num_hidden_layers", "n_layer"):
            if key in part:
                part |= {key: 2}
    if "text_config" in changed:
        changed["text_config"] = {**changed["text_config"], "num_hidden_layers": 2}
    return {**changed, "vocab_size": ROWS}


def apply_case(case: Case, model: str, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration and the side files of one model of a pair."""
    files: dict[str, Any] = {
        "tokenizer.json": tokenizer(),
        "generation_config.json": {"eos_token_id": [11]},
        "chat_template.jinja": "{{ messages }}",
    }
    if case.base == "gpt2":  # the older files say the same
        files["vocab.json"] = dict(files["tokenizer.json"]["model"]["vocab"])
    if case.where not in (model, "all"):
        return config, files
    part = {**config, **config[case.inner]} if case.inner else config
    part = {key: value for key, value in {**part, **case.changed}.items() if value is not GONE}
    if case.inner:
        part = {**config, case.inner: {**config[case.inner], **case.changed}}
    return part, {**files, **case.files}


def write_pair(folder: Path, case: Case) -> Path:
    """The three models of a case, and the recipe over them."""
    for seed, model in enumerate(("target", "rl", "sft")):
        config, files = apply_case(case, model, small(REAL[case.base]))
        tied = REAL[case.base].get("tie_word_embeddings", case.base in ("gemma2", "gpt2"))
        head = case.head if case.head is not None and case.where in (model, "all") else not tied
        generator = torch.Generator().manual_seed(0)
        shapes = {EMBEDDING: (ROWS, 4), **{f"model.layers.{index}.mlp.up_proj.weight": (256, 4) for index in (0, 1)}}
        shapes |= {HEAD: (ROWS, 4)} if head else {}
        tensors = {
            name: (torch.randn(shape, generator=generator) + 0.01 * seed).to(torch.bfloat16)
            for name, shape in shapes.items()
        }
        write_checkpoint(folder / model, tensors, config=config)
        for name, content in files.items():
            if content is not None:
                text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
                (folder / model / name).write_text(text)
    extra = {"ignore": [HEAD]} if case.head and case.where == "rl" else {}
    return write_recipe(folder, **extra)


def rewrite(recipe: Path, **keys: Any) -> Path:
    recipe.write_text(json.dumps({**json.loads(recipe.read_text()), **keys}))
    return recipe


def planned(recipe: Path) -> dict[str, Any]:
    return dict(json.loads(run_cli("plan", recipe, "--json").stdout))


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_pair_that_does_not_belong_together_is_told_and_can_be_accepted(case: Case, tmp_path: Path) -> None:
    recipe = write_pair(tmp_path, case)
    told = run_cli("apply", recipe, "-q")
    assert (tmp_path / "merged").exists() == (case.level != "problem")
    plan = planned(recipe)
    found = [it for it in plan["compared"] if it["level"] != "note"]
    assert [(it["name"], it["key"], it["level"], it["accepted"]) for it in found] == [
        (case.name, case.key, case.level, False)
    ] * len(found)
    assert found
    assert len(found) <= (1 if case.where != "all" else 2)
    assert told.returncode == (4 if case.level == "problem" else 0)
    shown = " ".join((told.stdout + told.stderr).split())
    assert f"{'error' if case.level == 'problem' else 'warning'}: " in shown
    assert all(it["message"] in shown for it in found)
    assert set(found[0]["values"]) >= {case.where} - {"all"}

    accepted = planned(rewrite(recipe, accept=[case.name]))
    kept = [it for it in accepted["compared"] if it["level"] != "note"]
    assert [(it["name"], it["accepted"], it["values"]) for it in kept] == [
        (it["name"], True, it["values"]) for it in found
    ]
    assert accepted["problems"] == []
    assert accepted["warnings"] == []
    quiet = run_cli("apply", recipe, "-q", "-o", tmp_path / "accepted")
    assert (quiet.returncode, "warning" in quiet.stderr) == (0, False)
    manifest = json.loads((tmp_path / "accepted" / "skillmerge.manifest.json").read_text())
    assert [(it["name"], it["values"]) for it in manifest["accepted"]] == [(it["name"], it["values"]) for it in found]
    card = write_card(read_manifest(tmp_path / "accepted"), Push("acme/merged"), "mit")
    for it in found:
        values = ", ".join(f"{model}: {value}" for model, value in it["values"].items())
        assert f"| {it['name']} | {it['key']} | {values} |" in card


def test_every_kind_of_difference_has_a_pair() -> None:
    names = Counter(case.name for case in CASES)
    assert set(names) == ACCEPTABLE.keys() - FOUND_WHILE_COMPUTING
    assert len({case.id for case in CASES}) == len(CASES) >= 40


def values_of(row: Row) -> tuple[Any, Any]:
    """Two values of a row that are not its default."""
    return (True, "b") if row.default in (None, False) or row.default is UNKNOWN else (2, 3)


@pytest.mark.parametrize("row", [row for row in TABLE if row.keys], ids=lambda row: row.what)
def test_each_row_of_the_table_is_compared_under_each_of_its_keys(row: Row, tmp_path: Path) -> None:
    first, second = values_of(row)
    for number, key in enumerate(row.keys):
        found = compared(tmp_path / str(number), {"model_type": "odd", key: first}, {"model_type": "odd", key: second})
        assert [(it.name, it.key, it.level) for it in found] == [(row.name, row.what, row.level)]
        assert found[0].message.endswith(row.follows)


def test_rows_that_are_worked_out_have_pairs() -> None:
    computed = {row.what for row in TABLE if not row.keys}
    assert computed - {case.key for case in CASES} <= {"layers without positions"}


def compared(folder: Path, donor: dict[str, Any], other: dict[str, Any]) -> list[Compared]:
    """What is found between a donor and two models of another configuration."""
    models = {}
    for name, config in (("target", donor), ("rl", other), ("sft", other)):
        stated = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")
        tensors = {EMBEDDING: torch.zeros(2, 2, dtype=getattr(torch, stated))}
        tensors |= {} if config.get("tie_word_embeddings", True) else {HEAD: tensors[EMBEDDING].clone()}
        models[name] = open_folder(name, write_checkpoint(folder / name, tensors, config=config))
    roles = roles_of(dict.fromkeys(models["target"].tensors, PAST), matrices=(EMBEDDING, HEAD))
    return compare_config(models, "target", roles, "same")


def test_layers_without_positions_are_compared(tmp_path: Path) -> None:
    smol = {"model_type": "smollm3", "num_hidden_layers": 8, "num_attention_heads": 16, "hidden_size": 2048}
    usual = {**smol, "no_rope_layers": [1, 1, 1, 0] * 2}
    assert compared(tmp_path / "same", smol, usual) == []
    [found] = compared(tmp_path / "other", smol, {**smol, "no_rope_layers": [1] * 8})
    assert (found.name, found.key, found.level) == ("rope", "layers without positions", "problem")


ODD: dict[str, dict[str, Any]] = {
    "a kind that is a list": {"vision_config": {"model_type": ["llama"]}},
    "a kind that is a table": {"vision_config": {"model_type": {"llama": 1}}},
    "an interval that is a text": {"model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layer_interval": "4"},
    "layers that are a number": {"model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layers": 4},
    "a text of layers": {"model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layers": "1110"},
    "endless layers": {"model_type": "smollm3", "num_hidden_layers": 10**15},
    "endless layers with a window": {"model_type": "mistral", "num_hidden_layers": 10**15},
    "a window from below": {"model_type": "qwen2", "num_hidden_layers": 4, "sliding_window": 8,
                            "use_sliding_window": True, "max_window_layers": -(10**15)},
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_odd_values_end_no_comparison(odd: str, tmp_path: Path) -> None:
    found = compared(tmp_path, ODD[odd], ODD[odd])
    assert [it.message for it in found] == []


def test_odd_values_mean_nothing() -> None:
    smol = {"model_type": "smollm3", "num_hidden_layers": 4}
    usual = effective(smol, "smollm3")
    assert usual["layers without positions"] == (1, 1, 1, 0)
    for odd in ("1110", 4, {"0": 1}, True):
        assert effective({**smol, "no_rope_layers": odd}, "smollm3") == usual
        assert effective({**smol, "no_rope_layer_interval": {} if odd == 4 else odd}, "smollm3") == usual
    assert [layers({"num_hidden_layers": count}) for count in (-1, 0, 100_000, 100_001)] == [None, 0, 100_000, None]
    window = {"num_hidden_layers": 3, "sliding_window": 8, "use_sliding_window": True, "max_window_layers": -2}
    assert effective(window, "qwen2")["sliding window"] == (8, (0, 1, 2))


@pytest.mark.parametrize(
    ("target", "other", "expected"),
    [
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct", set()),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-Coder-7B", set()),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-Math-7B", {("rope", "rope base")}),
        ("Qwen/Qwen2.5-7B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", {("rope", "rope base")}),
        ("Qwen/Qwen2.5-Math-7B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", set()),
        ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct", set()),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", set()),
        ("meta-llama/Llama-3.1-8B", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", set()),
        ("meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-3.1-8B", {("rope", "rope trained scaling")}),
        ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.2",
         {("rope", "rope base"), ("window", "sliding window")}),
        ("microsoft/Phi-3-mini-4k-instruct", "microsoft/Phi-3-mini-128k-instruct",
         {("rope", "rope trained scaling"), ("window", "sliding window")}),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen3-8B", {("architecture", "model_type")}),
        ("meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-7B", {("architecture", "model_type")}),
        ("Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct", set()),
    ],
)  # fmt: skip
def test_real_configurations_that_belong_together_or_do_not(
    target: str, other: str, expected: set[tuple[str, str]], tmp_path: Path
) -> None:
    for number, (donor, rest) in enumerate([(target, other), (other, target)]):
        found = compared(tmp_path / str(number), OLD[donor], OLD[rest])
        assert {(it.name, it.key) for it in found if it.level != "note"} == expected


@pytest.mark.parametrize("name", OLD)
def test_real_configuration_saved_again_differs_in_nothing(name: str, transformers: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OLD[name]))
    saved = json.loads(transformers.AutoConfig.from_pretrained(tmp_path).to_json_string(use_diff=True))
    for number, (donor, rest) in enumerate([(OLD[name], saved), (saved, OLD[name])]):
        found = compared(tmp_path / str(number), donor, rest)
        assert [it.message for it in found if it.level != "note"] == []
