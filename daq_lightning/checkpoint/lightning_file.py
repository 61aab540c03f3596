"""The weights of a Lightning `.ckpt` file, whatever else it holds: read as data, nothing in it is executed.

`torch.load(weights_only=True)` refuses a file that names any class it does not know, so one Path among the
hyperparameters would make the weights unreadable. Here the archive is read by `torch_archive`, which
imports and calls nothing that it names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from daq_lightning.checkpoint.sharded_file import ShardedFile, is_sharded_file
from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.checkpoint.torch_archive import DAMAGED, read_archive


def read_lightning_checkpoint(path: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    """The tensors of a Lightning checkpoint, memory-mapped, or read when asked for.

    Args:
        path: A `.ckpt` file, whose hyperparameters and callbacks may hold any objects; or the folder that a
            sharded strategy writes.

    Returns:
        Name -> tensor, of what the `state_dict` in the file holds. Sparse, quantized and distributed tensors,
        and what is not a tensor, are left out.

    Raises:
        CheckpointError: Not a file that `torch.save` wrote, cut off, or without a `state_dict`.
    """
    if is_sharded_file(path):
        return ShardedFile(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = read_archive(file, lambda: torch.UntypedStorage.from_file(os.fspath(path), False, size))
    except DAMAGED as error:
        what = (str(error).strip() or type(error).__name__).rstrip(".")
        raise CheckpointError(
            f"{path} cannot be read: {what}. Expected a complete checkpoint file that Lightning's Trainer "
            "wrote."
        ) from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path} has no state_dict: expected a checkpoint file that Lightning's Trainer wrote."
        )
    return {
        name: tensor for name, tensor in state.items() if isinstance(name, str) and isinstance(tensor, Tensor)
    }
