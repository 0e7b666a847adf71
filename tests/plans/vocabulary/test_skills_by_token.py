"""Stored skills and rows by token: extracted from models with other tokens, and added to other models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_checkpoint, run_cli, write_checkpoint, write_recipe
from safetensors.torch import save_file
from test_rows_by_hand import rows_of, write_models
from token_rows import (
    BASE,
    BLOCK,
    EMBEDDING,
    HEAD,
    Words,
    by_hand,
    by_token,
    past,
    same_bits,
    tokenizer_json,
    write_model,
)

import skillmerge
from skillmerge.checkpoints.kinds.table import open_as
from skillmerge.checkpoints.stores.folder import Folder
from skillmerge.engine.values import read_values
from skillmerge.errors import CheckFailed, InputError

MIXED: tuple[Words, Words, Words] = (
    [*BASE, "<tool>", "<think>", None, None],
    ["<think>", *BASE[::-1], "<tool>", None],
    [*BASE, None, "<tool>", "<x>"],
)


def extracted(folder: Path) -> Path:
    write_models(folder, MIXED)
    options = ("--vocabulary", "by-token", "--accept", "tokenization")
    done = run_cli("extract", "--from", folder / "rl", "--minus", folder / "sft", "-o", folder / "skill", *options)
    assert done.returncode == 0, done.stderr
    return folder / "skill"


def difference(folder: Path, name: str) -> np.ndarray:
    opened = open_as("skill", str(folder), Folder(folder), None)
    plus, minus = (
        read_values(plane, name).view(plane.tensors[name].shape).numpy() for plane in (opened.plus, opened.minus)
    )
    return plus.astype(np.float64) - minus.astype(np.float64)


def test_skill_holds_the_differences_of_tokens_and_zeros_elsewhere(tmp_path: Path) -> None:
    skill = extracted(tmp_path)
    rows = {name: it for name, it in rows_of(tmp_path, MIXED, EMBEDDING).items() if name != "target"}
    wanted = by_hand(rows, "rl", lambda rl, sft: rl.astype(np.float64) - sft.astype(np.float64))
    wanted[[0, 10]] = 0  # sft lacks <think>, and padding
    assert np.array_equal(difference(skill, EMBEDDING), wanted)
    opened = open_as("skill", str(skill), Folder(skill), None)
    for plane in (opened.plus, opened.minus):
        assert not read_values(plane, EMBEDDING).view(11, -1)[[0, 10]].any()


def test_skill_keeps_the_texts_of_its_rows(tmp_path: Path) -> None:
    skill = extracted(tmp_path)
    assert json.loads((skill / "skill.tokens.json").read_text()) == list(MIXED[1][:10])


def test_skill_gives_what_its_models_would(tmp_path: Path) -> None:
    """Onto a target with other rows: the tokens that all have, from their own rows."""
    extracted(tmp_path)
    models = {"target": "target", "math": {"skill": "skill"}}
    recipe = write_recipe(tmp_path, "target + lam * math", models=models, **by_token())
    made = read_checkpoint(skillmerge.apply(recipe, tmp_path / "out").output)
    rows = rows_of(tmp_path, MIXED, EMBEDDING)
    rows["sft"] = ["<y>" if word == "<x>" else word for word in MIXED[2]], rows["sft"][1]
    assert same_bits(made[EMBEDDING], by_hand(rows, "target", past))
    whole = {name: read_checkpoint(tmp_path / name)[BLOCK].numpy() for name in ("target", "rl", "sft")}
    assert same_bits(made[BLOCK], past(**whole))


def test_token_that_only_a_skill_lacks_is_merged_without_it(tmp_path: Path) -> None:
    extracted(tmp_path)
    write_model(tmp_path / "other", [*MIXED[0], "<new>"], 7)
    write_model(tmp_path / "before", [*MIXED[0], "<new>"], 8)
    write_model(tmp_path / "target", [*MIXED[0][:11], "<new>"], 0)
    models = {"target": "target", "other": "other", "before": "before", "math": {"skill": "skill"}}
    recipe = write_recipe(tmp_path, "target + (other - before) + lam * math", models=models, **by_token())
    made = read_checkpoint(skillmerge.apply(recipe, tmp_path / "out").output)[HEAD]
    ours, theirs, minus = (read_checkpoint(tmp_path / name)[HEAD].double() for name in ("target", "other", "before"))
    wanted = (ours[11] - (minus[12] - theirs[12])).float()
    assert torch.equal(made[11], wanted)
    assert torch.equal(made[10], ours[10].float())


def test_skill_without_tokens_is_refused_unless_its_rows_are_zero(tmp_path: Path) -> None:
    skill = extracted(tmp_path)
    (skill / "skill.tokens.json").unlink()
    models = {"target": "target", "math": {"skill": "skill"}}
    recipe = write_recipe(tmp_path, "target + lam * math", models=models, **by_token())
    found = run_cli("apply", recipe, "-o", tmp_path / "out")
    assert found.returncode == 4
    assert "does not say which token each of its rows belongs to" in found.stderr
    assert "help: extract it again from models with tokenizers, or leave `vocabulary` out of the recipe" in found.stderr
    tensors = {name: read_checkpoint(tmp_path / "sft")[name] for name in (EMBEDDING, HEAD)}
    block = {BLOCK: read_checkpoint(tmp_path / "rl")[BLOCK]}
    write_checkpoint(tmp_path / "rl", tensors | block, config={"vocab_size": 11})
    for name in ("rl", "sft"):
        (tmp_path / name / "tokenizer.json").unlink()
    skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), skill, overwrite=True)
    made = read_checkpoint(skillmerge.apply(recipe, tmp_path / "out").output)
    assert torch.equal(made[EMBEDDING], read_checkpoint(tmp_path / "target")[EMBEDDING])
    assert not torch.equal(made[BLOCK], read_checkpoint(tmp_path / "target")[BLOCK])


def test_parents_of_a_skill_are_told_from_others(tmp_path: Path) -> None:
    """The rows of `sft` were read in another order: its other tensors tell it."""
    skill = extracted(tmp_path)
    for name in ("rl", "sft"):
        assert run_cli("verify", skill, "--parent", tmp_path / name).returncode == 0, name
    assert run_cli("verify", skill, "--parent", tmp_path / "target").returncode == CheckFailed.exit_status
    assert skillmerge.rebuild(skill, check=True).tensors == 3


def test_skill_whose_rows_are_not_its_parents_is_no_patch_of_it(tmp_path: Path) -> None:
    for seed, (name, words) in enumerate(
        {"rl": ["</think>", *BASE, "<think>"], "sft": [*BASE, "<think>", None]}.items()
    ):
        write_model(tmp_path / name, words, seed)
    skillmerge.extract(str(tmp_path / "rl"), str(tmp_path / "sft"), tmp_path / "skill", vocabulary="by-token")
    found = run_cli("export", tmp_path / "skill", "--onto", tmp_path / "sft", "-o", tmp_path / "patch")
    assert found.returncode == 4
    assert f"rows of `{HEAD}` were matched by token: they are not where {tmp_path / 'sft'} has them" in found.stderr
    assert "help: add the skill in a recipe with `vocabulary: by-token`\n" in found.stderr
    assert not (tmp_path / "patch").exists()


def test_whole_models_have_no_rows_of_a_skill(tmp_path: Path) -> None:
    extracted(tmp_path)
    models = {"math": {"skill": "skill"}, "rl": "rl", "sft": "sft"}
    output = {"kind": "skill", "like": "math", "path": "two"}
    recipe = write_recipe(tmp_path, "math + (rl - sft)", models=models, coefficients=None, output=output, **by_token())
    with pytest.raises(InputError, match="a skill cannot give its rows to whole models") as caught:
        skillmerge.plan(recipe)
    assert caught.value.fix == "take a whole model as donor: `output: {like: rl}`"


def test_skills_add_up_by_token(tmp_path: Path) -> None:
    extracted(tmp_path)
    write_model(tmp_path / "a", [*BASE, "<think>"], 3)
    write_model(tmp_path / "b", ["<think>", *BASE], 4)
    skillmerge.extract(str(tmp_path / "a"), str(tmp_path / "b"), tmp_path / "second", vocabulary="by-token")
    models = {"math": {"skill": "skill"}, "code": {"skill": "second"}}
    output = {"kind": "skill", "path": "two"}
    recipe = write_recipe(tmp_path, "math + code", models=models, coefficients=None, output=output, **by_token())
    both = difference(skillmerge.apply(recipe, tmp_path / "two").output, EMBEDDING)
    math, code = difference(tmp_path / "skill", EMBEDDING), difference(tmp_path / "second", EMBEDDING)
    order = [8, *range(7, -1, -1)]  # <think> and the letters, in the order of the first
    wanted = math.copy()
    wanted[:9] += code[order]
    assert np.array_equal(both, wanted.astype(np.float32))


def test_adapters_rows_are_matched_by_token_too(tmp_path: Path) -> None:
    """As a difference: of a model with other rows than the target, whose tokenizer is beside it."""
    write_models(tmp_path, MIXED)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["embed_tokens"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    chance = torch.Generator().manual_seed(5)
    a, b = torch.randn(2, 11, generator=chance), torch.randn(6, 2, generator=chance)
    module = "base_model.model.model.embed_tokens"
    save_file({f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b}, adapter / "adapter_model.safetensors")
    models = {"target": "target", "v": {"adapter": "adapter"}}
    recipe = write_recipe(tmp_path, "target + lam * v", models=models, coefficients={"lam": 1.0}, **by_token())
    refused = run_cli("plan", recipe)
    assert refused.returncode == 4
    assert "copy the tokenizer that it was trained with into its folder, or leave `vocabulary` out" in refused.stderr
    by_id = run_cli("plan", write_recipe(tmp_path, "target + lam * v", models=models, coefficients={"lam": 1.0}))
    assert by_id.returncode == 4
    said = (
        f"`{module}.lora_embedding_A` has 11 rows, and `{EMBEDDING}` of {tmp_path / 'target'} has 12: tokens were added"
    )
    assert said in by_id.stderr
    advice = "add to the recipe `vocabulary: by-token`, and the tokenizer that it was trained with to its folder\n"
    assert f"help: {advice}" in by_id.stderr
    recipe = write_recipe(tmp_path, "target + lam * v", models=models, coefficients={"lam": 1.0}, **by_token())
    (adapter / "tokenizer.json").write_text(tokenizer_json(MIXED[1]))
    made = read_checkpoint(skillmerge.apply(recipe, tmp_path / "out").output)
    wide_a, wide_b = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    product = (np.outer(wide_a[0], wide_b[:, 0]) + np.outer(wide_a[1], wide_b[:, 1])).astype(np.float32)
    ours = read_checkpoint(tmp_path / "target")[EMBEDDING].numpy()
    places = {word: row for row, word in enumerate(MIXED[1]) if word is not None}
    wanted = ours.copy()
    for row, word in enumerate(MIXED[0]):
        if word in places:
            wanted[row] = (ours[row].astype(np.float64) + product[places[word]].astype(np.float64)).astype(np.float32)
    assert same_bits(made[EMBEDDING], wanted)
    assert torch.equal(made[HEAD], read_checkpoint(tmp_path / "target")[HEAD])


def test_rows_that_no_token_names_stay_as_they_are_with_skills_alone(tmp_path: Path) -> None:
    """Also where the method rounds, and no model but the donor, whose rows are its own, says which they are."""
    words: Words = [*BASE, "<tool>", None, None]
    for seed, name in enumerate(("target", "rl", "sft")):
        write_model(tmp_path / name, words, seed, dtype=torch.float64, width=64)
    skillmerge.extract(tmp_path / "rl", tmp_path / "sft", tmp_path / "skill")
    models = {"target": "target", "v": {"skill": "skill"}}
    merge = "multislerp(target, target + v, target + 0.5 * v)"
    recipe = write_recipe(tmp_path, merge, models=models, **by_token(coefficients=None, accept=["update-size"]))
    made = read_checkpoint(skillmerge.apply(recipe, tmp_path / "out").output)
    for matrix in (EMBEDDING, HEAD):
        assert torch.equal(made[matrix][9:], read_checkpoint(tmp_path / "target")[matrix][9:])
