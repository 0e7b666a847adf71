"""The plan: actions, accounting with rules ready to paste, config checks, layout, speed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import (
    PEAK_MEMORY,
    random_tensors,
    read_checkpoint,
    run_cli,
    tensor_shapes,
    write_checkpoint,
    write_family,
    write_recipe,
)

import skillmerge
from skillmerge.errors import InputError, RecipeError
from skillmerge.plans.accounting import settlement

Edit = Callable[..., Path]


def checkpoint(folder: Path, shapes: dict[str, tuple[int, ...]], seed: int = 0, **config: object) -> Path:
    return write_checkpoint(folder, random_tensors(shapes, seed=seed), config=config)


def trio(
    folder: Path, config: dict[str, object] | None = None, layers: int = 3, **changes: dict[str, tuple[int, ...]]
) -> Path:
    """A family whose models have the shapes given in `changes`, else the usual ones."""
    for seed, name in enumerate(("target", "rl", "sft")):
        checkpoint(folder / name, changes.get(name, tensor_shapes(layers)), seed, **(config or {}))
    return write_recipe(folder)


def without(*names: str, layers: int = 3) -> dict[str, tuple[int, ...]]:
    """With 8 layers a matrix is less than a tenth of the parameters."""
    return {name: shape for name, shape in tensor_shapes(layers).items() if name not in names}


def problems(recipe: Path) -> list[str]:
    """The messages, and last the rules that would settle them."""
    plan = skillmerge.plan(recipe)
    return [problem.message for problem in plan.problems] + (
        [text] if (text := settlement(plan.recipe, plan.problems)) else []
    )


def test_plan_gives_every_tensor_an_action_and_its_coefficients(family: Path, edit: Edit) -> None:
    rules = [{"layers": "0-1", "value": 0.0}, {"modules": "mlp", "value": 0.5}]
    plan = skillmerge.plan(edit(family, coefficients={"lam": {"default": 1.0, "rules": rules}}))
    tensors = plan.tensors
    assert tensors["model.layers.0.self_attn.q_proj.weight"].action == "copy"
    assert tensors["model.layers.0.self_attn.q_proj.weight"].sources == (
        ("target", "model.layers.0.self_attn.q_proj.weight"),
    )
    assert tensors["model.layers.0.mlp.up_proj.weight"].coefficients == (0.5,)
    assert tensors["model.layers.2.input_layernorm.weight"].coefficients == (1.0,)
    assert {model for model, _ in tensors["lm_head.weight"].sources} == {"target", "rl", "sft"}
    assert plan.donor == "target"


def test_plan_predicts_bytes_exactly(family: Path) -> None:
    plan = skillmerge.plan(family)
    result = skillmerge.apply(family)
    written = result.manifest.size
    assert plan.bytes_written == written
    assert plan.bytes_read == 3 * sum(spec.nbytes for shard in plan.shards for spec in shard.specs)


def test_plan_digest_depends_on_what_the_output_depends_on(family: Path, edit: Edit) -> None:
    digest = skillmerge.plan(family).digest
    assert skillmerge.plan(family).digest == digest
    assert skillmerge.plan(family, coefficients={"lam": 0.5}).digest != digest
    assert skillmerge.plan(edit(family, output={"path": "merged", "seed": 1})).digest != digest


def test_tensor_that_a_model_lacks_is_named_with_the_rule_to_settle_it(tmp_path: Path, edit: Edit) -> None:
    recipe = trio(tmp_path, layers=8, rl=without("lm_head.weight", layers=8))
    assert problems(recipe) == [
        "model `rl` lacks 1 tensor that the formula needs: lm_head.weight",
        'to take the donor\'s own, add to the recipe:\ncopy:\n  - {tensors: "lm_head.weight", from: target}',
    ]
    with pytest.raises(InputError, match="1 problem between the models"):
        skillmerge.apply(recipe)
    edit(recipe, copy=[{"tensors": "lm_head.weight", "from": "target"}])
    assert problems(recipe) == []
    assert skillmerge.plan(recipe).tensors["lm_head.weight"].action == "copy"


def test_tensor_that_the_donor_lacks_is_named_with_the_rule_to_settle_it(tmp_path: Path, edit: Edit) -> None:
    extra = {f"model.layers.{layer}.self_attn.rotary.inv_freq": (4,) for layer in range(3)}
    recipe = trio(tmp_path, sft={**tensor_shapes(), **extra}, rl={**tensor_shapes(), **extra})
    *messages, rules = problems(recipe)
    assert len(messages) == 2
    assert rules == (
        'if the output does not need them, add to the recipe:\nignore:\n  - "model.layers.*.self_attn.rotary.inv_freq"'
    )
    edit(recipe, ignore=["model.layers.*.self_attn.rotary.inv_freq"])
    assert problems(recipe) == []


def test_suggested_globs_match_nothing_but_the_problem(tmp_path: Path) -> None:
    recipe = trio(tmp_path, layers=8, rl=without("model.layers.1.mlp.up_proj.weight", layers=8))
    *_, text = problems(recipe)
    assert '{tensors: "model.layers.1.mlp.up_proj.weight", from: target}' in text


def test_shapes_that_differ_are_shown_both(tmp_path: Path) -> None:
    larger = {**tensor_shapes(), "model.embed_tokens.weight": (40, 16), "lm_head.weight": (40, 16)}
    text, _ = problems(trio(tmp_path, rl=larger))
    assert "`model.embed_tokens.weight` [32, 16] against [40, 16]" in text
    assert "vocabularies seem to differ" in text


def test_models_of_different_architectures_are_told_so(tmp_path: Path) -> None:
    other = {f"transformer.{name.replace('_', '')}": shape for name, shape in tensor_shapes(hidden=24).items()}
    assert "share no tensor names" in "\n".join(problems(trio(tmp_path, rl=other)))


def test_zero_coefficient_needs_no_other_model(tmp_path: Path, edit: Edit) -> None:
    recipe = trio(tmp_path, rl=without("lm_head.weight"))
    edit(recipe, coefficients={"lam": {"rules": [{"tensors": "lm_head.weight", "value": 0}]}})
    assert problems(recipe) == []


TIED = {"tie_word_embeddings": True}


def test_head_that_the_config_ties_is_no_difference(tmp_path: Path) -> None:
    recipe = trio(tmp_path, TIED, rl=without("lm_head.weight"), sft=without("lm_head.weight"))
    plan = skillmerge.plan(recipe)
    assert plan.problems == ()
    assert dict(plan.tensors["lm_head.weight"].sources)["rl"] == "model.embed_tokens.weight"
    assert any("ties to it" in note for note in plan.notes)


def test_head_that_only_others_store_is_left_out_where_all_tie_it(tmp_path: Path) -> None:
    plan = skillmerge.plan(trio(tmp_path, TIED, target=without("lm_head.weight")))
    assert plan.problems == ()
    assert "lm_head.weight" not in plan.tensors
    assert any("left out" in note for note in plan.notes)


def test_head_that_differs_from_what_it_is_tied_to_is_not_lost(tmp_path: Path) -> None:
    """transformers loads such a head as it is stored, whatever the config says."""
    recipe = trio(tmp_path, TIED, target=without("lm_head.weight"))
    with pytest.raises(InputError, match=r"ties `lm_head\.weight` to `model\..*`, but the two differ"):
        skillmerge.apply(recipe)
    for name in ("rl", "sft"):
        tensors = read_checkpoint(tmp_path / name)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        write_checkpoint(tmp_path / name, tensors, config=TIED)
    skillmerge.apply(recipe)


def test_tied_pair_that_the_recipe_drives_apart_gets_a_word(tmp_path: Path, edit: Edit) -> None:
    recipe = edit(trio(tmp_path, TIED), coefficients={"lam": {"rules": [{"modules": "head", "value": 0}]}})
    assert any("runtimes may use either" in it.message for it in skillmerge.plan(recipe).warnings)


def test_rules_are_added_to_sections_that_are_there(tmp_path: Path, edit: Edit) -> None:
    recipe = trio(tmp_path, layers=8, rl=without("lm_head.weight", layers=8))
    edit(recipe, copy=[{"tensors": "model.norm.weight", "from": "target"}])
    assert "add to the recipe's `copy:`\n  - {tensors" in problems(recipe)[-1]


def test_head_that_is_not_tied_is_a_difference(tmp_path: Path) -> None:
    target = without("lm_head.weight", layers=8)
    *_, text = problems(trio(tmp_path, {"tie_word_embeddings": False}, layers=8, target=target))
    assert 'ignore:\n  - "lm_head.weight"' in text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 4}, "the weights hold 3 layers"),
        ({"vocab_size": 33}, "`model.embed_tokens.weight` has 32 rows"),
        ({"text_config": {"num_hidden_layers": 5}}, "text_config.num_hidden_layers = 5"),
    ],
)
def test_config_that_contradicts_the_shapes_is_a_problem(tmp_path: Path, config: dict, message: str) -> None:
    assert message in "\n".join(problems(trio(tmp_path, config)))


@pytest.mark.parametrize(
    "config", [{"num_hidden_layers": 3, "vocab_size": 32}, {"vocab_size": 30}, {"num_hidden_layers": 2}]
)
def test_config_that_fits_or_leaves_room_is_none(tmp_path: Path, config: dict) -> None:
    assert problems(trio(tmp_path, config)) == []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"merge": "target + rl"}, r"gives 2 models' worth of weights for tensor[\s\S]*average"),
        ({"merge": "rl - sft"}, r"gives a difference, not a model[\s\S]*add it to a model"),
        ({"merge": "0.3 * target + 0.3 * rl"}, "must add up to 1"),
        ({"merge": "lam * target + (1 - lam) * rl - 0.1 * sft"}, r"with lam = 0.7"),
        (
            {"coefficients": {"lam": {"rules": [{"layers": "1-7", "value": 0}]}}},
            "layer 7 is past the last layer, which is 2",
        ),
        (
            {"coefficients": {"lam": {"rules": [{"tensors": "*.mpl.*", "value": 0}]}}},
            "this rule matches no tensor",
        ),
        ({"copy": [{"tensors": "visual.*", "from": "rl"}]}, "matches no tensor of the donor"),
        ({"ignore": ["visual.*"]}, "matches no tensor that the donor lacks"),
        ({"merge": "target + (rl - sft) / lam", "coefficients": {"lam": 0}}, "divides by zero"),
    ],
)
def test_mistake_that_only_the_models_reveal_is_told_in_the_recipe(
    family: Path, edit: Edit, keys: dict, message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        skillmerge.plan(edit(family, **keys))
    assert error.value.message.startswith(f"{family}:")


def test_factors_too_large_to_be_added_up_are_told(family: Path, edit: Edit) -> None:
    """Found by fuzzing: the sum of factors overflowed, and the plan ended with a traceback."""
    with pytest.raises(RecipeError, match="inf models' worth of weights"):
        skillmerge.plan(edit(family, merge="(target + rl - sft + sft) * 1e308", coefficients=None))


def test_degree_is_checked_for_every_tensors_coefficients(family: Path, edit: Edit) -> None:
    schedule = {"default": 1.0, "rules": [{"layers": 2, "value": 0.5}]}
    with pytest.raises(RecipeError, match=r"for tensor `model.layers.2.* \(with w = 0.5\)"):
        skillmerge.plan(edit(family, merge="w * target", coefficients={"w": schedule}))


def test_integer_tensors_must_be_equal_or_named(tmp_path: Path, edit: Edit) -> None:
    for name in ("target", "rl", "sft"):
        tensors = random_tensors(tensor_shapes(), seed=1)
        tensors["position_ids"] = torch.arange(8) + (name == "sft")
        write_checkpoint(tmp_path / name, tensors)
    recipe = write_recipe(tmp_path)
    assert skillmerge.plan(recipe).tensors["position_ids"].action == "same"
    with pytest.raises(InputError, match="`position_ids` holds I64 and differs between models `target` and `sft`"):
        skillmerge.apply(recipe)
    edit(recipe, copy=[{"tensors": "position_ids", "from": "sft"}])
    skillmerge.apply(recipe)


@pytest.mark.parametrize(
    ("name", "dtype", "config", "message"),
    [
        ("w", torch.float8_e4m3fn, {}, "holds F8_E4M3"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", torch.float32, {}, "quantized layout"),
        ("model.layers.0.mlp.qweight", torch.int32, {}, "quantized layout"),
        ("w", torch.bfloat16, {"quantization_config": {"quant_method": "fp8"}}, r"\(fp8\)"),
        ("w", torch.bfloat16, {"text_config": {"quantization_config": {"quant_method": "awq"}}}, r"\(awq\)"),
    ],
)
def test_quantised_checkpoints_are_refused_by_name_and_reason(
    tmp_path: Path, name: str, dtype: torch.dtype, config: dict, message: str
) -> None:
    trio(tmp_path)
    tensors = {**random_tensors(tensor_shapes()), name: torch.zeros(16, 16).to(dtype)}
    write_checkpoint(tmp_path / "rl", tensors, config=config)
    with pytest.raises(InputError, match="model `rl`") as error:
        skillmerge.plan(tmp_path / "recipe.yaml")
    assert error.match(message)


def test_packed_mxfp4_blocks_are_refused(tmp_path: Path) -> None:
    trio(tmp_path)
    packed = {
        f"model.layers.0.mlp.experts.up_proj_{part}": torch.zeros(4, dtype=torch.uint8) for part in ("blocks", "scales")
    }
    write_checkpoint(tmp_path / "rl", {**random_tensors(tensor_shapes()), **packed})
    with pytest.raises(InputError, match="MXFP4"):
        skillmerge.plan(tmp_path / "recipe.yaml")


def test_donor_can_be_chosen(tmp_path: Path, edit: Edit) -> None:
    recipe = write_family(tmp_path)
    write_checkpoint(tmp_path / "target", random_tensors(tensor_shapes(), torch.float32), shards=3)
    plan = skillmerge.plan(edit(recipe, output={"path": "merged", "like": "rl"}))
    assert [shard.file for shard in plan.shards] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert {tensor.dtype for tensor in plan.tensors.values()} == {"BF16"}


def test_single_file_of_another_name_becomes_the_one_that_runtimes_look_for(tmp_path: Path) -> None:
    recipe = write_family(tmp_path, shards=1)
    (tmp_path / "target" / "model.safetensors").rename(tmp_path / "target" / "weights.safetensors")
    assert [shard.file for shard in skillmerge.plan(recipe).shards] == ["model.safetensors"]


def test_plan_of_fifty_thousand_tensors_is_quick_and_small(tmp_path: Path) -> None:
    """3 models, 50,000 tensors each, in a process of its own that reports its own CPU time and memory."""
    import subprocess
    import sys

    from skillmerge.checkpoints.safetensors import build_header

    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer in range(61)
        for expert in range(273)
        for part in ("up", "gate", "down")
    ]
    header, specs = build_header((name, "BF16", (1, 2)) for name in names)
    for model in ("target", "rl", "sft"):
        (tmp_path / model).mkdir()
        (tmp_path / model / "model.safetensors").write_bytes(header + bytes(specs[-1].end - len(header)))
    recipe = write_recipe(tmp_path)
    program = (
        "import gc, re, sys, time; gc.disable(); import skillmerge; t = time.process_time();"
        f"plan = skillmerge.plan({str(recipe)!r}); seconds = time.process_time() - t;"
        "assert len(plan.tensors) > 49_900 and 'torch' not in sys.modules;"
        f"print(seconds, {PEAK_MEMORY} / 1e6)"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, process.stdout.split())
    assert megabytes < 400
    assert seconds < 10, "several times the promise: this is not a benchmark, only a guard"


def test_plan_command_shows_prints_and_saves(family: Path, tmp_path: Path, edit: Edit) -> None:
    edit(family, coefficients={"lam": {"default": 1.0, "rules": [{"layers": "0-", "ramp": [0, 1]}]}})
    human = run_cli("plan", family)
    assert human.returncode == 0, human.stderr
    for phrase in (
        "target (donor)",
        "lam over model.layers: 0 ▁▅█ 2  (0 to 1)",
        "copied byte for byte",
        "peak memory",
    ):
        assert phrase in human.stdout
    printed = run_cli("plan", family, "--json", "-o", tmp_path / "plan.json")
    document = json.loads(printed.stdout)
    assert document == json.loads((tmp_path / "plan.json").read_text())
    assert {
        "digest",
        "bytes_read",
        "bytes_written",
        "memory",
        "disk_free",
        "tensors",
        "shards",
    } <= document.keys()


def test_plan_command_shows_problems_and_exits_4(tmp_path: Path) -> None:
    process = run_cli("plan", trio(tmp_path, layers=8, rl=without("lm_head.weight", layers=8)))
    assert process.returncode == 4
    assert '- {tensors: "lm_head.weight", from: target}' in process.stdout


def test_lone_shard_of_an_indexed_donor_keeps_its_index(tmp_path: Path) -> None:
    """Without it no runtime finds a file of that name."""
    for seed, model in enumerate(("target", "sft", "rl")):
        folder = write_checkpoint(tmp_path / model, random_tensors(tensor_shapes(), seed=seed))
        names = list(tensor_shapes())
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    result = skillmerge.apply(write_recipe(tmp_path))
    index = json.loads((result.output / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model-00001-of-00001.safetensors"}
    skillmerge.verify(result.output)


def test_oddities_are_noted(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "target", random_tensors(tensor_shapes()))
    write_checkpoint(tmp_path / "sft", random_tensors(tensor_shapes()))
    (tmp_path / "rl").symlink_to("sft")
    schedule = {"default": 1.0, "rules": [{"layers": 0, "value": 0.5}]}
    recipe = write_recipe(tmp_path, coefficients={"lam": schedule})
    (folder / "config.json").unlink(missing_ok=True)
    plan = skillmerge.plan(recipe, coefficients={"lam": 0.3})
    notes = "\n".join(plan.notes)
    assert "no config.json" in notes
    assert "models `rl` and `sft` are the same: their difference is zero" in [it.message for it in plan.warnings]
    assert "--set lam=0.3 replaces the whole `lam` schedule" in notes
