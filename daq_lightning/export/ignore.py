"""Which weights a user leaves out, and which cannot be left out one by one."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorSpec
from daq_lightning.model.architecture import Role

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("query", "key", "value"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Projections that servers join into one matrix."""


def ignored_by(patterns: Sequence[str], specs: Sequence[TensorSpec], keys: Mapping[str, str]) -> set[str]:
    """The tensors that patterns name.

    Args:
        patterns: Names of modules or tensors, on disk or in memory; or regular expressions of a full one after `re:`.
        specs: All tensors.
        keys: Checkpoint name -> memory name.

    Raises:
        CheckpointError: A pattern that matches nothing, or is no regular expression.
    """
    ignored: set[str] = set()
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                expression = re.compile(pattern[3:])
            except re.error as error:
                raise CheckpointError(f"Ignore pattern {pattern!r} is not a regular expression: {error}.") from error
            matched = {spec.name for spec in specs if any(map(expression.fullmatch, _aliases(spec.name, keys)))}
        else:
            matched = {spec.name for spec in specs if pattern in _aliases(spec.name, keys)}
        if not matched:
            raise CheckpointError(
                f"The ignore pattern {pattern!r} matches no module or tensor. Give a full name such as "
                f"{specs[0].name.removesuffix('.weight')!r}, or a regular expression of one after 're:'."
            )
        ignored |= matched
    return ignored


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
                    f"{name} would be quantized and {', '.join(left_out)} not, but servers fuse them into one matrix: "
                    "ignore all of them or none."
                )


def check_experts(
    chosen: Sequence[TensorSpec], specs: Sequence[TensorSpec], keys: Mapping[str, str], roles: Mapping[str, Role]
) -> None:
    """Raises CheckpointError where only some experts of a layer are chosen."""
    names = {spec.name for spec in chosen}
    layers = {owner_of(keys[spec.name]) for spec in chosen if roles[spec.name] == "expert"}
    for spec in specs:
        if roles[spec.name] == "expert" and spec.name not in names and owner_of(keys[spec.name]) in layers:
            raise CheckpointError(
                f"{spec.name} would be kept and other experts of {owner_of(keys[spec.name])} quantized, but servers "
                "hold the experts of a layer in one tensor: ignore all of them or none."
            )


def owner_of(key: str) -> str:
    """The module that holds a tensor."""
    return key.rpartition(".")[0]


def _aliases(name: str, keys: Mapping[str, str]) -> list[str]:
    return [name, name.removesuffix(".weight"), keys[name], keys[name].removesuffix(".weight")]
