"""Publishing on the Hub: what is there afterwards, and what is seen of it before."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import random_tensors, run_cli, tensor_shapes, write_checkpoint, write_family, write_recipe
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard

import skillmerge
from skillmerge.checkpoints import hub_client
from skillmerge.errors import CheckFailed, InputError, StalePlan, TemporaryError, UsageError
from skillmerge.outputs.card import write_card
from skillmerge.recipes.recipe import Push

MERGED = "acme/merged"
CARD = "---\nlicense: mit\n---\n# A parent\n"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(hub_client, "FIRST_WAIT", 0.001)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with HubServer(tmp_path / "hub") as server, server.environment(monkeypatch):
        yield server


def licensed(recipe: Path) -> Path:
    for model in ("target", "sft", "rl"):
        (recipe.parent / model / "README.md").write_text(CARD)
        (recipe.parent / model / "config.json").write_text('{"model_type": "odd"}')
    return recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Local parents of one licence."""
    (tmp_path / "family").mkdir()
    return licensed(write_family(tmp_path / "family"))


@pytest.fixture
def output(recipe: Path) -> Path:
    return skillmerge.apply(recipe).output


def put_on_the_hub(hub: HubServer, recipe: Path) -> dict[str, str]:
    """The family as repositories; their URIs."""
    for model in ("target", "sft", "rl"):
        hub.create_from(f"acme/{model}", recipe.parent / model, card={"license": "mit"})
    return {model: f"hf://acme/{model}" for model in ("target", "sft", "rl")}


def assert_is_published(hub: HubServer, folder: Path, ref: str = "main") -> None:
    """Every file of the output is there, byte for byte, with a card, and no weights beside them."""
    tree = hub.tree(MERGED, ref)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(tree) == files | {"README.md", ".gitattributes"}
    for name in files:
        assert hub.content(MERGED, name, ref) == (folder / name).read_bytes(), name


# ------------------------------------------------------------------------------------------------------ push DIR


def test_new_repository_gets_one_commit_on_main(hub: HubServer, output: Path) -> None:
    published = skillmerge.push(output, MERGED)
    repo = hub.repos[MERGED]
    assert published.commit == repo.refs["main"]
    assert not published.already
    assert published.pull_request is None
    assert len(repo.commits) == 2, "the one that made the repository, and ours"
    assert_is_published(hub, output)


def test_repository_with_a_model_gets_a_pull_request(hub: HubServer, output: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", random_tensors(tensor_shapes()), shards=3)
    before = hub.create_from(MERGED, other)
    published = skillmerge.push(output, MERGED)
    assert published.pull_request == f"{hub.endpoint}/{MERGED}/discussions/1"
    assert hub.repos[MERGED].refs["main"] == before
    tree = hub.tree(MERGED, "refs/pr/1")
    weights = {name for name in tree if name.endswith(".safetensors")}
    assert weights == {path.name for path in output.glob("*.safetensors")}, "those of the old model are gone"


def test_push_to_main_or_to_a_branch_where_that_is_asked(hub: HubServer, output: Path, tmp_path: Path) -> None:
    before = hub.create_from(MERGED, write_checkpoint(tmp_path / "other", random_tensors(tensor_shapes())))
    skillmerge.push(output, MERGED, revision="v2")
    assert hub.repos[MERGED].refs["main"] == before
    assert "model-00001-of-00002.safetensors" in hub.tree(MERGED, "v2")
    skillmerge.push(output, MERGED, pull_request=False)
    assert "model-00001-of-00002.safetensors" in hub.tree(MERGED)
    assert hub.repos[MERGED].discussions == []
    with pytest.raises(UsageError, match="not both"):
        skillmerge.push(output, MERGED, revision="v2", pull_request=True)


def test_push_again_does_nothing(hub: HubServer, output: Path, tmp_path: Path) -> None:
    first = skillmerge.push(output, MERGED)
    sent = list(hub.uploads)
    again = skillmerge.push(output, MERGED)
    assert again.already
    assert again.commit == first.commit
    assert hub.uploads == sent
    hub.create_from("acme/other", write_checkpoint(tmp_path / "other", random_tensors(tensor_shapes())))
    request = skillmerge.push(output, "acme/other")
    again = skillmerge.push(output, "acme/other")
    assert again.already
    assert again.pull_request == request.pull_request
    assert len(hub.repos["acme/other"].discussions) == 1


def test_private_repository_and_message(hub: HubServer, output: Path) -> None:
    published = skillmerge.push(output, MERGED, private=True, message="The merge of the week")
    assert hub.repos[MERGED].private
    assert hub.repos[MERGED].messages[published.commit] == "The merge of the week"


def test_what_fails_its_verification_is_not_pushed(hub: HubServer, output: Path) -> None:
    shard = next(output.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    with pytest.raises(CheckFailed):
        skillmerge.push(output, MERGED)
    assert MERGED not in hub.repos
    assert hub.requests == []


def test_output_that_was_to_the_hub_and_back_verifies(hub: HubServer, output: Path, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    skillmerge.push(output, MERGED)
    back = Path(snapshot_download(MERGED, local_dir=tmp_path / "back", cache_dir=tmp_path / "cache"))
    shutil.rmtree(back / ".cache")
    assert skillmerge.verify(back).tensors == len(tensor_shapes())


def test_uploaded_shards_are_not_sent_again(hub: HubServer, output: Path) -> None:
    hub.fail("status", r"POST /api/models/acme/merged/commit", times=10**6, status=500)
    with pytest.raises(TemporaryError):
        skillmerge.push(output, MERGED)
    sent = list(hub.uploads)
    assert len(sent) == len(set(sent)) == 3, "two shards and a manifest"
    assert set(hub.tree(MERGED)) == {".gitattributes"}, "nothing of it is seen"
    hub.faults.clear()
    skillmerge.push(output, MERGED)
    assert hub.uploads == sent
    assert_is_published(hub, output)


def test_commit_whose_answer_is_lost_is_not_made_twice(hub: HubServer, output: Path) -> None:
    hub.fail("reset", r"#done", times=1)
    published = skillmerge.push(output, MERGED)
    assert published.already
    assert len(hub.repos[MERGED].commits) == 2
    assert_is_published(hub, output)


def test_branch_that_moves_is_left_alone(hub: HubServer, output: Path) -> None:
    def move() -> None:
        hub.commit(MERGED, {"notes.txt": b"somebody else's"})

    hub.fail("call", r"POST /api/models/acme/merged/commit", action=move)
    with pytest.raises(StalePlan, match="has moved on"):
        skillmerge.push(output, MERGED)
    assert set(hub.tree(MERGED)) == {".gitattributes", "notes.txt"}


def test_hub_that_has_something_else_afterwards_is_told(hub: HubServer, output: Path) -> None:
    def lose() -> None:
        repo = hub.repos[MERGED]
        tree = repo.commits[repo.refs["main"]]
        tree["config.json"] = hub.blob("config.json", b"{}")

    hub.fail("call", r"#done", action=lose)
    with pytest.raises(CheckFailed, match=r"differ from what was sent: config\.json"):
        skillmerge.push(output, MERGED)


@pytest.mark.parametrize(
    "where", ["POST /api/repos/create", "preupload", "objects/batch", "PUT /upload", "commit/main"]
)
@pytest.mark.parametrize("kind", ["status", "reset"])
def test_what_passes_is_waited_for(hub: HubServer, output: Path, where: str, kind: str) -> None:
    hub.fail(kind, where, times=1, status=503)
    skillmerge.push(output, MERGED)
    assert_is_published(hub, output)


def test_nothing_is_pushed_without_rights(hub: HubServer, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="the token may not do this"):
        skillmerge.push(output, "forbidden/merged")
    with hub.environment(monkeypatch, token=None), pytest.raises(InputError, match="needs a token"):
        skillmerge.push(output, MERGED)
    assert MERGED not in hub.repos


def test_same_weights_with_another_card_are_another_push(hub: HubServer, output: Path, tmp_path: Path) -> None:
    skillmerge.push(output, MERGED)
    card = tmp_path / "card.md"
    card.write_text("---\nlicense: mit\n---\n# Corrected\n")
    published = skillmerge.push(output, MERGED, card=card, pull_request=False)
    assert not published.already
    assert "# Corrected" in hub.content(MERGED, "README.md").decode()


def test_what_changed_on_the_hub_since_is_put_right(hub: HubServer, output: Path) -> None:
    skillmerge.push(output, MERGED)
    content = (output / "config.json").read_bytes()
    hub.commit(MERGED, {"config.json": content.replace(b"odd", b"bad")})
    assert not skillmerge.push(output, MERGED, pull_request=False).already
    assert hub.content(MERGED, "config.json") == content


@pytest.mark.parametrize("manifest", [b"{", b'{"plan_digest": "DIGEST"}', b'{"plan_digest": "DIGEST", "files": []}'])
def test_a_strangers_pull_request_is_not_ours(hub: HubServer, recipe: Path, tmp_path: Path, manifest: bytes) -> None:
    digest = skillmerge.plan(recipe).digest
    hub.create_from(MERGED, write_checkpoint(tmp_path / "other", random_tensors(tensor_shapes())))
    repo = hub.repos[MERGED]
    repo.refs["refs/pr/1"] = repo.refs["main"]
    hub.commit(MERGED, {"skillmerge.manifest.json": manifest.replace(b"DIGEST", digest.encode())}, "refs/pr/1")
    title = f"Merge target + lam * (rl - sft) (plan {digest[:12]})"
    discussion = {"num": 1, "title": title, "status": "open", "isPullRequest": True, "author": {"name": "stranger"}}
    repo.discussions.append({**discussion, "createdAt": "2026-01-01T00:00:00.000Z",
                             "repo": {"name": MERGED, "type": "model"}})  # fmt: skip
    result = skillmerge.apply(recipe, push=MERGED, no_local=True)
    assert result.published is not None
    assert not result.published.already
    assert result.published.pull_request == f"{hub.endpoint}/{MERGED}/discussions/2"


def test_repository_with_words_in_it_gets_a_pull_request(hub: HubServer, output: Path) -> None:
    hub.create(MERGED, {".gitattributes": b"", "README.md": b"# Mine\n"})
    assert skillmerge.push(output, MERGED).pull_request is not None
    assert hub.content(MERGED, "README.md") == b"# Mine\n"


def test_weights_that_are_no_model_of_ours_stay(hub: HubServer, output: Path) -> None:
    mine = ["my_lora.safetensors", "notes.json", "eval/model.safetensors", "vocabulary.md", ".gitattributes"]
    mine += ["skillmerge.yaml", "model.fp16.safetensors", "model_training_state.pt", "models.bin", "model-card.bin"]
    stale = [
        "model.safetensors",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
        "adapter_config.json",
    ]
    stale += ["adapter_model.safetensors", "consolidated.00.pth"]
    hub.create(MERGED, dict.fromkeys([*mine, *stale], b"y"))
    skillmerge.push(output, MERGED, pull_request=False)
    tree = set(hub.tree(MERGED))
    assert tree >= set(mine)
    assert not tree & set(stale)


@pytest.mark.parametrize("brought", [False, True])
def test_tokenizer_goes_where_the_merge_brings_its_own(hub: HubServer, recipe: Path, brought: bool) -> None:
    if brought:
        (recipe.parent / "target" / "tokenizer.json").write_text("{}")
    output = skillmerge.apply(recipe).output
    hub.create(MERGED, {"tokenizer.model": b"x", "chat_template.jinja": b"x", "model.safetensors": b"y"})
    skillmerge.push(output, MERGED, pull_request=False)
    assert ("tokenizer.model" in hub.tree(MERGED)) != brought
    assert ("chat_template.jinja" in hub.tree(MERGED)) != brought
    assert "model.safetensors" not in hub.tree(MERGED)


def test_private_weights_never_go_into_a_public_repository(hub: HubServer, output: Path) -> None:
    hub.create(MERGED)
    for revision in (None, "v2"):
        with pytest.raises(UsageError, match="is public"):
            skillmerge.push(output, MERGED, private=True, revision=revision)
    assert set(hub.repos[MERGED].refs) == {"main"}


def test_what_is_given_wins_over_the_recipe(hub: HubServer, recipe: Path) -> None:
    """Whether a running merge or a finished folder is pushed."""
    document = json.loads(recipe.read_text())
    document["output"]["push"] = {"repo": "acme/first", "pull_request": True, "message": "Hello"}
    recipe.write_text(json.dumps(document))
    result = skillmerge.apply(recipe, push="acme/second", revision="v2")
    skillmerge.push(result.output, "acme/third", revision="v2")
    for name in ("acme/second", "acme/third"):
        repo = hub.repos[name]
        assert repo.discussions == []
        assert repo.messages[repo.refs["v2"]] == "Hello"
    assert "acme/first" not in hub.repos
    assert skillmerge.push(result.output, "acme/fourth").pull_request is not None


def test_a_strangers_copy_of_our_pull_request_is_not_ours(hub: HubServer, recipe: Path, tmp_path: Path) -> None:
    """Whole, consistent, with our title, and still somebody else's."""
    hub.create_from(MERGED, write_checkpoint(tmp_path / "other", random_tensors(tensor_shapes())))
    first = skillmerge.apply(recipe, push=MERGED, no_local=True).published
    hub.repos[MERGED].discussions[0]["author"] = {"name": "stranger"}
    again = skillmerge.apply(recipe, push=MERGED, no_local=True).published
    assert first is not None
    assert again is not None
    assert not again.already
    assert again.pull_request != first.pull_request


def test_refusals_in_the_hubs_own_words(hub: HubServer, output: Path) -> None:
    hub.card_errors = ['"license" must be one of [apache-2.0, mit, …]']
    with pytest.raises(InputError, match='"license" must be one of'):
        skillmerge.push(output, MERGED, license="Apache 2.0")
    hub.card_errors = []
    hub.quota_message = "Private repository storage limit reached"
    with pytest.raises(InputError, match="storage limit reached"):
        skillmerge.push(output, "acme/other")
    assert set(hub.tree(MERGED)) == set(hub.tree("acme/other")) == {".gitattributes"}


def test_commit_that_lands_after_it_was_given_up_is_found(hub: HubServer, output: Path, tmp_path: Path) -> None:
    """A gateway gives up on a large commit, and the Hub makes it all the same."""
    hub.create_from(MERGED, write_checkpoint(tmp_path / "other", random_tensors(tensor_shapes())))
    hub.fail("reset", "#done")
    assert skillmerge.push(output, MERGED).already
    assert len(hub.repos[MERGED].discussions) == 1


def test_output_that_stands_in_the_way_is_told_before_anything_is_made(hub: HubServer, recipe: Path) -> None:
    skillmerge.apply(recipe)
    with pytest.raises(UsageError, match="exists already"):
        skillmerge.apply(recipe, coefficients={"lam": 0.5}, push=MERGED)
    assert MERGED not in hub.repos


# ---------------------------------------------------------------------------------------------------- apply --push


def test_apply_pushes_what_the_recipe_says(hub: HubServer, recipe: Path) -> None:
    document = json.loads(recipe.read_text())
    document["output"]["push"] = {"repo": MERGED, "private": True, "tags": ["math"], "message": "Hello"}
    recipe.write_text(json.dumps(document))
    result = skillmerge.apply(recipe)
    assert result.published is not None
    assert_is_published(hub, result.output)
    assert hub.repos[MERGED].private
    assert "math" in ModelCard(hub.content(MERGED, "README.md").decode()).data.tags
    again = skillmerge.apply(recipe)
    assert again.already
    assert again.published is not None
    assert again.published.already


def test_apply_with_a_push_that_fails_keeps_the_output(hub: HubServer, recipe: Path) -> None:
    hub.fail("status", "PUT /upload", times=10**6, status=503)
    with pytest.raises(TemporaryError):
        skillmerge.apply(recipe, push=MERGED)
    output = recipe.parent / "merged"
    skillmerge.verify(output)
    hub.faults.clear()
    assert skillmerge.apply(recipe, push=MERGED).already
    assert_is_published(hub, output)


def test_push_that_is_not_allowed_is_told_before_any_work(hub: HubServer, recipe: Path) -> None:
    with pytest.raises(InputError, match="may not"):
        skillmerge.apply(recipe, push="forbidden/merged")
    (recipe.parent / "rl" / "README.md").write_text("---\nlicense: other\n---\n")
    with pytest.raises(UsageError, match="licences do not settle"):
        skillmerge.apply(recipe, push=MERGED)
    assert not list(recipe.parent.glob("merged*"))
    assert MERGED not in hub.repos


def test_no_local_leaves_nothing_on_the_disk(hub: HubServer, recipe: Path) -> None:
    local = skillmerge.apply(recipe, recipe.parent / "local").output
    result = skillmerge.apply(recipe, push=MERGED, no_local=True)
    assert result.published is not None
    assert not list(recipe.parent.glob("merged*"))
    for path in local.iterdir():
        if not path.name.startswith("skillmerge."):
            assert hub.content(MERGED, path.name) == path.read_bytes()
    again = skillmerge.apply(recipe, push=MERGED, no_local=True)
    assert again.already
    assert again.published is not None
    assert again.published.commit == result.published.commit
    with pytest.raises(UsageError, match="no output at all"):
        skillmerge.apply(recipe, no_local=True)


@pytest.mark.parametrize("where", ["PUT /upload", "commit/main", "#done"])
def test_no_local_is_continued(hub: HubServer, recipe: Path, where: str) -> None:
    """Whatever was sent is not sent again, and one commit comes of it."""
    hub.fail("status", where, times=10**6, after=1 if "PUT" in where else 0, status=500)
    if where == "#done":
        hub.faults[0].kind = "reset"
        hub.fail("status", "GET /api/models/acme/merged/revision", times=10**6, after=2, status=500)
    with pytest.raises(TemporaryError):
        skillmerge.apply(recipe, push=MERGED, no_local=True)
    sent = list(hub.uploads)
    hub.faults.clear()
    result = skillmerge.apply(recipe, push=MERGED, no_local=True)
    assert hub.uploads[: len(sent)] == sent
    assert len(hub.uploads) == len(set(hub.uploads)) == 3, "two shards and a manifest"
    assert len(hub.repos[MERGED].commits) == 2
    assert result.published is not None
    assert not list(recipe.parent.glob("merged*"))


def test_no_local_begins_again_where_the_hub_forgot_uploads(hub: HubServer, recipe: Path) -> None:
    hub.fail("status", "commit/main", times=10**6, status=500)
    with pytest.raises(TemporaryError):
        skillmerge.apply(recipe, push=MERGED, no_local=True)
    hub.faults.clear()
    hub.repos[MERGED].lfs.clear()
    with pytest.raises(TemporaryError, match="no longer has all files"):
        skillmerge.apply(recipe, push=MERGED, no_local=True)
    skillmerge.apply(recipe, push=MERGED, no_local=True)
    assert "model-00001-of-00002.safetensors" in hub.tree(MERGED)


def test_hub_to_hub_and_back_through_transformers(hub: HubServer, tmp_path: Path) -> None:
    """Three repositories in, one out, loaded by from_pretrained from the Hub."""
    assert run_cli("demo", tmp_path / "demo").returncode == 0
    models = {"target": "target-sft", "rl": "source-rl", "sft": "source-sft"}
    for name in models.values():
        hub.create_from(f"acme/{name}", tmp_path / "demo" / name, card={"license": "mit"})
    (tmp_path / "work").mkdir()
    document = {"models": {key: f"hf://acme/{name}" for key, name in models.items()}, "output": {"path": "merged"}}
    recipe = write_recipe(tmp_path / "work", **document)
    variables = hub.variables()
    process = run_cli("apply", recipe, "--push", MERGED, "--no-local", "--json", **variables)
    assert process.returncode == 0, process.stderr
    local = write_recipe(tmp_path / "demo", models={key: f"./{name}" for key, name in models.items()})
    merged = skillmerge.apply(local, tmp_path / "local").output
    program = (
        f"from transformers import AutoModelForCausalLM as A; there = A.from_pretrained({MERGED!r}).state_dict();"
        f"here = A.from_pretrained({str(merged)!r}).state_dict();"
        "assert there.keys() == here.keys() and all((there[key] == here[key]).all() for key in here)"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr


def test_copied_shard_is_copied_by_the_hub(hub: HubServer, recipe: Path, tmp_path: Path) -> None:
    """Blocks that lambda leaves alone, in a shard of their own, are the donor's file byte for byte."""
    models = put_on_the_hub(hub, recipe)
    rules = [{"layers": "0-", "value": 0.0}, {"tensors": ["*embed*", "model.norm*", "lm_head*"], "value": 0.0}]
    schedule = {"default": 1.0, "rules": rules}
    (tmp_path / "work").mkdir()
    work = write_recipe(tmp_path / "work", models=models, coefficients={"lam": schedule})
    skillmerge.apply(work, push=MERGED, pull_request=False)
    assert hub.count("lfs-files/duplicate") == 1
    shard = "model-00001-of-00002.safetensors"
    assert hub.tree(MERGED)[shard].sha256 == hub.tree("acme/target")[shard].sha256
    # Without a local output too; and where the Hub will not copy, the file goes through this disk once more.
    for name, fault in (("acme/second", False), ("acme/third", True)):
        if fault:
            hub.fail("status", "lfs-files/duplicate", times=10**6, status=400)
        hub.uploads.clear()
        skillmerge.apply(work, tmp_path / "none", push=name, no_local=True)
        assert hub.tree(name)[shard].sha256 == hub.tree("acme/target")[shard].sha256
        assert (hub.tree(name)[shard].sha256 in hub.uploads) == fault
    assert not list(tmp_path.glob("none*"))
    # A commit that is refused for another reason has nothing to do with copies.
    hub.faults.clear()
    hub.fail("status", "commit/main", times=10**6, status=403)
    hub.requests.clear()
    with pytest.raises(InputError):
        skillmerge.apply(work, tmp_path / "none", push="acme/fourth", no_local=True)
    assert hub.count("commit/main") == 1


def test_copy_that_comes_back_damaged_is_not_published(hub: HubServer, recipe: Path, tmp_path: Path) -> None:
    """What the Hub would not copy is fetched, and nobody downstream of us would notice a flipped bit."""
    models = put_on_the_hub(hub, recipe)
    (tmp_path / "work").mkdir()
    work = write_recipe(tmp_path / "work", models=models, merge="target + 0 * (rl - sft)", coefficients={})
    hub.fail("status", "lfs-files/duplicate", times=10**6, status=400)
    hub.fail("call", "POST .*lfs-files/duplicate", action=lambda: hub.fail("flip", "GET /storage/", times=10**6))
    hub.faults.reverse()
    with pytest.raises(InputError, match="does not have the digest"):
        skillmerge.apply(work, tmp_path / "none", push=MERGED, no_local=True)
    assert "model-00001-of-00002.safetensors" not in hub.tree(MERGED)


# --------------------------------------------------------------------------------------------------------- the card


def card_of(hub: HubServer) -> ModelCard:
    return ModelCard(hub.content(MERGED, "README.md").decode())


def test_card_names_parents_and_what_was_done(hub: HubServer, recipe: Path, tmp_path: Path) -> None:
    models = put_on_the_hub(hub, recipe)
    models["sft"] = str(recipe.parent / "sft")
    (tmp_path / "work").mkdir()
    schedule = {"default": 1.0, "rules": [{"layers": "0-", "ramp": [0.0, 1.0]}]}
    work = write_recipe(tmp_path / "work", models=models, coefficients={"lam": schedule})
    skillmerge.apply(work, push=MERGED)
    card = card_of(hub)
    assert card.data.to_dict() == {
        "base_model": ["acme/target", "acme/rl"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "license": "mit",
        "tags": ["merge", "skillmerge"],
    }
    text = card.text
    assert "lam over model.layers: 0 ▁▅█ 2  (0 to 1)" in text
    assert f"[acme/rl](https://huggingface.co/acme/rl) | `{hub.repos['acme/rl'].refs['main']}`" in text
    assert "local: 2 files" in text
    assert "realised lambda" in text
    assert '"merge": "target + lam * (rl - sft)"' in text
    assert str(tmp_path) not in text.replace(work.read_text().strip(), "")


BODY = """\
# merged

A merge of 3 models by `target + lam * (rl - sft)`, computed by skillmerge 0.1.0: 12 tensors, 9.0 KB.

## Parents

| name | model | commit | licence |
| --- | --- | --- | --- |
| `target` (donor) | local: 2 files, 8.0 KB | - | - |
| `rl` | local: 2 files, 8.0 KB | - | - |
| `sft` | local: 2 files, 8.0 KB | - | - |

## How they were merged

```yaml
<recipe>
```

```
lam over model.layers: 0 ▁▅█ 2  (0 to 1)
```

| lam | attention | mlp | norm | embedding | head |
| --- | --- | --- | --- | --- | --- |
| model.layers 0 | 0 | 0 | 0 | - | - |
| model.layers 1 | 0.5 | 0.5 | 0.5 | - | - |
| model.layers 2 | 1 | 1 | 1 | - | - |
| outside blocks | - | - | 1 | 1 | 1 |

## What rounding did

Measured on a sample of blocks.

| module | asked lambda | realised lambda | vanished | changed |
| --- | --- | --- | --- | --- |
| attention | 0.769 | 0.761 | 6.6% | 82.8% |
| mlp | 0.738 | 0.734 | 7.1% | 81.7% |
| norm | 0.891 | 0.91 | 2.4% | 83.3% |
| embedding | 1 | 0.999 | 0.2% | 90.4% |
| head | 1 | 1 | 0.7% | 87.5% |
| all | 0.854 | 0.852 | 4.3% | 84.8% |

## Use

```python
from transformers import AutoModelForCausalLM  # or the class for its task

model = AutoModelForCausalLM.from_pretrained("acme/merged")
```

## Proof

`skillmerge.manifest.json` names every input with its commit and digests, what was done to each tensor,
and the sha256 of every file. Plan `<digest>`.
With the recipe above and the commits of the table, `skillmerge apply` gives the same bytes again;
`skillmerge verify` checks them.
"""


def test_skill_goes_to_the_hub_and_is_used_from_there(hub: HubServer, recipe: Path, tmp_path: Path) -> None:
    models = put_on_the_hub(hub, recipe)
    skill = skillmerge.extract(models["rl"], models["sft"], tmp_path / "math").output
    published = skillmerge.push(skill, "acme/math-skill")
    assert {"skill.json", "README.md"} < set(hub.tree("acme/math-skill"))
    card = ModelCard(hub.content("acme/math-skill", "README.md").decode())
    assert card.data.base_model == ["acme/rl", "acme/sft"]
    assert card.data.library_name == "skillmerge"
    assert "base_model_relation" not in card.data.to_dict()
    assert "It is not a model" in card.text
    (tmp_path / "work").mkdir()
    used = {"target": models["target"], "math": {"skill": f"hf://acme/math-skill@{published.commit}"}}
    stored = skillmerge.apply(write_recipe(tmp_path / "work", "target + lam * math", models=used)).output
    direct = skillmerge.apply(recipe, tmp_path / "direct").output
    assert {p.name: p.read_bytes() for p in stored.glob("*.safetensors")} == {
        p.name: p.read_bytes() for p in direct.glob("*.safetensors")
    }


def test_card_reads_as_it_should(recipe: Path) -> None:
    schedule = {"default": 1.0, "rules": [{"layers": "0-", "ramp": [0.0, 1.0]}]}
    text = write_recipe(recipe.parent, coefficients={"lam": schedule}).read_text()
    for model in ("target", "sft", "rl"):
        (recipe.parent / model / "config.json").unlink()
        (recipe.parent / model / "README.md").unlink()
    card = write_card(skillmerge.apply(recipe).manifest, Push(MERGED), "mit")
    found = re.sub(r"[0-9a-f]{64}", "<digest>", card.replace(text.strip(), "<recipe>"))
    assert found.split("---\n\n", 1)[1] == BODY


def test_licences_that_differ_have_to_be_settled(hub: HubServer, recipe: Path) -> None:
    (recipe.parent / "rl" / "README.md").unlink()
    output = skillmerge.apply(recipe).output
    with pytest.raises(UsageError, match=r"target: mit, rl: none, sft: mit"):
        skillmerge.push(output, MERGED)
    assert MERGED not in hub.repos
    skillmerge.push(output, MERGED, license="apache-2.0")
    assert card_of(hub).data.license == "apache-2.0"


def test_card_by_hand_keeps_its_words(hub: HubServer, output: Path, tmp_path: Path) -> None:
    card = tmp_path / "card.md"
    card.write_text("---\ntags: [mine]\nlanguage: en\n---\n\n# By hand\n\nExactly  so.\n")
    skillmerge.push(output, MERGED, card=card, tags=("math",))
    found = card_of(hub)
    assert found.text.endswith("\n# By hand\n\nExactly  so.\n")
    assert found.data.tags == ["mine", "merge", "skillmerge", "math"]
    assert (found.data.language, found.data.license) == ("en", "mit")


# --------------------------------------------------------------------------------------------------- the command line


def test_push_command(hub: HubServer, output: Path) -> None:
    process = run_cli("push", output, MERGED, "--tag", "math", "--private", **hub.variables())
    assert process.returncode == 0, process.stderr
    assert f"published: {hub.endpoint}/{MERGED} (commit {hub.repos[MERGED].refs['main']})" in process.stdout
    document = json.loads(run_cli("push", output, MERGED, "--tag", "math", "--json", **hub.variables()).stdout)
    assert document["already"]
    assert document["repository"] == MERGED
    process = run_cli("push", output, "no-slash", **hub.variables())
    assert process.returncode == 2


def test_token_is_never_seen(hub: HubServer, recipe: Path) -> None:
    seen = []
    for fault in (None, "status", "reset"):
        if fault:
            hub.fail(fault, "commit/main", times=2, status=400)
        process = run_cli("apply", recipe, "--push", MERGED, "--overwrite", "-v", **hub.variables(), HF_DEBUG="1")
        seen += [process.stdout, process.stderr]
    seen += [path.read_bytes().decode("latin-1") for path in recipe.parent.rglob("*") if path.is_file()]
    seen += [hub.content(MERGED, name).decode("latin-1") for name in hub.tree(MERGED)]
    assert not [text for text in seen if TOKEN in text]


# --------------------------------------------------------------------------------------------------------------- xet


@pytest.mark.parametrize("how", ["push", "no-local"])
def test_xet_storage(tmp_path: Path, recipe: Path, how: str) -> None:
    """Up and down through the xet client, in processes of their own: it reads its settings once."""
    output = skillmerge.apply(recipe, tmp_path / "local").output
    with HubServer(tmp_path / "hub", xet=True) as hub:
        if how == "push":
            process = run_cli("push", output, MERGED, **hub.variables())
        else:
            process = run_cli("apply", recipe, "--push", MERGED, "--no-local", **hub.variables())
        assert process.returncode == 0, process.stderr
        assert hub.uploads == [], "nothing went the old way"
        shards = sorted(output.glob("*.safetensors"))
        program = (
            "import sys, hf_xet; from huggingface_hub import hf_hub_download;"
            "print(*(item.hash for item in hf_xet.hash_files(sys.argv[1:])))"
        )
        hashes = python(hub, program, *shards).split()
        for shard, xet_hash in zip(shards, hashes, strict=True):
            sha256 = hub.tree(MERGED)[shard.name].sha256
            assert sha256 is not None
            hub.xet_hashes[sha256] = xet_hash
        program = "import sys; from huggingface_hub import hf_hub_download as get; print(get(sys.argv[1], sys.argv[2]))"
        for shard in shards:
            assert Path(python(hub, program, MERGED, shard.name).strip()).read_bytes() == shard.read_bytes()


def python(hub: HubServer, program: str, *arguments: str | Path) -> str:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    process = subprocess.run(command, env={**os.environ, **hub.variables()}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


# ------------------------------------------------------------------------------------------------------------ killed


KILLS = int(os.environ.get("SKILLMERGE_TEST_KILLS", "4"))
"""How many times each; 50 before a release."""


@pytest.mark.parametrize("how", ["push", "no-local"])
def test_push_killed_at_random_instants(hub: HubServer, recipe: Path, tmp_path: Path, how: str) -> None:
    """Killed, then run again: one commit, all files right, and until then nothing of it is seen."""
    output = skillmerge.apply(recipe, tmp_path / "local").output
    wanted = {path.name: path.read_bytes() for path in output.iterdir() if not path.name.startswith("skillmerge.")}
    random_instant = random.Random(7)
    environment = {**os.environ, **hub.variables()}

    def start(repository: str) -> subprocess.Popen[bytes]:
        arguments = ["push", str(output), repository]
        if how == "no-local":
            arguments = ["apply", str(recipe), "--push", repository, "--no-local"]
        command = [sys.executable, "-m", "skillmerge", *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    hub.latency = 0.02  # so that most instants are between two requests
    began = time.monotonic()
    start("acme/first").communicate()
    assert "README.md" in hub.tree("acme/first")
    duration = time.monotonic() - began
    for number in range(KILLS):
        repository = f"acme/merged-{number}"
        process = start(repository)
        time.sleep(duration * random_instant.uniform(0.3, 1.0))
        process.kill()
        process.communicate()
        if repository in hub.repos:
            seen = set(hub.tree(repository))
            assert seen == {".gitattributes"} or seen >= set(wanted), seen
        process = start(repository)
        _, told = process.communicate()
        assert process.returncode == 0, told.decode()
        repo = hub.repos[repository]
        assert len(repo.commits) == 2, number
        assert repo.discussions == []
        for name, content in wanted.items():
            assert hub.content(repository, name) == content, (number, name)
    assert not list(recipe.parent.glob("merged*"))
