"""The weights of a sharded Lightning checkpoint: a folder `.ckpt` of torch.distributed.checkpoint.

    .metadata         a pickle: what tensors there are, and where their pieces lie
    __<rank>_*.distcp the pieces
    meta.pt           everything else (loops, callbacks), which is not read here

A tensor is read when it is asked for, its pieces put together, by any single process. The metadata is a
pickle and foreign input: it is held to limits of time and memory first (`pickle_limits`); only the classes
that torch writes into it are made, anything else is refused before it is imported; and what it says is held
against the files: pieces fill their tensors, lie in files of this folder, and are together no larger than
those. The pieces are read by `torch_archive`, which executes nothing.

Source: torch 2.13 `torch.distributed.checkpoint` (`FileSystemReader.read_data`, `metadata`); lightning 2.6
`ModelParallelStrategy.save_checkpoint` (the prefix "state_dict.").
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daq_lightning.checkpoint.folder import inside
from daq_lightning.checkpoint.pickle_limits import check_pickle
from daq_lightning.checkpoint.tensor_file import CheckpointError, DescribedTensors, TensorSpec
from daq_lightning.checkpoint.torch_archive import read_archive

_METADATA, _PREFIX = ".metadata", "state_dict."
_MOST_DIMENSIONS = 64  # of torch
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
}  # fmt: skip
# of these only what a call gives is made: a pickle could set attributes of the classes and functions too
_CALLED: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): lambda value: _memory_format(value),
    ("torch.serialization", "_get_layout"): lambda name: torch.serialization._get_layout(name),
    **{(module, f"{kind}{system}Path"): lambda *parts: os.path.join(*parts)
       for module in ("pathlib", "pathlib._local")  # where Python 3.13 has them
       for kind in ("", "Pure") for system in ("Posix", "Windows")},
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
        with self._explained():
            program = (self._path / _METADATA).read_bytes()
            check_pickle(program)
            metadata = _Metadata(io.BytesIO(program)).load()
            _check(metadata, self._path)
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
        from torch.distributed.checkpoint.metadata import MetadataIndex

        spec = self.specs[name]
        with self._explained():
            tensor = torch.zeros(spec.shape, dtype=spec.dtype, device="cpu")
            for chunk in self._metadata.state_dict_metadata[_PREFIX + name].chunks:
                place = self._metadata.storage_data[MetadataIndex(_PREFIX + name, chunk.offsets)]
                part = tensor
                for axis, (start, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                    part = part.narrow(axis, start, length)
                part.copy_(self._piece(name, place, part))
        return tensor

    def _piece(self, name: str, place: Any, like: Tensor) -> Tensor:
        """What `torch.save` wrote at a place: a tensor of a known dtype and shape."""
        data = bytearray(place.length)
        with open(self._path / place.relative_path, "rb") as file:
            file.seek(place.offset)
            if file.readinto(data) != len(data):
                raise ValueError(f"its piece {place.relative_path} was cut off")
        found = read_archive(
            io.BytesIO(data), lambda: torch.frombuffer(data, dtype=torch.uint8).untyped_storage()
        )
        if not (isinstance(found, Tensor) and (found.dtype, found.shape) == (like.dtype, like.shape)):
            what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else "no tensor"
            raise ValueError(
                f"a piece of {name!r:.80} is {what[:80]}, expected {like.dtype} {tuple(like.shape)}"
            )
        return found

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:  # anything that the metadata makes may be of another type than expected
            what = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise CheckpointError(
                f"{self._path} cannot be read: {what.rstrip('.')}. Expected a complete checkpoint folder "
                "that Lightning's Trainer wrote with ModelParallelStrategy or FSDPStrategy."
            ) from error


class _Metadata(pickle.Unpickler):
    """Makes what torch writes into `.metadata`, and nothing else."""

    def load(self) -> Any:
        """The content.

        Raises:
            UnpicklingError: It names something else, or sets attributes of classes.
        """
        self._before: dict[type, dict[str, Any]] = {}
        try:
            return super().load()
        finally:
            altered = [kind for kind, before in self._before.items() if dict(vars(kind)) != before]
            for kind in altered:
                _restore(kind, self._before[kind])
            if altered:
                raise pickle.UnpicklingError(
                    f"its metadata alters {altered[0].__name__}, which torch never does"
                )

    def find_class(self, module: str, name: str) -> Any:
        """A class by its name."""
        if (module, name) in _CALLED:
            return _CALLED[module, name]
        known = name in _CLASSES.get(module, ())
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not (known or dtype):
            raise pickle.UnpicklingError(f"its metadata names {module}.{name}, which torch does not write")
        found = super().find_class(module, name)
        if isinstance(found, type):
            self._before.setdefault(found, dict(vars(found)))
        return found


def _memory_format(value: Any) -> Any:
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    return _MEM_FORMAT_ENCODING(value)


def _restore(kind: type, before: Mapping[str, Any]) -> None:
    for name in set(vars(kind)) - set(before):
        delattr(kind, name)
    for name, value in before.items():
        if vars(kind).get(name) is not value:
            setattr(kind, name, value)


def _is_shape(value: Any) -> bool:
    return isinstance(value, torch.Size) and len(value) <= _MOST_DIMENSIONS and all(n >= 0 for n in value)


def _check(metadata: Any, folder: Path) -> None:
    """Holds the metadata of the state against the files.

    Raises:
        ValueError: A piece lies elsewhere, or beyond the end of its file; pieces do not fill their tensor.
    """
    from torch.distributed.checkpoint.metadata import MetadataIndex

    sizes: dict[str, int] = {}
    total = 0
    for place in metadata.storage_data.values():
        name = place.relative_path
        if not (type(name) is str and type(place.offset) is type(place.length) is int):
            raise ValueError("a piece has no name of a file and two numbers for its place in it")
        if Path(name).name != name:
            raise ValueError(f"its metadata names the file {name!r:.80}, which is not in the folder")
        if name not in sizes:
            if not (folder / name).is_file():
                raise ValueError(f"its piece {name} is missing")
            sizes[name] = inside(folder, name).stat().st_size
        if not 0 <= place.offset <= place.offset + place.length <= sizes[name]:
            raise ValueError(f"a piece ends behind the end of {name}")
        if place.transform_descriptors:
            raise ValueError(f"the pieces in {name} are transformed, which Lightning never does")
        total += place.length
    if total > sum(sizes.values()):
        raise ValueError("its pieces overlap")
    for name, entry in metadata.state_dict_metadata.items():
        if not name.startswith(_PREFIX) or not hasattr(entry, "size"):
            continue
        dtype, held = entry.properties.dtype, 0
        if not isinstance(dtype, torch.dtype) or not _is_shape(entry.size):
            raise ValueError(f"{name!r:.80} has no dtype and a size of at most {_MOST_DIMENSIONS} dimensions")
        for chunk in entry.chunks:
            where, shape = chunk.offsets, chunk.sizes
            if not (_is_shape(where) and _is_shape(shape) and len(where) == len(shape) == len(entry.size)):
                raise ValueError(f"a piece of {name!r:.80} has other dimensions than it")
            place = metadata.storage_data[MetadataIndex(name, where)]
            count = math.prod(shape)
            if count * dtype.itemsize > place.length:
                raise ValueError(f"a piece of {name} does not hold its {count} numbers")
            held += count
        if held != math.prod(entry.size):
            raise ValueError(f"the pieces of {name} hold {held} numbers, it has {math.prod(entry.size)}")
