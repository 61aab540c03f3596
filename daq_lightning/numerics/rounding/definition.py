"""Rounding with curvature, to be read: element by element, in float64. `blocked` is its fast twin.

    R_ij = sum_{j' < j} e_ij' A_in[j', j]                       feedback along the row
    C_ij = sum_{i' < i} (e_i'j + R_i'j) A_out[i', i]            feedback down the column
    Q_ij = nearest(W_ij + R_ij + C_ij)                          e_ij = W_ij - Q_ij
    loss = sum_ij d_out_i d_in_j (e_ij + R_ij + C_ij)^2

i and j walk upward in the order of the curvature. ``e + R + C`` is (A_out^T (W - Q) A_in)_ij, and the only
term of the loss that is left to choose when Q_ij is: nearest makes it as small as the grid allows. Rows alone
(A_out = I) are GPTQ.

Legend: M out, N in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daq_lightning.numerics.encode import encode
from daq_lightning.numerics.formats import Format
from daq_lightning.numerics.rounding.loss import nearest_loss
from daq_lightning.numerics.rounding.walk import RoundingTask, Walked, sides


def walk(task: RoundingTask) -> Walked:
    """See `daq_lightning.numerics.rounding.walk`."""
    (columns, groups_N, a_in, d_in), (rows, groups_M, a_out, d_out) = sides(task, torch.float64)
    weight_MN = task.weight.double()[rows][:, columns]
    scale_MN = task.scale[groups_M][:, groups_N]
    zero_MN = None if task.zero is None else task.zero[groups_M][:, groups_N].float()
    error_MN, moved_MN = torch.zeros_like(weight_MN), torch.zeros_like(weight_MN)
    codes_MN = torch.empty_like(weight_MN, dtype=task.format.dtype)
    loss = weight_MN.new_zeros(())
    for i in range(len(rows)):
        for j in range(len(columns)):
            along = error_MN[i, :j] @ a_in[:j, j]
            down = moved_MN[:i, j] @ a_out[:i, i]
            wanted = weight_MN[i, j] + along + down
            zero = None if zero_MN is None else zero_MN[i, j]
            codes_MN[i, j], value = nearest(wanted, scale_MN[i, j], task.format, zero)
            error_MN[i, j] = weight_MN[i, j] - value
            moved_MN[i, j] = error_MN[i, j] + along
            loss += d_out[i] * d_in[j] * (moved_MN[i, j] + down) ** 2
    codes = torch.empty_like(codes_MN)
    codes.view(torch.uint8)[rows[:, None], columns] = codes_MN.view(torch.uint8)
    return Walked(codes, float(loss), nearest_loss(task, torch.float64), 1.0)


def nearest(wanted: Tensor, scale: Tensor, fmt: Format, zero: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The code of the package's one rounding, and its value under the scale in float32."""
    code = encode(wanted.float() * scale.reciprocal(), fmt, zero)
    return code, (code.float() if zero is None else code - zero) * scale
