"""The sums of every candidate scale: one signature, several implementations.

`eager` is the reference, written to be read.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Tensor

from daq_lightning.numerics.formats import Granularity
from daq_lightning.numerics.kernels.eager import delta_stats_eager
from daq_lightning.numerics.objectives import DeltaStats

Implementation: TypeAlias = Literal["auto", "eager"]


def delta_stats(
    weight_MN: Tensor,
    base_MN: Tensor,
    scale_GK: Tensor,
    granularity: Granularity,
    implementation: Implementation = "auto",
) -> DeltaStats:
    """Sums of every group under each of its candidate scales.

    Args:
        weight_MN: float32, bfloat16 or float16, shape (M, N), finite.
        base_MN: Same shape and device, any of these dtypes, finite.
        scale_GK: float32 candidates of each group, finite and at least the smallest normal float32. Groups are
            numbered row by row of the granularity's grid.
        granularity: Which elements share a scale.
        implementation: "auto" takes the fastest that runs on the weight's device.

    Returns:
        `DeltaStats` of shape (G, K): counts int64, sums float64.
    """
    return delta_stats_eager(weight_MN, base_MN, scale_GK, granularity)
