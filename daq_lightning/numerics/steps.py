"""What becomes of changes by their size in steps of the format: those below half a step are the first to go.

    step  = 2^(floor(log2 |code|) - mantissa bits) * scale      distance between the codes around a weight
    bin   = number of edges 2^-8, 2^-7, ..., 2^3 that |delta| / step reaches

|code| is |weight| / scale, at least the smallest normal number (below it the grid is even) and at most the
largest. The scale is the plain (absmax) one, whatever was written, so that both scales are counted over the
same changes. Bins come from exponents, without a logarithm: every device finds the same.

Legend: S groups of a sample, E elements of a group, T tensors, B bins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from daq_lightning.numerics.bins import STEP_BINS
from daq_lightning.numerics.formats import Format
from daq_lightning.numerics.formats.fp8 import FP8_E4M3
from daq_lightning.numerics.objectives import sign_of_difference

_LOWEST = -8  # exponent of the first edge


class StepCounts(NamedTuple):
    """How many changed elements of each bin had which outcome: int64, shape (T, B, 3), outcomes in the order
    of `OUTCOMES`."""

    searched: Tensor
    absmax: Tensor


def step_of(weight: Tensor, scale: Tensor, fmt: Format = FP8_E4M3) -> Tensor:
    """The distance between the two codes around a weight, times its scale.

    Args:
        weight: float32, of any shape.
        scale: float32, > 0; broadcasts against it.
        fmt: The format of the codes.

    Example:
        >>> step_of(torch.tensor([448.0, 1.0, 0.0]), torch.ones(1))
        tensor([3.2000e+01, 1.2500e-01, 1.9531e-03])
    """
    exponent = torch.frexp((weight.abs() * scale.reciprocal()).clamp(fmt.min_normal, fmt.max)).exponent
    return torch.ldexp(torch.ones_like(weight), exponent - 1 - fmt.mantissa_bits) * scale


def count_by_step(
    weight_SE: Tensor,
    base_SE: Tensor,
    written_SE: Tensor,
    plain_SE: Tensor,
    plain_S1: Tensor,
    *,
    tensors: int = 1,
    fmt: Format = FP8_E4M3,
) -> StepCounts:
    """Counts the outcomes of all changes, under the written scales and under plain ones.

    Args:
        weight_SE: Fine-tuned weights, any floating dtype; the groups of one tensor follow each other, as many
            of each.
        base_SE: Before fine-tuning.
        written_SE: Dequantized as written, float32.
        plain_SE: Dequantized under plain scales, float32.
        plain_S1: The plain scales, float32.
        tensors: How many tensors the groups belong to.
        fmt: The format of the codes.
    """
    weight_SE, base_SE = weight_SE.float(), base_SE.float()
    # the quotient is rounded, but never up to a power of two that it does not reach
    ratio_SE = (weight_SE - base_SE).abs() / step_of(weight_SE, plain_S1, fmt)
    bins_SE = (torch.frexp(ratio_SE).exponent - _LOWEST).clamp(0, STEP_BINS - 1)
    sign_SE = sign_of_difference(weight_SE, base_SE)
    first_S1 = torch.arange(tensors, dtype=torch.int32, device=bins_SE.device).repeat_interleave(
        len(bins_SE) // tensors
    )[:, None]
    size = tensors * STEP_BINS
    changed_SE = torch.where(sign_SE == 0, size, bins_SE + first_S1 * STEP_BINS)  # the last place: unchanged
    pairs_SE = changed_SE
    for dequantized_SE in (written_SE, plain_SE):
        pairs_SE = pairs_SE * 3 + (1 + sign_SE * sign_of_difference(dequantized_SE, base_SE))
    counts = torch.zeros(9 * (size + 1), dtype=torch.int64, device=pairs_SE.device)
    places = pairs_SE.flatten().long()
    counts.scatter_add_(0, places, torch.ones_like(places))  # `bincount` would wait for the device
    both = counts[: 9 * size].reshape(tensors, STEP_BINS, 3, 3)
    return StepCounts(searched=both.sum(3), absmax=both.sum(2))
