"""A checkpoint folder seen through a LoRA adapter: each weight is merged in float32 at the moment it is read.

    merged[name] = float32(weight) + scaling * B @ A        or the weight as it is, where the adapter does not touch it

Nothing is written and nothing is kept: merging a whole model into bfloat16 first would round a tenth of a typical
update away before the search sees it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.checkpoint.tensor_file import CheckpointError

if TYPE_CHECKING:
    from daq_lightning.checkpoint.adapter import AdapterFolder
    from daq_lightning.checkpoint.buffers import Buffers


class AdaptedCheckpoint(Checkpoint):
    """A folder whose tensors come with an adapter merged in. Names, dtypes and shapes are those of the folder.

    Args:
        path: The folder that the adapter was trained on.
        adapter: The adapter.
        tied: Groups of names that are one tensor in the model.
        dtype: Of dequantized weights; see `Checkpoint`.

    Raises:
        CheckpointError: As for `Checkpoint`, or the adapter changes a tensor that the folder lacks, or one of two that
            are tied.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        adapter: AdapterFolder,
        tied: Sequence[Sequence[str]] = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(path, dtype)
        self._adapter = adapter
        unused = sorted(adapter.unused(self.specs))
        if unused:
            more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
            raise CheckpointError(
                f"The adapter changes {', '.join(unused[:3])}{more}, which {self.path} does not have: pass the model "
                "that the adapter was trained on."
            )
        apart = sorted(adapter.unties(tied))
        if apart:
            raise CheckpointError(
                f"The adapter changes {', '.join(apart)}, which config.json ties to a weight that it does not change "
                "in the same way: the two can no longer be one tensor. Merge it with PEFT into a model with "
                "tie_word_embeddings=False, save that, and pass it as the fine-tuned model."
            )

    @property
    def places(self) -> tuple[Path, ...]:
        """The folder, and that of the adapter."""
        return (self.path, self._adapter.path)

    def read(self, name: str, buffers: Buffers | None = None) -> Tensor:
        """One tensor with the adapter merged in, in float32; as it is where the adapter leaves it alone."""
        weight = super().read(name, buffers)
        merged = self._adapter.merged(name, weight)
        return weight if merged is None else merged
