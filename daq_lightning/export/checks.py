"""What is looked at before anything is computed: a device that is there, numbers that are finite."""

from __future__ import annotations

import torch
from torch import Tensor


def check_finite(tensor: Tensor, name: str) -> None:
    """Raises ValueError, by name, for a tensor with NaN or Inf."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    low, high = tensor.detach().aminmax()
    if not bool(low.isfinite() & high.isfinite()):
        raise ValueError(
            f"{name} has {int(tensor.isnan().sum())} NaN and {int(tensor.isinf().sum())} Inf values: the "
            "training run has diverged or the file is damaged. Export an earlier checkpoint."
        )


def check_device(device: str | torch.device | None) -> None:
    """Raises ValueError for a device that does not exist here or does not compute, such as "meta"."""
    if device is None:
        return
    try:
        torch.ones(1, dtype=torch.float32, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error
