"""What a full or broken disk means."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from skillmerge.durable import disk_errors
from skillmerge.errors import ResourceError, SkillmergeError, UsageError

# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, ResourceError),
        (errno.EDQUOT, ResourceError),
        (errno.EIO, ResourceError),
        (errno.EACCES, UsageError),
        (errno.EPERM, UsageError),
        (errno.EROFS, UsageError),
        (errno.ENOTDIR, UsageError),
        (errno.ENAMETOOLONG, UsageError),
    ],
    ids=lambda value: errno.errorcode.get(value, "") if isinstance(value, int) else "",
)
def test_disk_error_says_where_and_what_to_do(number: int, kind: type[SkillmergeError]) -> None:
    with pytest.raises(kind, match="some/file") as caught, disk_errors(Path("some/file")):
        raise OSError(number, os.strerror(number))
    assert caught.value.fix
