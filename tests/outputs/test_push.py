"""Publishing on the Hub: what is there afterwards, and what is seen of it before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import random_tensors, run_cli, run_process, tensor_shapes, write_checkpoint
from hub_server import TOKEN, HubServer
from published import MERGED, assert_is_published

import skillmerge
from skillmerge.errors import CheckFailed, InputError, StalePlan, TemporaryError, UsageError

# ------------------------------------------------------------------------------------------------------ push DIR


def test_new_repository_gets_one_commit_on_main(hub: HubServer, finished: Path) -> None:
    published = skillmerge.push(finished, MERGED)
    repo = hub.repos[MERGED]
    assert published.commit == repo.refs["main"]
    assert not published.already
    assert published.pull_request is None
    assert len(repo.commits) == 2, "the one that made the repository, and ours"
    assert_is_published(hub, finished)


def test_repository_with_a_model_gets_a_pull_request(hub: HubServer, finished: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", random_tensors(tensor_shapes()), shards=3)
    before = hub.create_from(MERGED, other)
    published = skillmerge.push(finished, MERGED)
    assert published.pull_request == f"{hub.endpoint}/{MERGED}/discussions/1"
    assert hub.repos[MERGED].refs["main"] == before
    tree = hub.tree(MERGED, "refs/pr/1")
    weights = {name for name in tree if name.endswith(".safetensors")}
    assert weights == {path.name for path in finished.glob("*.safetensors")}, "those of the old model are gone"


def test_push_to_main_or_to_a_branch_where_that_is_asked(hub: HubServer, finished: Path, tmp_path: Path) -> None:
    before = hub.create_from(MERGED, write_checkpoint(tmp_path / "other", random_tensors(tensor_shapes())))
    skillmerge.push(finished, MERGED, revision="v2")
    assert hub.repos[MERGED].refs["main"] == before
    assert "model-00001-of-00002.safetensors" in hub.tree(MERGED, "v2")
    skillmerge.push(finished, MERGED, pull_request=False)
    assert "model-00001-of-00002.safetensors" in hub.tree(MERGED)
    assert hub.repos[MERGED].discussions == []
    with pytest.raises(UsageError, match="not both"):
        skillmerge.push(finished, MERGED, revision="v2", pull_request=True)


def test_push_again_does_nothing(hub: HubServer, finished: Path, tmp_path: Path) -> None:
    first = skillmerge.push(finished, MERGED)
    sent = list(hub.uploads)
    again = skillmerge.push(finished, MERGED)
    assert again.already
    assert again.commit == first.commit
    assert hub.uploads == sent
    hub.create_from("acme/other", write_checkpoint(tmp_path / "other", random_tensors(tensor_shapes())))
    request = skillmerge.push(finished, "acme/other")
    again = skillmerge.push(finished, "acme/other")
    assert again.already
    assert again.pull_request == request.pull_request
    assert len(hub.repos["acme/other"].discussions) == 1


def test_private_repository_and_message(hub: HubServer, finished: Path) -> None:
    published = skillmerge.push(finished, MERGED, private=True, message="The merge of the week")
    assert hub.repos[MERGED].private
    assert hub.repos[MERGED].messages[published.commit] == "The merge of the week"


def test_what_fails_its_verification_is_not_pushed(hub: HubServer, finished: Path) -> None:
    shard = next(finished.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    with pytest.raises(CheckFailed):
        skillmerge.push(finished, MERGED)
    assert MERGED not in hub.repos
    assert hub.requests == []


def test_output_that_was_to_the_hub_and_back_verifies(hub: HubServer, finished: Path, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    skillmerge.push(finished, MERGED)
    back = Path(snapshot_download(MERGED, local_dir=tmp_path / "back", cache_dir=tmp_path / "cache"))
    assert (back / ".cache" / "huggingface").is_dir()
    assert skillmerge.verify(back).tensors == len(tensor_shapes())


def test_uploaded_shards_are_not_sent_again(hub: HubServer, finished: Path) -> None:
    hub.fail("status", r"POST /api/models/acme/merged/commit", times=10**6, status=500)
    with pytest.raises(TemporaryError):
        skillmerge.push(finished, MERGED)
    sent = list(hub.uploads)
    assert len(sent) == len(set(sent)) == 3, "two shards and a manifest"
    assert set(hub.tree(MERGED)) == {".gitattributes"}, "nothing of it is seen"
    hub.faults.clear()
    skillmerge.push(finished, MERGED)
    assert hub.uploads == sent
    assert_is_published(hub, finished)


def test_commit_whose_answer_is_lost_is_not_made_twice(hub: HubServer, finished: Path) -> None:
    hub.fail("reset", r"#done", times=1)
    published = skillmerge.push(finished, MERGED)
    assert published.already
    assert len(hub.repos[MERGED].commits) == 2
    assert_is_published(hub, finished)


def test_branch_that_moves_is_left_alone(hub: HubServer, finished: Path) -> None:
    def move() -> None:
        hub.commit(MERGED, {"notes.txt": b"somebody else's"})

    hub.fail("call", r"POST /api/models/acme/merged/commit", action=move)
    with pytest.raises(StalePlan, match="has changed since"):
        skillmerge.push(finished, MERGED)
    assert set(hub.tree(MERGED)) == {".gitattributes", "notes.txt"}


def test_hub_that_has_something_else_afterwards_is_told(hub: HubServer, finished: Path) -> None:
    def lose() -> None:
        repo = hub.repos[MERGED]
        tree = repo.commits[repo.refs["main"]]
        tree["config.json"] = hub.blob("config.json", b"{}")

    hub.fail("call", r"#done", action=lose)
    with pytest.raises(CheckFailed, match=r"differ from what was sent: config\.json"):
        skillmerge.push(finished, MERGED)


@pytest.mark.parametrize(
    "where", ["POST /api/repos/create", "preupload", "objects/batch", "PUT /upload", "commit/main"]
)
@pytest.mark.parametrize("kind", ["status", "reset"])
def test_what_passes_is_waited_for(hub: HubServer, finished: Path, where: str, kind: str) -> None:
    hub.fail(kind, where, times=1, status=503)
    skillmerge.push(finished, MERGED)
    assert_is_published(hub, finished)


def test_nothing_is_pushed_without_rights(hub: HubServer, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="the token may not do this"):
        skillmerge.push(finished, "forbidden/merged")
    with hub.environment(monkeypatch, token=None), pytest.raises(InputError, match="needs a token"):
        skillmerge.push(finished, MERGED)
    assert MERGED not in hub.repos


def test_same_weights_with_another_card_are_another_push(hub: HubServer, finished: Path, tmp_path: Path) -> None:
    skillmerge.push(finished, MERGED)
    card = tmp_path / "card.md"
    card.write_text("---\nlicense: mit\n---\n# Corrected\n")
    published = skillmerge.push(finished, MERGED, card=card, pull_request=False)
    assert not published.already
    assert "# Corrected" in hub.content(MERGED, "README.md").decode()


def test_what_changed_on_the_hub_since_is_put_right(hub: HubServer, finished: Path) -> None:
    skillmerge.push(finished, MERGED)
    content = (finished / "config.json").read_bytes()
    hub.commit(MERGED, {"config.json": content.replace(b"odd", b"bad")})
    assert not skillmerge.push(finished, MERGED, pull_request=False).already
    assert hub.content(MERGED, "config.json") == content


@pytest.mark.parametrize("manifest", [b"{", b'{"plan_digest": "DIGEST"}', b'{"plan_digest": "DIGEST", "files": []}'])
def test_a_strangers_pull_request_is_not_ours(hub: HubServer, licensed: Path, tmp_path: Path, manifest: bytes) -> None:
    digest = skillmerge.plan(licensed).digest
    hub.create_from(MERGED, write_checkpoint(tmp_path / "other", random_tensors(tensor_shapes())))
    repo = hub.repos[MERGED]
    repo.refs["refs/pr/1"] = repo.refs["main"]
    hub.commit(MERGED, {"skillmerge.manifest.json": manifest.replace(b"DIGEST", digest.encode())}, "refs/pr/1")
    title = f"Merge target + lam * (rl - sft) (plan {digest[:12]})"
    discussion = {"num": 1, "title": title, "status": "open", "isPullRequest": True, "author": {"name": "stranger"}}
    repo.discussions.append({**discussion, "createdAt": "2026-01-01T00:00:00.000Z",
                             "repo": {"name": MERGED, "type": "model"}})  # fmt: skip
    result = skillmerge.apply(licensed, push=MERGED, no_local=True)
    assert result.published is not None
    assert not result.published.already
    assert result.published.pull_request == f"{hub.endpoint}/{MERGED}/discussions/2"


def test_repository_with_words_in_it_gets_a_pull_request(hub: HubServer, finished: Path) -> None:
    hub.create(MERGED, {".gitattributes": b"", "README.md": b"# Mine\n"})
    assert skillmerge.push(finished, MERGED).pull_request is not None
    assert hub.content(MERGED, "README.md") == b"# Mine\n"


def test_weights_that_are_no_model_of_ours_stay(hub: HubServer, finished: Path) -> None:
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
    skillmerge.push(finished, MERGED, pull_request=False)
    tree = set(hub.tree(MERGED))
    assert tree >= set(mine)
    assert not tree & set(stale)


@pytest.mark.parametrize("brought", [False, True])
def test_tokenizer_goes_where_the_merge_brings_its_own(hub: HubServer, licensed: Path, brought: bool) -> None:
    if brought:
        (licensed.parent / "target" / "tokenizer.json").write_text("{}")
    output = skillmerge.apply(licensed).output
    hub.create(MERGED, {"tokenizer.model": b"x", "chat_template.jinja": b"x", "model.safetensors": b"y"})
    skillmerge.push(output, MERGED, pull_request=False)
    assert ("tokenizer.model" in hub.tree(MERGED)) != brought
    assert ("chat_template.jinja" in hub.tree(MERGED)) != brought
    assert "model.safetensors" not in hub.tree(MERGED)


def test_private_weights_never_go_into_a_public_repository(hub: HubServer, finished: Path) -> None:
    hub.create(MERGED)
    for revision in (None, "v2"):
        with pytest.raises(UsageError, match="is public"):
            skillmerge.push(finished, MERGED, private=True, revision=revision)
    assert set(hub.repos[MERGED].refs) == {"main"}


def test_what_is_given_wins_over_the_recipe(hub: HubServer, licensed: Path) -> None:
    """Whether a running merge or a finished folder is pushed."""
    document = json.loads(licensed.read_text())
    document["output"]["push"] = {"repo": "acme/first", "pull_request": True, "message": "Hello"}
    licensed.write_text(json.dumps(document))
    result = skillmerge.apply(licensed, push="acme/second", revision="v2")
    skillmerge.push(result.output, "acme/third", revision="v2")
    for name in ("acme/second", "acme/third"):
        repo = hub.repos[name]
        assert repo.discussions == []
        assert repo.messages[repo.refs["v2"]] == "Hello"
    assert "acme/first" not in hub.repos
    assert skillmerge.push(result.output, "acme/fourth").pull_request is not None


def test_a_strangers_copy_of_our_pull_request_is_not_ours(hub: HubServer, licensed: Path, tmp_path: Path) -> None:
    """Whole, consistent, with our title, and still somebody else's."""
    hub.create_from(MERGED, write_checkpoint(tmp_path / "other", random_tensors(tensor_shapes())))
    first = skillmerge.apply(licensed, push=MERGED, no_local=True).published
    hub.repos[MERGED].discussions[0]["author"] = {"name": "stranger"}
    again = skillmerge.apply(licensed, push=MERGED, no_local=True).published
    assert first is not None
    assert again is not None
    assert not again.already
    assert again.pull_request != first.pull_request


def test_refusals_in_the_hubs_own_words(hub: HubServer, finished: Path) -> None:
    hub.card_errors = ['"license" must be one of [apache-2.0, mit, …]']
    with pytest.raises(InputError, match='"license" must be one of'):
        skillmerge.push(finished, MERGED, license="Apache 2.0")
    hub.card_errors = []
    hub.quota_message = "Private repository storage limit reached"
    with pytest.raises(InputError, match="storage limit reached"):
        skillmerge.push(finished, "acme/other")
    assert set(hub.tree(MERGED)) == set(hub.tree("acme/other")) == {".gitattributes"}


def test_commit_that_lands_after_it_was_given_up_is_found(hub: HubServer, finished: Path, tmp_path: Path) -> None:
    """A gateway gives up on a large commit, and the Hub makes it all the same."""
    hub.create_from(MERGED, write_checkpoint(tmp_path / "other", random_tensors(tensor_shapes())))
    hub.fail("reset", "#done")
    assert skillmerge.push(finished, MERGED).already
    assert len(hub.repos[MERGED].discussions) == 1


def test_output_that_stands_in_the_way_is_told_before_anything_is_made(hub: HubServer, licensed: Path) -> None:
    skillmerge.apply(licensed)
    with pytest.raises(UsageError, match="already exists"):
        skillmerge.apply(licensed, coefficients={"lam": 0.5}, push=MERGED)
    assert MERGED not in hub.repos


# --------------------------------------------------------------------------------------------------- the command line


def test_push_command(hub: HubServer, finished: Path) -> None:
    process = run_cli("push", finished, MERGED, "--tag", "math", "--private", **hub.variables())
    assert process.returncode == 0, process.stderr
    assert f"published: {hub.endpoint}/{MERGED} (commit {hub.repos[MERGED].refs['main']})" in process.stdout
    document = json.loads(run_cli("push", finished, MERGED, "--tag", "math", "--json", **hub.variables()).stdout)
    assert document["already"]
    assert document["repository"] == MERGED
    process = run_cli("push", finished, "no-slash", **hub.variables())
    assert process.returncode == 2


@pytest.mark.parametrize("run", [run_cli, run_process])
def test_token_is_never_seen(hub: HubServer, licensed: Path, run: Any) -> None:
    seen = []
    for fault in (None, "status", "reset") if run is run_cli else (None,):
        if fault:
            hub.fail(fault, "commit/main", times=2, status=400)
        process = run("apply", licensed, "--push", MERGED, "--overwrite", "-v", **hub.variables(), HF_DEBUG="1")
        seen += [process.stdout, process.stderr]
    seen += [path.read_bytes().decode("latin-1") for path in licensed.parent.rglob("*") if path.is_file()]
    seen += [hub.content(MERGED, name).decode("latin-1") for name in hub.tree(MERGED)]
    assert not [text for text in seen if TOKEN in text]


def test_name_of_a_repository_is_checked_before_anything_else(hub: HubServer, finished: Path) -> None:
    shutil.rmtree(finished)
    with pytest.raises(UsageError, match="`a/b/c` is not a repository name"):
        skillmerge.push(finished, "a/b/c")


def test_push_says_what_becomes_of_a_branch_and_of_visibility(hub: HubServer, finished: Path) -> None:
    first = run_cli("push", finished, MERGED, "--private", "--revision", "next")
    assert "published on branch `next`: " in first.stdout
    second = run_cli("push", finished, MERGED, "--public", "--revision", "next")
    assert f"note: {MERGED} is private and stays so: `--public` is for new repositories\n" in second.stderr


def test_push_without_a_network_says_so(hub: HubServer, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="needs a network, but HF_HUB_OFFLINE is set"):
        skillmerge.push(finished, MERGED)
