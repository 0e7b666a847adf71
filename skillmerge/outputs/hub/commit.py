"""A finished model -> one commit on the Hugging Face Hub.

Shards are uploaded ahead, invisibly; one commit at the end makes all of them visible. The commit requires that the
branch has not moved, is checked against the Hub's own digests, and is found again by a rerun after a crash. Knows files
and digests, nothing about tensors.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import FileDuplicationError, HfHubHTTPError
from huggingface_hub.lfs import UploadInfo

from skillmerge.checkpoints.place import Location
from skillmerge.checkpoints.store import digest_of
from skillmerge.checkpoints.stores.hub import Repository
from skillmerge.checkpoints.stores.hub_client import LOG_IN, Quiet, retried
from skillmerge.checkpoints.stores.retries import LOG, Passing
from skillmerge.durable import disk_errors
from skillmerge.errors import CheckFailed, InputError, SkillmergeError, StalePlan, TemporaryError, UsageError, some
from skillmerge.outputs import manifest
from skillmerge.outputs.hub.published import Published, check_repository
from skillmerge.outputs.manifest import File, Manifest
from skillmerge.outputs.staging import MANIFEST_FILE
from skillmerge.recipes.recipe import Push

_FIRST_FILES = {".gitattributes"}
"""Files of a repository that was only just created."""

_MAX_MANIFEST = 256 << 20

_PIECE = 64 << 20

_SHARD = r"(-\d{5}-of-\d{5})?"
_MODEL_FILE = re.compile(
    rf"(model|pytorch_model){_SHARD}\.(safetensors|bin)(\.index\.json)?|consolidated(\.\d+)?\.(pth|safetensors)"
    r"|adapter_config\.json|adapter_model\.(safetensors|bin)|skillmerge\.(manifest|run)\.json|model\.sig"
    rf"|skill\.json|skill{_SHARD}\.safetensors"
)
_TOKENIZER_FILE = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|tokenizer\.model|vocab\.txt|merges\.txt"
    r"|chat_template\.(jinja|json)"
)
"""Names at the top of a repository where runtimes look for files that must belong together."""


def _is_about_copies(error: BaseException | None) -> bool:
    """Return whether a commit failed because of the files that the Hub was to copy."""
    if isinstance(error, ForgottenUploads):
        return True  # it reported copies that it had not made
    while error is not None:
        if isinstance(error, FileDuplicationError) or type(error) is ValueError:
            return True
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            return "duplicate" in str(error.response.url)
        error = error.__cause__
    return False


class ForgottenUploads(TemporaryError):
    """Raised when the Hub has dropped uploads that no commit refers to."""


@dataclass(frozen=True, slots=True)
class Digests:
    """What the Hub states about a file: its size, and its sha256 or git digest."""

    size: int
    sha256: str
    git_sha1: str | None = None

    @classmethod
    def of(cls, content: bytes) -> Digests:
        return cls(len(content), hashlib.sha256(content).hexdigest(), digest_of("git_sha1", content)[1])

    def agree(self, size: int, digest: tuple[str, str]) -> bool:
        return size == self.size and digest in (("sha256", self.sha256), ("git_sha1", self.git_sha1))


def _is_there(file: File, listed: Mapping[str, tuple[int, tuple[str, str]]], files: Repository) -> bool:
    """Return whether the Hub has a file of a manifest. A small file, which has no sha256 there, is read."""
    size, (kind, digest) = listed.get(file.name, (-1, ("", "")))
    if size != file.size:
        return False
    if kind != "sha256":
        digest = digest_of("sha256", files.read_small(file.name, size))[1]
    return digest == file.sha256


def obstacles(push: Push) -> Iterator[SkillmergeError]:
    """Yield why a push cannot succeed, as far as this machine knows without a request."""
    place = Location(push.repository, push.revision or "")
    if get_token() is None:
        yield InputError(f"pushing to {place} needs a token, but there is none", fix=LOG_IN)
    if push.revision and push.pull_request:
        yield UsageError(
            "a push goes to a branch or into a pull request, not both", fix="leave `--revision` or `--pull-request` out"
        )
    if constants.HF_HUB_OFFLINE:
        yield InputError(f"pushing to {place} needs a network, but HF_HUB_OFFLINE is set", fix="unset HF_HUB_OFFLINE")


class HubCommit:
    """One commit in the making: a repository, the branch or pull request that the commit goes to, and its files.

    Every request to the Hub may raise InputError (not allowed, not found), StalePlan (the branch moved),
    TemporaryError.
    """

    def __init__(self, push: Push) -> None:
        """Find or create the repository; nothing else of a push is visible before the commit."""
        check_repository(push.repository)
        self.push = push
        self._api = HfApi()
        self._quiet = Quiet()
        self._place = str(Location(push.repository, push.revision or ""))
        self._operations: dict[str, CommitOperationAdd | CommitOperationCopy] = {}
        self._digests: dict[str, Digests] = {}
        self._tried = False
        for obstacle in obstacles(push):
            raise obstacle
        self._prepare()

    def _prepare(self) -> None:
        repository, branch = self.push.repository, self.push.revision or constants.DEFAULT_REVISION
        if not retried(self._place, lambda: self._api.repo_exists(repository)):
            retried(self._place, lambda: self._api.create_repo(repository, private=self.push.private, exist_ok=True))
        elif self.push.private is not None:
            self._compare_visibility(self.push.private)
        if self.push.revision and not self.push.revision.startswith("refs/"):
            retried(self._place, lambda: self._api.create_branch(repository, branch=branch, exist_ok=True))
        self.parent, listed = self._listing(branch)
        # A repository whose run died before its commit still counts as new.
        new = set(listed) <= _FIRST_FILES
        asked = self.push.pull_request
        self.as_pull_request = asked if asked is not None else not (new or self.push.revision)
        self._branch = branch

    def _compare_visibility(self, private: bool) -> None:
        """Compare what was requested with a repository that exists. Raises UsageError if that is public."""
        repository = self.push.repository
        is_private = retried(self._place, lambda: self._api.model_info(repository)).private
        if private and not is_private:
            raise UsageError(
                f"{repository} is public, and a private one was requested", fix="choose another repository name"
            )
        if is_private and not private:
            LOG.warning("%s is private and stays so: `--public` is for new repositories", repository)

    def _listing(self, revision: str) -> tuple[str, dict[str, tuple[int, tuple[str, str]]]]:
        """Return the commit of a revision, and what the Hub states about its files."""
        info = retried(
            self._place, lambda: self._api.model_info(self.push.repository, revision=revision, files_metadata=True)
        )
        files = {}
        for item in info.siblings or []:
            digest = ("sha256", item.lfs.sha256) if item.lfs else ("git_sha1", str(item.blob_id))
            files[item.rfilename] = (item.size or 0, digest)
        return str(info.sha), files

    def upload(self, name: str, path: Path, size: int, sha256: str) -> None:
        """Upload a large file ahead of the commit, unless the Hub has it."""
        operation = CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path))
        operation.upload_info.sha256 = bytes.fromhex(sha256)  # saves reading it again

        def attempt() -> None:
            try:
                with self._quiet:
                    self._api.preupload_lfs_files(
                        self.push.repository,
                        [operation],
                        revision=self._branch,
                        create_pr=self.as_pull_request,
                        num_threads=1,
                    )
            except RuntimeError as error:
                # How failed uploads come out of threads and the xet client.
                if isinstance(error.__cause__, Exception) and not isinstance(error.__cause__, RuntimeError):
                    raise error.__cause__ from None
                raise Passing("the upload failed") from error

        retried(self._place, attempt, tries=2)  # the client itself has tried several times
        if operation.path_or_fileobj != b"":  # the Hub wants it in the commit itself: it is small
            operation.path_or_fileobj = path.read_bytes()
        self._operations[name] = operation
        self._digests[name] = Digests(size, sha256)

    def copy(self, name: str, size: int, sha256: str, repository: str, commit: str, path: str) -> None:
        """A file that is identical to one of another repository, so that the Hub can copy it."""
        if repository == self.push.repository:
            repository = ""  # no name means the same repository
        self._operations[name] = CommitOperationCopy(
            src_path_in_repo=path,
            path_in_repo=name,
            src_revision=commit,
            src_repo_id=repository or None,
            src_repo_type="model" if repository else None,
        )
        self._digests[name] = Digests(size, sha256)

    def fetch_original(self, name: str, path: Path) -> None:
        """Write the file that the Hub was to copy to `path`. Raises InputError, TemporaryError, ResourceError."""
        operation = self._operations[name]
        assert isinstance(operation, CommitOperationCopy)
        repository = operation.src_repo_id or self.push.repository
        found, size = hashlib.sha256(), self._digests[name].size
        try:
            with (
                closing(Repository(Location(repository, operation.src_revision or ""))) as files,
                disk_errors(path),
                path.open("wb") as stream,
            ):
                for position in range(0, size, _PIECE):
                    piece = memoryview(bytearray(min(_PIECE, size - position)))
                    files.read(operation.src_path_in_repo, position, piece)()
                    found.update(piece)
                    stream.write(piece)
            # Some storage does not check the digest itself.
            if found.hexdigest() != self._digests[name].sha256:
                place = files.at.path(operation.src_path_in_repo)
                raise InputError(
                    f"{place}: the download does not have the digest that the Hub states",
                    fix="run the same command again",
                )
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def take_uploaded(self, name: str, size: int, sha256: str) -> None:
        """A file that an earlier run uploaded and then removed from this disk."""
        operation = CommitOperationAdd(path_in_repo=name, path_or_fileobj=b"")
        operation.upload_info = UploadInfo(size=size, sample=b"", sha256=bytes.fromhex(sha256))
        # There is no public API for this; preupload_lfs_files sets the same two fields.
        operation._upload_mode, operation._is_uploaded = "lfs", True
        self._operations[name] = operation
        self._digests[name] = Digests(size, sha256)

    def add(self, name: str, content: bytes) -> None:
        """A small file, sent with the commit."""
        self._operations[name] = CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        self._digests[name] = Digests.of(content)

    @property
    def names(self) -> set[str]:
        return set(self._operations)

    def make(self, message: str, description: str, upload: Callable[[str], None]) -> Published:
        """Create the commit, unless it exists, and compare the Hub's files with what was sent.

        upload: sends a file by name that the Hub refuses to copy. Raises CheckFailed if the Hub has different
        files, ForgottenUploads if it has dropped earlier uploads.
        """
        message = self.push.message or message
        published = self._find(message)
        if published is not None:
            return published
        try:
            published = retried(self._place, lambda: self._commit(message, description))
        except (SkillmergeError, ValueError, FileDuplicationError) as error:
            copies = [name for name, item in self._operations.items() if isinstance(item, CommitOperationCopy)]
            if not copies or not _is_about_copies(error):
                raise
            for name in copies:  # other storage, another region, no rights: upload it like any other file
                upload(name)
            published = retried(self._place, lambda: self._commit(message, description))
        self._compare(published.commit)
        return published

    def _description(self, description: str, deleted: Sequence[CommitOperationDelete]) -> str:
        names = ", ".join(item.path_in_repo for item in deleted)
        return description + (f"\n\nRemoved with the previous model: {names}" if deleted else "")

    def _commit(self, message: str, description: str) -> Published:
        # A commit that seemed to fail may still appear a moment later.
        if self._tried and (found := self._find(message)) is not None:
            return found
        self._tried = True
        stale = self._stale()
        try:
            with self._quiet:
                info = self._api.create_commit(
                    self.push.repository,
                    [*self._operations.values(), *stale],
                    commit_message=message,
                    commit_description=self._description(description, stale),
                    revision=self._branch,
                    create_pr=self.as_pull_request,
                    parent_commit=self.parent,
                )
        except Exception as error:
            # The answer may have been lost after the commit was created.
            if (found := self._find(message)) is not None:
                return found
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if status in (409, 412):
                raise StalePlan(
                    f"{self._place} has changed since this push began (its head was {self.parent[:12]})",
                    fix="check the new commits, then rerun",
                ) from error
            if status == 400 and "pointer" in str(error).lower():
                raise ForgottenUploads(
                    f"{self._place} no longer has all files that were uploaded", fix="run the same command again"
                ) from error
            raise
        url = info.pr_url or self._home
        return Published(self.push.repository, info.oid, url, info.pr_url, already=False, branch=self.push.revision)

    def _stale(self) -> list[CommitOperationDelete]:
        """Return the files of another model that a runtime would mix with these: weights, adapter, and its tokenizer if
        this model has its own."""
        _, listed = self._listing(self.parent)
        tokenizer = any(_TOKENIZER_FILE.fullmatch(name) for name in self._operations)
        return [
            CommitOperationDelete(path_in_repo=name)
            for name in listed
            if name not in self._operations
            and (_MODEL_FILE.fullmatch(name) or (tokenizer and _TOKENIZER_FILE.fullmatch(name)))
        ]

    def find_plan(self, plan_digest: str, title: str) -> tuple[Published, Manifest] | None:
        """Return an output of this plan that is there already, and its manifest: on the branch, or in an open pull
        request of ours. Every byte of it is what its manifest says, and that is whole."""
        for revision, request in self._places(self.push.message or title):
            commit, listed = self._listing(revision)
            if MANIFEST_FILE not in listed:
                continue
            files = Repository(Location(self.push.repository, commit))
            try:
                proof = manifest.parse(files.read_small(MANIFEST_FILE, _MAX_MANIFEST), files.at.path(MANIFEST_FILE))
                if proof.plan_digest == plan_digest and all(_is_there(file, listed, files) for file in proof.files):
                    return self._there(commit, request), proof
            except (CheckFailed, InputError):
                continue  # belongs to another author
            finally:
                files.close()
        return None

    @property
    def _home(self) -> str:
        return f"{constants.ENDPOINT}/{self.push.repository}"

    def _places(self, title: str) -> Iterator[tuple[str, str | None]]:
        """Yield the places where a commit of ours may be: revision, and the address of our pull request."""
        yield self._branch, None
        if self.as_pull_request:
            user = retried(self._place, self._api.whoami)["name"]
            requests = retried(
                self._place,
                lambda: list(
                    self._api.get_repo_discussions(
                        self.push.repository, discussion_type="pull_request", discussion_status="open"
                    )
                ),
            )
            for request in requests:
                if (request.author, request.title) == (user, title):
                    yield f"refs/pr/{request.num}", f"{self._home}/discussions/{request.num}"

    def _there(self, commit: str, request: str | None) -> Published:
        branch = None if request else self.push.revision
        return Published(self.push.repository, commit, request or self._home, request, already=True, branch=branch)

    def _find(self, title: str) -> Published | None:
        """Return this model if an earlier run has committed it."""
        for revision, request in self._places(title):
            commit, listed = self._listing(revision)
            if not self._differences(listed):
                return self._there(commit, request)
        return None

    def _differences(self, listed: Mapping[str, tuple[int, tuple[str, str]]]) -> list[str]:
        return [
            name for name, digests in self._digests.items() if name not in listed or not digests.agree(*listed[name])
        ]

    def _compare(self, commit: str) -> None:
        _, listed = self._listing(commit)
        if different := self._differences(listed):
            raise CheckFailed(
                f"{self._place}: at {commit} the Hub's sizes or digests differ from what was sent: {some(different)}",
                fix="do not use that commit; rerun the push",
            )
