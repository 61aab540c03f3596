"""What a server makes of the input of a quantized Linear: FP8 by scales found on the fly, undone at once.

    scale = max(absmax / 448, floor)          of a token, or of a token and a group of its features
    seen  = dtype(fp8(x / scale) * scale)

in float32. A server multiplies the codes and applies the scales afterwards; here the product that it would
round once is rounded to the dtype of the activations first, as a reader that dequantizes does with weights.

The floor keeps a token of zeros from a division by zero. It is that of vLLM's kernels: 1 / (448 * 512) for
the scale of a token, and an absmax of 1e-10 for a group.

Legend: T tokens (any leading dimensions), N features.

Sources: vLLM, csrc/quantization/w8a8/fp8 (dynamic_per_token_scaled_fp8_quant, per_token_group_quant);
compressed-tensors, dynamic activations of the strategies "token" and "group".
"""

from __future__ import annotations

import torch
from torch import Tensor

from daq_lightning.numerics.formats import Format
from daq_lightning.numerics.formats.fp8 import FP8_E4M3
from daq_lightning.numerics.quantize import encode

_TOKEN_FLOOR = 1 / 512  # smallest absmax whose scale is followed
_GROUP_FLOOR = 1e-10


@torch.no_grad()
def quantized_input(x_TN: Tensor, group: int | None = None, fmt: Format = FP8_E4M3) -> Tensor:
    """Activations as a product in FP8 sees them.

    Args:
        x_TN: float32, bfloat16, float16 or float64, shape (..., N).
        group: Features that share a scale, the last group of N may be smaller; None for all of a token.
        fmt: The format of the codes.

    Returns:
        New tensor of the same shape and dtype. NaN or Inf makes its whole group NaN.

    Raises:
        ValueError: `group` is less than 1.

    Example:
        >>> quantized_input(torch.tensor([[448.0, 5.3], [0.0, 0.0]]))
        tensor([[448.0000,   5.5000],
                [  0.0000,   0.0000]])
    """
    if group is not None and group < 1:
        raise ValueError(f"group={group}: expected at least one feature, or None for all of a token.")
    if not x_TN.numel():
        return x_TN.clone()
    features, floor = x_TN.shape[-1], _TOKEN_FLOOR
    groups = x_TN.float()
    if group is not None:
        floor = _GROUP_FLOOR
        groups = torch.nn.functional.pad(groups, (0, -features % group)).unflatten(-1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=floor) / fmt.max
    seen = encode(groups / scale, fmt).float() * scale
    if group is not None:
        seen = seen.flatten(-2)[..., :features]
    return seen.to(x_TN.dtype)
