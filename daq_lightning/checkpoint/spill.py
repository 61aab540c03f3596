"""Rows of numbers that are too many for memory: written to a temporary folder, read again in pieces.

A file for each name holds its rows one after the other, as raw bytes. The folder lies where the system keeps
temporary files (TMPDIR) and goes with the `with` block, also after an error.

Legend: R rows, N entries of a row.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from daq_lightning.checkpoint.flat_bytes import tensor_bytes


class Spill:
    """Rows under names, on disk, for as long as a `with` block lasts.

    Example:
        >>> with Spill() as spill:
        ...     spill.append("a", torch.tensor([[1.0, 2.0]]))
        ...     spill.append("a", torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
        ...     spill.read("a", 1, 3)
        tensor([[3., 4.],
                [5., 6.]])
    """

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._kinds: dict[str, tuple[int, torch.dtype]] = {}

    def __enter__(self) -> Spill:
        self._folder = tempfile.TemporaryDirectory(prefix="daq-lightning-")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._folder is not None
        self._folder.cleanup()
        self._folder = None

    def append(self, name: str, rows_RN: Tensor) -> None:
        """Writes rows behind those that the name has; all have one width and dtype.

        Raises:
            OSError: The disk is full.
        """
        kind = rows_RN.shape[1], rows_RN.dtype
        assert self._kinds.setdefault(name, kind) == kind
        with open(self._file(name), "ab") as file:
            file.write(tensor_bytes(rows_RN.detach().cpu().contiguous()))

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """The rows from start to stop of a name, in memory of their own, on the CPU."""
        width, dtype = self._kinds[name]
        rows_RN = torch.empty(stop - start, width, dtype=dtype, device="cpu")
        if not rows_RN.numel():
            return rows_RN
        with open(self._file(name), "rb") as file:
            file.seek(start * width * dtype.itemsize)
            count = file.readinto(tensor_bytes(rows_RN))
        assert count == rows_RN.nbytes, f"{count} of {rows_RN.nbytes} bytes of {name}"
        return rows_RN

    def _file(self, name: str) -> Path:
        assert self._folder is not None, "a Spill is used inside its with block"
        return Path(self._folder.name) / name
