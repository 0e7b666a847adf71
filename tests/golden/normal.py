"""What a recording leaves out: every piece of text that depends on time, host or library versions, in one table.

The work folder's path always has the same length (see `playing`), so that tables and wrapped lines come out alike
before the path is replaced.
"""

from __future__ import annotations

import re
from pathlib import Path

RULES: tuple[tuple[str, str], ...] = (
    # Time: how long a run or a candidate took, and when events and run logs were written.
    (r"\bin \d+\.\d s\b", "in <seconds> s"),
    (r'"seconds": [0-9.e+-]+', '"seconds": "<seconds>"'),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)", "<time>"),
    (r"(<dt>date<dd>)[^<]*", r"\1<time>"),
    # Host: free disk space, in JSON and in the plan's text.
    (r'"disk_free": \d+', '"disk_free": "<bytes>"'),
    (r"[0-9.]+ [kMGT]?B free", "<free>"),
    (r"\| disk free \| [^|]*\|", "| disk free | <free> |"),
    # Versions: the environment of a manifest, and what it covers by digests.
    (r'"python": "[^"]*"', '"python": "<version>"'),
    (r'"platform": "[^"]*"', '"platform": "<platform>"'),
    (r'"torch": "[^"]*"', '"torch": "<version>"'),
    (r'"safetensors": "[^"]*"', '"safetensors": "<version>"'),
    (r'("skillmerge|"semanticVersion)(": )"\d+\.\d+\.\d+[^"]*"', r'\1\2"<version>"'),
    (r"(<dt>skillmerge<dd>)[^<]*", r"\1<version>"),
    (r"(<dt>manifest sha256<dd><code>)[0-9a-f]{64}", r"\1<digest of the manifest>"),
    (r">skillmerge \d+\.\d+\.\d+[^<]*<", ">skillmerge <version><"),
    (r'("name": "skillmerge", "version": )"[^"]*"', r'\1"<version>"'),
    (r'("name": "skillmerge.run.json", "sha256": )"[0-9a-f]{64}"', r'\1"<digest of the run log>"'),
    (r'("manifestDigest": )"[0-9a-f]{64}"', r'\1"<digest of the manifest>"'),
    (r'("sha256": )"[0-9a-f]{64}"(\s*\},\s*"name": "skillmerge\.(manifest|run)\.json")', r'\1"<digest of \3>"\2'),
    (r'(?m)^(  "digest": )"[0-9a-f]{64}"$', r'\1"<digest of the manifest>"'),
)
"""(pattern, replacement), applied in this order to all text: output of commands and text files that they write."""

_RULES = [(re.compile(pattern), replacement) for pattern, replacement in RULES]
_SHARD = re.compile(r'(?m)(^\{.*("shard": |"event": "shard_finished").*\n)+')
_COUNT = re.compile(r'"finished": \d+')
_FLOAT = re.compile(r"-?\d+\.\d{6,}(?:e[+-]?\d+)?|-?\d+(?:\.\d+)?e[+-]?\d+")


def normalised(text: str, work: Path, digits: int | None = None) -> str:
    """The text without what differs from run to run and from host to host.

    digits: round long numbers to so many significant digits, where they come out of a matrix library.
    """
    text = text.replace(str(work), "<work>")
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    # Two writers finish shards in any order, also with one thread: lines about shards are sorted.
    text = _SHARD.sub(lambda match: "".join(sorted(_COUNT.sub("<count>", match.group()).splitlines(True))), text)
    if digits is not None:
        text = _FLOAT.sub(lambda match: f"{float(match.group()):.{digits}g}", text)
    return text
