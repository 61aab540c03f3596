"""The loss that rounding with curvature makes small, of any codes: tr(E^T H_out E H_in), E = Q - W.

Legend: M out, N in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daq_lightning.numerics.quantize import dequantize, quantize
from daq_lightning.numerics.rounding.walk import RoundingTask, sides


def loss_of(task: RoundingTask, codes_MN: Tensor, dtype: torch.dtype) -> float:
    """tr(E^T H_out E H_in) of any codes, by two matrix products in a dtype and a sum in float64."""
    inputs, outputs = sides(task, dtype)
    error_MN = task.weight.float() - dequantize(codes_MN, task.scale, task.granularity, zero=task.zero)
    error_MN = error_MN.to(dtype)[outputs.order][:, inputs.order]
    rest_MN = (outputs.unit_upper.T @ (error_MN @ inputs.unit_upper)).double()
    return float(outputs.diagonal @ rest_MN.square() @ inputs.diagonal)


def nearest_loss(task: RoundingTask, dtype: torch.dtype) -> float:
    """`loss_of` nearest rounding."""
    codes_MN = quantize(task.weight, task.scale, task.granularity, task.format, task.zero)
    return loss_of(task, codes_MN, dtype)
