"""What a server makes of the input of a quantized Linear: codes by scales found on the fly, undone at once.

    FP8     scale = max(absmax, floor) / 448     of a token, or of a token and a group of its features
    MXFP8   scale = 2^ceil(log2(absmax / 448))   of a token and a group of 32
    int8    scale = absmax / 127                 of a token
    seen    = dtype(code(x / scale) * scale)

in float32 (int8: x times 127 / absmax). A server multiplies the codes and applies the scales afterwards; here
the product that it would round once is rounded to the dtype of the activations first, as a reader that
dequantizes does with weights.

The floor keeps a token of zeros from a division by zero. It is that of vLLM's kernels: 1 / (448 * 512) for
the scale of a token, and an absmax of 1e-10 for a group.

Legend: T tokens (any leading dimensions), N features.

Sources: vLLM, csrc/quantization/w8a8/fp8 (dynamic_per_token_scaled_fp8_quant, per_token_group_quant),
csrc/quantization/w8a8/int8 (dynamic_scaled_int8_quant) and layers/quantization/utils/mxfp8_utils.py;
compressed-tensors, dynamic activations of the strategies "token" and "group", whose scale of int8 is absmax /
127.5, and of MXFP8 twice as large where absmax / 448 is a power of two itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daq_lightning.numerics.encode import encode
from daq_lightning.numerics.formats import SMALLEST_SCALE, Format, ScaleFormat
from daq_lightning.numerics.formats.fp8 import FP8_E4M3
from daq_lightning.numerics.scales import round_scale

_TOKEN_FLOOR = 1 / 512  # smallest absmax whose scale is followed
_GROUP_FLOOR = 1e-10


@torch.no_grad()
def quantized_input(
    x_TN: Tensor,
    group: int | None = None,
    fmt: Format = FP8_E4M3,
    scale_format: ScaleFormat = "float32",
) -> Tensor:
    """Activations as a product of codes sees them.

    Args:
        x_TN: float32, bfloat16, float16 or float64, shape (..., N).
        group: Features that share a scale, the last group of N may be smaller; None for all of a token.
        fmt: The format of the codes.
        scale_format: "float32", or "ue8m0" for powers of two.

    Returns:
        New tensor of the same shape and dtype. NaN or Inf makes its whole group NaN.

    Raises:
        ValueError: `group` is less than 1, or another scale format.

    Example:
        >>> quantized_input(torch.tensor([[448.0, 5.3], [0.0, 0.0]]))
        tensor([[448.0000,   5.5000],
                [  0.0000,   0.0000]])
    """
    if group is not None and group < 1:
        raise ValueError(f"group={group}: expected at least one feature, or None for all of a token.")
    if scale_format not in ("float32", "ue8m0"):
        raise ValueError(f"scale_format={scale_format!r}: expected 'float32' or 'ue8m0' for activations.")
    if not x_TN.numel():
        return x_TN.clone()
    features, floor = x_TN.shape[-1], _TOKEN_FLOOR
    groups = x_TN.float()
    if group is not None:
        floor = _GROUP_FLOOR
        groups = torch.nn.functional.pad(groups, (0, -features % group)).unflatten(-1, (-1, group))
    absmax = groups.abs().amax(-1, keepdim=True)
    if not fmt.dtype.is_floating_point:
        scale = absmax / fmt.max
        scaled = groups * (fmt.max / absmax.clamp(min=SMALLEST_SCALE))
        seen = torch.where(absmax.isfinite(), encode(scaled, fmt).float() * scale, torch.nan)
    else:
        scale = absmax.clamp(min=floor) / fmt.max
        if scale_format == "ue8m0":
            scale = round_scale(absmax / fmt.max, scale_format)
        seen = encode(groups / scale, fmt).float() * scale
    if group is not None:
        seen = seen.flatten(-2)[..., :features]
    return seen.to(x_TN.dtype)
