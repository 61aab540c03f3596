"""Zero points in rounding: a weight that is moved so that its codes are counted from 0.

    weight ~ (code - zero) * scale    <=>    weight + zero * scale ~ code * scale

Both sides have the same errors, so whatever rounds the right one has rounded the weight.

Legend: M out, N in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daq_lightning.numerics.formats import Granularity
from daq_lightning.numerics.quantize import dequantize


def counted_from_zero(
    weight_MN: Tensor, scale: Tensor, zero: Tensor | None, granularity: Granularity
) -> Tensor:
    """The weight plus its zero points, in float32; itself where there are none.

    Args:
        weight_MN: Floating point, shape (M, N).
        scale: float32, shape ``granularity.grid((M, N))``.
        zero: int8, shaped as the scale, or None.
        granularity: Which elements share them.

    Example:
        >>> from daq_lightning.numerics.formats import PerBlock
        >>> two = torch.full((1, 1), 2, dtype=torch.int8)
        >>> counted_from_zero(torch.tensor([[0.5, -1.0]]), torch.tensor([[0.5]]), two, PerBlock(1, 2))
        tensor([[1.5000, 0.0000]])
    """
    if zero is None:
        return weight_MN
    one_MN = torch.ones(weight_MN.shape, dtype=torch.int8, device=weight_MN.device)
    return weight_MN.float() + dequantize(one_MN, zero.float() * scale, granularity)
