"""Tokens of two models side by side."""

from __future__ import annotations

from skillmerge.checkpoints.tokenizers.matching import Tokens, matched, placed, shown


def tokens(*texts: str | None) -> Tokens:
    return Tokens.of({number: text for number, text in enumerate(texts) if text is not None})


def test_every_token_is_of_one_kind() -> None:
    found = matched(tokens("a", "b", "c", None, "d"), 6, tokens("b", "x", "c", "d", "y", None), 6)
    assert (found.same, found.moved_count, found.here_count, found.there_count, found.padding) == (1, 2, 1, 2, 1)
    assert found.moved == (("b", 1, 0), ("d", 4, 3))
    assert (found.here, found.there) == (("a",), ("x", "y"))


def test_tokens_with_several_ids_are_of_no_kind() -> None:
    found = matched(tokens("a", "b", "a"), 3, tokens("b", "a", "c", "c"), 4)
    assert (found.same, found.moved_count, found.here_count, found.there_count) == (0, 1, 0, 1)
    assert found.twice == {"c": (2, 3)}
    assert placed(tokens("a", "b", "a"), tokens("b", "a")) == {1: 0}


def test_ids_beyond_the_rows_are_those_of_no_token() -> None:
    found = matched(tokens("a", "b"), 1, tokens("b", "a"), 1)
    assert (found.same, found.moved_count, found.here_count, found.there_count) == (0, 0, 1, 1)
    assert found.beyond == {"a": 1}


def test_two_spellings_of_one_token_are_one() -> None:
    assert placed(tokens("<0x09>", "a"), tokens("a", "\t")) == {0: 1, 1: 0}
    assert placed(tokens("\t", "a"), tokens("a", "<0x09>")) == {0: 1, 1: 0}
    assert placed(tokens("\t", "<0x09>"), tokens("<0x09>", "\t")) == {0: 1, 1: 0}
    assert placed(tokens("\t", "<0x09>"), tokens("<0x09>", "a")) == {1: 0}
    assert placed(tokens("\t", "<0x09>", "a"), tokens("\t", "b")) == {0: 0}


def test_tokens_are_shown_on_one_short_line() -> None:
    assert shown("a\nb\tc") == r"a\nb\tc"
    assert shown("x" * 24) == "x" * 24
    assert shown("x" * 25) == "x" * 23 + "…"
    assert shown("\x1b" * 24) == r"\x1b" * 5 + r"\x1" + "…"
