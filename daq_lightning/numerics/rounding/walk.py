"""What a walk over a weight takes and gives; the same for the definition, its blocked twin and the C++.

Legend: M out, N in, of a weight; K the size of one side, M or N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from daq_lightning.numerics.formats import Format, Granularity


@dataclass(frozen=True, kw_only=True)
class Factor:
    """The curvature of one side of a weight: ``H[order][:, order] = A diag(d) A^T``.

    Attributes:
        order: Which row or column of the weight comes first, second, ...: int64, shape (K,).
        unit_upper: A, unit upper triangular: float32, shape (K, K).
        diagonal: d, positive: float64, shape (K,).
    """

    order: Tensor
    unit_upper: Tensor
    diagonal: Tensor


@dataclass(frozen=True, kw_only=True)
class RoundingTask:
    """What is to be rounded, and along which curvature.

    Attributes:
        weight: float32, bfloat16 or float16, shape (M, N), finite and not empty.
        scale: float32, shape ``granularity.grid((M, N))``.
        granularity: Which elements share a scale.
        format: Of the codes.
        inputs: The curvature of the columns; None: the identity.
        outputs: The curvature of the rows; None: the identity.
        zero: int8, of the shape of the scale, for a format with zero points.
    """

    weight: Tensor
    scale: Tensor
    granularity: Granularity
    format: Format
    inputs: Factor | None
    outputs: Factor | None
    zero: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)."""
        return (self.weight.shape[0], self.weight.shape[1])


class Walked(NamedTuple):
    """What came of a task.

    Attributes:
        codes: Of the format, shape (M, N).
        loss: tr(E^T H_out E H_in) of the codes.
        nearest_loss: The same of nearest rounding; where only a part of it was measured, which alone is more
            than `loss`, extrapolated.
        nearest_measured: That part of it, in (0, 1].
    """

    codes: Tensor
    loss: float
    nearest_loss: float
    nearest_measured: float


class Side(NamedTuple):
    """One side as a walk uses it: which index comes first, which row of scales it has, A and d."""

    order: Tensor
    group: Tensor
    unit_upper: Tensor
    diagonal: Tensor


def sides(task: RoundingTask, dtype: torch.dtype) -> tuple[Side, Side]:
    """Inputs and outputs of a task; None becomes the identity in its natural order."""
    cell_rows, cell_cols = task.granularity.cell(task.shape)
    device = task.weight.device

    def side(factor: Factor | None, size: int, cell: int) -> Side:
        if factor is None:
            factor = identity(size, device)
        return Side(factor.order, factor.order // cell, factor.unit_upper.to(dtype), factor.diagonal)

    return side(task.inputs, task.shape[1], cell_cols), side(task.outputs, task.shape[0], cell_rows)


def identity(size: int, device: torch.device) -> Factor:
    """The factor of I, in natural order."""
    return Factor(
        order=torch.arange(size, dtype=torch.int64, device=device),
        unit_upper=torch.eye(size, dtype=torch.float32, device=device),
        diagonal=torch.ones(size, dtype=torch.float64, device=device),
    )
