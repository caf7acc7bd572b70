"""JSON files that carry their own checksum (standard library only).

    {"crc32": 2774823,
    "samples": ...}

The number is the CRC-32 of every byte after the first line break. To any JSON reader it is one more
key; a byte that changes anywhere is noticed by ``unsealed``.
"""

import json
import re
import zlib
from typing import Any

_FIRST_LINE = re.compile(rb'\{"crc32": (0|[1-9][0-9]{0,9}),')


def sealed(values: dict[str, Any], *, indent: int | None = None) -> bytes:
    """A JSON object, not empty, with its checksum."""
    rest = json.dumps(values, indent=indent).lstrip("{").lstrip("\n").encode() + b"\n"
    return b'{"crc32": %d,\n' % zlib.crc32(rest) + rest


def unsealed(content: bytes) -> dict[str, Any]:
    """The object that ``sealed`` made bytes of.

    Raises:
        ValueError: If a byte of it has changed, or it is something else.
    """
    first, line_break, rest = content.partition(b"\n")
    match = _FIRST_LINE.fullmatch(first)
    if match is None or not line_break:
        raise ValueError("it has no checksum")
    if int(match[1]) != zlib.crc32(rest):
        raise ValueError("its checksum is wrong")
    values = json.loads(b"{" + rest)
    if not isinstance(values, dict):
        raise ValueError("it is no object")
    return values
