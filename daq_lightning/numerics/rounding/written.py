"""The sums of codes that no nearest rounding gives: what is measured is what is written.

Kernels of the backends round to nearest while they sum; codes that were chosen otherwise are read back here.

Legend: M out, N in.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from daq_lightning.numerics.formats import Granularity
from daq_lightning.numerics.objectives import DeltaStats, sums
from daq_lightning.numerics.quantize import dequantize
from daq_lightning.numerics.tiling import bands

if TYPE_CHECKING:
    from daq_lightning.numerics.search.stages import SearchResult

_BAND = 1 << 20  # elements that are held in float64 at a time


@torch.no_grad()
def stats_of_codes(
    weight_MN: Tensor,
    base_MN: Tensor,
    codes_MN: Tensor,
    scale: Tensor,
    granularity: Granularity,
    reader_dtype: torch.dtype = torch.float32,
    zero: Tensor | None = None,
) -> DeltaStats:
    """Sums over a weight, of shape (), as a reader sees its codes.

    Args:
        weight_MN: The fine-tuned weight.
        base_MN: The weight before fine-tuning, of the same shape and device.
        codes_MN: Its codes.
        scale: float32, shape ``granularity.grid((M, N))``.
        granularity: Which elements share a scale.
        reader_dtype: What the reader rounds products of code and scale to.
        zero: int8, of the shape of the scale, of codes with zero points.
    """
    shape_MN = (weight_MN.shape[0], weight_MN.shape[1])
    cell_rows, _ = granularity.cell(shape_MN)
    total = DeltaStats.zero(weight_MN.device)
    for rows in bands(shape_MN, granularity, _BAND):
        groups = slice(rows.start // cell_rows, -(-rows.stop // cell_rows))
        zero_of_rows = None if zero is None else zero[groups]
        seen = dequantize(codes_MN[rows], scale[groups], granularity, reader_dtype, zero_of_rows).float()
        # row by row first: a sum whose order does not depend on the number of threads
        total = total.add(sums(weight_MN[rows].float(), base_MN[rows].float(), seen).total())
    return total


def measured(
    result: SearchResult,
    weight_MN: Tensor,
    base_MN: Tensor,
    granularity: Granularity,
    reader_dtype: torch.dtype,
) -> SearchResult:
    """A result with the sums of its codes and scales, of the whole weight as one group.

    Args:
        result: Codes, scales and zero points.
        weight_MN: The fine-tuned weight.
        base_MN: The weight before fine-tuning.
        granularity: Which elements share a scale.
        reader_dtype: What a reader dequantizes to.
    """

    def seen_in(dtype: torch.dtype) -> DeltaStats:
        stats = stats_of_codes(
            weight_MN, base_MN, result.codes, result.scale, granularity, dtype, result.zero
        )
        return stats.map(lambda field: field[None])

    return dataclasses.replace(result, stats=seen_in(torch.float32), dequantized_stats=seen_in(reader_dtype))
