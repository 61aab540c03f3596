"""A few whole groups of a weight, for figures that look at single elements: the same ones every time.

    group p of the grid, p = stride / 2, stride 3 / 2, ...    ->    row p // J, column (p + 0.618 J row) mod J

Whole groups, because only of a whole group the plain (absmax) scale is known. The columns turn from row to
row, so that a few blocks of a large weight do not all lie below each other. Which groups are taken depends on
the shape alone: not on threads, ranks, batches or a seed.

Legend: M out, N in, S groups of the sample, E elements of a group, I x J grid of groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from daq_lightning.numerics.formats import Granularity

MOST_ELEMENTS = (1 << 15) - 1
"""Of a sample; a group that has more is taken alone. Up to here torch computes in the calling thread, and to
wake others for so little takes longer than the work: 12 ms on a busy machine, for what is done in 0.1 ms."""
_SHARE = 64  # of a weight, one element in so many


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Which groups of a weight are looked at.

    Attributes:
        cells: Row and column of each group in the grid, in file order. All are of one size: ragged groups
            are left out unless there are no others.
        height: Rows of a group.
        width: Columns of a group.
        columns: Columns of the grid.
        stride: From one group to the next, in the order of the grid before columns turn.
    """

    cells: tuple[tuple[int, int], ...]
    height: int
    width: int
    columns: int
    stride: int

    @property
    def elements(self) -> int:
        """How many elements are looked at."""
        return len(self.cells) * self.height * self.width

    def of_weight(self, weight_MN: Tensor) -> Tensor:
        """The elements of the groups, of any tensor of the weight's shape: ``weight_SE``."""
        if self.height == 1 and self.width == weight_MN.shape[1]:  # evenly spaced rows: a view, one copy
            (first, _), stride = self.cells[0], self.stride
            return weight_MN[first::stride][: len(self.cells)].contiguous()
        if self.height == 1:  # many small groups
            whole = weight_MN.shape[1] // self.width
            rows_S, columns_S = torch.tensor(self.cells, dtype=torch.int64, device=weight_MN.device).T
            return weight_MN[:, : whole * self.width].unflatten(1, (whole, self.width))[rows_S, columns_S]
        blocks = [
            weight_MN[
                row * self.height : (row + 1) * self.height, column * self.width : (column + 1) * self.width
            ]
            for row, column in self.cells
        ]
        return torch.stack([block.reshape(-1) for block in blocks])

    def of_groups(self, values_G: Tensor) -> Tensor:
        """What belongs to the groups, of numbers of all groups in the order of the grid: ``values_S``."""
        return values_G[[row * self.columns + column for row, column in self.cells]]


def sample_of(shape_MN: tuple[int, int], granularity: Granularity) -> Sample:
    """The sample of a weight: one element in 64, at most 32,767, and at least one group.

    Args:
        shape_MN: Of the weight; not empty.
        granularity: Which elements share a scale.

    Example:
        >>> from daq_lightning.numerics.formats import PerBlock
        >>> sample_of((1024, 2048), PerBlock(128, 128)).cells
        ((4, 8),)
    """
    rows, cols = granularity.cell(shape_MN)
    height, width = min(rows, shape_MN[0]), min(cols, shape_MN[1])
    grid_rows, grid_cols = shape_MN[0] // height, shape_MN[1] // width
    count, cells = grid_rows * grid_cols, []
    wanted = min(MOST_ELEMENTS, shape_MN[0] * shape_MN[1] // _SHARE) // (height * width)
    stride = count // max(1, min(count, wanted))
    turn = round(0.618 * grid_cols)
    for index in range(stride // 2, count, stride)[: max(1, wanted)]:
        row, column = divmod(index, grid_cols)
        cells.append((row, (column + turn * row) % grid_cols))
    return Sample(
        cells=tuple(cells),
        height=height,
        width=width,
        columns=granularity.grid(shape_MN)[1],
        stride=stride,
    )
