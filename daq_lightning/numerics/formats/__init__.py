"""What a number format, a granularity and a scale format are: data, and what follows from it.

A weight is stored as codes of a `Format` and one scale per group of elements; the granularity says which
elements share a scale. A scale MULTIPLIES to dequantize: ``weight = code * scale``. A format is one file
beside this one: search, rounding and kernels take all they need from it.

Nothing here needs torch to be imported.

Legend: M out, N in, G groups.

Sources: arXiv 2603.22324, section 3.1 (block 128 and per channel); https://docs.vllm.ai (power-of-two scales,
    "ue8m0").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Format:
    """A grid of numbers, symmetric but for its ends: that of a small floating point format, or of integers.

    Integers up to 2^k are such a grid too: all of them are below or in the first binade, [2^(k - 1), 2^k),
    where the step is 1.

    Attributes:
        dtype_name: Of the torch dtype that holds the codes in memory, as their values: a code times its scale
            is the weight. Files may pack them tighter.
        max: Largest value; what is larger saturates to it.
        min_normal: Smallest normal number, a power of two. Below it the grid is even, with step
            ``min_normal / 2^mantissa_bits``.
        mantissa_bits: Explicit bits of the significand.
        lowest: Smallest value; None stands for -max.
        reach: What plain quantization maps the largest magnitude of a group to; None stands for max. Integers
            reach half a step beyond their largest. With zero points: what it maps the range to.
        bits: Of a code in a file.
        zero_point: Whether each group has a code that stands for 0, of integers only: the weight is ``(code -
            zero) * scale``, and plain quantization maps the group's smallest and largest weight to the ends.
    """

    dtype_name: str
    max: float
    min_normal: float
    mantissa_bits: int
    lowest: float | None = None
    reach: float | None = None
    bits: int = 8
    zero_point: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype that holds the codes."""
        import torch  # here, so that settings which name a format do without it

        return getattr(torch, self.dtype_name)

    @property
    def low(self) -> float:
        """Smallest value; what is smaller saturates to it."""
        return -self.max if self.lowest is None else self.lowest

    @property
    def reached(self) -> float:
        """What plain quantization maps the largest magnitude of a group to."""
        return self.max if self.reach is None else self.reach


ScaleFormat: TypeAlias = Literal["float32", "bfloat16", "ue8m0", "e4m3"]
"""How a reader keeps a scale: float32, rounded to bfloat16, a power of two, or a value of E4M3 divided by one
global scale of the weight."""

SCALE_FORMATS: tuple[str, ...] = get_args(ScaleFormat)

SMALLEST_SCALE = 2.0**-126
"""Smallest normal float32: below it the reciprocal of a scale would overflow."""


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole weight; scale shape (1, 1)."""

    def grid(self, shape_MN: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scale tensor of a weight of this shape."""
        return (min(shape_MN[0], 1), min(shape_MN[1], 1))

    def cell(self, shape_MN: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of one group."""
        return shape_MN


@dataclass(frozen=True)
class PerChannel:
    """One scale per output row; scale shape (M, 1)."""

    def grid(self, shape_MN: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scale tensor of a weight of this shape."""
        return (shape_MN[0], min(shape_MN[1], 1))

    def cell(self, shape_MN: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of one group."""
        return (1, shape_MN[1])


@dataclass(frozen=True)
class PerBlock:
    """One scale per block of `rows` x `cols`; scale shape (ceil(M / rows), ceil(N / cols)).

    The last blocks of a weight whose size is not a multiple are smaller ("ragged").
    """

    rows: int = 128
    cols: int = 128

    def __post_init__(self) -> None:
        if not isinstance(self.rows, int) or not isinstance(self.cols, int):
            raise TypeError(
                f"PerBlock needs whole numbers of rows and columns, got {self.rows} x {self.cols}."
            )
        if self.rows < 1 or self.cols < 1:
            raise ValueError(f"PerBlock needs rows and cols of at least 1, got {self.rows} x {self.cols}.")

    def grid(self, shape_MN: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scale tensor of a weight of this shape."""
        return (-(-shape_MN[0] // self.rows), -(-shape_MN[1] // self.cols))

    def cell(self, shape_MN: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of one group."""
        return (self.rows, self.cols)


Granularity: TypeAlias = PerTensor | PerChannel | PerBlock
