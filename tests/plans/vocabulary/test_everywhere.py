"""Rows by token in every command and in every way to run one: the same bytes."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODELS, read_checkpoint, run_cli, weights, write_checkpoint, write_recipe
from hub_server import HubServer
from test_rows_by_hand import rows_of, write_models
from token_rows import BASE, EMBEDDING, HEAD, Words, by_hand, by_token, past, same_bits, tokenizer_json, write_model

import skillmerge
from skillmerge.engine.tiles import Tile
from skillmerge.errors import CheckFailed, StalePlan
from skillmerge.plans import budget
from skillmerge.plans.opening import Access, planned
from skillmerge.plans.planner import plan_recipe
from skillmerge.plans.vocabulary.by_token import by_token as aligned
from skillmerge.recipes.parse import load
from skillmerge.reporter import Reporter
from skillmerge.verbs.sweep.candidates import with_values
from skillmerge.verbs.sweep.in_memory import compute

MIXED: tuple[Words, Words, Words] = (
    [*BASE, "<tool>", "<think>", None, None],
    ["<think>", *BASE[::-1], "<tool>"],
    [*BASE, None, "<tool>", "<think>"],
)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A recipe by token over three models of different rows."""
    write_models(tmp_path, MIXED, dtype=torch.bfloat16, shards=2)
    return write_recipe(tmp_path, **by_token())


def made(recipe: Path, name: str = "out", **options: Any) -> dict[str, bytes]:
    return weights(skillmerge.apply(recipe, recipe.parent / name, **options).output)


def test_order_of_a_models_vocabulary_changes_no_byte(tmp_path: Path) -> None:
    """Its rows and their tokens are shuffled together, with padding in between."""
    found = []
    for seed in range(4):
        folder = tmp_path / str(seed)
        write_models(folder, MIXED)
        for number, name in enumerate(MODELS[1:], 1):
            order = [*MIXED[number], None]
            random.Random(seed * 7 + number).shuffle(order)
            tensors = read_checkpoint(folder / name)
            places = [list(MIXED[number]).index(word) if word is not None else 0 for word in order]
            shuffled = {key: value[places] if key in (EMBEDDING, HEAD) else value for key, value in tensors.items()}
            write_checkpoint(folder / name, shuffled, config={"vocab_size": len(order)})
            (folder / name / "tokenizer.json").write_text(tokenizer_json(order))
        found.append(made(write_recipe(folder, **by_token())))
    assert all(each == found[0] for each in found)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_threads_change_no_byte(mixed: Path, threads: int) -> None:
    assert made(mixed, threads=threads) == made(mixed, "other")


@pytest.mark.parametrize("shards", [1, 3])
def test_shards_of_a_model_change_no_byte(mixed: Path, shards: int) -> None:
    first = made(mixed)
    for name in ("rl", "sft"):
        tensors = read_checkpoint(mixed.parent / name)
        config = json.loads((mixed.parent / name / "config.json").read_text())
        for file in (mixed.parent / name).glob("model*"):
            file.unlink()
        write_checkpoint(mixed.parent / name, tensors, shards=shards, config=config)
    assert made(mixed, "other") == first


@pytest.mark.parametrize("merge", ["target + lam * (rl - sft)", "target + lam * ties(rl - sft, sft - rl, density=0.4)"])
def test_tiles_change_no_byte(tmp_path: Path, merge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are wider than a block, so that tiles begin and end inside of them."""
    write_models(tmp_path, MIXED, width=40_000, dtype=torch.bfloat16)
    recipe = write_recipe(tmp_path, merge, **by_token())
    first = made(recipe)
    for tile in (1 << 16, 1 << 18):
        with monkeypatch.context() as patch:
            patch.setattr(budget, "TILE_BYTES", tile)
            assert made(recipe, f"tile-{tile}", threads=2) == first


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"merge": "target + lam * (target - sft)", "tokens": {"<think>": {"from": "rl"}}},
        {"merge": "sft", "coefficients": None, "output": {"like": "target"}},
    ],
    ids=["formula", "taken", "donor outside"],
)
def test_saved_plan_and_tasks_give_the_same_bytes(mixed: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    mixed = write_recipe(tmp_path, **by_token(**keys))
    first = made(mixed)
    plan = tmp_path / "plan.json"
    assert run_cli("plan", mixed, "-o", plan).returncode == 0
    assert made(plan, "again") == first
    for index in range(2):
        task = run_cli("shard", plan, "-o", tmp_path / "tasks", "--index", str(index), "--of", "2")
        assert task.returncode == 0, task.stderr
    finished = run_cli("finish", plan, "-o", tmp_path / "tasks")
    assert finished.returncode == 0, finished.stderr
    assert weights(tmp_path / "tasks") == first


@pytest.mark.parametrize("command", ["apply", "shard"])
def test_changed_tokenizer_makes_a_plan_stale(mixed: Path, tmp_path: Path, command: str) -> None:
    plan = tmp_path / "plan.json"
    run_cli("plan", mixed, "-o", plan)
    words = list(MIXED[1])
    words[1], words[2] = words[2], words[1]
    (tmp_path / "rl" / "tokenizer.json").write_text(tokenizer_json(words))
    more = ["--index", "0", "--of", "1"] if command == "shard" else []
    stale = run_cli(command, plan, "-o", tmp_path / "out", *more)
    assert stale.returncode == StalePlan.exit_status, stale.stderr
    said = {"apply": "other tokens, or tokens with other ids", "shard": "other tensors, sizes or tokens in model-"}
    assert f"model rl: {said[command]}" in stale.stderr
    assert not (tmp_path / "out" / "config.json").exists()


def test_interrupted_run_does_not_keep_shards_of_other_rows(mixed: Path, tmp_path: Path) -> None:
    before = skillmerge.plan(mixed)
    (tmp_path / "sft" / "tokenizer.json").write_text(tokenizer_json([*BASE, "<think>", "<tool>", None]))
    after = skillmerge.plan(mixed)
    assert before.weights_digest != after.weights_digest
    assert before.digest != after.digest


def test_outputs_can_be_rebuilt_and_verified(mixed: Path, tmp_path: Path) -> None:
    output = skillmerge.apply(mixed, tmp_path / "out").output
    assert run_cli("verify", output).returncode == 0
    assert skillmerge.rebuild(output, check=True).tensors == 3
    manifest = json.loads((tmp_path / "out" / "skillmerge.manifest.json").read_text())
    assert manifest["vocabulary"]["matrices"][EMBEDDING] == {"rows": 12, "merged": 10, "donor": 2}
    (tmp_path / "rl" / "tokenizer.json").write_text(tokenizer_json(MIXED[1][::-1]))
    with pytest.raises((CheckFailed, StalePlan)):
        skillmerge.rebuild(output, check=True)


def test_hub_and_folder_give_the_same_bytes_in_a_handful_of_requests(hub: HubServer, tmp_path: Path) -> None:
    """A vocabulary of 4,000 tokens with some added ones: each matrix is read in a few ranges."""
    plain = [f"w{number}" for number in range(4000)]
    words: tuple[Words, Words, Words] = (
        [*plain, "<tool>", *[None] * 95],
        [*plain, "<think>", "</think>", "<tool>", *[None] * 93],
        [*plain, "</think>", "<tool>", *[None] * 30],
    )
    write_models(tmp_path, words, dtype=torch.bfloat16)
    first = made(write_recipe(tmp_path, **by_token()))
    for name in MODELS:
        hub.create_from(f"acme/{name}", tmp_path / name)
    (tmp_path / "remote").mkdir()
    models = {name: f"hf://acme/{name}" for name in MODELS}
    recipe = write_recipe(tmp_path / "remote", models=models, **by_token())
    hub.requests.clear()
    assert made(recipe, threads=1) == first
    assert 6 <= hub.count(r"GET /storage/") <= 36
    small = [it.path for it in hub.requests if "acme/rl/" in it.path and "tokenizer" in it.path]
    assert len(small) <= 1, small


def test_sweep_in_memory_merges_the_rows_that_apply_does(tmp_path: Path) -> None:
    """Which rows are merged depends on the numbers: a model with the factor 0 needs no token."""
    write_models(tmp_path, ([*BASE, "<x>"], [*BASE, None, "<x>"], [*BASE, "<y>"]))
    keys = by_token(coefficients={"lam": 1.0, "mu": 0.5}, output={"like": "target"})
    recipe = write_recipe(tmp_path, "(1 - lam - mu) * target + lam * rl + mu * sft", **keys)
    parsed = load(recipe)
    for values in ({"lam": 0.5, "mu": 0.0}, {"lam": 0.5, "mu": 0.25}):
        with planned(parsed, None, Access(), lambda _: None) as (_, checkpoints):
            candidate = with_values(parsed, values)
            models = aligned(candidate, checkpoints)
            plan = plan_recipe(candidate, models)
            into = {name: torch.zeros(it.shape).view(-1) for name, it in plan.tensors.items()}

            def put(tile: Tile, found: torch.Tensor, into: dict[str, torch.Tensor] = into) -> None:
                into[tile.tensor.name][tile.first : tile.last].copy_(found)

            compute(plan, models, put)
        wanted = read_checkpoint(skillmerge.apply(candidate, tmp_path / f"out-{values['mu']}").output)
        for name, tensor in wanted.items():
            assert torch.equal(into[name], tensor.view(-1)), (values, name)
        rows = rows_of(tmp_path, ([*BASE, "<x>"], [*BASE, None, "<x>"], [*BASE, "<y>"]), EMBEDDING)
        stays = same_bits(wanted[EMBEDDING][8], rows["target"][1][8])
        assert stays == (values["mu"] != 0)


def test_inspect_measures_rows_of_tokens(tmp_path: Path) -> None:
    write_models(tmp_path, (BASE, BASE, [*BASE[::-1], None]))
    tensors = read_checkpoint(tmp_path / "target")
    for matrix in (EMBEDDING, HEAD):
        reversed_rows = tensors[matrix].flip(0)
        tensors[matrix] = torch.cat([reversed_rows, torch.ones(1, reversed_rows.shape[1])])
    write_checkpoint(tmp_path / "sft", tensors, config={"vocab_size": 9})
    found = skillmerge.inspect(tmp_path / "sft", tmp_path / "target", vocabulary="by-token")
    assert found.total["changed"] == 0
    shown = run_cli("inspect", tmp_path / "sft", tmp_path / "target", "--vocabulary", "by-token")
    assert shown.returncode == 0, shown.stderr
    refused = run_cli("inspect", write_recipe(tmp_path), "--vocabulary", "by-token")
    assert refused.returncode == 2
    assert "write it into the recipe: `vocabulary: by-token`" in refused.stderr


def test_no_tokenizer_is_read_where_no_row_is_merged(tmp_path: Path) -> None:
    write_models(tmp_path, (BASE, [*BASE, "<x>"], BASE))
    for name in MODELS:
        shutil.rmtree(tmp_path / name / "tokenizer.json", ignore_errors=True)
        (tmp_path / name / "tokenizer.json").unlink()
    rules = [{"modules": ["embedding", "head"], "value": 0}]
    recipe = write_recipe(tmp_path, **by_token(coefficients={"lam": {"default": 0.5, "rules": rules}}))
    found = run_cli("plan", recipe)
    assert found.returncode == 0, found.stderr
    note = "`vocabulary: by-token` changes nothing: the formula reads no other model's embedding or head"
    assert note in found.stdout


def test_random_vocabularies_agree_with_maps_made_by_hand(tmp_path: Path) -> None:
    for seed in range(6):
        chance = random.Random(seed)
        words: list[Words] = []
        for _ in MODELS:
            some: list[str | None] = [f"t{number}" for number in range(40) if chance.random() < 0.8]
            some += [None] * chance.randrange(6)
            chance.shuffle(some)
            words.append(some)
        folder = tmp_path / str(seed)
        for number, name in enumerate(MODELS):
            write_model(folder / name, words[number], number, shards=chance.choice([1, 2]))
        output = skillmerge.apply(write_recipe(folder, **by_token()), folder / "out", reporter=Reporter()).output
        for matrix in (EMBEDDING, HEAD):
            rows = rows_of(folder, (words[0], words[1], words[2]), matrix)
            wanted: np.ndarray = by_hand(rows, "target", past)
            assert same_bits(read_checkpoint(output)[matrix], wanted)
