"""The weights of an export that is written and not yet published, as its servers compute with them.

    quantized    float32(code) * scale      what kernels of the format multiply with
    kept         as the file holds it

Read from the very files, one tensor at a time: what a validation sees is what will be served.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from daq_lightning.checkpoint.manifest import KEPT
from daq_lightning.checkpoint.tensor_file import read_header
from daq_lightning.numerics.quantize import dequantize

if TYPE_CHECKING:
    from daq_lightning.export.plan import ExportPlan


class WrittenWeights(Mapping[str, Tensor]):
    """Checkpoint name -> weight, read and dequantized when asked for.

    Args:
        plan: Of the export.
        folder: Where its files lie.
        files: Their names.
        device: Where a weight is dequantized.

    Raises:
        CheckpointError: A file is not there, or not complete.
    """

    def __init__(
        self, plan: ExportPlan, folder: Path, files: Iterable[str], device: torch.device | str = "cpu"
    ) -> None:
        self.plan = plan
        self._tensors = {tensor.spec.name: tensor for tensor in plan.tensors}
        self._entries = {name: entry for file in files for name, entry in read_header(folder / file).items()}
        self._device = device

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        parts = {
            part: self._entries[spec.name].read().to(self._device) for part, spec in tensor.stored.items()
        }
        if not tensor.quantize:
            return parts[KEPT]
        layout = self.plan.layout
        unpacked = layout.unpack(parts, tensor.spec.shape)
        return dequantize(unpacked.codes, unpacked.scale, layout.granularity, torch.float32, unpacked.zero)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
