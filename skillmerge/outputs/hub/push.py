"""The verb push: a verified output -> the Hub. And the shards of a running merge, sent as they are finished."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from skillmerge.checkpoints.place import on_hub
from skillmerge.engine.destination import ShardRecord
from skillmerge.errors import UsageError
from skillmerge.outputs.attempts import Attempt
from skillmerge.outputs.buckets.at_hand import AtHand, at_hand
from skillmerge.outputs.hub.card import CARD_FILE, license_of, read_metadata, write_card
from skillmerge.outputs.hub.commit import ForgottenUploads, HubCommit, obstacles
from skillmerge.outputs.hub.published import Published, check_repository
from skillmerge.outputs.hub.rehearsal import Refusals, Rehearsal
from skillmerge.outputs.manifest import File, Input, Manifest
from skillmerge.outputs.output import Output
from skillmerge.outputs.proof.sign import signature_beside
from skillmerge.outputs.sending import Sender
from skillmerge.outputs.staging import Staging
from skillmerge.outputs.verify import SIGNATURE_FILE, verify_files
from skillmerge.plans.plan import InputPlan, Plan
from skillmerge.recipes.parse import parse_recipe
from skillmerge.recipes.recipe import Push
from skillmerge.reporter import Reporter, default_reporter
from skillmerge.threads import in_threads

_SMALL = 1 << 20
"""Files up to this many bytes are part of the commit request."""


def push(
    folder: str | os.PathLike[str],
    repository: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    pull_request: bool | None = None,
    message: str | None = None,
    tags: tuple[str, ...] = (),
    license: str | None = None,
    card: str | os.PathLike[str] | None = None,
    allow_nonfinite: bool = False,
    reporter: Reporter | None = None,
) -> Published:
    """Verify an output and publish it as one commit of `repository` (org/name on the Hub).

    A repository that already has a model gets a pull request, unless `pull_request` or `revision` (a branch) say
    otherwise. license, card: replace the recipe's. Rerun to resume an interrupted push. Raises CheckFailed, UsageError,
    InputError, StalePlan, TemporaryError.
    """
    reporter = reporter or default_reporter("uploading")
    given = {"private": private, "revision": revision, "pull_request": pull_request, "message": message}
    prepared = _Prepared(repository, {**given, "tags": tags or None}, Refusals(all=False))
    with at_hand(folder, whole=True, reporter=reporter) as found:
        prepared.verify(found, allow_nonfinite, reporter)
        prepared.write_card(card, license)
        reporter.say(f"uploading to {repository}")
        assert prepared.card is not None, "what is wrong with it was raised"
        return send(HubCommit(prepared.push), prepared.output, prepared.card, prepared.signature)


def rehearse_push(
    folder: str | os.PathLike[str],
    repository: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    pull_request: bool | None = None,
    message: str | None = None,
    tags: tuple[str, ...] = (),
    license: str | None = None,
    card: str | os.PathLike[str] | None = None,
    allow_nonfinite: bool = False,
    reporter: Reporter | None = None,
) -> Rehearsal:
    """Do all of `push` that needs no network, and return what it would publish and why it would be refused.

    The arguments are those of `push`. Nothing is sent or written, and the Hub is not asked. Raises CheckFailed if the
    output does not verify, UsageError for what is no output or no repository's name.
    """
    reporter = reporter or default_reporter("verifying")
    given = {"private": private, "revision": revision, "pull_request": pull_request, "message": message}
    refusals = Refusals(all=True)
    prepared = _Prepared(repository, {**given, "tags": tags or None}, refusals)
    with at_hand(folder, whole=False, reporter=reporter) as found:
        prepared.verify(found, allow_nonfinite, reporter)
        prepared.write_card(card, license)
        names = [path for path in found.folder.rglob("*") if path.is_file()]
        sizes = {path.relative_to(found.folder).as_posix(): path.stat().st_size for path in names}
    refused = (*refusals.found, *obstacles(prepared.push))
    title = prepared.push.message or _title(prepared.proof.expression, prepared.proof.plan_digest)
    signed = prepared.signature is not None
    return Rehearsal(prepared.output, prepared.push, title, prepared.card, signed, refused, sizes)


class _Prepared:
    """A push of an output before any request to the Hub: `verify` the output, then `write_card`."""

    output: Output
    push: Push
    signature: bytes | None = None
    card: str | None = None

    def __init__(self, repository: str, options: Mapping[str, Any], refusals: Refusals) -> None:
        self._repository, self._options, self._refusals = repository, options, refusals

    @property
    def proof(self) -> Manifest:
        return self.output.manifest

    def verify(self, found: AtHand, allow_nonfinite: bool, reporter: Reporter) -> None:
        """Check the repository's name, every byte of the output, its gates and its signature."""
        check_repository(self._repository, found.folder)
        verdict = verify_files(found.folder, allow_nonfinite=allow_nonfinite, reporter=reporter, contents=found.open)
        self.output = replace(verdict.output, place=found.place)
        with self._refusals:
            self.output.refuse_failed()
        with self._refusals:
            self.signature = signature_beside(self.output)

    def write_card(self, card: str | os.PathLike[str] | None, license: str | None) -> None:
        """Write the model card, from the recipe's settings and the arguments."""
        asked = parse_recipe(self.proof.recipe.text, "the manifest's recipe", self.output.folder).output
        self.push = _settings(asked.push, self._repository, self._options)
        with self._refusals:
            if card is None and asked.card is not None:
                raise UsageError(
                    f"the recipe names a card ({asked.card.name}), which is not in the output",
                    fix="pass it: `--card FILE`",
                )
            by_hand = read_card(Path(card) if card else None)
            how = "declare it: `--license apache-2.0`"
            base = self.output.adapter_base
            self.card = write_card(self.proof, self.push, license or asked.license, by_hand, how, base)


def _settings(asked: Push | None, repository: str | None, options: Mapping[str, Any]) -> Push:
    """Return the recipe's push settings, replaced by the arguments that are not None."""
    given = {name: value for name, value in options.items() if value is not None}
    if repository is not None:
        given["repository"] = repository
    # A branch and a pull request exclude each other: an argument wins over the recipe.
    elsewhere: dict[str, Any] = {"pull_request": None} if "revision" in given else {}
    if given.get("pull_request"):
        elsewhere["revision"] = None
    return replace(asked or Push(repository or ""), **{**elsewhere, **given})


def read_card(path: Path | None) -> str | None:
    """Return a card written by hand. Raises UsageError."""
    try:
        return path.read_text(encoding="utf-8") if path is not None else None
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"the card {path} cannot be read: {why}", fix="check the path and the file") from error


def send(commit: HubCommit, output: Output, card: str, signature: bytes | None) -> Published:
    """Upload the remaining files, and commit. The output's folder may lack shards that were uploaded."""
    folder, proof = output.folder, output.manifest
    large = [file for file in proof.files if file.size > _SMALL or file.name.endswith(".safetensors")]
    sources = _hub_files(proof.inputs)
    for file in large:
        if file.name not in commit.names and file.sha256 in sources:
            commit.copy(file.name, file.size, file.sha256, *sources[file.sha256])
    waiting = [file for file in large if file.name not in commit.names]
    for _ in in_threads(lambda file, stop: _upload(commit, folder, file), waiting):
        pass
    for name in sorted(proof.file_names - commit.names):
        commit.add(name, (folder / name).read_bytes())
    if signature is not None:
        commit.add(SIGNATURE_FILE, signature)
    commit.add(CARD_FILE, card.encode())
    by_name = {file.name: file for file in large}
    return commit.make(
        _title(proof.expression, proof.plan_digest),
        f"Made by skillmerge {proof.tool.version}.",
        lambda name: _upload(commit, folder, by_name[name]),
    )


def _title(expression: str, plan_digest: str) -> str:
    return f"Merge {expression} (plan {plan_digest[:12]})"


def _upload(commit: HubCommit, folder: Path, file: File) -> None:
    path = folder / file.name
    if path.exists():
        return commit.upload(file.name, path, file.size, file.sha256)
    commit.fetch_original(file.name, path)
    commit.upload(file.name, path, file.size, file.sha256)
    path.unlink()


def _hub_files(inputs: Iterable[Input | InputPlan]) -> dict[str | None, tuple[str, str, str]]:
    """sha256 -> repository, commit and path, of the files of inputs on the Hub."""
    found: dict[str | None, tuple[str, str, str]] = {}
    for item in inputs:
        place = on_hub(item.uri)
        if place is not None and item.revision:
            for file in item.files:
                path = f"{place.subfolder}/{file.name}" if place.subfolder else file.name
                found[file.stated_sha256] = (place.repository, item.revision, path)
    found.pop(None, None)
    return found


class MergePush(Sender):
    """The push of a running merge: checked before the work, uploading during it, committed after it."""

    def __init__(
        self, plan: Plan, repository: str | None, remove: bool, options: Mapping[str, Any], *, commits: bool = True
    ) -> None:
        """commits: whether this run makes the commit too; a task only sends its shards ahead."""
        super().__init__(plan, remove)
        output = plan.recipe.output
        self._push = _settings(output.push, repository, options)
        check_repository(self._push.repository)
        self._license = output.license
        self._card = read_card(output.card)
        if commits and (self._card is None or not read_metadata(self._card)[1].get("license")):
            license_of(plan.inputs, output.license)
        self._connected: HubCommit | None = None
        self._on_the_hub = _hub_files(plan.inputs)

    @property
    def _commit(self) -> HubCommit:
        """Check everything local before any request to the Hub."""
        if self._connected is None:
            self._connected = HubCommit(self._push)
        return self._connected

    @property
    def destination(self) -> str:
        return self._push.repository

    def find(self, conditions: Mapping[str, Any]) -> tuple[Published, Manifest] | None:
        """Return this plan's output and its manifest, if the Hub has it."""
        title = _title(self._plan.recipe.document.data["merge"], self._plan.digest)
        return self._commit.find_plan(self._plan.digest, title)

    def _begin(self, staging: Staging | Attempt) -> None:
        _ = self._commit

    def _deliver(self, path: Path, done: ShardRecord) -> None:
        name, size, sha256 = done.file, done.size, done.sha256
        if sha256 in self._on_the_hub:
            self._commit.copy(name, size, sha256, *self._on_the_hub[sha256])
        elif done.uploaded:
            self._commit.take_uploaded(name, size, sha256)
        else:
            if self._remove:
                self._check(path)
            self._commit.upload(name, path, size, sha256)

    def publish(self, output: Output, *, verified: bool) -> Published:
        """Create the commit. An output of an earlier run is verified first."""
        if not verified:
            verify_files(output.folder, allow_nonfinite=output.manifest.environment.allow_nonfinite)
        text = write_card(output.manifest, self._push, self._license, self._card, base=output.adapter_base)
        try:
            return send(self._commit, output, text, signature_beside(output))
        except ForgottenUploads:
            if self._remove and isinstance(self._staging, Staging):
                self._staging.discard()
            raise
