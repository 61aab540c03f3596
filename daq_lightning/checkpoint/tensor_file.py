"""One safetensors file: where its tensors lie, and reading them one at a time.

    8 bytes little-endian header length | JSON header | tensor bytes, without gaps

The safetensors library checks, reads and writes whole files through a memory map, whose pages count as
resident memory, and it cannot write a tensor before the last one is known. An export streams checkpoints
larger than memory, so offsets are computed here and tensors are read and written at their place, by any
thread, in any order.

A header is foreign input: every field is checked before it is used.

Source: https://huggingface.co/docs/safetensors (format).
"""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from reprlib import repr as shown
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from daq_lightning.checkpoint.buffers import Buffers


DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_MAX_HEADER = 100 << 20  # bytes; the limit of the reference implementation
_MAX_DIMENSIONS, _MAX_ELEMENTS = 16, 2**48


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written: which file, what was expected and what to do."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor as a file declares it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return prod(self.shape) * self.dtype.itemsize


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    """The description of a tensor at hand."""
    return TensorSpec(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape))


@dataclass(frozen=True, kw_only=True)
class TensorEntry(TensorSpec):
    """A tensor and its place: absolute byte offset in a file."""

    path: Path
    offset: int

    def read(self, buffers: Buffers | None = None) -> Tensor:
        """Reads the tensor.

        Args:
            buffers: Where the memory comes from; None takes new memory.

        Raises:
            CheckpointError: The file is shorter than its header says.
        """
        new = torch.empty(self.nbytes if buffers is None else 0, dtype=torch.uint8, device="cpu")
        data = new if buffers is None else buffers.take(self.nbytes)
        view, done = data.numpy().data, 0
        with open(self.path, "rb", buffering=0) as file:
            while done < self.nbytes:
                count = os.preadv(file.fileno(), [view[done:]], self.offset + done)
                if count == 0:
                    raise CheckpointError(
                        f"{self.path} ended while reading {self.name}: the file was cut off."
                    )
                done += count
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype, device="cpu")
        return data.view(self.dtype).reshape(self.shape)


class LazyTensors(Mapping[str, Tensor]):
    """Tensors that are described before any of them is read, and read when asked for.

    Attributes:
        collective: Whether reading one is work for all ranks together, by `on`, since none has the whole.
    """

    collective: bool = False

    def on(self, name: str, owner: int) -> Tensor | None:
        """A tensor on one rank, None on the others; all ranks ask for the same ones in the same order."""
        raise NotImplementedError(f"{type(self).__name__} lies whole on each rank")

    @abstractmethod
    def spec(self, name: str) -> TensorSpec:
        """dtype and shape of a tensor, without computing or reading it."""


class DescribedTensors(LazyTensors):
    """Lazy tensors whose descriptions are at hand: subclasses set `specs`, and read.

    Attributes:
        specs: Name, dtype and shape of every tensor.
    """

    specs: Mapping[str, TensorSpec]

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def spec(self, name: str) -> TensorSpec:
        """dtype and shape of a tensor."""
        return self.specs[name]


class Renamed(DescribedTensors):
    """Some of other tensors, under names of their own.

    Args:
        tensors: The tensors.
        names: Name here -> name there.
    """

    def __init__(self, tensors: LazyTensors, names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, names
        self.specs = {name: replace(tensors.spec(other), name=name) for name, other in names.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]


def spec_in(weights: Mapping[str, Tensor], name: str) -> TensorSpec:
    """dtype and shape of a tensor of `described` weights."""
    return weights.spec(name) if isinstance(weights, LazyTensors) else spec_of(name, weights[name])


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, in the order of their data; checked against the size of the file.

    Raises:
        CheckpointError: Not a safetensors file, cut off, or a header that contradicts itself or the file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    f"{path} is not a complete safetensors file: it has {size} bytes, and its header claims "
                    f"{length}. Copy or download it again."
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a safetensors header that cannot be read: {error}.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a safetensors header that is not an object.")
    header.pop("__metadata__", None)
    entries = [_entry(path, name, fields, 8 + length) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    end = 8 + length
    for entry in entries:
        if entry.offset != end:
            raise CheckpointError(
                f"{path}: the data of {entry.name} begins at byte {entry.offset}, expected {end}."
            )
        end += entry.nbytes
    if end != size:
        raise CheckpointError(
            f"{path} should have {end} bytes by its header and has {size}: it was cut off or overwritten. "
            "Copy or download it again."
        )
    return {entry.name: entry for entry in entries}


def read_metadata(path: Path) -> dict[str, Any]:
    """The `__metadata__` of a safetensors file whose header is known to be valid; empty if it has none."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata = header.get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def make_header(specs: Iterable[TensorSpec], path: Path) -> tuple[bytes, list[TensorEntry]]:
    """The header of a file that holds these tensors in this order, and where each will lie.

    The data begins at a multiple of 8 bytes, as the reference implementation has it.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    specs = list(specs)
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    entries, offset = [], 8 + len(text)
    for spec in specs:
        entries.append(
            TensorEntry(name=spec.name, dtype=spec.dtype, shape=spec.shape, path=path, offset=offset)
        )
        offset += spec.nbytes
    return len(text).to_bytes(8, "little") + text, entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {name!r} occurs twice")
    return result


def _entry(path: Path, name: str, fields: Any, data_start: int) -> TensorEntry:
    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: the header entry of {name!r} {what}.")

    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= set(fields):
        raise wrong("lacks dtype, shape or data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    dtype = _DTYPES.get(dtype) if isinstance(dtype, str) else None
    if dtype is None:
        raise wrong(
            f"has the dtype {shown(fields['dtype'])[:80]}, expected one of {', '.join(sorted(_DTYPES))}"
        )
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_DIMENSIONS
        or not all(type(size) is int and 0 <= size <= _MAX_ELEMENTS for size in shape)
        or prod(max(1, size) for size in shape) > _MAX_ELEMENTS
    ):
        raise wrong(f"has the shape {shown(shape)[:80]}, expected a list of sizes")
    if not (
        isinstance(offsets, list) and len(offsets) == 2 and all(type(x) is int and x >= 0 for x in offsets)
    ):
        raise wrong(f"has the offsets {shown(offsets)[:80]}, expected [begin, end]")
    entry = TensorEntry(name=name, dtype=dtype, shape=tuple(shape), path=path, offset=data_start + offsets[0])
    if offsets[1] - offsets[0] != entry.nbytes:
        raise wrong(
            f"spans {offsets[1] - offsets[0]} bytes, but {fields['dtype']} {shape} needs {entry.nbytes}"
        )
    return entry
