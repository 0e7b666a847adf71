"""Trying again what may pass: one way for every remote store, whose own errors it is given a reading of."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

from skillmerge.errors import TemporaryError

LOG = logging.getLogger("skillmerge.hub")
"""What to show of waiting for a network: on any thread, far from the reporter of the run."""

TRIES = 6
FIRST_WAIT = 1.0
LONGEST_WAIT = 300.0
"""Seconds. A server that asks for a longer wait than this gets it next time: exit status 75."""

T = TypeVar("T")


class Passing(Exception):
    """Something that may pass: `wait` is how long the server asked to wait, in seconds."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.what, self.wait = what, wait


def retry(
    what: str,
    whom: str,
    attempt: Callable[[], T],
    errors: Callable[[str], AbstractContextManager[None]],
    *,
    progress: Callable[[], int] = lambda: 0,
    tries: int | None = None,
    stop: threading.Event | None = None,
) -> T:
    """Run `attempt`, again where it fails with what may pass. what: the place, and `whom` it waits for, for messages.
    errors: a context that turns errors of the network into ours, or into Passing.

    Only tries without any `progress` count: a link that breaks often still gets there. Once `stop` is set,
    nothing is waited for.
    Raises InputError for what will not pass, TemporaryError if `tries` (or TRIES) were not enough.
    """
    failed, reached = 0, progress()
    while True:
        if stop is not None and stop.is_set():
            raise stopped(what, whom)
        try:
            with errors(what):
                return attempt()
        except Passing as passing:
            if progress() > reached:
                failed, reached = 0, progress()
            failed += 1
            # A little more than asked, and not the same for all: else everybody is back at the same instant.
            wait = max(passing.wait or 0.0, FIRST_WAIT * 2 ** (failed - 1)) * random.uniform(1.0, 1.2)
            if failed >= (tries or TRIES) or wait > 1.2 * LONGEST_WAIT:
                raise TemporaryError(
                    f"{what}: {passing.what}", fix="rerun later; the same command continues where it stopped"
                ) from passing
            LOG.info("%s: trying again (%d of %d), waiting %.0f s", passing.what, failed + 1, tries or TRIES, wait)
            if (stop or threading.Event()).wait(wait):
                raise stopped(what, whom) from passing


def stopped(what: str, whom: str) -> TemporaryError:
    """Return the error of a read that is no longer wanted."""
    return TemporaryError(f"{what}: stopped while it waited for {whom}")
