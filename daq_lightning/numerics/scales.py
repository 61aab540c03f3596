"""Scales as a file and its reader keep them: rounded, of powers of two, or of E4M3 with a global scale.

    scale = round_scale(max|weight| / reach)        one per group
    E4M3:  scale * global_scale is a value of E4M3; global_scale is one power of two for the weight

Legend: G groups.

Sources: OCP Microscaling Formats (MX) specification, version 1.0 (E8M0); compressed-tensors 0.20 (scales in
    E4M3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from daq_lightning.numerics.formats import SCALE_FORMATS, SMALLEST_SCALE, Format, ScaleFormat

_SMALLEST_E4M3, _LARGEST_E4M3 = 2.0**-9, 448.0
_GLOBAL_EXPONENTS = (-119, 117)  # so that 2^-9 / global and 448 / global are normal numbers of float32


def absmax_to_scale(
    absmax: Tensor, scale_format: ScaleFormat, fmt: Format, global_scale: Tensor | None = None
) -> Tensor:
    """The scales that map these magnitudes to the largest code; 1 where they are 0, in units of the global
    scale, which is `global_scale_of` all of them unless it is given."""
    if scale_format == "e4m3" and global_scale is None:
        global_scale = global_scale_of(absmax, fmt)
    one = 1.0 if global_scale is None else global_scale.reciprocal()
    return torch.where(absmax == 0, one, round_scale(absmax / fmt.reached, scale_format, global_scale))


def global_scale_of(absmax: Tensor, fmt: Format) -> Tensor:
    """The global scale of scales in E4M3: a power of two in float32, shape (1,).

    Formula: the one with ``112 < max(absmax) / fmt.reached * global <= 224``; 1 without a finite maximum > 0.

    Example:
        >>> from daq_lightning.numerics.formats.fp4 import FP4_E2M1
        >>> global_scale_of(torch.tensor([0.3, 6.0]), FP4_E2M1)
        tensor([128.])
    """
    largest = (absmax / fmt.reached).amax().reshape(1)
    mantissa, exponent = torch.frexp(largest)  # mantissa in [0.5, 1); 224 = 0.875 * 2^8
    exponent = (8 - exponent - (mantissa > 0.875).int()).clamp(*_GLOBAL_EXPONENTS)
    known = largest.isfinite() & (largest > 0)
    return torch.where(known, torch.ldexp(torch.ones_like(largest), exponent), 1.0)


def round_scale(scale: Tensor, scale_format: ScaleFormat, global_scale: Tensor | None = None) -> Tensor:
    """Rounds float32 scales to those that a reader keeps, never below the smallest normal float32.

    "float32" keeps them, "bfloat16" rounds to nearest, "ue8m0" rounds UP to a power of two (rounding down
    would saturate the group's largest weight), "e4m3" rounds ``scale * global_scale`` to the nearest value
    of E4M3 that is not 0.

    Example:
        >>> round_scale(torch.tensor([0.3, 0.5]), "ue8m0")
        tensor([0.5000, 0.5000])
        >>> round_scale(torch.tensor([0.3, 0.5]), "e4m3", torch.ones(1))
        tensor([0.3125, 0.5000])

    Raises:
        ValueError: Unknown scale format, or "e4m3" without a global scale.
    """
    check_scale_format(scale_format)
    scale = scale.clamp(min=SMALLEST_SCALE)
    if scale_format == "e4m3":
        if global_scale is None:
            raise ValueError("Scales in e4m3 need the global scale of their weight, see global_scale_of.")
        stored = (scale * global_scale).clamp(_SMALLEST_E4M3, _LARGEST_E4M3).to(torch.float8_e4m3fn).float()
        return torch.where(scale.isfinite(), stored / global_scale, scale)
    if scale_format == "bfloat16":
        return scale.bfloat16().float()
    if scale_format == "ue8m0":
        mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
        return torch.where(scale.isfinite(), torch.ldexp(torch.ones_like(scale), exponent), scale)
    return scale


def check_scale_format(scale_format: str) -> None:
    """Raises ValueError for a name that is none of the scale formats."""
    if scale_format not in SCALE_FORMATS:
        raise ValueError(
            f"Unknown scale format {scale_format!r}: expected one of {', '.join(SCALE_FORMATS)}."
        )


def zero_of(smallest: Tensor, largest: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """The zero point, int8, of groups with these ends under a scale; they broadcast."""
    zero = ((-smallest / scale).round() + fmt.low).clamp(fmt.low, fmt.max)
    return torch.where(zero.isfinite() & (smallest < largest), zero, 0).to(torch.int8)
