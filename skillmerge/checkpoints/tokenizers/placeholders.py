"""Tokens that vocabularies keep free for later use, by what they are called."""

from __future__ import annotations

import re

_LONGEST = 100
"""Longer tokens are none, so that a hostile one costs no time."""

_PLACEHOLDER = re.compile(
    r"(?:<\|?|<｜|\[|>>|\|\|\|)"
    r"[\w▁ -]*(?:reserved|unused|extra|special|dummy|place[▁_ ]?holder|padding|control|blank|empty|spare)[\w▁ -]*?"
    r"[_▁ -]?\d+"
    r"(?:\|?>|｜>|\]|<<|\|\|\|)"
    r"|\[PAD\d+\]|<pad_?\d+>|madeupword\d+",
    re.IGNORECASE,
)


def is_placeholder(token: str) -> bool:
    """Return whether a token is kept free: `<|reserved_special_token_3|>`, `<unused7>`, `<extra_id_0>`, `[unused1]`,
    …"""
    return len(token) <= _LONGEST and _PLACEHOLDER.fullmatch(token) is not None
