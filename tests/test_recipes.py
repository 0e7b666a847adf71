"""Every file in recipes/ says when to use it, plans, applies, and can be built again."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapter_models import write_adapter
from conftest import random_tensors, tensor_shapes, write_checkpoint
from hub_server import HubServer
from token_rows import tokenizer_json

import skillmerge
from skillmerge.engine.runner import Work
from skillmerge.recipes.parse import load
from skillmerge.verbs.rebuild import How, check_rebuild

LAYERS = {"upscaled": {"target": 48, "rl": 32, "sft": 32}}
FILES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert len(FILES) >= 30


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipe_applies_as_it_is(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = path.read_text()
    assert "# When: " in text
    experts: dict[str, tuple[int, ...]] = {}
    if "modules: router" in text or "experts:" in text:
        at = "model.layers.0.mlp"
        experts = {f"{at}.gate.weight": (4, 16), f"{at}.experts.down_proj": (4, 16, 8)}
    recipe = tmp_path / path.name
    recipe.write_text(text)
    with HubServer(tmp_path / "hub") as hub, hub.environment(monkeypatch):
        parsed = load(recipe)
        for seed, (name, uri) in enumerate(parsed.models.items()):
            if parsed.entries[name].stack:
                continue
            layers = LAYERS.get(path.stem, {}).get(name, 8)
            tensors = random_tensors(tensor_shapes(layers=layers) | experts, seed=seed)
            if parsed.entries[name].kind == "adapter":
                write_adapter(tmp_path / uri, tensor_shapes(layers=8), seed)
                continue
            if name in parsed.skills:
                write_checkpoint(tmp_path / "before", random_tensors(tensor_shapes(layers=8), seed=99))
                write_checkpoint(tmp_path / f"after-{name}", tensors)
                skillmerge.extract(str(tmp_path / f"after-{name}"), str(tmp_path / "before"), tmp_path / uri)
                continue
            folder = write_checkpoint(tmp_path / uri.removeprefix("hf://"), tensors, config={"model_type": "odd"})
            if parsed.by_token:
                words = [*parsed.tokens, *(f"w{number}" for number in range(20))]
                (folder / "tokenizer.json").write_text(tokenizer_json(words if name == "rl" else words[::-1]))
            if uri.startswith("hf://"):
                hub.create_from(uri.removeprefix("hf://"), folder)
        check(recipe)


def check(recipe: Path) -> None:
    plan = skillmerge.plan(recipe)
    assert plan.problems == ()
    assert plan.notes == ()
    assert any(tensor.action in ("merge", "compute", "join") for tensor in plan.tensors.values())
    output = skillmerge.apply(recipe, threads=2).output
    assert skillmerge.verify(output).tensors == len(plan.tensors)
    otherwise = How(work=Work("cpu", 5, 1_500_000_000))
    assert check_rebuild(output, how=otherwise).tensors == len(plan.tensors)
