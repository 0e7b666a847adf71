"""What the comparison asks of a Hub: few requests, and none for files that the donor has as well."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import MODELS, put_family, run_cli, write_recipe
from hub_server import HubServer
from pair_cases import tokenizer

from skillmerge.plans import planner
from skillmerge.plans.compare.models import Comparison

SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "vocab.json",
    "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer.model",
)  # fmt: skip


def put(hub: HubServer, folder: Path, *, alike: bool) -> Path:
    """A family whose models have all side files that a tokenizer can have, alike or each its own; the recipe."""
    put_family(hub, folder)
    for number, model in enumerate(MODELS):
        own = "" if alike else " " * number
        files: Mapping[str, Any] = {
            "tokenizer.json": json.dumps(tokenizer()), "chat_template.jinja": "{{ messages }}",
            "generation_config.json": '{"eos_token_id": 12}', "vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2",
            "tokenizer_config.json": '{"x": 1}', "added_tokens.json": '{"b": 9}', "special_tokens_map.json": '{"y": 1}',
            "tokenizer.model": "x",
        }  # fmt: skip
        held = {name: (text + own).encode() for name, text in files.items()}
        # Without it there are more files to look at than may be fetched.
        hub.commit(f"acme/{model}", held if alike else {**held, "tokenizer.json": None})
    (folder / "remote").mkdir()
    return write_recipe(folder / "remote", models={model: f"hf://acme/{model}" for model in MODELS})


def requests(hub: HubServer, recipe: Path) -> dict[str, list[str]]:
    """The requests of a plan by model; its cache is empty before."""
    hub.requests.clear()
    planned = run_cli("plan", recipe, "--json")
    assert planned.returncode == 0, planned.stderr
    paths = [request.path for request in hub.requests]
    return {model: [path for path in paths if f"acme/{model}/" in path] for model in MODELS}


@pytest.mark.parametrize("alike", [True, False])
def test_comparison_asks_little_of_the_hub(
    alike: bool, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = put(hub, tmp_path, alike=alike)
    compared = requests(hub, recipe)
    with monkeypatch.context() as patch:
        patch.setattr(planner, "compare_models", lambda *_, **__: Comparison((), None))
        before = requests(hub, recipe)
    more = {model: len(compared[model]) - len(before[model]) for model in MODELS}
    assert all(more[model] <= 5 for model in MODELS), more
    assert more["target"] > 0
    assert all((more[model] == 0) == alike for model in ("rl", "sft")), more
    fetched = re.compile("|".join(map(re.escape, SIDE_FILES)))
    assert any(fetched.search(path) for path in compared["rl"]) != alike
