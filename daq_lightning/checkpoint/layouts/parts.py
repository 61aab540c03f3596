"""The tensors that a quantized weight is stored as, and what a layout makes of them again.

| part | what it is |
| --- | --- |
| codes | codes of the format, several in an element where they are small |
| scale | one per group |
| zero | zero points, one per group, as codes |
| global_scale | what all scales of the weight are multiplied with in the file |
| shape | of the weight |

Legend: M out, N in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

CODES, SCALE, ZERO, GLOBAL_SCALE, SHAPE = "codes", "scale", "zero", "global_scale", "shape"


class Part(NamedTuple):
    """One tensor of a quantized weight `X.weight`.

    Attributes:
        suffix: Its name is `X.weight` and this.
        dtype: In the file.
        shape: In the file.
    """

    suffix: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Unpacked(NamedTuple):
    """A quantized weight in memory: ``weight = (code - zero) * scale``.

    Attributes:
        codes: As values, shape (M, N).
        scale: float32, the shape of the granularity's grid; what multiplies, whatever the file holds.
        zero: int8, shaped as the scale; None stands for 0.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


class Codes(ABC):
    """How codes lie in a file."""

    @abstractmethod
    def parts(self, shape_MN: tuple[int, int], grid: tuple[int, int]) -> dict[str, Part]:
        """The tensors of a weight, without those of its scales."""

    @abstractmethod
    def pack(self, codes_MN: Tensor, zero: Tensor | None) -> dict[str, Tensor]:
        """These tensors, from codes as values."""

    @abstractmethod
    def unpack(self, parts: Mapping[str, Tensor], shape_MN: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Codes as values, and their zero points.

        Raises:
            ValueError: What is stored beside the codes contradicts the shape.
        """


class Scales(ABC):
    """How scales lie in a file."""

    @abstractmethod
    def parts(self, grid: tuple[int, int]) -> dict[str, Part]:
        """The tensors of the scales of a weight."""

    @abstractmethod
    def pack(self, scale: Tensor, global_scale: Tensor | None) -> dict[str, Tensor]:
        """These tensors, from float32 multipliers.

        Raises:
            ValueError: The file cannot hold a scale exactly, which was rounded to what it holds before.
        """

    @abstractmethod
    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The float32 multipliers."""


class PlainCodes(Codes):
    """Codes as they are, one an element, in the place of the weight."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def parts(self, shape_MN: tuple[int, int], grid: tuple[int, int]) -> dict[str, Part]:
        """See `Codes.parts`."""
        return {CODES: Part("", self._dtype, shape_MN)}

    def pack(self, codes_MN: Tensor, zero: Tensor | None) -> dict[str, Tensor]:
        """See `Codes.pack`."""
        assert zero is None
        return {CODES: codes_MN}

    def unpack(self, parts: Mapping[str, Tensor], shape_MN: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """See `Codes.unpack`."""
        return parts[CODES], None
