"""A histogram whose bins have one relative width: quantiles of a stream too long to keep.

    bin(x) = 0                                               below 2^-40
    bin(x) = 1 + 512 (e + 40) + floor(512 (x / 2^e - 1))     2^e <= x < 2^(e + 1), e from -40 to 15

Counts are int64 and add over batches and ranks, so a quantile is the same for every split of the stream. A
bin is read as its middle, which is at most 1/1024 of a value (0.1 %) away from it; below 2^-40 (1e-12) a
value reads as 0. The bins come from the exponent and the mantissa, without a logarithm: no device rounds them
differently.

Legend: H bins, T numbers of the stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

PER_OCTAVE, LOWEST, HIGHEST = 512, -40, 16
BINS = 1 + PER_OCTAVE * (HIGHEST - LOWEST)


def histogram(values_T: Tensor) -> Tensor:
    """How many values fall into each bin.

    Args:
        values_T: Non-negative numbers, float64. Those of 2^16 and above count in the last bin.

    Returns:
        int64 counts of shape (H,), on the device of the values.
    """
    mantissa_T, exponent_T = torch.frexp(values_T)  # mantissa in [1/2, 1), so the octave is exponent - 1
    place_T = ((mantissa_T * 2 - 1) * PER_OCTAVE).long()
    bins_T = 1 + (exponent_T.long() - 1 - LOWEST) * PER_OCTAVE + place_T
    bins_T = torch.where(values_T < 2.0**LOWEST, 0, bins_T).clamp(max=BINS - 1)
    return torch.bincount(bins_T, minlength=BINS)


def quantile(counts_H: Tensor, fraction: float, largest: Tensor) -> Tensor:
    """The value below which a fraction of the stream lies, within 0.1 %.

    Formula: with ranks from 0 and r = fraction (n - 1), linear between the values of rank floor(r) and
    ceil(r), as NumPy and llama.cpp do.

    Args:
        counts_H: What `histogram` returned, or a sum of such.
        fraction: In [0, 1].
        largest: The largest value of the stream, shape (): no quantile is above it.

    Returns:
        A float64 scalar; NaN without a value.

    Example:
        >>> values = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
        >>> quantile(histogram(values), 0.5, values.max())
        tensor(2.0020, dtype=torch.float64)
    """
    up_to_H = counts_H.cumsum(0)
    rank = fraction * (up_to_H[-1] - 1).clamp(min=0).double()
    below, above = (
        _middle(torch.searchsorted(up_to_H, whole.long(), right=True).clamp(max=BINS - 1))
        for whole in (rank.floor(), rank.ceil())
    )
    value = torch.minimum(below + (rank - rank.floor()) * (above - below), largest)
    return torch.where(up_to_H[-1] > 0, value, torch.nan)


def _middle(bins: Tensor) -> Tensor:
    octave = (bins - 1).div(PER_OCTAVE, rounding_mode="floor").double() + LOWEST
    middle = (1 + ((bins - 1).remainder(PER_OCTAVE).double() + 0.5) / PER_OCTAVE) * octave.exp2()
    return torch.where(bins == 0, 0.0, middle)
