"""Whatever a file puts into a message, it stays one printable line."""

import pytest

from pathsegdiff.errors import BundleError, PathSegDiffError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a plain line: é, μm, 組織", "a plain line: é, μm, 組織"),
        ("two\nlines", "two\\nlines"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("to the \u202eleft", "to the \\u202eleft"),
        ("half a pair: \ud800", "half a pair: \\ud800"),
    ],
)
def test_line_breaks_and_control_characters_are_escaped(text, shown):
    assert str(BundleError(text)) == shown
    assert shown.isprintable()


def test_a_message_has_an_end():
    assert len(str(PathSegDiffError("x" * 100_000))) == 2003
    again = BundleError(str(BundleError("a\nb")))
    assert str(again) == "a\\nb"  # escaped once
