"""What `accept` settles, what is compared in spite of problems, models that are only copied, and broken files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    random_tensors,
    read_checkpoint,
    run_cli,
    tensor_shapes,
    write_checkpoint,
    write_family,
    write_recipe,
)
from pair_cases import tokenizer

import skillmerge
from skillmerge.checkpoints.tokenizers.small_files import MAX_BYTES
from skillmerge.errors import InputError
from skillmerge.remarks import ACCEPTABLE

PLAIN: dict[str, Any] = {"model_type": "llama", "num_hidden_layers": 3, "rope_theta": 10000.0, "vocab_size": 32}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 11421896\n"
FREE, THINK = {13: "<|reserved_special_token_0|>"}, {13: "<think>"}
COPIED = "model.norm.weight"


def models(folder: Path, merge: str | None = None, **given: dict[str, Any]) -> Path:
    """A family with a tokenizer each; given: keys of a model's configuration, and its side files, which have a dot."""
    for seed, name in enumerate(("target", "rl", "sft")):
        own = {"tokenizer.json": tokenizer(), **given.get(name, {})}
        config = {**PLAIN, **{key: value for key, value in own.items() if "." not in key}}
        step = random_tensors(tensor_shapes(), torch.float32, seed, 1e-3)
        tensors = {key: (it + step[key]).bfloat16() for key, it in random_tensors(tensor_shapes()).items()}
        write_checkpoint(folder / name, tensors, config=config)
        for file, content in own.items():
            if "." in file:
                (folder / name / file).write_text(content if isinstance(content, str) else json.dumps(content))
    return write_recipe(folder) if merge is None else write_recipe(folder, merge)


def changed(recipe: Path, **keys: Any) -> Path:
    recipe.write_text(json.dumps({**json.loads(recipe.read_text()), **keys}))
    return recipe


def idle(name: str) -> str:
    return f"`accept: [{name}]` settles nothing here"


@pytest.mark.parametrize("name", sorted(ACCEPTABLE.keys() - {"update-size"}))
def test_name_that_settles_nothing_is_a_note(name: str, tmp_path: Path) -> None:
    recipe = models(tmp_path)
    before = skillmerge.plan(recipe).notes
    assert [note for note in skillmerge.plan(changed(recipe, accept=[name])).notes if note not in before] == [
        idle(name)
    ]
    assert f"note: {idle(name)}\n" in run_cli("apply", recipe).stderr


def test_update_size_is_known_only_when_it_is_measured(tmp_path: Path) -> None:
    """The note would come and go with `--stats`."""
    recipe = changed(models(tmp_path), accept=["update-size"])
    assert idle("update-size") not in skillmerge.plan(recipe).notes
    assert idle("update-size") not in run_cli("apply", recipe).stderr


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("donor", {"merge": "target - sft + rl", "coefficients": {}}),
        ("merged-share", {"copy": [{"tensors": "model.embed_tokens.weight", "from": "target"}]}),
        ("ties", {"coefficients": {"lam": {"default": 0.7, "rules": [{"modules": "head", "value": 0}]}}}),
    ],
)
def test_name_that_settles_what_the_recipe_says_is_no_note(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True} if name == "ties" else {}
    recipe = changed(models(tmp_path, target=tied, rl=tied, sft=tied), **keys)
    assert [it.name for it in skillmerge.plan(recipe).warnings] == [name]
    plan = skillmerge.plan(changed(recipe, accept=[name]))
    assert (plan.warnings, idle(name) in plan.notes) == ((), False)


def test_ties_of_stored_heads_are_known_when_weights_are_read(tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    recipe = changed(models(tmp_path, target=tied, rl=tied, sft=tied), accept=["ties"])
    for name in ("target", "rl", "sft"):
        tensors = random_tensors(tensor_shapes())
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        write_checkpoint(tmp_path / name, tensors, config={**PLAIN, **tied})
    assert idle("ties") not in skillmerge.plan(recipe).notes
    assert f"note: {idle('ties')}\n" in run_cli("apply", recipe).stderr


def test_no_name_is_idle_while_the_models_are_the_wrong_ones(tmp_path: Path) -> None:
    recipe = changed(models(tmp_path, rl={"model_type": "qwen2"}), accept=["tokenizer", "merged-share"])
    assert not any("settles nothing" in note for note in skillmerge.plan(recipe).notes)
    recipe = changed(models(tmp_path, rl={"rope_theta": 5e5}), accept=["tokenizer", "merged-share"])
    assert [note for note in skillmerge.plan(recipe).notes if "settles" in note] == [idle("tokenizer")]


def test_placeholders_that_the_difference_trains_can_be_accepted(tmp_path: Path) -> None:
    free, used = ({"tokenizer.json": tokenizer(added=added)} for added in (FREE, THINK))
    recipe = models(tmp_path, target=used, rl=used, sft=free)
    with pytest.raises(InputError, match="1 warning under --strict") as caught:
        skillmerge.apply(recipe, strict=True)
    assert "accept: [tokenizer]" in str(caught.value.fix)
    result = skillmerge.apply(changed(recipe, accept=["tokenizer"]), strict=True)
    assert [(it.name, it.key, it.level) for it in result.manifest.accepted] == [
        ("tokenizer", "placeholders", "warning")
    ]


def test_placeholders_hide_no_other_way_of_cutting_text(tmp_path: Path) -> None:
    free, used = ({"tokenizer.json": tokenizer(added=added)} for added in (FREE, THINK))
    other = {"tokenizer.json": tokenizer(added=THINK, normalizer=None)}
    plan = skillmerge.plan(models(tmp_path, target=used, rl=other, sft=free))
    assert [it.name for it in plan.warnings] == ["tokenizer", "tokenization"]


# Models of two architectures, and files that are none.


def test_accepted_architecture_shows_what_else_differs(tmp_path: Path) -> None:
    other = {"model_type": "mistral", "rope_theta": 5e5, "chat_template.jinja": "x"}
    recipe = models(tmp_path, rl=other)
    assert [(it.name, it.level) for it in skillmerge.plan(recipe).compared.found if it.name] == [
        ("architecture", "problem")
    ]
    plan = skillmerge.plan(changed(recipe, accept=["architecture"]))
    assert [(it.name, it.key, it.accepted) for it in plan.compared.found if it.name] == [
        ("architecture", "model_type", True),
        ("rope", "rope base", False),
        ("window", "sliding window", False),
        ("chat-template", "chat_template", False),
    ]


def test_pointer_in_place_of_a_side_file_ends_nothing_but_is_told(tmp_path: Path) -> None:
    """Found by a review: a saved plan ended as well, and all that is found later was not told of."""
    recipe, saved = models(tmp_path), tmp_path / "p.json"
    output = skillmerge.apply(recipe).output
    assert run_cli("plan", recipe, "--save", saved).returncode == 0
    (tmp_path / "rl" / "tokenizer.json").write_text(POINTER)
    said = "model `rl`: tokenizer.json: is a Git LFS pointer, not the file itself; its tokenizer is compared as far as"
    planned = run_cli("plan", recipe)
    assert planned.returncode == 0
    assert f"warning: {said} other files say it\n" in planned.stdout
    for command in (("apply", saved, "--output", tmp_path / "out"), ("rebuild", output, "--check")):
        process = run_cli(*command)
        assert process.returncode == 0, process.stderr
        assert f"warning: {said} other files say it\n" in process.stderr
    inspected = run_cli("inspect", tmp_path / "sft", tmp_path / "rl")
    assert inspected.returncode == 0
    assert "tokenizer.json: is a Git LFS pointer, not the file itself" in inspected.stderr
    assert run_cli("plan", changed(recipe, accept=["tokenizer"]), "--strict").returncode == 0


def test_pointer_in_place_of_a_side_file_of_the_donor_ends_a_plan(tmp_path: Path) -> None:
    recipe = models(tmp_path)
    (tmp_path / "target" / "chat_template.jinja").write_text(POINTER)
    stopped = run_cli("plan", recipe)
    assert stopped.returncode == 4
    assert f"{tmp_path / 'target' / 'chat_template.jinja'}: is a Git LFS pointer, not the file" in stopped.stderr


SIX = {f"model.layers.{layer}.self_attn.{it}_proj.weight": (16, 16) for layer in range(6) for it in "qkvo"}
"""Six layers, each of enough tensors to be one."""


def without_the_last_layer(folder: Path, name: str) -> None:
    """Two models of a configuration that says six layers, of which one holds five."""
    config = {**PLAIN, "num_hidden_layers": 6}
    write_family(folder, SIX, config=config)
    held = {key: it for key, it in read_checkpoint(folder / name).items() if ".layers.5." not in key}
    shutil.rmtree(folder / name)
    write_checkpoint(folder / name, held, config=config)


def test_pointer_hides_nothing_that_is_found_later(tmp_path: Path) -> None:
    """Found by a review: the comparison ended at the first one, and said that all had been compared."""
    without_the_last_layer(tmp_path, "rl")
    (tmp_path / "sft" / "special_tokens_map.json").write_text(POINTER)
    inspected = run_cli("inspect", tmp_path / "rl", tmp_path / "sft").stderr
    assert "special_tokens_map.json: is a Git LFS pointer" in inspected
    assert "config.json says 6 layers, and the weights hold 5" in inspected


def test_inspect_tells_what_the_model_after_lacks(tmp_path: Path) -> None:
    """Found by a review: what a plan says of its donor, `inspect` did not."""
    without_the_last_layer(tmp_path, "rl")
    assert run_cli("inspect", tmp_path / "sft", tmp_path / "rl", "-q").stderr.splitlines()[0] == (
        f"warning: `{tmp_path / 'rl'}`: config.json says num_hidden_layers = 6, but the weights hold 5 layers "
        "(`model.layers.0` to `model.layers.4`)"
    )


def test_differences_only_warn_of_what_is_built_again(tmp_path: Path) -> None:
    recipe = models(tmp_path)
    output = skillmerge.apply(recipe).output
    path = tmp_path / "rl" / "config.json"
    path.write_text(json.dumps({**PLAIN, "rope_theta": 5e5}))
    rebuilt = run_cli("rebuild", output, "--check")
    assert rebuilt.returncode == 0
    assert "warning: rope base: `rl` has 500,000, the donor `target` 10,000: " in rebuilt.stderr


# Models that are only copied from, and files that the output carries.


def test_model_that_is_only_copied_from_may_stop_and_talk_as_it_likes(tmp_path: Path) -> None:
    recipe = models(tmp_path)
    shutil.copytree(tmp_path / "rl", tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text("other")
    (tmp_path / "other" / "generation_config.json").write_text('{"eos_token_id": 7}')
    four = {name: name for name in ("target", "rl", "sft", "other")}
    changed(recipe, models=four, copy=[{"tensors": COPIED, "from": "other"}])
    plan = skillmerge.plan(recipe)
    assert (plan.problems, plan.warnings) == ((), ())
    assert dict(plan.tensors[COPIED].sources) == {"other": COPIED}
    assert str(plan.compared.line).startswith("compared target, rl, sft, other: ")
    added = skillmerge.plan(changed(recipe, copy=[], merge="target + lam * (rl - sft) + 0.1 * (other - sft)"))
    assert [it.name for it in added.warnings] == ["stop-tokens", "chat-template"]


def test_rows_that_are_only_copied_have_to_be_the_donors_tokens(tmp_path: Path) -> None:
    recipe = models(tmp_path)
    shutil.copytree(tmp_path / "rl", tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer([*"hgfedcba", "ab", "cd", "abcd"])))
    four = {name: name for name in ("target", "rl", "sft", "other")}
    changed(recipe, models=four, copy=[{"tensors": "model.embed_tokens.weight", "from": "other"}])
    assert [it.name for it in skillmerge.plan(recipe).problems] == ["tokenizer"]


BROKEN = {
    "tokenizer.json": '{"model": ',
    "tokenizer_config.json": "[]",
    "generation_config.json": "{",
    "special_tokens_map.json": "{",
}


@pytest.mark.parametrize("file", BROKEN)
def test_broken_file_of_the_donor_is_a_warning_since_the_output_carries_it(file: str, tmp_path: Path) -> None:
    recipe = models(tmp_path, target={file: BROKEN[file]})
    [told] = skillmerge.plan(recipe).warnings
    path = tmp_path / "target" / file
    assert told.message.startswith(f"the donor `target`: {path}: cannot be read: ")
    assert told.message.endswith("; the output carries the file as it is")
    assert told.fix == "fetch or save that file again; to carry it as it is, write `accept: [tokenizer]`"
    assert skillmerge.plan(changed(recipe, accept=["tokenizer"])).warnings == ()
    of_another = skillmerge.plan(models(tmp_path / "rl", rl={file: BROKEN[file]}))
    assert (of_another.problems, of_another.warnings) == ((), ())
    assert any(f"{file}: cannot be read: " in note for note in of_another.notes)


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("tokenizer_config.json", '{"backend": "a", "backend": "b"}', "the key 'backend' is defined twice"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "added_tokens"),
        ("added_tokens.json", '{"a": 0.5}', "an id is not a whole number"),
    ],
)
def test_file_of_the_donor_that_runtimes_read_is_a_note(file: str, content: str, why: str, tmp_path: Path) -> None:
    recipe = models(tmp_path, target={file: content})
    if file == "added_tokens.json":  # is read where tokenizer.json does not hold these tokens
        (tmp_path / "target" / "tokenizer.json").rename(tmp_path / "target" / "tokenizer.unused")
    plan = skillmerge.plan(recipe)
    assert (plan.problems, plan.warnings) == ((), ())
    assert any(f"{file}: cannot be read: " in note and why in note for note in plan.notes)


def test_broken_tokenizer_is_no_warning_where_no_output_carries_it(tmp_path: Path) -> None:
    models(tmp_path, rl={"tokenizer.json": "{"})
    extracted = run_cli("extract", "--from", tmp_path / "rl", "--minus", tmp_path / "sft", "-o", tmp_path / "skill")
    assert (extracted.returncode, "warning" in extracted.stderr) == (0, False)


def test_vocabularies_of_several_languages_are_not_broken(tmp_path: Path) -> None:
    speech = {"vocab.json": {"eng": {"a": 0}, "fra": {"a": 1}}}
    recipe = models(tmp_path, target=speech, rl=speech, sft=speech)
    for name in ("target", "rl", "sft"):
        (tmp_path / name / "tokenizer.json").unlink()
    plan = skillmerge.plan(recipe)
    assert (plan.problems, plan.warnings, [it for it in plan.notes if "read" in it]) == ((), (), [])


def test_tokenizer_above_the_limit_is_not_broken(tmp_path: Path) -> None:
    recipe = models(tmp_path)
    with open(tmp_path / "target" / "tokenizer.json", "r+b") as stream:
        stream.truncate(MAX_BYTES + 1)
    plan = skillmerge.plan(recipe)
    assert plan.warnings == ()
    assert any("tokenizer.json: is larger than 64 MB; its tokenizer is compared as far" in note for note in plan.notes)
