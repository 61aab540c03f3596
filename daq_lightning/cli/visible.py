"""Output whose names cannot steer a terminal.

Names of tensors, files and fields come from foreign files, and may hold the characters by which a program
moves the cursor, sets colours and titles, or turns text around. They are shown as escapes, which in JSON mean
the character itself.
"""

from __future__ import annotations

from typing import Any, TextIO

_LINES = "\t\n\r"
_TURNING = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))  # of bidirectional text
_ESCAPES = {
    code: f"\\u{code:04x}"
    for code in (*range(0x20), *range(0x7F, 0xA0), *_TURNING)
    if chr(code) not in _LINES
}


def visible(text: str) -> str:
    """The text with escapes in place of control characters other than those of lines.

    Example:
        >>> visible("a\\x1b[2Jb")
        'a\\\\u001b[2Jb'
    """
    return text.translate(_ESCAPES)


class Visible:
    """A stream that shows control characters as escapes.

    Args:
        stream: Where the text goes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes a text."""
        self._stream.write(visible(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
