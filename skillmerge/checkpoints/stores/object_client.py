"""Talking to object stores (S3, Google Cloud Storage, Azure) with obstore: one place for its settings and errors.

Endpoint, region and credentials are those of the clouds' own tools, and each client finds them by itself. What a
request fails with is never shown as it is: signatures and keys can be in it. Its status and the service's one-word code
are read off, and say what it means.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from skillmerge.checkpoints.place import Bucket
from skillmerge.checkpoints.stores.retries import Passing, retry
from skillmerge.errors import InputError, SkillmergeError, StalePlan, UsageError

IN_FLIGHT = 256 << 20
"""Bytes that this process has asked for and not yet received, from all stores together."""

QUICK_TRIES = 3
"""How often obstore itself tries again, which is all that helps the parts of an upload."""

_SETTINGS = re.compile(r"(AWS|AZURE|GOOGLE)_")
_ENDPOINT = re.compile(r"ENDPOINT(_URL(_S3)?)?$")
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>|\"(?:code|error)\": ?\"(\w{1,60})\"")
_OF_CREDENTIALS = re.compile(
    r"token request|169\.254\.|WebIdentity|(?<!authentication )credential|service account|Access Key|pem file"
    r"|Account must|Unable to (open|decode)",
    re.IGNORECASE,
)
"""What obstore says where it finds none, or asks a machine's own service for them and gets none."""
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired", "invalid_grant"}
_REFUSED = {
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AuthenticationFailed", "AuthorizationFailure",
    "InvalidAuthenticationInfo", "AuthFailure",
}  # fmt: skip
_AGAIN = {
    "SlowDown", "RequestTimeout", "ServerBusy", "OperationTimedOut", "InternalError", "ThrottlingException",
    "InvalidPart", "InvalidPartOrder", "NoSuchUpload",
}  # fmt: skip
"""Codes of services for what may pass, whatever the status that they come with."""

_CLOUDS = {"s3": "S3", "gs": "Google Cloud Storage", "az": "Azure"}
_LOG_IN = {
    "s3": "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or choose a profile with AWS_PROFILE",
    "gs": "log in with `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_SAS_TOKEN",
}

T = TypeVar("T")


def connect(place: Bucket) -> Any:
    """Return obstore's store for a place. Makes no request.

    Raises UsageError if the package is missing or settings are not usable.
    """
    version = tuple(sys.version_info[:2])
    if version < (3, 11):
        raise UsageError(
            f"`{place.scheme}://` places need Python 3.11 or later; this is {version[0]}.{version[1]}",
            fix="use a newer Python, or fetch the model into a folder",
        )
    try:
        from obstore import store
    except ImportError as error:
        raise UsageError(
            f"`{place.scheme}://` places need the package obstore", fix="install it: `pip install 'skillmerge[stores]'`"
        ) from error
    _check_settings()
    kind = {"s3": store.S3Store, "gs": store.GCSStore, "az": store.AzureStore}[place.scheme]
    options: dict[str, Any] = {
        "prefix": place.prefix or None,
        "client_options": {
            "allow_http": True,  # as the clouds' tools: the address of an endpoint says what it is
            "connect_timeout": timedelta(seconds=10),
            "timeout": timedelta(seconds=120),
        },
        "retry_config": {"max_retries": QUICK_TRIES, "retry_timeout": timedelta(seconds=60)},
    }
    if place.scheme == "s3" and (provider := _profile()) is not None:
        options["credential_provider"] = provider
    with object_errors(str(place)):
        return kind(place.bucket, **options)


def _check_settings() -> None:
    """Raise UsageError for settings that obstore's libraries do not survive. None is shown."""
    for name, value in os.environ.items():
        if not _SETTINGS.match(name):
            continue
        if not (value.isascii() and value.isprintable()):
            raise UsageError(f"{name} has invalid characters", fix="check it for stray spaces and line ends")
        if _ENDPOINT.search(name) and value and not _is_address(value):
            raise UsageError(f"{name} is not an address", fix="write it as `https://host` or `http://host:port`")


def _is_address(value: str) -> bool:
    try:
        parts = urlsplit(value)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and " " not in value
    except ValueError:
        return False


def _profile() -> Any:
    """Return boto3's credentials where a profile has them: obstore reads none of AWS's files. Else None."""
    if os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_SKIP_SIGNATURE"):
        return None  # which go before a profile with the clouds' own tools too
    folder = Path(os.path.expanduser("~/.aws"))
    files = [
        Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or folder / "credentials"),
        Path(os.environ.get("AWS_CONFIG_FILE") or folder / "config"),
    ]
    profile = os.environ.get("AWS_PROFILE")
    if not profile and not any(file.is_file() for file in files):
        return None
    try:
        import boto3
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        if not profile and not files[0].is_file():
            return None  # a region, perhaps; a machine's own credentials are found without it
        named = f"the AWS profile `{profile}`" if profile else str(files[0])
        raise UsageError(
            f"{named} is read with the package boto3, which is not installed",
            fix='`pip install boto3`, or `eval "$(aws configure export-credentials --format env)"`',
        ) from error
    try:
        session = boto3.Session()
        return Boto3CredentialProvider(session) if session.get_credentials() is not None else None
    except Exception as error:  # botocore's, whose texts are of files with secrets
        raise UsageError(
            f"the AWS profile `{profile or 'default'}` could not be used ({type(error).__name__})",
            fix="check it: `aws sts get-caller-identity`",
        ) from None


def tried(
    place: Bucket,
    attempt: Callable[[], T],
    *,
    progress: Callable[[], int] = lambda: 0,
    stop: threading.Event | None = None,
) -> T:
    """Run `attempt`, again where it fails with what may pass.

    Raises FileNotFoundError for an object that is not there, FileExistsError for one that was to be new; InputError,
    StalePlan, TemporaryError.
    """
    return retry(str(place), cloud(place), attempt, object_errors, progress=progress, stop=stop)


def cloud(place: Bucket) -> str:
    return _CLOUDS[place.scheme]


@contextmanager
def object_errors(what: str) -> Iterator[None]:
    """Turn obstore's errors into ours, or into Passing. Their texts are read, and never shown."""
    try:
        yield
    except (SkillmergeError, Passing, FileNotFoundError, FileExistsError):
        raise
    except Exception as error:
        if type(error).__module__.startswith(("obstore", "botocore", "boto3")):
            raise _meant(what, error) from None
        raise
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise InputError(
                f"{what}: the client could not make the request", fix="check the settings in the environment"
            ) from None
        raise


def _meant(what: str, error: Exception) -> Exception:
    """Return our error for one of obstore's."""
    name, text = type(error).__name__, str(error)
    status, code = _status_of(text), _code_of(text)
    scheme = what.partition("://")[0]
    said = f" ({code or status})" if code or status else ""
    if name == "AlreadyExistsError":
        return FileExistsError(what)
    if name == "PreconditionError" or status == 412:
        return StalePlan(f"{what} changed while it was in use", fix="run the same command again")
    if code == "NoSuchBucket" or code == "ContainerNotFound" or (status == 404 and "list request" in text):
        place = "/".join(what.split("/")[:3])
        return InputError(
            f"{what}: there is no bucket `{place}`{said}", fix="check its name, and the endpoint or account"
        )
    if code in _EXPIRED:
        return InputError(f"{what}: the credentials have expired{said}", fix=f"renew them: {_LOG_IN[scheme]}")
    if code in _AGAIN or status in _PASSING:
        return Passing(f"{_CLOUDS[scheme]} answers {code or status}")
    if _OF_CREDENTIALS.search(text.partition("Debug source")[0]):
        return InputError(f"{what}: no usable credentials or settings were found{said}", fix=_LOG_IN[scheme])
    if status == 401 or name == "UnauthenticatedError" or code in _REFUSED:
        return InputError(f"{what}: the credentials are refused{said}", fix=_LOG_IN[scheme])
    if status == 403 or name == "PermissionDeniedError":
        return InputError(
            f"{what}: access is denied{said}", fix="check whose credentials these are, and what they may read and write"
        )
    if "incorrectly configured region" in text or status in (301, 307):
        return InputError(f"{what}: the bucket is in another region", fix="set AWS_REGION to the bucket's region")
    if status is None and ("HTTP error" in text or "error sending request" in text or "timed out" in text):
        return Passing(f"the network failed between here and {_CLOUDS[scheme]}")
    return InputError(f"{what}: {_CLOUDS[scheme]} refuses the request{said}", fix="check the endpoint and the settings")


def _status_of(text: str) -> int | None:
    found = _STATUS.search(text)
    return int(found[1]) if found else None


def _code_of(text: str) -> str:
    found = _CODE.search(text)
    return (found[1] or found[2]) if found else ""
