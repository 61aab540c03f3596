"""What readers of an export see: the same codes and scales, as two kinds of weights.

    searched      float32(code) * scale           inside the FP8 kernels of vLLM and SGLang; what the search looks at
    dequantized   dtype(float32(code) * scale)    transformers and whoever dequantizes into 16 bit

The second rounding moves a weight by up to 2^-9 of itself, as much as many updates: where the base is a 16-bit model,
some updates that the codes keep are gone in 16 bit. The sums of the search are exact; those of this second reader are
taken over rows spread evenly over the weight, because a pass over all of it would cost more than the search.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daq_lightning.numerics.formats import Granularity
from daq_lightning.numerics.objectives import DeltaStats, measure

SAMPLE = 1 << 13
"""Elements of a weight that are looked at, about: every n-th row, so that there are no more, but at least one row."""

_PIECE = 1 << 14  # elements of one sum (rows can be long): of more, the last bit depends on the number of threads


def dequantized_stats(
    weight_MN: Tensor, base_MN: Tensor, codes_MN: Tensor, scale: Tensor, granularity: Granularity, dtype: torch.dtype
) -> DeltaStats:
    """Sums over sampled rows, of a reader that computes ``dtype(float32(code) * float32(scale))``.

    Args:
        weight_MN: The fine-tuned weight, any floating dtype, shape (M, N).
        base_MN: The weight before fine-tuning.
        codes_MN: float8 codes.
        scale: float32, shape ``granularity.grid((M, N))``.
        granularity: Which elements share a scale.
        dtype: What the reader dequantizes to.

    Returns:
        `DeltaStats` of shape (); its `n` says how many elements were looked at.
    """
    step = -(-weight_MN.numel() // SAMPLE)
    rows, columns = granularity.cell((weight_MN.shape[0], weight_MN.shape[1]))
    # by expand: repeat_interleave, and with it `dequantize`, wakes all threads for the smallest tensor
    scale_of_row = scale[:, None].expand(-1, rows, -1).flatten(0, 1)[: weight_MN.shape[0] : step]
    scale_RN = scale_of_row[:, :, None].expand(-1, -1, columns).flatten(1, 2)[:, : weight_MN.shape[1]]
    seen = (codes_MN[::step].float() * scale_RN).to(dtype)
    parts = (tensor.flatten().split(_PIECE) for tensor in (weight_MN[::step], base_MN[::step], seen))
    stats = [measure(weight, base, piece) for weight, base, piece in zip(*parts, strict=True)]
    return DeltaStats(*(torch.stack(fields).sum(0) for fields in zip(*stats, strict=True)))
