"""The name of a weight, taken apart: its stack, its layer, its projection."""

from __future__ import annotations

import re


def split_name(name: str) -> tuple[str, str, str]:
    """A name as (stack, layer, projection), with `*` for the numbers of the projection.

    Example:
        >>> split_name("model.layers.3.mlp.experts.17.down_proj.weight")
        ('model.layers', 'model.layers.3', 'mlp.experts.*.down_proj')
        >>> split_name("lm_head.weight")
        ('', '', 'lm_head')
    """
    parts = name.removesuffix(".weight").split(".")
    first = next((index for index, part in enumerate(parts) if is_number(part)), None)
    if first is None or first == len(parts) - 1:
        return "", "", ".".join(parts)
    projection = ["*" if is_number(part) else part for part in parts[first + 1 :]]
    return ".".join(parts[:first]), ".".join(parts[: first + 1]), ".".join(projection)


def is_number(part: str) -> bool:
    """Whether a part of a name is a number of a few digits."""
    return re.fullmatch(r"[0-9]{1,9}", part) is not None
