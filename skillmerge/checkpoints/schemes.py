"""The table of URI schemes, and what reads each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from skillmerge.checkpoints.place import (
    Bucket,
    Local,
    Location,
    ModelPlace,
    PlaceError,
    instead_on_hub,
    may_hold_secret,
    parse_bucket,
    parse_location,
)
from skillmerge.checkpoints.store import Stat, Store
from skillmerge.checkpoints.stores.folder import Folder
from skillmerge.errors import UsageError, did_you_mean

_HUB = f"{Location.scheme}://"
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//?)")


@dataclass(frozen=True, slots=True)
class Scheme:
    """A scheme of URIs.

    parse: its place, without a request; raises PlaceError. open: the store there, given the place and whether what is
    read goes through a local cache. fetch: the folder with all that a runtime loads of it. reopen: as `open`, given
    also the files that are known to be there, which need not be asked for again; None where that saves nothing.
    """

    parse: Callable[[str], ModelPlace]
    open: Callable[[Any, bool], Store]
    fetch: Callable[[Any], AbstractContextManager[Path]]
    reopen: Callable[[Any, bool, Mapping[str, Stat]], Store] | None = None


def parse_place(uri: str) -> ModelPlace | None:
    """Return the place that a URI names, or None if it is a path. Raises PlaceError."""
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return None
    if scheme not in SCHEMES:
        raise PlaceError(f"`{scheme}://` is not a place that skillmerge reads", _instead(uri, scheme, rest))
    return SCHEMES[scheme].parse(uri)


def _instead(uri: str, scheme: str, rest: str) -> str:
    if scheme == "file":
        return f"write the path alone: `{unquote(rest).removeprefix('localhost')}`"
    if near := next((known for known in SCHEMES if scheme.lower() == known or did_you_mean(scheme, [known])), None):
        return _meant(near, rest)
    return instead_on_hub(uri) or (
        "a model is a folder, `hf://org/name` on the Hub, or `s3://`, `gs://` or `az://` and a bucket's name"
    )


def _meant(scheme: str, rest: str) -> str:
    """Return the address that was meant: its scheme alone, where the rest may have a secret in it."""
    return f"did you mean `{scheme}://{'' if may_hold_secret(rest) else rest}`?"


def is_path(uri: str) -> bool:
    """Return whether a URI is a path and not a place of one of the schemes."""
    return not any(uri.startswith(f"{scheme}://") for scheme in SCHEMES)


def bucket_of(uri: object) -> Bucket | None:
    """Return the place in an object store that a URI names, or None if it is a path or on the Hub. Raises UsageError,
    also for other addresses and for `s3:/bucket`, which nobody means as the name of a folder."""
    text = str(uri)
    address = _ADDRESS.match(text)
    if address is None or address[0] == _HUB:
        return None
    scheme, slashes = address.groups()
    if slashes == "/":
        if scheme.lower() not in SCHEMES:
            return None
        fix = _meant(scheme.lower(), text[address.end() :])
        raise UsageError(f"the address of a place does not begin with `{address[0]}`", fix=fix)
    try:
        place = parse_place(text)
    except PlaceError as error:
        raise UsageError(str(error), fix=error.fix) from error
    return place if isinstance(place, Bucket) else None


def output_place(uri: object) -> Bucket | None:
    """Return the place in an object store that an output is to have, or None if it is a folder. Raises UsageError."""
    if str(uri).startswith(_HUB):
        raise UsageError(
            f"the output `{uri}` is on the Hub, where a merge is published by a push",
            fix="name a folder, and pass `--push org/name`; with `--no-local` too, no copy stays in it",
        )
    return bucket_of(uri)


def open_store(
    place: ModelPlace,
    *,
    follow_links: bool = False,
    download: bool = False,
    known: Mapping[str, Stat] | None = None,
) -> Store:
    """Return the files of a place. follow_links: of a folder, links may lead out. download: through the local cache.
    known: files of a commit, with the digests that the store stated: only these are looked for, without a request.

    Raises InputError, TemporaryError.
    """
    if isinstance(place, Local):
        return Folder(place.path, follow_links=follow_links)
    scheme = SCHEMES[place.scheme]
    if known is not None and scheme.reopen is not None:
        return scheme.reopen(place, download, known)
    return scheme.open(place, download)


def local_folder(place: ModelPlace) -> AbstractContextManager[Path]:
    """Return a folder with all that a runtime loads of a model, fetched where it is not there. It may be gone
    afterwards."""
    return nullcontext(place.path) if isinstance(place, Local) else SCHEMES[place.scheme].fetch(place)


def _open_location(location: Location, download: bool, known: Mapping[str, Stat] | None = None) -> Store:
    from skillmerge.checkpoints.stores.hub import open_location

    return open_location(location, download=download, known=known)


def _download(location: Location) -> AbstractContextManager[Path]:
    from skillmerge.checkpoints.stores.hub import download

    return nullcontext(download(location))


def _open_bucket(bucket: Bucket, download: bool, known: Mapping[str, Stat] | None = None) -> Store:
    from skillmerge.checkpoints.stores.objects import Objects

    return Objects(bucket, known=known)


def _fetch_bucket(bucket: Bucket) -> AbstractContextManager[Path]:
    from skillmerge.checkpoints.stores.objects import fetched

    return fetched(bucket)


BUCKETS = ("s3", "gs", "az")
SCHEMES = {
    Location.scheme: Scheme(parse_location, _open_location, _download, _open_location),
    **dict.fromkeys(BUCKETS, Scheme(parse_bucket, _open_bucket, _fetch_bucket, _open_bucket)),
}
