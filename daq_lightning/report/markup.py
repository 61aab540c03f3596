"""Text and numbers in HTML. Names come from foreign checkpoints: all text goes through `text`.

Characters that cannot be seen, or that turn text around, are shown as escapes.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable


def visible(value: object) -> str:
    """A value as one line of printable characters.

    Example:
        >>> visible("a\\u202eb")
        'a\\\\u202eb'
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in str(value)
    )


def text(value: object) -> str:
    """A value as text of an element or of a quoted attribute.

    Example:
        >>> text("<script>")
        '&lt;script&gt;'
    """
    return html.escape(visible(value), quote=True)


def sentence(value: str) -> str:
    """A sentence with names and options of the command in it: lines break after dots and blanks."""
    with_names = re.sub(r"\.(?=[A-Za-z_])", ".<wbr>", text(value))
    return re.sub(r"(?<![^ ])--[a-z-]+", r'<span class="option">\g<0></span>', with_names)


def name(value: str) -> str:
    """The name of a weight, which may be broken after a dot."""
    return f"<code>{text(value).replace('.', '.<wbr>')}</code>"


def number(value: float | None, how: str = ".4f") -> str:
    """A figure, or a dash where it says nothing."""
    return "-" if value is None else format(value, how)


def scrolling(content: str, called: str) -> str:
    """Finished content in a box that scrolls, by keyboard too, where the screen is narrow."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{text(called)}">{content}</div>'


def items(lines: Iterable[str]) -> str:
    """A list of finished lines; nothing for none."""
    listed = "".join(f"<li>{line}</li>" for line in lines)
    return f"<ul>{listed}</ul>" if listed else ""
