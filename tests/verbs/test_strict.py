"""Problems, warnings and notes: where each is told, what `accept` settles, and what `--strict` makes of warnings."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_tensors, run_cli, tensor_shapes, write_checkpoint, write_recipe
from observing import MergeServer, discard, finished_shards, put_previous, staging_of, visible

import skillmerge
from skillmerge.errors import InputError
from skillmerge.outputs import manifest
from skillmerge.study.gates import GateFailed

PLAIN: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "rope_theta": 10000.0, "vocab_size": 32,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
SCALED = {**PLAIN, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
"""With what only a warning is for: another scaling in one of the models."""
WARNED = "rope scaling: `rl` has linear, factor 2, the donor `target` none: positions are scaled in only some"


def models(folder: Path, *, rl: dict[str, Any] = PLAIN, update: float = 2e-3, **keys: Any) -> Path:
    """A family in bfloat16, where rl has a configuration of its own, and `update` is how far it moved."""
    shapes = tensor_shapes()
    sft = random_tensors(shapes, torch.bfloat16, 0)
    moved = random_tensors(shapes, torch.float32, 1, update)
    write_checkpoint(folder / "sft", sft, config=PLAIN)
    write_checkpoint(folder / "target", random_tensors(shapes, torch.bfloat16, 2), config=PLAIN)
    write_checkpoint(folder / "rl", {name: (sft[name] + moved[name]).bfloat16() for name in sft}, config=rl)
    return write_recipe(folder, **keys)


@pytest.fixture
def warned(tmp_path: Path) -> Path:
    return models(tmp_path, rl=SCALED)


def test_warning_is_told_wherever_a_run_is_recorded(warned: Path) -> None:
    files = {name: warned.parent / name for name in ("report.html", "events.jsonl", "plan.md")}
    plan = run_cli("plan", warned, "--markdown", files["plan.md"])
    assert plan.returncode == 0
    assert f"warning: {WARNED}" in plan.stdout
    assert plan.stdout.splitlines()[-1] == "1 warning"
    assert "warning: `rope scaling" in files["plan.md"].read_text().replace("``", "`")
    document = json.loads(run_cli("plan", warned, "--json").stdout)
    assert [WARNED in text for text in document["warnings"]] == [True]
    assert [(row["name"], row["level"], row["accepted"]) for row in document["compared"]] == [
        ("rope-scaling", "warning", False)
    ]
    quiet = run_cli("apply", warned, "-q", "--report", files["report.html"], "--events", files["events.jsonl"])
    assert quiet.returncode == 0
    assert quiet.stderr.startswith(f"warning: {WARNED}")
    assert "1 warning" not in quiet.stdout
    told = run_cli("plan", warned, "-q").stdout.splitlines()
    assert (told[0].startswith(f"warning: {WARNED}"), told[-2][:5], told[-1]) == (True, "plan ", "1 warning")
    assert not any(line.startswith(("note:", "compared", "output", "reads")) for line in told)
    report = files["report.html"].read_text().replace("&#x27;", "'")
    assert WARNED in report.replace("<code>", "`").replace("</code>", "`")
    events = [json.loads(line) for line in files["events.jsonl"].read_text().splitlines()]
    assert [WARNED in event["message"] for event in events if event["event"] == "warning"] == [True]
    assert [WARNED in text for text in manifest.read(warned.parent / "merged").warnings] == [True]
    run_cli("apply", warned, "--overwrite", "--full", "--junit", warned.parent / "junit.xml")
    assert f"<system-out>warning: {WARNED}" in (warned.parent / "junit.xml").read_text()
    again = run_cli("apply", warned)
    assert again.stdout.splitlines()[-1] == "1 warning"
    assert again.stderr.count(WARNED) == 1
    assert [WARNED in text for text in json.loads(run_cli("apply", warned, "--json").stdout)["warnings"]] == [True]


def test_models_that_belong_together_are_warned_of_nothing(tmp_path: Path) -> None:
    recipe = models(tmp_path)
    result = skillmerge.apply(recipe)
    assert list(result.warnings) == []
    document = manifest.read(result.output).as_dict()
    assert "warnings" not in document
    assert "accepted" not in document
    assert run_cli("apply", recipe, "--strict").returncode == 0


def test_strict_refuses_a_warning_before_a_byte_is_written(warned: Path) -> None:
    for command in ("plan", "apply"):
        process = run_cli(command, warned, "--strict")
        assert process.returncode == 4
        assert "error: 1 warning under --strict" in process.stderr
        for text in (WARNED, "accept: [rope-scaling]"):  # once is enough
            assert (process.stdout + process.stderr).count(text) == 1
    assert run_cli("plan", warned, "--strict", "--detailed-exitcode").returncode == 4
    for command in ("plan", "apply"):
        process = run_cli(command, warned, "--strict", "--json")
        assert (process.returncode, json.loads(process.stdout)["ok"]) == (4, False)
    assert not skillmerge.plan(warned, strict=True).ok
    with pytest.raises(InputError):
        skillmerge.apply(warned, strict=True)
    assert sorted(path.name for path in warned.parent.iterdir()) == ["recipe.yaml", "rl", "sft", "target"]


def test_warning_of_the_text_alone_is_refused_with_its_help(tmp_path: Path) -> None:
    recipe = models(tmp_path, output={"path": "merged", "shard_size": 5})
    process = run_cli("apply", recipe, "--strict")
    assert process.returncode == 2
    assert process.stderr == (
        "error: 1 warning under --strict:\n"
        "line 14 of the recipe: `shard_size: 5` is 5 bytes\n"
        "help: did you mean `5GB`?\n"
    )
    process = run_cli("plan", recipe, "--strict")
    assert (process.returncode, process.stderr) == (2, "error: 1 warning under --strict\n")


def test_comparison_with_a_saved_plan_shows_warnings_too(warned: Path) -> None:
    run_cli("plan", warned, "--save", warned.parent / "plan.json")
    process = run_cli("plan", warned, "--diff", warned.parent / "plan.json")
    assert process.stdout.startswith("nothing changed since ")
    assert process.stdout.count(f"warning: {WARNED}") == 1


def test_accepted_difference_is_kept_and_warns_no_more(tmp_path: Path) -> None:
    recipe = models(tmp_path, rl=SCALED, accept=["rope-scaling"])
    assert run_cli("plan", recipe, "--strict").returncode == 0
    assert "accepted `rope-scaling`" in run_cli("plan", recipe).stdout
    result = skillmerge.apply(recipe, strict=True)
    (kept,) = manifest.read(result.output).accepted
    assert (kept.name, kept.key, kept.values) == (
        "rope-scaling", "rope scaling", {"target": "none", "rl": "linear, factor 2", "sft": "none"},
    )  # fmt: skip
    assert run_cli("verify", result.output).returncode == 0


def test_accepting_what_is_not_there_is_a_note(tmp_path: Path) -> None:
    recipe = models(tmp_path, accept=["window"])
    assert "note: `accept: [window]` settles nothing here" in run_cli("plan", recipe).stdout
    assert run_cli("plan", recipe, "--strict").returncode == 0


def test_name_that_nothing_is_called_is_a_mistake(tmp_path: Path) -> None:
    process = run_cli("plan", models(tmp_path, accept=["tokeniser"]))
    assert process.returncode == 2
    assert "`tokeniser` is not a difference that can be accepted" in process.stderr
    assert "did you mean `tokenizer`?" in process.stderr


def test_strict_holds_back_weights_that_rounding_spoiled(tmp_path: Path) -> None:
    recipe = models(tmp_path, update=1e-5, coefficients={"lam": 0.3})
    junit = tmp_path / "junit.xml"
    process = run_cli("apply", recipe, "--strict", "--junit", junit)
    assert process.returncode == 3
    assert "strict" in process.stderr
    assert 'failures="1"' in junit.read_text()
    assert not (tmp_path / "merged").exists()
    with pytest.raises(GateFailed) as caught:
        skillmerge.apply(recipe, strict=True, keep_failed=True)
    assert [outcome.gate for outcome in caught.value.outcomes] == ["strict"]
    assert (tmp_path / "merged.partial" / "files" / "model.safetensors").exists()


def test_strict_refuses_what_was_made_without_it_and_leaves_it_alone(tmp_path: Path) -> None:
    recipe = models(tmp_path, update=1e-5, coefficients={"lam": 0.3})
    output = skillmerge.apply(recipe).output
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    process = run_cli("apply", recipe, "--strict")
    assert process.returncode == 3
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_inspect_of_two_models_says_how_they_do_not_belong_together(tmp_path: Path) -> None:
    """Nothing is made of them, so that what is a problem elsewhere only warns."""
    models(tmp_path, rl={**PLAIN, "rope_theta": 1e6})
    process = run_cli("inspect", tmp_path / "sft", tmp_path / "rl", "--json")
    assert process.returncode == 0
    (said,) = json.loads(process.stdout)["warnings"]
    assert said.startswith(f"rope base: `{tmp_path / 'sft'}` has 10,000, `{tmp_path / 'rl'}` 1,000,000")
    assert f"warning: {said}" in process.stderr
    assert json.loads(run_cli("inspect", tmp_path / "recipe.yaml", "--json").stdout)["warnings"][0].startswith(
        "rope base"
    )


def test_result_has_what_the_plan_compared_and_noted(warned: Path) -> None:
    (warned.parent / "rl" / "extra.safetensors").write_bytes((warned.parent / "rl" / "model.safetensors").read_bytes())
    written = warned.parent / "result.json"
    result = json.loads(run_cli("apply", warned, "--json", "--result-file", written).stdout)
    plan = json.loads(run_cli("plan", warned, "--json").stdout)
    assert result == json.loads(written.read_text())
    assert (result["notes"], result["compared"]) == (plan["notes"], plan["compared"])
    assert "model `rl`: extra.safetensors is beside model.safetensors and not read" in result["notes"]
    assert [row["name"] for row in result["compared"] if row["level"] == "warning"] == ["rope-scaling"]


def test_side_file_that_is_none_stops_no_rebuild(tmp_path: Path) -> None:
    """Its weights are what they were: only what is made now needs the tokenizer to be compared."""
    recipe = models(tmp_path)
    output = skillmerge.apply(recipe).output
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"
    (tmp_path / "rl" / "tokenizer.json").write_text(pointer)
    assert run_cli("plan", recipe, "--strict").returncode == 4
    for command in (("rebuild", output, "--check"), ("inspect", tmp_path / "sft", tmp_path / "rl")):
        process = run_cli(*command)
        assert process.returncode == 0, process.stderr
        assert "warning: " in process.stderr
        assert "is a Git LFS pointer" in process.stderr


@pytest.mark.parametrize("replaces", [False, True], ids=["nothing there", "replaces an output"])
@pytest.mark.parametrize("judge", ["strict", "gates"])
def test_publication_that_was_killed_is_judged_by_what_is_asked_now(
    server: MergeServer, tmp_path: Path, judge: str, replaces: bool
) -> None:
    """The run that died asked for nothing; the one that goes on must not publish for it what it would refuse."""
    recipe = models(tmp_path, update=1e-5, coefficients={"lam": 0.3})
    output, asked = tmp_path / "merged", recipe
    way: dict[str, Any] = {"overwrite": replaces, "no_exchange": replaces}
    if judge == "gates":
        asked = tmp_path / "asked.yaml"
        asked.write_text(recipe.read_text()[:-1] + ', "gates": {"realised": {"min": 0.99, "max": 1.01}}}')
    steps = server.run(recipe, output=tmp_path / "undisturbed", **way)["steps"]
    kept = 0
    for step in range(steps - 25, steps + 1):
        previous = put_previous(output) if replaces else None
        assert server.run(recipe, **way, kill_at=step)["status"] == -signal.SIGKILL
        published = visible(output) not in (None, previous)
        shards = finished_shards(output)
        placing = "manifest_sha256" in (staging_of(output) / "journal.jsonl").read_text() if not published else False
        answer = server.run(asked, **way, strict=judge == "strict")
        if published and judge == "gates" and not replaces:
            assert answer["status"] == 2, answer  # what is there was made of another recipe
        else:
            assert answer["status"] == 3, answer
        assert visible(output) == previous or published, step
        kept += placing and bool(shards)
        if output.exists():
            discard(output)
        assert not staging_of(output).exists()
    assert kept > 2, "no run was killed while it published"
