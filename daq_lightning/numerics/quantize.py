"""The only rounding in the package: absmax scale, scale rounding, quantize, dequantize.

    scale  = max|weight| / reach        one per group, then rounded to what the file and its reader keep
    code   = cast(clamp(weight * (1 / scale), low, max))        nearest, ties to even, subnormals kept
    weight ~ code * scale

where low and max are the ends of the format, and reach is max, or half a step more for integers.

A format with zero points maps the smallest and largest weight of a group, and 0, to its ends:

    scale  = (largest - smallest) / (max - low)                 rounded likewise
    zero   = clamp(round(-smallest / scale) + low, low, max)    a code; 0 in a group of zeros
    code   = cast(clamp(weight * (1 / scale), low - zero, max - zero)) + zero
    weight ~ (code - zero) * scale

Scales in E4M3 have one global scale for the weight, a power of two, and are read as e4m3 / global. It brings
the largest plain scale between 112 and 224, so that a search may still double it. They are rounded to
nearest: a million normal weights in E2M1, in groups of 16, have an error of 0.91 % of their energy so, and of
1.01 % with scales rounded up.

All arithmetic is float32: a bfloat16 division picks another code for some 3 % of the weights. The weight is
multiplied by a float32 reciprocal that is computed once per group, because that product (unlike a division)
is the same to the last bit in eager mode, in compiled C++ and in Triton. The search scores `encode` and
`decode`; the file holds their result.

Legend: M out, N in, G groups.

Sources: arXiv 2603.22324, Eq. 4 and Algorithm 1, line 3; OCP 8-bit floating point specification (E4M3);
compressed-tensors 0.20, `calculate_qparams` (zero points, there of the scale before it is rounded).
"""

from __future__ import annotations

import torch
from torch import Tensor

from daq_lightning.numerics.encode import encode
from daq_lightning.numerics.formats import Format, Granularity, ScaleFormat
from daq_lightning.numerics.formats.fp8 import FP8_E4M3
from daq_lightning.numerics.scales import absmax_to_scale, zero_of
from daq_lightning.numerics.tiling import bands, extremes, scale_of_rows, to_groups

_BAND = 1 << 18  # elements that are held in float32 at a time


def absmax_scale(
    weight_MN: Tensor,
    granularity: Granularity,
    *,
    scale_format: ScaleFormat = "float32",
    fmt: Format = FP8_E4M3,
    global_scale: Tensor | None = None,
) -> Tensor:
    """The scale that maps the largest magnitude of each group to the largest code.

    Formula: ``scale = round_scale(max|weight_g| / fmt.reached)``; a group of zeros gets scale 1.

    Args:
        weight_MN: float32, bfloat16 or float16, shape (M, N).
        granularity: Which elements share a scale.
        scale_format: What the scale is rounded to.
        fmt: The format of the codes.
        global_scale: For "e4m3", shape (1,); None takes that of `global_scale_of`.

    Returns:
        float32 scale of shape ``granularity.grid((M, N))``. NaN or Inf in a group shows as a NaN or Inf
        scale.

    Example:
        >>> from daq_lightning.numerics.formats import PerChannel
        >>> absmax_scale(torch.tensor([[2.0, -448.0], [0.0, 0.0]]), PerChannel())
        tensor([[1.],
                [1.]])
    """
    return absmax_to_scale(absmax(weight_MN, granularity), scale_format, fmt, global_scale)


def absmax(weight_MN: Tensor, granularity: Granularity) -> Tensor:
    """Largest magnitude of each group, or its NaN or Inf: float32, shape ``granularity.grid((M, N))``."""
    shape_MN = (weight_MN.shape[0], weight_MN.shape[1])
    grid = granularity.grid(shape_MN)
    if weight_MN.numel() == 0:
        return torch.zeros(grid, dtype=torch.float32, device=weight_MN.device)
    parts = []
    for rows in bands(shape_MN, granularity, elements=max(_BAND, weight_MN.numel() // 16)):
        groups_GE = to_groups(weight_MN[rows], granularity)
        # no copy of |x|; keeps NaN
        parts.append(torch.maximum(groups_GE.amax(1), -groups_GE.amin(1)).float())
    return torch.cat(parts).reshape(grid)


def min_max_scale(
    weight_MN: Tensor,
    granularity: Granularity,
    *,
    scale_format: ScaleFormat = "float32",
    fmt: Format,
    global_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The plain scale and zero point of each group.

    Args:
        weight_MN: float32, bfloat16 or float16, shape (M, N).
        granularity: Which elements share a scale.
        scale_format: What the scale is rounded to.
        fmt: The format of the codes.
        global_scale: For scales in E4M3.

    Returns:
        float32 scale and int8 zero point of shape ``granularity.grid((M, N))``; for a format without zero
        points its `absmax_scale` and None.

    Example:
        >>> from daq_lightning.numerics.formats import PerChannel
        >>> from daq_lightning.numerics.formats.int4 import INT4_ASYM
        >>> min_max_scale(torch.tensor([[-1.0, 6.5]]), PerChannel(), fmt=INT4_ASYM)
        (tensor([[0.5000]]), tensor([[-6]], dtype=torch.int8))
    """
    if not fmt.zero_point:
        return absmax_to_scale(absmax(weight_MN, granularity), scale_format, fmt, global_scale), None
    smallest, largest = extremes(weight_MN, granularity)
    scale = absmax_to_scale(largest - smallest, scale_format, fmt, global_scale)
    return scale, zero_of(smallest, largest, scale, fmt)


def quantize(
    weight_MN: Tensor,
    scale: Tensor,
    granularity: Granularity,
    fmt: Format = FP8_E4M3,
    zero: Tensor | None = None,
) -> Tensor:
    """Codes of a weight under a scale.

    Formula: ``code = cast(clamp(weight * (1 / scale), low, max))``.

    Args:
        weight_MN: float32, bfloat16 or float16, shape (M, N), finite.
        scale: float32, shape ``granularity.grid((M, N))``, finite and > 0.
        granularity: Which elements share a scale.
        fmt: The format of the codes.
        zero: int8, of the shape of the scale, for a format with zero points.

    Returns:
        codes_MN of dtype ``fmt.dtype``.

    Raises:
        ValueError: The scale has another shape than the granularity asks for.

    Example:
        >>> from daq_lightning.numerics.formats import PerTensor
        >>> quantize(torch.tensor([[5.3]]), torch.tensor([[1.0]]), PerTensor()).float()
        tensor([[5.5000]])
    """
    shape_MN = (weight_MN.shape[0], weight_MN.shape[1])
    check_scale(scale, shape_MN, granularity)
    reciprocal = scale.reciprocal()
    codes_MN = torch.empty(shape_MN, dtype=fmt.dtype, device=weight_MN.device)
    for rows in _row_bands(shape_MN):
        scaled = weight_MN[rows].float() * scale_of_rows(reciprocal, rows, shape_MN, granularity)
        zero_rows = None if zero is None else scale_of_rows(zero, rows, shape_MN, granularity)
        codes_MN[rows] = encode(scaled, fmt, zero_rows)
    return codes_MN


def dequantize(
    codes_MN: Tensor,
    scale: Tensor,
    granularity: Granularity,
    dtype: torch.dtype = torch.float32,
    zero: Tensor | None = None,
) -> Tensor:
    """The weight that a reader computes: ``dtype(float32(code - zero) * float32(scale))``.

    Args:
        codes_MN: Codes, shape (M, N).
        scale: Shape ``granularity.grid((M, N))``.
        granularity: Which elements share a scale.
        dtype: Of the result; the product itself is taken in float32.
        zero: int8, of the shape of the scale, for codes with zero points.

    Returns:
        weight_MN of the dtype asked for.

    Raises:
        ValueError: The scale has another shape than the granularity asks for.
    """
    shape_MN = (codes_MN.shape[0], codes_MN.shape[1])
    check_scale(scale, shape_MN, granularity)
    factor = scale.float()
    weight_MN = torch.empty(shape_MN, dtype=dtype, device=codes_MN.device)
    for rows in _row_bands(shape_MN):
        codes = codes_MN[rows].float()
        if zero is not None:
            codes -= scale_of_rows(zero, rows, shape_MN, granularity)
        weight_MN[rows] = (codes * scale_of_rows(factor, rows, shape_MN, granularity)).to(dtype)
    return weight_MN


def _row_bands(shape_MN: tuple[int, int]) -> list[slice]:
    step = max(1, _BAND // max(1, shape_MN[1]))
    return [slice(start, min(start + step, shape_MN[0])) for start in range(0, shape_MN[0], step)]


def check_scale(scale: Tensor, shape_MN: tuple[int, int], granularity: Granularity) -> None:
    """Raises ValueError for a scale of another shape than the granularity asks for."""
    expected = granularity.grid(shape_MN)
    if tuple(scale.shape) != expected:
        raise ValueError(
            f"A weight of shape {shape_MN} with {granularity} needs a scale of shape {expected}, "
            f"got {tuple(scale.shape)}."
        )
