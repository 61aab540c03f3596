"""Which weights a user leaves out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorSpec


def ignored_by(patterns: Sequence[str], specs: Sequence[TensorSpec], keys: Mapping[str, str]) -> set[str]:
    """The tensors that patterns name.

    Args:
        patterns: Names of modules or tensors, on disk or in memory; or regular expressions of a full one
            after `re:`.
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
                raise CheckpointError(
                    f"Ignore pattern {pattern!r} is not a regular expression: {error}."
                ) from error
            matched = {
                spec.name for spec in specs if any(map(expression.fullmatch, _aliases(spec.name, keys)))
            }
        else:
            matched = {spec.name for spec in specs if pattern in _aliases(spec.name, keys)}
        if not matched:
            raise CheckpointError(
                f"The ignore pattern {pattern!r} matches no module or tensor. Give a full name such as "
                f"{specs[0].name.removesuffix('.weight')!r}, or a regular expression of one after 're:'."
            )
        ignored |= matched
    return ignored


def _aliases(name: str, keys: Mapping[str, str]) -> list[str]:
    return [name, name.removesuffix(".weight"), keys[name], keys[name].removesuffix(".weight")]
