"""Talking to the Hugging Face Hub: one place for its errors, retries and tokens.

huggingface_hub finds the endpoint, the token and the cache (HF_ENDPOINT, HF_TOKEN, `hf auth login`, HF_HOME,
HF_HUB_OFFLINE). What may pass later is tried again, as long as the server asks for; what goes wrong for good
becomes an error with the next command to type. What the Hub says is shown, its first line without tokens and
signatures; no other text that comes from a request ever is: a token could be in it.
"""

from __future__ import annotations

import email.utils
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import urlsplit

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
    parse_ratelimit_headers,
)

from skillmerge.checkpoints.stores.retries import LONGEST_WAIT, Passing, retry
from skillmerge.errors import InputError, ResourceError, SkillmergeError

HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]
"""The base class of the HTTP library's errors, whichever library this huggingface_hub uses."""

_LONGEST_SAYING = 300
_PASSING = {408, 425, 429, 500, 502, 503, 504, 520, 522, 524}

T = TypeVar("T")


class Quiet:
    """A context, entered from any thread, in which the client draws no progress bars: they are the process's own."""

    def __init__(self) -> None:
        self._lock, self._inside, self._restore = threading.Lock(), 0, False

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            # The variable decides for good where it is set.
            if self._inside == 1 and constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
                self._restore = not are_progress_bars_disabled()
                disable_progress_bars()

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._restore:
                self._restore = False
                enable_progress_bars()


def retried(
    what: str,
    attempt: Callable[[], T],
    *,
    progress: Callable[[], int] = lambda: 0,
    tries: int | None = None,
    stop: threading.Event | None = None,
) -> T:
    """Run `attempt`, which asks the Hub, as `retry` does. `what` is the repository, for messages."""

    def bounded() -> T:
        _bound_waiting()
        return attempt()

    return retry(what, "the Hub", bounded, hub_errors, progress=progress, tries=tries, stop=stop)


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn huggingface_hub's and the HTTP library's errors into ours, or into Passing."""
    try:
        yield
    except (SkillmergeError, Passing):
        raise
    except Exception as error:
        if (ours := _of_the_hub(what, error)) is not None:
            raise ours from error
        # What the network's library says is never shown: for an unusable token it quotes the token.
        if (ours := _of_the_network(what, error)) is not None:
            raise ours from None
        raise


def _of_the_hub(what: str, error: Exception) -> Exception | None:
    """Ours for an error that huggingface_hub has a name for; the narrower ones come first."""
    match error:
        case OfflineModeIsEnabled():
            return InputError(
                f"{what} is not in the local cache, and HF_HUB_OFFLINE is set",
                fix=f"unset HF_HUB_OFFLINE, or fetch it where there is a network: hf download {_repository(what)}",
            )
        case LocalTokenNotFoundError():
            return InputError(f"{what} needs a token, but there is none", fix=LOG_IN)
        case LocalEntryNotFoundError():
            return Passing("a file could not be fetched")
        case HFValidationError():
            return InputError(f"{what} is not a name that a repository can have")
        case HfHubHTTPError():
            return _explained(what, error)
        case EntryNotFoundError():
            return InputError(f"{what}: a file is missing there")
    return None


def _of_the_network(what: str, error: Exception) -> Exception | None:
    """Ours for an error of the HTTP library, the system or a library between; the narrower ones come first."""
    name = type(error).__name__
    if isinstance(error, HTTPError) and name in ("LocalProtocolError", "UnsupportedProtocol", "InvalidURL"):
        return InputError(
            f"{what}: the request failed ({name})",
            fix="check HF_ENDPOINT, and the token for stray spaces and line ends: hf auth login",
        )
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError)):
        return Passing(f"the network failed ({name}) between here and {_host(constants.ENDPOINT)}")
    if isinstance(error, ImportError):
        return InputError(
            f"{what}: the network's client lacks a package ({error})",
            fix="install it, or unset the proxy that asks for it (ALL_PROXY)",
        )
    if isinstance(error, OSError):
        if error.filename is not None and error.filename == os.environ.get("SSL_CERT_FILE"):
            return InputError(f"{error.filename}: cannot be read: {error.strerror}", fix="check SSL_CERT_FILE")
        return ResourceError(
            f"{what}: the local cache could not be used: {error.strerror or name}",
            fix="free disk space, or point HF_HOME at another place",
        )
    if isinstance(error, UnicodeError):
        return InputError(f"{what}: the token has invalid characters", fix=LOG_IN)
    if isinstance(error, ValueError):
        # A refusal in the Hub's own words, or an answer that is none (a proxy's page).
        return InputError(f"{what}: {_without_token(str(error)).strip()[:500]}", fix="check HF_ENDPOINT")
    if name in ("InvalidURL", "UnsupportedProtocol"):
        return InputError(f"{what}: the Hub's address is invalid ({constants.ENDPOINT})", fix="check HF_ENDPOINT")
    return None


def probe(seconds: float = 5.0) -> dict[str, str | bool]:
    """Return whether the Hub answers: one request without a token, for at most so long. Never raises, never shows a
    token."""
    found: dict[str, str | bool] = {
        "endpoint": _host(constants.ENDPOINT),
        "offline": bool(constants.HF_HUB_OFFLINE),
        "token": _token_state(),
    }
    if constants.HF_HUB_OFFLINE:
        return {**found, "answer": "not checked: HF_HUB_OFFLINE is set"}
    answer = [f"none in {seconds:g} s"]

    def ask() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=seconds).status_code
            answer[0] = f"reachable (HTTP {status})"
        except Exception as error:  # whatever the network does
            answer[0] = f"not reachable ({type(error).__name__})"

    # A thread, because names are looked up without a limit in time.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds + 1)
    return {**found, "answer": answer[0]}


def _host(address: str) -> str:
    """Return an address without user, password, path and query."""
    try:
        parts = urlsplit(address)
        return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
    except ValueError:
        return "not an address"


def _token_state() -> str:
    try:
        return "present" if get_token() else "none"
    except Exception as error:  # a token file that is none
        return f"cannot be read ({type(error).__name__})"


def _without_token(text: str) -> str:
    token = get_token()
    return text.replace(token, "<token>") if token else text


def _bound_waiting() -> None:
    """Without a limit, the client waits forever for an answer."""
    session = get_session()
    if session.timeout.read is None:
        session.timeout = LONGEST_WAIT


LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def _repository(what: str) -> str:
    return what.rpartition("://")[2].split("@")[0]


def _explained(what: str, error: HfHubHTTPError) -> Exception:
    """Ours for an answer of the Hub, with what it says of it."""
    ours = _meant(what, error)
    headers = error.response.headers if error.response is not None else {}
    said = _said(headers, getattr(error, "server_message", None))
    if said and isinstance(ours, InputError) and said.lower() not in ours.message.lower():
        return type(ours)(f"{ours.message} (the Hub says: {said})", fix=ours.fix)
    return ours


def _said(headers: Mapping[str, str], message: str | None = None) -> str:
    """Return the first line of what a service says, without what could be a secret."""
    text = (message or headers.get("x-error-message") or "").strip().partition("\n")[0]
    text = re.sub(r"\bhf_\w{6,}|(?i:bearer|basic)\s+\S+", "<token>", _without_token(text))
    return re.sub(r"(://[^\s?]*)\?\S*", r"\1", text)[:_LONGEST_SAYING].rstrip(" .")  # addresses are signed there


def _meant(what: str, error: HfHubHTTPError) -> Exception:
    status = error.response.status_code if error.response is not None else 0
    known = get_token() is not None
    repository = _repository(what)
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{repository}"
        fix = f"ask for access at {page}" + ("" if known else f", then {LOG_IN}")
        return InputError(f"{what} is gated, and access has not been granted to you", fix=fix)
    if isinstance(error, RepositoryNotFoundError):
        if known:
            fix = "check the name; for a private repository, check what the token may see: hf auth whoami"
        else:
            fix = f"check the name; for a private repository {LOG_IN}"
        return InputError(f"{what}: there is no such repository, or it is private", fix=fix)
    if isinstance(error, RevisionNotFoundError):
        return InputError(
            f"{what}: the repository has no such revision", fix=f"see {constants.ENDPOINT}/{repository}/commits/main"
        )
    if isinstance(error, DisabledRepoError):
        return InputError(f"{what}: the Hub has disabled this repository")
    if isinstance(error, EntryNotFoundError):
        return InputError(f"{what}: a file is missing there")
    if status == 401:
        return InputError(f"{what}: the Hub refuses the token", fix="log in again: hf auth login")
    if status == 403:
        return InputError(
            f"{what}: the token may not do this", fix="create a token with more rights at hf.co/settings/tokens"
        )
    return refused(status, error.response.headers if error.response is not None else {}, what)


def refused(status: int, headers: Mapping[str, str], what: str) -> Exception:
    """Return an answer that is not what was asked for: Passing, or an InputError."""
    if status in _PASSING:
        word = "too many requests" if status == 429 else f"the server answers {status}"
        said = _said(headers)
        return Passing(f"{word} (the Hub says: {said})" if said else word, _asked_wait(headers))
    return InputError(f"{what}: the server answers {status}")


def _asked_wait(headers: Mapping[str, str]) -> float | None:
    """Return seconds that `Retry-After` (a number or a date) or the rate limit's reset ask to wait."""
    asked = headers.get("retry-after")
    if asked is not None:
        if asked.strip().isdecimal():
            return float(asked)
        try:
            return max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
        except ValueError:
            return None
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else None
