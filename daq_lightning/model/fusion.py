"""What servers join into one matrix or one tensor, and therefore must be quantized together or not at all."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorSpec
from daq_lightning.model.outline import Role, owner_of

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("query", "key", "value"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Projections that servers join into one matrix."""


def fused_groups(names: Iterable[str]) -> list[list[str]]:
    """The weights that are one to a server: q, k and v; gate and up; all experts of a layer; else one alone.

    Example:
        >>> fused_groups(["mlp.gate_proj.weight", "mlp.down_proj.weight", "mlp.up_proj.weight"])
        [['mlp.gate_proj.weight', 'mlp.up_proj.weight'], ['mlp.down_proj.weight']]
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        layer, expert, _ = name.rpartition(".experts.")
        groups.setdefault(layer + expert if expert else shared_input(name), []).append(name)
    return list(groups.values())


def check_fused(chosen: Collection[str], roles: Mapping[str, Role]) -> None:
    """Raises CheckpointError where servers fuse weights of which only some are chosen."""
    for name in chosen:
        prefix, _, leaf = name.removesuffix(".weight").rpartition(".")
        for group in FUSED:
            if leaf not in group:
                continue
            siblings = [f"{prefix}.{sibling}.weight" for sibling in group]
            left_out = [sibling for sibling in siblings if sibling in roles and sibling not in chosen]
            if left_out:
                raise CheckpointError(
                    f"{name} would be quantized and {', '.join(left_out)} not, but servers fuse them into "
                    "one matrix: ignore all of them or none."
                )


def check_experts(
    chosen: Sequence[TensorSpec],
    specs: Sequence[TensorSpec],
    keys: Mapping[str, str],
    roles: Mapping[str, Role],
) -> None:
    """Raises CheckpointError where only some experts of a layer are chosen, or where they differ in shape."""
    names = {spec.name for spec in chosen}
    layers = {owner_of(keys[spec.name]) for spec in chosen if roles[spec.name] == "expert"}
    for spec in specs:
        if roles[spec.name] == "expert" and spec.name not in names and owner_of(keys[spec.name]) in layers:
            raise CheckpointError(
                f"{spec.name} would be kept and other experts of {owner_of(keys[spec.name])} quantized, but "
                "servers hold the experts of a layer in one tensor: ignore all of them or none."
            )
    first: dict[tuple[str, str], TensorSpec] = {}
    for spec in chosen:
        layer, found, expert = spec.name.rpartition(".experts.")
        if not found:
            continue
        one = first.setdefault((layer, expert.partition(".")[2]), spec)
        if one.shape != spec.shape:
            raise CheckpointError(
                f"{spec.name} has the shape {spec.shape} and {one.name} {one.shape}, but servers hold the "
                "experts of a layer in one tensor: ignore all of them."
            )


def shared_input(name: str) -> str:
    """What all weights have in common that take one input: servers fuse them for it.

    Example:
        >>> shared_input("layers.0.v_proj.weight"), shared_input("layers.0.o_proj.weight")
        ('layers.0.q_proj', 'layers.0.o_proj')
    """
    prefix, dot, leaf = name.removesuffix(".weight").rpartition(".")
    return prefix + dot + next((group[0] for group in FUSED if leaf in group), leaf)
