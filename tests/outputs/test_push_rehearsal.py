"""A push without the Hub: what it would publish, and every reason why it would be refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import run_cli
from hub_server import HubServer
from published import MERGED

import skillmerge
from skillmerge.errors import CheckFailed, UsageError


def test_rehearsal_has_the_files_and_the_card_that_the_push_sends(hub: HubServer, finished: Path) -> None:
    before = sorted(path.name for path in finished.iterdir())
    rehearsal = skillmerge.rehearse_push(finished, MERGED, private=True, tags=("math",), message="The merge of May")
    assert hub.requests == []
    assert sorted(path.name for path in finished.iterdir()) == before, "and nothing is written"
    assert rehearsal.ok
    published = skillmerge.push(finished, MERGED, private=True, tags=("math",), message="The merge of May")
    sent = {name: len(hub.content(MERGED, name)) for name in hub.tree(MERGED) if name != ".gitattributes"}
    assert rehearsal.files == sent
    assert rehearsal.card is not None
    assert hub.content(MERGED, "README.md").decode() == rehearsal.card
    assert hub.repos[MERGED].messages[published.commit] == rehearsal.title


def test_rehearsal_names_all_that_would_be_refused(
    hub: HubServer, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    card = tmp_path / "card.md"
    card.write_text("---\nlicense: [\n---\n")
    options = ("--dry-run", "--card", str(card), "--revision", "v2", "--pull-request")
    process = run_cli("push", str(finished), MERGED, *options)
    assert process.returncode == 2, "the status of the first, as the push would end"
    for what in ("the card's metadata cannot be read", "needs a token", "not both"):
        assert what in process.stderr
    assert "nothing was sent" in process.stdout
    assert "model.safetensors" in process.stdout
    document = json.loads(run_cli("push", str(finished), MERGED, *options, "--json").stdout)
    assert (document["ok"], document["dry_run"], document["exit_status"]) == (False, True, 2)
    assert [row["exit_status"] for row in document["refused"]] == [2, 4, 2]
    assert document["message"] == document["refused"][0]["message"]
    assert document["card"] is None
    assert hub.requests == []


def test_rehearsal_of_a_private_repository_is_shown(finished: Path, hub: HubServer) -> None:
    process = run_cli("push", str(finished), MERGED, "--dry-run", "--private", "--license", "mit")
    assert process.returncode == 0, process.stderr
    assert f"would publish {finished} as {MERGED} (if it is new: private)" in process.stdout
    assert "to: `main`, or a pull request if the repository has a model" in process.stdout
    assert "license: mit" in process.stdout
    assert "to: branch `v2`\n" in run_cli("push", str(finished), MERGED, "--dry-run", "--revision", "v2").stdout
    assert hub.requests == []


def test_rehearsal_verifies_the_output(finished: Path) -> None:
    shard = next(finished.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    with pytest.raises(CheckFailed, match="sha256 differs"):
        skillmerge.rehearse_push(finished, MERGED)


@pytest.mark.parametrize("verb", [skillmerge.push, skillmerge.rehearse_push])
def test_repository_in_another_form_is_explained(verb: object, finished: Path) -> None:
    assert callable(verb)
    with pytest.raises(UsageError, match=r"write `acme/merged`$"):
        verb(finished, f"hf://{MERGED}")
    with pytest.raises(UsageError, match=f"the folder comes first: `skillmerge push {finished} {MERGED}`"):
        verb(MERGED, str(finished))


def test_flag_and_its_opposite_exclude_each_other(hub: HubServer, finished: Path) -> None:
    process = run_cli("push", str(finished), MERGED, "--private", "--public")
    assert process.returncode == 2
    assert "`--private` and `--public` exclude each other" in process.stderr
