"""What a `quantization_config` says of scales, for folders of any maker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.numerics.formats import PerBlock


@dataclass(frozen=True, kw_only=True)
class Hints:
    """What config.json says of scales.

    Attributes:
        block: The size of the blocks that share a scale; None if no block layout is described.
        groups: Sizes of the groups of a row that share one; empty if there are none.
        bits: Of the codes that are described.
        zero_points: Whether all integers of four bits have them.
    """

    block: PerBlock | None
    groups: frozenset[int]
    bits: frozenset[int]
    zero_points: bool

    @classmethod
    def of(cls, quantization: Mapping[str, Any], path: Path) -> Hints:
        """From a `quantization_config`.

        Raises:
            CheckpointError: It cannot be followed.
        """
        try:
            sizes = [quantization["weight_block_size"]] if quantization.get("weight_block_size") else []
            groups = (quantization.get("config_groups") or {}).values()
            every = [group.get("weights") or {} for group in groups]
            for weights in every:
                if weights.get("strategy") == "block":
                    sizes.append(weights["block_structure"])
                kind = (weights.get("num_bits"), weights.get("type", "int"))
                if weights.get("symmetric") is False and kind != (4, "int"):
                    raise ValueError("weights with a zero point, other than integers of 4 bits")
            if len({tuple(size) for size in sizes}) > 1:
                raise ValueError("blocks of several sizes")
            return cls(
                block=PerBlock(*map(int, sizes[0])) if sizes else None,
                groups=frozenset(
                    int(weights["group_size"])
                    for weights in every
                    if weights.get("strategy") in ("group", "tensor_group")
                ),
                bits=frozenset(int(weights["num_bits"]) for weights in every if weights.get("num_bits")),
                zero_points=bool(every) and all(weights.get("symmetric") is False for weights in every),
            )
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{path}: the quantization_config {quantization} cannot be followed: {error}."
            ) from error
