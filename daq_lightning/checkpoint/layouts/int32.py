"""Integers of four bits, eight of them in an int32: format `pack-quantized` of compressed-tensors.

    X.weight_packed        int32 (M, N / 8)         code + 8, the first in the lowest bits
    X.weight_shape         int64 (2)                M, N
    X.weight_zero_point    int32 (M / 8, groups)    zero + 8, packed along the rows; of asymmetric schemes

A row, or a column of zero points, that does not fill its last int32 leaves zero bits there.

Legend: M out, N in.

Source: compressed-tensors 0.20, `pack_to_int32`; vLLM, `CompressedTensorsWNA16`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from daq_lightning.checkpoint.flat_bytes import flat_bytes
from daq_lightning.checkpoint.layouts.parts import CODES, SHAPE, ZERO, Codes, Part

_PER_WORD, _OFFSET = 8, 8


class PackedIntegers(Codes):
    """See the module.

    Args:
        asymmetric: Whether there are zero points.
    """

    def __init__(self, asymmetric: bool) -> None:
        self._asymmetric = asymmetric

    def parts(self, shape_MN: tuple[int, int], grid: tuple[int, int]) -> dict[str, Part]:
        """See `Codes.parts`."""
        rows, cols = shape_MN
        parts = {
            CODES: Part("_packed", torch.int32, (rows, _words(cols))),
            SHAPE: Part("_shape", torch.int64, (2,)),
        }
        if self._asymmetric:
            parts[ZERO] = Part("_zero_point", torch.int32, (_words(grid[0]), grid[1]))
        return parts

    def pack(self, codes_MN: Tensor, zero: Tensor | None) -> dict[str, Tensor]:
        """See `Codes.pack`."""
        assert (zero is not None) == self._asymmetric
        shape = torch.tensor(codes_MN.shape, dtype=torch.int64, device=codes_MN.device)
        packed = {CODES: pack_rows(codes_MN), SHAPE: shape}
        return packed if zero is None else packed | {ZERO: pack_rows(zero.T).T.contiguous()}

    def unpack(self, parts: Mapping[str, Tensor], shape_MN: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """See `Codes.unpack`."""
        said = tuple(parts[SHAPE].tolist())
        if said != shape_MN:
            raise ValueError(f"its stored shape is {said}, expected {shape_MN}")
        codes_MN = unpack_rows(parts[CODES], shape_MN[1])
        if not self._asymmetric:
            return codes_MN, None
        return codes_MN, unpack_rows(parts[ZERO].T, shape_MN[0]).T.contiguous()


def pack_rows(codes_MN: Tensor) -> Tensor:
    """int8 codes from -8 to 7 -> int32 (M, ceil(N / 8)).

    Example:
        >>> pack_rows(torch.tensor([[-7, -6, -8, -8, -8, -8, -8, -8]], dtype=torch.int8))
        tensor([[33]], dtype=torch.int32)
    """
    rows, cols = codes_MN.shape
    nibbles = codes_MN.new_zeros(rows, _words(cols) * _PER_WORD, dtype=torch.uint8)
    nibbles[:, :cols] = (codes_MN + _OFFSET).view(torch.uint8)
    return (nibbles[:, ::2] | (nibbles[:, 1::2] << 4)).view(torch.int32)


def unpack_rows(packed: Tensor, cols: int) -> Tensor:
    """What `pack_rows` packed: int8 (M, cols)."""
    bytes_ = flat_bytes(packed).view(packed.shape[0], packed.shape[1] * packed.itemsize)
    nibbles = torch.stack((bytes_ & 0xF, bytes_ >> 4), -1).flatten(-2)
    return nibbles[:, :cols].view(torch.int8) - _OFFSET


def _words(count: int) -> int:
    return -(-count // _PER_WORD)
