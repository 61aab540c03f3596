"""What servers join into one matrix or one tensor, and therefore must be quantized together or not at all."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorSpec
from daq_lightning.model.outline import Role, owner_of

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("query", "key", "value"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("wq_a", "wkv"),
)
"""Projections that servers join into one matrix."""
_WIDER = (
    (r".*linear_attn", ("q_proj", "k_proj", "v_proj", "g_proj")),
    (r".*self_attn", ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj")),
)
"""Name of a layer -> what servers join in it besides: linear attention of OLMo and of Kimi."""


def joined(module: str) -> tuple[str, ...]:
    """The last parts of the names of all projections that servers join with one, itself included.

    Example:
        >>> joined("mlp.up_proj"), joined("mlp.down_proj"), joined("linear_attn.g_proj")[:2]
        (('gate_proj', 'up_proj'), ('down_proj',), ('q_proj', 'k_proj'))
    """
    prefix, _, leaf = module.rpartition(".")
    wider = [group for layer, group in _WIDER if leaf in group and re.fullmatch(layer, prefix)]
    return next((group for group in (*wider, *FUSED) if leaf in group), (leaf,))


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
        module = name.removesuffix(".weight")
        siblings = [f"{module.rpartition('.')[0]}.{sibling}.weight" for sibling in joined(module)]
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
    module = name.removesuffix(".weight")
    prefix, dot, _ = module.rpartition(".")
    return prefix + dot + joined(module)[0]


def experts_of(name: str) -> str:
    """A pattern for the experts of the layer of one of them, or of all layers for "".

    Example:
        >>> experts_of("model.layers.3.mlp.experts.0.up_proj")
        're:.*\\\\blayers\\\\.3\\\\.mlp\\\\.experts\\\\..*'
    """
    layer = name.partition(".experts.")[0]
    _, found, number = layer.rpartition("layers.")
    layer = found + number
    return "re:.*" + (f"\\b{re.escape(layer)}" if layer else "") + r"\.experts\..*"
