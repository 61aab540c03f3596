"""The rounding itself: values that are divided by their scale -> codes of a format."""

from __future__ import annotations

import torch
from torch import Tensor

from daq_lightning.numerics.formats import Format


def encode(scaled: Tensor, fmt: Format, zero: Tensor | None = None) -> Tensor:
    """Rounds float32 values that are divided by their scale: saturates, then nearest, ties to even.

    Args:
        scaled: float32, of any shape, finite.
        fmt: The format of the codes.
        zero: Of formats with zero points: what codes are counted from, in a shape that broadcasts.

    Returns:
        Codes of dtype ``fmt.dtype``, as their values.
    """
    if zero is not None:
        return (scaled.clamp(fmt.low - zero, fmt.max - zero).round() + zero).to(fmt.dtype)
    scaled = scaled.clamp(fmt.low, fmt.max)
    if not fmt.dtype.is_floating_point:
        return scaled.round().to(fmt.dtype)
    if torch.finfo(fmt.dtype).max != fmt.max:  # codes of a coarser grid than that of their dtype
        exponent = torch.frexp(scaled.abs().clamp(min=fmt.min_normal)).exponent - 1
        step = torch.ldexp(torch.ones_like(scaled), exponent - fmt.mantissa_bits)
        scaled = (scaled / step).round() * step
    return scaled.to(fmt.dtype)
