"""A plan as Markdown: what it shows, that a stranger's names stay text, and that it fits into a comment."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import random_tensors, run_cli, tensor_shapes, write_checkpoint, write_family, write_recipe
from hub_server import HubServer

import skillmerge
from skillmerge.cli.show.markdown import MARK, plan_page
from skillmerge.plans.budget import budget


def page(recipe: Path, *arguments: str | Path) -> str:
    target = recipe.parent / "plan.md"
    process = run_cli("plan", recipe, "--markdown", target, *arguments)
    assert process.returncode in (0, 4), process.stderr
    return target.read_text()


def rows(text: str, head: str) -> list[list[str]]:
    """The cells of the table whose header begins so."""
    table = text[text.index(f"| {head} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


def test_markdown_of_a_plan_shows_models_coefficients_actions_and_totals(
    family: Path, edit: Callable[..., Path]
) -> None:
    edit(family, coefficients={"lam": {"default": 1, "rules": [{"layers": 0, "value": 0}]}})
    text = page(family)
    assert text.startswith(MARK)
    assert "**Can be applied**: 12 tensors" in text
    assert [row[0] for row in rows(text, "model")] == ["`target` (donor)", "`rl`", "`sft`"]
    assert rows(text, "`lam`")[0][:2] == ["`model.layers 0`", "0"]
    assert [row[0] for row in rows(text, "tensors")] == ["9", "3"]
    totals = dict(rows(text, "totals"))
    assert set(totals) == {"merges", "reads", "writes", "peak memory", "disk free", "output"}
    assert totals["output"] == f"`{family.parent / 'merged'}`"
    plan = skillmerge.plan(family)
    assert text.rstrip().endswith(f"plan `{plan.digest}`")


def test_markdown_shows_commits_of_models_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_family(tmp_path)
    with HubServer(tmp_path / "hub") as hub, hub.environment(monkeypatch):
        commit = hub.create_from("acme/rl", tmp_path / "rl")
        recipe = write_recipe(tmp_path, models={"target": "target", "rl": "hf://acme/rl", "sft": "sft"})
        text = page(recipe)
    assert rows(text, "model")[1][:3] == ["`rl`", "`hf://acme/rl`", f"`{commit}`"]


def test_markdown_shows_changes_since_a_saved_plan(family: Path) -> None:
    saved = family.parent / "plan.json"
    run_cli("plan", family, "-o", saved)
    assert f"**Changes since `{saved}`**\n\nNone." in page(family, "--diff", saved)
    text = page(family, "--diff", saved, "--set", "lam=0.5")
    assert "- `lam: 0.7 before, 0.5 now, in outside blocks, model.layers 0, model.layers 1, model.layers 2`" in text
    assert "None." not in text


def test_markdown_shows_problems_and_the_rules_that_settle_them(family: Path) -> None:
    tensors = random_tensors(tensor_shapes())
    tensors["extra.weight"] = tensors["model.norm.weight"].clone()
    write_checkpoint(family.parent / "other", tensors)
    document = json.loads(family.read_text())
    document["models"]["rl"] = "other"
    family.write_text(json.dumps(document))
    text = page(family)
    assert "**Cannot be applied**: 1 problem between the models." in text
    assert re.search(r"```yaml\n[^`]*ignore:\n[^`]*extra\.weight[^`]*```", text)


def test_names_of_strangers_stay_text(tmp_path: Path) -> None:
    """Every name is in a code span whose fence is longer than what it holds, and no bar ends a cell."""
    name = "x``|<img src=x onerror=alert(1)> @team #1 [a](http://evil)"
    shapes = {f"{name}.{index}": shape for index, shape in enumerate(tensor_shapes().values())}
    for model in ("target", "rl", "sft"):
        write_checkpoint(tmp_path / model, random_tensors(shapes, seed=len(model)))
    text = page(write_recipe(tmp_path, coefficients={"lam": 1}))
    (row,) = rows(text, "tensors")
    assert len(row) == 4
    assert row[3].startswith("```x``\\|<img")
    assert row[3].endswith("```")
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text)
    assert not any(part in outside for part in ("<img", "@team", "evil"))


def test_markdown_of_a_huge_plan_fits_into_a_comment(tmp_path: Path) -> None:
    shapes = {f"model.layers.{n}.{'very_long_name_' * 20}{n}.weight": (2,) for n in range(600)}
    rules = [{"layers": n, "value": n / 1000} for n in range(0, 600, 2)]
    for model in ("target", "sft"):
        write_checkpoint(tmp_path / model, random_tensors(shapes))
    extra = {f"extra.{n}.{'long' * 60}": (2,) for n in range(300)}
    write_checkpoint(tmp_path / "rl", random_tensors({**shapes, **extra}))
    recipe = write_recipe(tmp_path, coefficients={"lam": {"rules": rules}})
    plan = skillmerge.plan(recipe)
    changes = [f"model {'x' * 500} {n}" for n in range(500)]
    text = plan_page(plan, budget(plan, threads=1, memory_limit=None), "merged", 1, changes, "old.json")
    assert len(text) < 65_536
    assert "… and 460 more" in text
