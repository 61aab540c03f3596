"""How scales are stored: as numbers, as exponents, or as E4M3 with one more scale for the whole weight.

    numbers      X.weight_scale           float32 or bfloat16
    exponents    X.weight_scale           uint8 e: 2^(e - 127), that is E8M0; 255 is NaN
    E4M3         X.weight_scale           float8_e4m3fn
                 X.weight_global_scale    float32 (1): what divides them

Source: compressed-tensors 0.20, `compress_mx_scale` and `NVFP4PackedCompressor`; OCP Microscaling Formats
(MX) specification, 1.0, section 5.4.1 (E8M0).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from daq_lightning.checkpoint.layouts.parts import GLOBAL_SCALE, SCALE, Part, Scales

_BIAS, _NAN = 127, 255


class NumberScales(Scales):
    """Scales as they are.

    Args:
        dtype: In the file.
        suffix: Of their name.
    """

    def __init__(self, dtype: torch.dtype, suffix: str = "_scale") -> None:
        self._dtype, self._suffix = dtype, suffix

    def parts(self, grid: tuple[int, int]) -> dict[str, Part]:
        """See `Scales.parts`."""
        return {SCALE: Part(self._suffix, self._dtype, grid)}

    def pack(self, scale: Tensor, global_scale: Tensor | None) -> dict[str, Tensor]:
        """See `Scales.pack`."""
        stored = scale.to(self._dtype)
        _check(stored.float(), scale, str(self._dtype).removeprefix("torch."))
        return {SCALE: stored}

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """See `Scales.unpack`."""
        return parts[SCALE].float()


class ExponentScales(Scales):
    """Powers of two, by their exponent."""

    def parts(self, grid: tuple[int, int]) -> dict[str, Part]:
        """See `Scales.parts`."""
        return {SCALE: Part("_scale", torch.uint8, grid)}

    def pack(self, scale: Tensor, global_scale: Tensor | None) -> dict[str, Tensor]:
        """See `Scales.pack`."""
        stored = (torch.frexp(scale).exponent - 1 + _BIAS).to(torch.uint8)
        _check(of_exponents(stored), scale, "an exponent")
        return {SCALE: stored}

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """See `Scales.unpack`."""
        return of_exponents(parts[SCALE])


class E4M3Scales(Scales):
    """Values of E4M3, all divided by one scale of the weight."""

    def parts(self, grid: tuple[int, int]) -> dict[str, Part]:
        """See `Scales.parts`."""
        return {
            SCALE: Part("_scale", torch.float8_e4m3fn, grid),
            GLOBAL_SCALE: Part("_global_scale", torch.float32, (1,)),
        }

    def pack(self, scale: Tensor, global_scale: Tensor | None) -> dict[str, Tensor]:
        """See `Scales.pack`."""
        assert global_scale is not None
        factor = global_scale.float().reshape(1).to(scale.device)
        stored = (scale * factor).to(torch.float8_e4m3fn)
        _check(stored.float() / factor, scale, "E4M3")
        return {SCALE: stored, GLOBAL_SCALE: factor}

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """See `Scales.unpack`."""
        return parts[SCALE].float() / parts[GLOBAL_SCALE].float()


def of_exponents(stored: Tensor) -> Tensor:
    """The float32 values of E8M0 bytes.

    Example:
        >>> of_exponents(torch.tensor([126, 127, 255], dtype=torch.uint8))
        tensor([0.5000, 1.0000,    nan])
    """
    exponent = stored.view(torch.uint8).int() - _BIAS
    powers = torch.ldexp(torch.ones(stored.shape, dtype=torch.float32, device=stored.device), exponent)
    return powers.masked_fill(exponent == _NAN - _BIAS, torch.nan)


def _check(read: Tensor, scale: Tensor, kind: str) -> None:
    if not torch.equal(read, scale):
        wrong = int((read != scale).sum())
        raise ValueError(f"{wrong} scales are none that {kind} holds: they have to be rounded before.")
