"""The bytes of a tensor, for files, fingerprints and messages between ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def flat_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in row-major order: uint8, one dimension; a view where it is contiguous.

    A tensor of one element counts as contiguous whatever its stride, `reshape` keeps that stride, and
    `Tensor.view(dtype)` then refuses it: hence a stride that is set.

    Example:
        >>> column = torch.tensor([[1, 2], [3, 4]], dtype=torch.int16)[:1, ::2]
        >>> flat_bytes(column)
        tensor([1, 0], dtype=torch.uint8)
    """
    if not tensor.numel():
        return torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return tensor.detach().contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor in row-major order, without a copy where it is contiguous."""
    flat = flat_bytes(tensor)
    return flat.numpy().data if flat.numel() else memoryview(b"")
