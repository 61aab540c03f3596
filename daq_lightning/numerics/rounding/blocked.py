"""Rounding with curvature in tiles, for any device: `definition` with matrix products for the sums.

    tile (I, J) of B x B     R = E[I, :J] A_in[:J, J]        C = A_out[:I, I]^T (E + R)[:I, J]
    element (i, j) of it     R[i, j:] += e_ij A_in[j, j:]    C[i:, j] += (e_ij + R_ij) A_out[i, i:]

Tiles with the same I + J are independent, and so are elements with the same i + j: all elements of all tiles
on both diagonals are rounded at once, so a weight takes ``2 (M + N)`` steps whatever the size of a tile.

Sums are float32 here and float64 in the definition: where that decides a tie the codes differ from there on,
and the loss does not.

Legend: M out, N in, B size of a tile, T tiles on a diagonal, D elements on one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from daq_lightning.numerics.rounding.definition import nearest
from daq_lightning.numerics.rounding.loss import nearest_loss
from daq_lightning.numerics.rounding.walk import RoundingTask, Side, Walked, sides

BLOCK = 64


def walk(task: RoundingTask) -> Walked:
    """See `daq_lightning.numerics.rounding.walk`."""
    inputs, outputs = (_filled(side) for side in sides(task, torch.float32))
    (columns, groups_N, a_in, d_in), (rows, groups_M, a_out, d_out) = inputs, outputs
    weight_MN = _filled_weight(task, rows, columns)
    scale_MN = task.scale[groups_M][:, groups_N]
    zero_MN = None if task.zero is None else task.zero[groups_M][:, groups_N].float()
    codes_MN = torch.empty_like(weight_MN, dtype=task.format.dtype)
    error_MN, moved_MN = torch.zeros_like(weight_MN), torch.zeros_like(weight_MN)
    loss = torch.zeros((), dtype=torch.float64, device=weight_MN.device)
    down, across = len(rows) // BLOCK, len(columns) // BLOCK
    for diagonal in range(down + across - 1):
        tiles = [(i, diagonal - i) for i in range(max(0, diagonal - across + 1), min(diagonal + 1, down))]
        cuts = [(_cut(i), _cut(j)) for i, j in tiles]
        along = torch.stack([error_MN[i, : j.start] @ a_in[: j.start, j] for i, j in cuts])
        below = torch.stack([a_out[: i.start, i].T @ moved_MN[: i.start, j] for i, j in cuts])
        codes, error, moved, rest = _walk_tiles(
            task,
            torch.stack([weight_MN[cut] for cut in cuts]),
            torch.stack([scale_MN[cut] for cut in cuts]),
            None if zero_MN is None else torch.stack([zero_MN[cut] for cut in cuts]),
            torch.stack([a_in[j, j] for _, j in cuts]).triu(1),
            torch.stack([a_out[i, i] for i, _ in cuts]).triu(1),
            along,
            below,
        )
        for tile, (i, j) in enumerate(cuts):
            codes_MN[i, j], error_MN[i, j], moved_MN[i, j] = codes[tile], error[tile], moved[tile]
            loss += d_out[i] @ rest[tile].double().square() @ d_in[j]
    codes = torch.empty(task.shape, dtype=task.format.dtype, device=weight_MN.device)
    kept = codes_MN.view(torch.uint8)[: task.shape[0], : task.shape[1]]
    codes.view(torch.uint8)[rows[: task.shape[0], None], columns[: task.shape[1]]] = kept
    return Walked(codes, float(loss), nearest_loss(task, torch.float32), 1.0)


def _walk_tiles(
    task: RoundingTask,
    weight_TBB: Tensor,
    scale_TBB: Tensor,
    zero_TBB: Tensor | None,
    a_in_TBB: Tensor,
    a_out_TBB: Tensor,
    along_TBB: Tensor,
    down_TBB: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, e, e + R and e + R + C of tiles that are independent; A without its diagonal of 1."""
    codes_TBB = torch.empty_like(weight_TBB, dtype=task.format.dtype)
    error_TBB, moved_TBB = torch.empty_like(weight_TBB), torch.empty_like(weight_TBB)
    index = torch.arange(BLOCK, dtype=torch.int64, device=weight_TBB.device)
    for diagonal in range(2 * BLOCK - 1):
        i = index[max(0, diagonal - BLOCK + 1) : diagonal + 1]
        j = diagonal - i
        weight_TD, along_TD, down_TD = weight_TBB[:, i, j], along_TBB[:, i, j], down_TBB[:, i, j]
        wanted_TD = weight_TD + (along_TD + down_TD)
        zero_TD = None if zero_TBB is None else zero_TBB[:, i, j]
        code_TD, value_TD = nearest(wanted_TD, scale_TBB[:, i, j], task.format, zero_TD)
        error_TD = weight_TD - value_TD
        moved_TD = error_TD + along_TD
        codes_TBB.view(torch.uint8)[:, i, j] = code_TD.view(torch.uint8)
        error_TBB[:, i, j], moved_TBB[:, i, j] = error_TD, moved_TD
        along_TBB[:, i] += error_TD[:, :, None] * a_in_TBB[:, j]
        down_TBB[:, :, j] += (moved_TD[:, :, None] * a_out_TBB[:, i]).transpose(1, 2)
    return codes_TBB, error_TBB, moved_TBB, moved_TBB + down_TBB


def _cut(block: int) -> slice:
    return slice(block * BLOCK, (block + 1) * BLOCK)


def _filled(side: Side) -> Side:
    """Up to whole tiles, with the identity, which feeds nothing back and counts nowhere."""
    more = -len(side.order) % BLOCK
    upper = pad(side.unit_upper, (0, more, 0, more))
    order, group, diagonal = (pad(x, (0, more)) for x in (side.order, side.group, side.diagonal))
    return Side(order, group, upper, diagonal)


def _filled_weight(task: RoundingTask, rows: Tensor, columns: Tensor) -> Tensor:
    m, n = task.shape
    weight_MN = task.weight[rows[:m]][:, columns[:n]].float()
    return pad(weight_MN, (0, len(columns) - n, 0, len(rows) - m))
