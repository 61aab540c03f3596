"""Layers in parts that are observed one after the other, each with sums that fit a memory budget."""

from __future__ import annotations

from collections.abc import Sequence

from daq_lightning.model.observer import Layer


def in_parts(layers: Sequence[Layer], memory: int) -> tuple[list[list[Layer]], list[str]]:
    """The layers in parts whose sums fit, those of a group together; and the names of those that never do."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.group, []).append(layer)
    parts: list[list[Layer]] = []
    too_large: list[str] = []
    free = 0
    for group in groups.values():
        size = bytes_in(group)
        if size > memory:
            too_large += [layer.name for layer in group]
            continue
        if size > free or not parts:
            parts.append([])
            free = memory
        parts[-1] += group
        free -= size
    return parts, too_large


def bytes_in(layers: Sequence[Layer]) -> int:
    """Of the sums of some layers; those of a group share the one of their inputs."""
    inputs = {layer.group: layer.shape[1] for layer in layers}
    return 4 * sum(size**2 for size in (*inputs.values(), *(layer.shape[0] for layer in layers)))
