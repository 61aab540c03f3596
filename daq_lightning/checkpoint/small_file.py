"""A safetensors file written at once, of tensors that are in memory: adapters, statistics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from daq_lightning.checkpoint.flat_bytes import tensor_bytes
from daq_lightning.checkpoint.tensor_file import make_header, spec_of


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a whole safetensors file of CPU tensors, in the order and under the names given."""
    specs = [spec_of(name, tensor) for name, tensor in tensors.items()]
    header, _ = make_header(specs, path)
    with open(path, "wb") as file:
        file.write(header)
        for tensor in tensors.values():
            file.write(tensor_bytes(tensor))
