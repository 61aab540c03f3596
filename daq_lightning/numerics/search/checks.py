"""What a search refuses, and in which words."""

from __future__ import annotations

import torch
from torch import Tensor

from daq_lightning.numerics.formats import Granularity
from daq_lightning.numerics.search.settings import ScaleSearch


def check_settings(granularity: object, search: object) -> None:
    """Raises TypeError for something else than a granularity and a search."""
    if not isinstance(granularity, Granularity):
        raise TypeError(
            "granularity must be PerTensor(), PerChannel() or PerBlock(rows, cols), "
            f"got {granularity!r}; the three are in daq_lightning."
        )
    if not isinstance(search, ScaleSearch):
        raise TypeError(f"search must be a ScaleSearch, got {search!r}; write ScaleSearch(metric=...).")


def check_inputs(weight: Tensor, base: Tensor, name: str) -> None:
    """Raises ValueError or TypeError, with the name of the weight, for what is no weight and its base."""
    for tensor, role in ((weight, "weight"), (base, "base")):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name}: {role} is a {type(tensor).__name__}, expected a torch.Tensor; convert it with "
                "torch.as_tensor(...)."
            )
        if tensor.layout != torch.strided:
            raise TypeError(
                f"{name}: {role} has the layout {tensor.layout}, expected a dense tensor; convert it with "
                ".to_dense()."
            )
    if weight.ndim != 2 or base.ndim != 2 or weight.numel() == 0:
        raise ValueError(
            f"{name}: expected a non-empty matrix (M, N) and its base, got shapes {tuple(weight.shape)} and "
            f"{tuple(base.shape)}; search the 2-D slices of a stacked weight one by one."
        )
    if weight.shape != base.shape:
        raise ValueError(
            f"{name}: weight has shape {tuple(weight.shape)}, its base {tuple(base.shape)}; "
            "pass the base that this weight was trained from."
        )
    if weight.device != base.device:
        raise ValueError(
            f"{name}: weight is on {weight.device}, its base on {base.device}; move one with .to()."
        )
    if weight.device.type == "meta":
        raise ValueError(
            f"{name}: weight and base are on the meta device and hold no values; load them first."
        )
    for tensor, role in ((weight, "weight"), (base, "base")):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(
                f"{name}: {role} has dtype {tensor.dtype}, expected float32, bfloat16 or float16; "
                "dequantize quantized weights first."
            )


def not_finite(tensor: Tensor, name: str) -> str:
    """The message about a tensor whose codes or sums are not finite."""
    nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    if nan + inf == 0:
        largest = float(tensor.abs().max())
        return f"{name}: values are too large for float32 sums (largest magnitude {largest:g})."
    return (
        f"{name} of shape {tuple(tensor.shape)} has {nan} NaN and {inf} Inf values; codes cannot hold them. "
        "The training run has diverged or the file is damaged: export an earlier checkpoint."
    )
