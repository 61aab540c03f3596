"""Cached keys and values in FP8, with one scale for a whole tensor: a MULTIPLIER, of which a layer has two.

    scale = the smallest bfloat16 with 448 * scale >= absmax

transformers holds it in bfloat16 and vLLM in float32, so it is a number that both have. Rounded up, it lets
no value that was seen overflow; that a step is up to 2^-7 wider costs FP8 nothing, whose steps are relative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daq_lightning.numerics.formats.fp8 import FP8_E4M3


def cache_scale(absmax: Tensor) -> Tensor:
    """The scales of what was cached.

    Args:
        absmax: The largest absolute value of each, >= 0, of any shape.

    Returns:
        Float32 of this shape, > 0; 1 where nothing but zeros was seen.

    Raises:
        ValueError: NaN or Inf.

    Source: compressed-tensors 0.20 `calculate_qparams` (absmax / 448), vLLM `BaseKVCacheMethod`.

    Example:
        >>> cache_scale(torch.tensor([448.0, 3.0, 0.0]))
        tensor([1.0000, 0.0067, 1.0000])
    """
    absmax = absmax.to(torch.float64)
    if not bool((absmax.isfinite() & (absmax >= 0)).all()):
        raise ValueError(f"The largest absolute values should be finite and >= 0, got {absmax.tolist()}.")
    scale = (absmax / FP8_E4M3.max).to(torch.bfloat16)
    too_small = scale.double() * FP8_E4M3.max < absmax
    above = (scale.view(torch.int16) + 1).view(torch.bfloat16)  # of positive numbers, the next one
    return torch.where(absmax > 0, torch.where(too_small, above, scale), 1.0).to(torch.float32)


def cached(values: Tensor, scale: float) -> Tensor:
    """Keys or values as they are read from an FP8 cache: ``e4m3(values / scale) * scale``, in their dtype.

    Args:
        values: Of a floating dtype and any shape; what is larger than 448 * scale saturates.
        scale: As for `cache_scale`.

    Source: vLLM `reshape_and_cache`, in float32.

    Example:
        >>> cached(torch.tensor([1.0, 1.05, 900.0]), 1.0)
        tensor([  1.,   1., 448.])
    """
    codes = (values.float() / scale).clamp(-FP8_E4M3.max, FP8_E4M3.max).to(FP8_E4M3.dtype)
    return (codes.float() * scale).to(values.dtype)
