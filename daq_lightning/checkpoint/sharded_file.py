"""The weights of a sharded Lightning checkpoint: a folder `.ckpt` of torch.distributed.checkpoint.

    .metadata         a pickle: what tensors there are, and where their pieces lie
    __<rank>_*.distcp the pieces
    meta.pt           everything else (loops, callbacks), which is not read here

A tensor is read when it is asked for, its pieces put together, by any single process. The metadata is a
pickle and foreign input: only the classes that torch writes into it are made, anything else is refused before
it is imported.

Source: torch 2.13 `torch.distributed.checkpoint` (`FileSystemReader`, `metadata`); lightning 2.6
`ModelParallelStrategy.save_checkpoint` (the prefix "state_dict.").
"""

from __future__ import annotations

import contextlib
import os
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daq_lightning.checkpoint.tensor_file import CheckpointError, DescribedTensors, TensorSpec

_METADATA, _PREFIX = ".metadata", "state_dict."
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip


def is_sharded_file(path: str | os.PathLike[str]) -> bool:
    """Whether a path is such a folder."""
    return (Path(path) / _METADATA).is_file()


class ShardedFile(DescribedTensors):
    """The `state_dict` in a sharded checkpoint: name -> tensor, read when asked for.

    Args:
        path: The folder.

    Raises:
        CheckpointError: It is not one, is cut off, or its metadata names what torch never writes.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        with self._explained(), open(self._path / _METADATA, "rb") as file:
            metadata = _Metadata(file).load()
            found = metadata.state_dict_metadata.items()
            self.specs = {
                name.removeprefix(_PREFIX): TensorSpec(
                    name=name.removeprefix(_PREFIX), dtype=entry.properties.dtype, shape=tuple(entry.size)
                )
                for name, entry in found
                if name.startswith(_PREFIX) and hasattr(entry, "size")
            }
        if not self.specs:
            raise CheckpointError(
                f"{path} has no state_dict: expected a checkpoint folder that Lightning's Trainer wrote."
            )
        self._metadata = metadata

    def __getitem__(self, name: str) -> Tensor:
        import torch.distributed.checkpoint as dcp

        spec = self.specs[name]
        reader = dcp.FileSystemReader(self._path)
        reader.read_metadata = lambda *_, **__: self._metadata  # type: ignore[method-assign]  checked above
        with self._explained(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")  # it is not needed
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device="cpu")
            dcp.load({_PREFIX + name: tensor}, storage_reader=reader, no_dist=True)
        return tensor

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except BaseException as error:  # torch's own is not an Exception
            failures = getattr(error, "failures", None)
            if failures is None and not isinstance(error, Exception):
                raise
            cause = next(iter(failures.values()))[0] if failures else error
            what = (str(cause).strip().splitlines() or [type(cause).__name__])[0][:300]
            raise CheckpointError(
                f"{self._path} cannot be read: {what.rstrip('.')}. Expected a complete checkpoint folder "
                "that Lightning's Trainer wrote with ModelParallelStrategy or FSDPStrategy."
            ) from error


class _Metadata(pickle.Unpickler):
    """Makes what torch writes into `.metadata`, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        known = name in _CLASSES.get(module, ())
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not (known or dtype):
            raise pickle.UnpicklingError(f"its metadata names {module}.{name}, which torch does not write")
        return super().find_class(module, name)
