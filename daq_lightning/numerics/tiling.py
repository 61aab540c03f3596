"""From a weight to its groups, ``weight_MN -> groups_GE``, and where to cut it into pieces of whole groups.

A group is the set of elements that share a scale. Groups are numbered row by row of the scale tensor. A
ragged block is filled up with zeros; a zero weight over a zero base adds to no sum except the number of equal
signs, from which `group_sizes` takes the filling away again.

Legend: M out, N in, G groups, E elements in a (filled) group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from daq_lightning.numerics.formats import Granularity, PerBlock, PerTensor


class Box(NamedTuple):
    """Rows from `top` up to `bottom`, columns from `left` up to `right`."""

    top: int
    bottom: int
    left: int
    right: int

    def within(self, weight_MN: Tensor, origin: Box) -> Tensor:
        """These rows and columns of a tensor that holds those of `origin`."""
        rows = slice(self.top - origin.top, self.bottom - origin.top)
        return weight_MN[rows, self.left - origin.left : self.right - origin.left]


def to_groups(weight_MN: Tensor, granularity: Granularity) -> Tensor:
    """Rearranges a weight into groups.

    Args:
        weight_MN: Any dtype, shape (M, N).
        granularity: Which elements share a scale.

    Returns:
        groups_GE. A view where the layout allows it (rows, whole tensor), else one copy.
    """
    shape_MN = (weight_MN.shape[0], weight_MN.shape[1])
    (grid_rows, grid_cols), (rows, cols) = granularity.grid(shape_MN), granularity.cell(shape_MN)
    pad_rows, pad_cols = grid_rows * rows - shape_MN[0], grid_cols * cols - shape_MN[1]
    if pad_rows or pad_cols:
        filled_MN = weight_MN.new_zeros(grid_rows * rows, grid_cols * cols)
        filled_MN[: shape_MN[0], : shape_MN[1]] = weight_MN
        weight_MN = filled_MN
    blocks = weight_MN.reshape(grid_rows, rows, grid_cols, cols).transpose(1, 2)
    return blocks.reshape(grid_rows * grid_cols, rows * cols)


def group_sizes(
    shape_MN: tuple[int, int], granularity: Granularity, device: torch.device | str = "cpu"
) -> Tensor:
    """Number of real elements in each group: int64, shape (G,)."""
    (grid_rows, grid_cols), (rows, cols) = granularity.grid(shape_MN), granularity.cell(shape_MN)
    height = (shape_MN[0] - rows * torch.arange(grid_rows, dtype=torch.int64, device=device)).clamp(max=rows)
    width = (shape_MN[1] - cols * torch.arange(grid_cols, dtype=torch.int64, device=device)).clamp(max=cols)
    return (height[:, None] * width[None, :]).flatten()


def bands(shape_MN: tuple[int, int], granularity: Granularity, elements: int) -> Iterator[slice]:
    """Cuts the rows of a weight into bands of whole groups, of about `elements` elements, or one group.

    Yields:
        Row slices. The bands of `PerTensor` are the whole weight.
    """
    rows = shape_MN[0] if isinstance(granularity, PerTensor) else granularity.cell(shape_MN)[0]
    step = max(1, elements // max(1, rows * shape_MN[1])) * max(1, rows)
    for start in range(0, shape_MN[0], step):
        yield slice(start, min(start + step, shape_MN[0]))


def patches(
    shape_MN: tuple[int, int], granularity: Granularity, elements: int
) -> Iterator[tuple[tuple[slice, slice], slice]]:
    """Cuts a weight into patches of whole groups, of about `elements` elements each (at least one group).

    Yields:
        Rows and columns of a patch, and its groups, which follow those of the patch before. A patch spans all
        columns unless a single row of blocks has more elements than that.
    """
    start, (_, cell_cols) = 0, granularity.cell(shape_MN)
    for rows in bands(shape_MN, granularity, elements):
        height = rows.stop - rows.start
        grid_rows, grid_cols = granularity.grid((height, shape_MN[1]))
        step = grid_cols if grid_rows > 1 else max(1, elements // (height * cell_cols))
        for first in range(0, grid_cols, step):
            columns = slice(first * cell_cols, min((first + step) * cell_cols, shape_MN[1]))
            stop = start + grid_rows * (min(first + step, grid_cols) - first)
            yield (rows, columns), slice(start, stop)
            start = stop


def scale_of_rows(scale: Tensor, rows: slice, shape_MN: tuple[int, int], granularity: Granularity) -> Tensor:
    """The scales of some rows of a weight, so that they broadcast against ``weight_MN[rows]``."""
    if isinstance(granularity, PerTensor):
        return scale
    if isinstance(granularity, PerBlock):
        block_rows = (
            torch.arange(rows.start, rows.stop, dtype=torch.int64, device=scale.device) // granularity.rows
        )
        return scale[block_rows].repeat_interleave(granularity.cols, 1)[:, : shape_MN[1]]
    return scale[rows]


def extremes(weight_MN: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """The smallest and largest of each group's weights and 0: float32, shape ``granularity.grid((M, N))``."""
    shape_MN = (weight_MN.shape[0], weight_MN.shape[1])
    parts = []
    for rows in bands(shape_MN, granularity, elements=max(1 << 18, weight_MN.numel() // 16)):
        groups_GE = to_groups(weight_MN[rows], granularity)
        smallest_G, largest_G = groups_GE.amin(1).float(), groups_GE.amax(1).float()
        parts.append(torch.stack([smallest_G.clamp(max=0), largest_G.clamp(min=0)]))
    smallest, largest = torch.cat(parts, 1).reshape(2, *granularity.grid(shape_MN))
    return smallest, largest
