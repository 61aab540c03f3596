"""E2M1, two codes in a byte: formats `nvfp4-pack-quantized` and `mxfp4-pack-quantized` of compressed-tensors.

    X.weight_packed    uint8 (M, N / 2)    the even column in the lower four bits
    four bits          sign, then the index of 0, .5, 1, 1.5, 2, 3, 4, 6

-0 keeps its sign.

Legend: M out, N in.

Source: compressed-tensors 0.20, `pack_fp4_to_uint8`; OCP Microscaling Formats (MX) specification, 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from daq_lightning.checkpoint.layouts.parts import CODES, Codes, Part

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_DTYPE = torch.float8_e4m3fn


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
    # by the byte that holds the value in memory: a table of 256 instead of comparisons
    nibbles = _nibbles(codes_MN.device)[codes_MN.contiguous().view(torch.uint8).int()]
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def unpack_pairs(packed: Tensor) -> Tensor:
    """What `pack_pairs` packed: float8_e4m3fn (M, N)."""
    nibbles = torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2)
    return _values(packed.device).view(torch.uint8)[nibbles.int()].view(_DTYPE)


def _values(device: torch.device) -> Tensor:
    """The sixteen values, by their four bits."""
    magnitudes = torch.tensor(_MAGNITUDES, dtype=torch.float32, device=device)
    return torch.cat([magnitudes, -magnitudes]).to(_DTYPE)


def _nibbles(device: torch.device) -> Tensor:
    """Four bits by the byte of E4M3."""
    table = torch.zeros(256, dtype=torch.uint8, device=device)
    four_bits = torch.arange(16, dtype=torch.uint8, device=device)
    table[_values(device).view(torch.uint8).int()] = four_bits
    return table
