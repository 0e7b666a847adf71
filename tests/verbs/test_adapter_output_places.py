"""An output that is an adapter, however it is made and wherever it goes: kills, tasks, the Hub, a bucket."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from adapter_files import DOWN, modules, write_adapter, write_base
from bucket_server import S3Server
from clusters import alone, run_tasks, save
from conftest import run_cli, write_recipe
from hub_server import HubServer
from observing import Content, MergeServer, assert_finished, content, reference

import skillmerge
from skillmerge.errors import StalePlan, UsageError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MODELS = {"base": "./base", "a": {"adapter": "./a", "onto": "base"}, "b": {"adapter": "./b", "name": "rl"}}
OUTPUT = {"kind": "adapter", "path": "./merged", "license": "mit"}
SENT = {WEIGHTS, CONFIG, "skillmerge.manifest.json", "skillmerge.run.json"}


@pytest.fixture
def family(tmp_path: Path) -> Path:
    write_base(tmp_path / "base", 4)
    write_adapter(tmp_path / "a", modules(4), seed=1)
    (tmp_path / "b").mkdir()
    write_adapter(tmp_path / "b" / "rl", modules(4, (DOWN,)), seed=2, r=4)
    return tmp_path


def recipe_of(folder: Path, places: Mapping[str, str] = {}, **output: Any) -> Path:
    folder.mkdir(exist_ok=True)
    models = {name: {**it, "adapter": places[name]} if isinstance(it, dict) and places else
              places.get(name, it) for name, it in MODELS.items()}  # fmt: skip
    return write_recipe(folder, "base + lam * (a - base) - 0.25 * b", models=models, output={**OUTPUT, **output})


def on_the_hub(hub: HubServer, family: Path) -> dict[str, str]:
    for name in MODELS:
        hub.create_from(f"acme/{name}", family / name)
    return {name: f"hf://acme/{name}" for name in MODELS}


def loaded(folder: Path) -> Content:
    """What PEFT reads."""
    return {name: digest for name, digest in content(folder).items() if name in (WEIGHTS, CONFIG)}


def test_kill_and_resume_give_the_same_bytes(server: MergeServer, family: Path) -> None:
    recipe = recipe_of(family)
    wanted, output = reference(server, recipe), family / "merged"
    steps = server.run(recipe)["steps"]
    shutil.rmtree(output)
    for step in range(1, steps + 1):
        server.run(recipe, kill_at=step)
        assert server.run(recipe)["status"] == 0
        assert_finished(output, wanted)
        shutil.rmtree(output)


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_adapter_that_changed_between_kill_and_resume_is_the_new_one(
    server: MergeServer, family: Path, file: str
) -> None:
    recipe = recipe_of(family)
    skillmerge.apply(recipe, family / "old")
    for step in (6, 12):
        server.run(recipe, kill_at=step)
        write_adapter(family / "a", modules(4), seed=3 if file == WEIGHTS else 1, lora_alpha=step)
        assert server.run(recipe)["status"] == 0
        assert loaded(family / "merged") == loaded(skillmerge.apply(recipe, family / f"new{step}").output)
        assert loaded(family / "merged") != loaded(family / "old")
        shutil.rmtree(family / "merged")


def test_tasks_make_what_apply_makes_and_know_changed_adapters(family: Path) -> None:
    plan = save(recipe_of(family))
    wanted = alone(plan)
    run_tasks(plan, family / "merged", tasks=2)
    skillmerge.finish(plan)
    assert content(family / "merged") == wanted
    write_adapter(family / "b" / "rl", modules(4, (DOWN,)), seed=2, r=4, lora_alpha=7)
    told = "model b: other tensors or sizes in rl/adapter_model.safetensors, or another adapter_config.json"
    assert told in run_cli("apply", plan, "-o", family / "other").stderr
    write_adapter(family / "a", modules(4), seed=1, lora_alpha=7)
    for verb in (("shard", plan, "-o", family / "other", "--index", "0", "--of", "1"), ("apply", plan, "-o", "other")):
        process = run_cli(*verb, cwd=family)
        assert process.returncode == 7, process.stderr
        assert "model a" in process.stderr


@pytest.mark.parametrize("options", [{}, {"no_local": True}])
def test_hub_to_hub(hub: HubServer, family: Path, options: dict[str, Any]) -> None:
    local = loaded(skillmerge.apply(recipe_of(family)).output)
    recipe = recipe_of(family / "remote", on_the_hub(hub, family))
    made = skillmerge.apply(recipe, push="acme/joined", **options)
    assert set(hub.tree("acme/joined")) == {".gitattributes", "README.md", *SENT}
    assert (family / "remote" / "merged").exists() == (not options)
    for name in local:
        (family / name).write_bytes(hub.content("acme/joined", name))
    assert hub.content("acme/joined", WEIGHTS) == (family / "merged" / WEIGHTS).read_bytes()
    assert json.loads(hub.content("acme/joined", CONFIG)) == json.loads((family / "merged" / CONFIG).read_bytes())
    assert {item.name: item.revision for item in made.manifest.inputs} == {
        name: hub.repos[f"acme/{name}"].refs["main"] for name in MODELS
    }
    assert skillmerge.apply(recipe, push="acme/joined", **options).already
    models = {"base": "hf://acme/base", "v": {"adapter": "hf://acme/joined"}}
    skillmerge.apply(write_recipe(family / "remote", "base + v", models=models, coefficients=None), family / "again")


def test_base_is_the_one_of_the_recipe_where_it_is_another_one_on_the_hub(hub: HubServer, family: Path) -> None:
    """Trained on the quantized model, put onto the one that it was quantized from."""
    for name in ("a", "b/rl"):
        config = family / name / CONFIG
        config.write_text(config.read_text().replace("acme/base", "other/base-bnb-4bit"))
    local = skillmerge.apply(recipe_of(family)).output
    assert json.loads((local / CONFIG).read_text())["base_model_name_or_path"] == "other/base-bnb-4bit"
    made = skillmerge.apply(recipe_of(family / "remote", on_the_hub(hub, family))).output
    found = json.loads((made / CONFIG).read_text())
    assert (found["base_model_name_or_path"], found["revision"]) == ("acme/base", hub.repos["acme/base"].refs["main"])


def test_tasks_send_it_ahead(hub: HubServer, family: Path) -> None:
    plan = save(recipe_of(family / "remote", on_the_hub(hub, family)))
    skillmerge.shard(plan, index=0, of=1, push="acme/joined", no_local=True)
    skillmerge.finish(plan, push="acme/joined", no_local=True)
    skillmerge.apply(recipe_of(family))
    assert hub.content("acme/joined", WEIGHTS) == (family / "merged" / WEIGHTS).read_bytes()


def test_adapter_that_changed_on_the_hub_is_pinned_by_the_plan(hub: HubServer, family: Path) -> None:
    recipe = recipe_of(family / "remote", on_the_hub(hub, family))
    plan = save(recipe)
    wanted = loaded(skillmerge.apply(recipe_of(family)).output)
    write_adapter(family / "a", modules(4), seed=9, lora_alpha=9)
    hub.commit("acme/a", {path.name: path for path in (family / "a").iterdir()})
    assert loaded(skillmerge.apply(plan, family / "pinned").output) == wanted
    assert loaded(skillmerge.apply(recipe, family / "now").output) != wanted
    assert run_cli("plan", recipe, "--lock").returncode == 0
    now = loaded(family / "now")
    write_adapter(family / "a", modules(4), seed=10, lora_alpha=10)
    hub.commit("acme/a", {path.name: path for path in (family / "a").iterdir()})
    assert run_cli("apply", recipe, "--locked", "-o", family / "locked").returncode == 0
    assert loaded(family / "locked") == now


@pytest.mark.parametrize("attributes", [{"gated": True}, {"private": True}, None])
def test_adapter_that_the_hub_refuses_is_named(
    hub: HubServer, family: Path, monkeypatch: pytest.MonkeyPatch, attributes: dict[str, bool] | None
) -> None:
    places = on_the_hub(hub, family)
    if attributes is not None:
        hub.create_from("acme/secret", family / "a", **attributes)
    recipe = recipe_of(family / "remote", {**places, "a": "hf://acme/secret"})
    with hub.environment(monkeypatch, token=None):
        process = run_cli("apply", recipe)
    assert process.returncode == 4, process.stderr
    assert "model `a`: hf://acme/secret" in process.stderr
    assert not (family / "remote" / "merged").exists()


def test_note_says_how_an_adapter_is_pinned(hub: HubServer, family: Path) -> None:
    recipe = recipe_of(family / "remote", on_the_hub(hub, family))
    commit = {name: hub.repos[f"acme/{name}"].refs["main"] for name in MODELS}
    said = run_cli("plan", recipe).stderr
    assert f"to pin it, write\n  a: {{adapter: hf://acme/a@{commit['a']}, …}}\n" in said
    assert f"to pin it, write\n  base: hf://acme/base@{commit['base']}\n" in said


@pytest.mark.skipif(sys.version_info < (3, 11), reason="obstore needs Python 3.11")
def test_bucket_to_bucket(s3: S3Server, family: Path) -> None:
    local = skillmerge.apply(recipe_of(family)).output
    places = {name: s3.put_folder(f"family/{name}", family / name) for name in MODELS}
    out = "s3://bucket/out/merged"
    recipe = recipe_of(family / "remote", places, path=out)
    made = skillmerge.apply(recipe)
    assert s3.get(f"out/merged/{WEIGHTS}") == (local / WEIGHTS).read_bytes()
    assert s3.get(f"out/merged/{CONFIG}") == (local / CONFIG).read_bytes()
    assert skillmerge.verify(out).tensors == len(made.manifest.tensors)
    assert skillmerge.rebuild(out, check=True).tensors == len(made.manifest.tensors)
    assert skillmerge.apply(recipe).already
    rehearsal = skillmerge.rehearse_push(out, "acme/joined")
    assert rehearsal.card is not None
    assert "base_model:\n- acme/base\n" in rehearsal.card
    plan = save(recipe_of(family / "tasks", places, path="s3://bucket/out/tasks"))
    skillmerge.shard(plan, index=0, of=1)
    skillmerge.finish(plan)
    assert s3.get(f"out/tasks/{WEIGHTS}") == (local / WEIGHTS).read_bytes()
    write_adapter(family / "a", modules(4), seed=1, lora_alpha=7)
    s3.put(f"family/a/{CONFIG}", (family / "a" / CONFIG).read_bytes())
    with pytest.raises(StalePlan):
        skillmerge.apply(plan, "s3://bucket/out/stale")


def test_nothing_is_replaced_without_overwrite(family: Path) -> None:
    recipe = recipe_of(family)
    skillmerge.apply(recipe)
    before = content(family / "merged")
    recipe = recipe_of(family, license="apache-2.0")
    recipe.write_text(recipe.read_text().replace("0.25", "0.5"))
    with pytest.raises(UsageError, match="already exists"):
        skillmerge.apply(recipe)
    assert content(family / "merged") == before
    skillmerge.apply(recipe, overwrite=True)
    assert content(family / "merged") != before
    for name in ("a", "b"):
        with pytest.raises(UsageError, match=f"would replace model `{name}`"):
            skillmerge.apply(recipe, family / name, overwrite=True)
