"""E2M1, two codes in a byte: formats `nvfp4-pack-quantized` and `mxfp4-pack-quantized` of compressed-tensors.

    X.weight_packed    uint8 (M, N / 2)    the even column in the lower four bits
    four bits          sign, then the index of 0, .5, 1, 1.5, 2, 3, 4, 6

-0 keeps its sign. In memory a code is the byte of E4M3 that has its value: those of 1 to 6 follow each other
in steps of 4, from 0x38, so that shifts take the place of a table.

Legend: M out, N in.

Source: compressed-tensors 0.20, `pack_fp4_to_uint8`; OCP Microscaling Formats (MX) specification, 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from daq_lightning.checkpoint.layouts.parts import CODES, Codes, Part

_HALF = 0x30  # the byte of 0.5, and of what would be index 0 in the row of the others


class PackedFp4(Codes):
    """See the module."""

    def parts(self, shape_MN: tuple[int, int], grid: tuple[int, int]) -> dict[str, Part]:
        """See `Codes.parts`."""
        return {CODES: Part("_packed", torch.uint8, (shape_MN[0], shape_MN[1] // 2))}

    def pack(self, codes_MN: Tensor, zero: Tensor | None) -> dict[str, Tensor]:
        """See `Codes.pack`."""
        assert zero is None
        return {CODES: pack_pairs(codes_MN)}

    def unpack(self, parts: Mapping[str, Tensor], shape_MN: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """See `Codes.unpack`."""
        return unpack_pairs(parts[CODES]), None


def pack_pairs(codes_MN: Tensor) -> Tensor:
    """Values of E2M1 in float8_e4m3fn, N even -> uint8 (M, N / 2).

    Example:
        >>> pack_pairs(torch.tensor([[0.5, -6.0]]).to(torch.float8_e4m3fn))
        tensor([[241]], dtype=torch.uint8)
    """
    bytes_ = codes_MN.contiguous().view(torch.uint8)
    magnitude = bytes_ & 0x7F
    index = (magnitude.clamp(min=_HALF) - _HALF) >> 2
    index = torch.maximum(index, (magnitude > 0).to(torch.uint8))  # 0.5 is one of its own
    nibbles = index | ((bytes_ >> 4) & 8)
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def unpack_pairs(packed: Tensor) -> Tensor:
    """What `pack_pairs` packed: float8_e4m3fn (M, N)."""
    nibbles = torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2)
    index = nibbles & 7
    bytes_ = (index > 0).to(torch.uint8) * _HALF + (index > 1).to(torch.uint8) * (index << 2)
    return (bytes_ | ((nibbles & 8) << 4)).view(torch.float8_e4m3fn)
