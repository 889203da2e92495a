"""Others' errors in our lines: what a converter or a runtime says, and what of it is no fault of theirs."""
from __future__ import annotations

import pytest

from utils.errors import error_lines, first_line, short_reason


@pytest.mark.parametrize(("error", "lines", "first", "reason"), [
    (ValueError("a  b\n\tc\n"), ["a  b", "\tc"], "ValueError: a  b", "a b c"), (ValueError(), ["ValueError"], "ValueError", "ValueError"),
    (ValueError(" \n "), ["ValueError"], "ValueError", "ValueError"),
])  # fmt: skip
def test_what_an_error_says(error, lines, first, reason):
    assert (error_lines(error), first_line(error), short_reason(error)) == (lines, first, reason)


def test_a_long_reason_is_cut():
    """A word that is longer than the line leaves its start to be read."""
    assert short_reason(ValueError("abc " * 99), 12) == "abc abc ab …"
    assert short_reason(ValueError("x" * 99), 5) == "xxx …" and short_reason(ValueError("x" * 5), 5) == "xxxxx"
