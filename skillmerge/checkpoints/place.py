"""Places of models: a folder, hf://org/name[@revision][/subfolder], or s3://bucket/prefix. Text only, no requests."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol
from urllib.parse import unquote

_HUB = "hf://"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_LOCATION = re.compile(
    r"(?P<repository>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?"
    r"(?:/(?P<subfolder>.+?))?/?"
)

_ADDRESS = re.compile(
    r"(?:https?://|git@|hf:/?/?|huggingface:/?/?|hub:/?/?|)"
    r"(?:(?:www\.)?(?:huggingface\.co|hf\.co|hf-mirror\.com)[/:])?(?:api/)?"
    r"(?P<kind>(?:models|datasets|spaces|buckets|kernels)/)?"
    r"(?P<repository>[^/@\s?#:]+/[^/@\s?#:]+?)(?:\.git)?"
    r"(?:@(?P<at>[^/\s?#]+)"
    r"|/(?P<page>tree|blob|resolve|raw|commit|blame|edit)/(?P<revision>refs/pr/[0-9]+|[^/\s?#]+))?"
    r"(?P<below>/[^\s?#]*)?(?:[?#].*)?"
)
"""Other spellings of a model on the Hub: addresses of pages and files, git's form, prefixes."""
_ON_HUB = re.compile(
    r"(https?://)?(www\.)?(huggingface\.co|hf\.co|hf-mirror\.com)[/:]|git@hf\.co|(hf|huggingface|hub):"
)

_OTHERS = {
    "datasets": "a data set", "spaces": "a Space", "buckets": "a storage bucket", "kernels": "a kernel",
    "collections": "a collection", "papers": "a paper", "api": "the address of a page",
    "models": "the address of a page",
}  # fmt: skip
"""First parts of Hub addresses that are not organizations, and what they name."""
_FILE = re.compile(r"\.(safetensors|json|bin|pt|pth|gguf|md)$")
_FORMS = "write `hf://org/name`, `hf://org/name@revision` or `hf://org/name@revision/subfolder`"

_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
"""What all three clouds allow, and no more."""

_PAGE = re.compile(r"(tree|blob|resolve|raw)/(main|[0-9a-f]{40})(/|$)")


class PlaceError(ValueError):
    """Raised for text that is not a place. fix: what to write instead, or None."""

    def __init__(self, message: str, fix: str | None = None) -> None:
        super().__init__(message)
        self.fix = fix


class ModelPlace(Protocol):
    """The place of a model. scheme: how its URI begins, "" for a path. name: what people call it. versioned: whether it
    has commits, so that what it names may change; revision: which of them, "" for the latest."""

    @property
    def scheme(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def versioned(self) -> bool: ...
    @property
    def revision(self) -> str: ...
    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which cannot change."""

    def at(self, commit: str) -> ModelPlace:
        """Return the same place at a commit."""


@dataclass(frozen=True, slots=True)
class Local:
    """A folder on this machine."""

    path: Path
    scheme: ClassVar[str] = ""
    versioned: ClassVar[bool] = False
    revision: ClassVar[str] = ""
    pinned: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return str(self.path)

    def at(self, commit: str) -> Local:
        return self

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class Location:
    """A model on the Hub. revision: a branch, tag, `refs/pr/N` or commit; "" for the default branch.
    subfolder: "" for the repository's top."""

    repository: str
    revision: str = ""
    subfolder: str = ""
    scheme: ClassVar[str] = "hf"
    versioned: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return self.repository

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which cannot change."""
        return _COMMIT.fullmatch(self.revision) is not None

    def at(self, commit: str) -> Location:
        return replace(self, revision=commit)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{_HUB}{self.repository}{revision}{'/' + self.subfolder if self.subfolder else ''}"


@dataclass(frozen=True, slots=True)
class Bucket:
    """A model in an object store: what lies in a bucket below a prefix, which is "" for the bucket's top."""

    scheme: str
    bucket: str
    prefix: str = ""
    versioned: ClassVar[bool] = False
    revision: ClassVar[str] = ""
    pinned: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return str(self)

    def at(self, commit: str) -> Bucket:
        return self

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}{'/' + self.prefix if self.prefix else ''}"


def may_hold_secret(rest: str) -> bool:
    """Return whether what follows `s3://` may have credentials in it. A secret key may have a slash in it: then only
    the colon before it is left of a user's part."""
    bucket = rest.partition("/")[0]
    return "@" in bucket or ":" in bucket or "?" in rest


def parse_bucket(uri: str) -> Bucket:
    """Parse a URI such as s3://bucket/prefix. Raises PlaceError, which never shows what may be a secret."""
    scheme, _, rest = uri.partition("://")
    bucket, _, prefix = rest.partition("/")
    form = f"write `{scheme}://bucket/prefix`"
    if may_hold_secret(rest):
        raise PlaceError(
            f"a `{scheme}://` place has no credentials, account or query in it",
            f"{form}; the credentials are found where the cloud's own tools find them",
        )
    if not _BUCKET.fullmatch(bucket):
        raise PlaceError(f"`{uri}` does not begin with a bucket's name", form)
    parts = prefix.rstrip("/").split("/") if prefix.strip("/") else []
    if any(part in ("", ".", "..") for part in parts) or not prefix.isprintable() or "\\" in prefix:
        raise PlaceError(f"`{uri}` has a prefix that cannot be", form)
    if parts and _FILE.search(parts[-1]):
        raise PlaceError(f"`{uri}` is a file, not a model", f"name its folder: `{uri.rstrip('/').rpartition('/')[0]}`")
    return Bucket(scheme, bucket, "/".join(parts))


def parse_location(uri: str) -> Location:
    """Parse a URI. Raises PlaceError. A revision with a slash in it (except refs/pr/N) is written with %2F."""
    written = uri.removeprefix(_HUB)
    first, _, rest = written.lstrip("/").partition("/")
    if first in _OTHERS:
        raise PlaceError(f"`{uri}` is {_OTHERS[first]}, not a model", _model_in(first, rest))
    match = _LOCATION.fullmatch(written)
    if match is None or not _REPOSITORY.fullmatch(match["repository"]) or uri.endswith("@"):
        raise PlaceError(f"`{uri}` is not a model on the Hub", _near(written) or _FORMS)
    subfolder = match["subfolder"] or ""
    if _ON_HUB.match(match["repository"]) or _PAGE.match(subfolder):
        raise PlaceError(f"`{uri}` is the address of a page, not of a model", _near(written))
    if _FILE.search(subfolder):
        folder, _, _ = uri.rstrip("/").rpartition("/")
        raise PlaceError(f"`{uri}` is a file, not a model", f"name its folder: `{folder}`")
    revision = unquote(match["revision"] or "")
    if any(part in ("", ".", "..") for part in subfolder.split("/") if subfolder) or re.search(
        r"[\s\\]|\.\.", revision
    ):
        raise PlaceError(f"`{uri}` has a revision or subfolder that cannot be", _FORMS)
    return Location(match["repository"], revision, subfolder)


def _model_in(kind: str, rest: str) -> str:
    """Return what to write in place of an address that does not begin with an organization."""
    repository = "/".join(rest.removeprefix("models/").split("/")[:2])
    if kind in ("models", "api") and _REPOSITORY.fullmatch(repository):
        return f"to read the model, write `{_HUB}{repository}`"
    return "name a model: `hf://org/name`"


def _near(written: str) -> str | None:
    """Return what to write for something like a model on the Hub."""
    if _ON_HUB.match(written):
        return instead_on_hub(written)
    if "@" not in written:
        written = written.replace(":", "@", 1)
    return instead_on_hub(f"hf.co/{written.lstrip('/')}")


def on_hub(uri: str) -> Location | None:
    """Return the model on the Hub that a URI names, or None for one elsewhere. Raises PlaceError as
    `parse_location`."""
    return parse_location(uri) if uri.startswith(_HUB) else None


def instead_on_hub(text: str) -> str | None:
    """Return what to write for a model on the Hub that was written in another way, or None if it is none."""
    match = _ADDRESS.fullmatch(text.strip())
    if match is None or _ON_HUB.match(text.strip()) is None:
        return None
    kind = (match["kind"] or "models/").rstrip("/")
    if kind != "models":
        return f"name a model: this is {_OTHERS[kind]}"
    if not _REPOSITORY.fullmatch(match["repository"]) or _ON_HUB.match(match["repository"]):
        return None
    below = [part for part in (match["below"] or "").split("/") if part]
    if match["page"] in ("blob", "resolve", "raw", "blame", "edit") or (below and "." in below[-1]):
        below = below[:-1]  # a file of the model
    if match["page"] is None and match["at"] is None:
        below = []  # a tab of its page, such as discussions
    revision = unquote(match["at"] or match["revision"] or "")
    written = revision if revision.startswith("refs/pr/") else revision.replace("/", "%2F")
    place = Location(match["repository"], "" if revision == "main" else written, "/".join(below))
    return f"to read it from the Hub, write `{place}`"


def looks_like_repository(text: str) -> bool:
    """Return whether text could be the name of a repository, `org/name` or `org/name@revision`, and is no plain
    path."""
    return _REPOSITORY.fullmatch(text.partition("@")[0]) is not None
