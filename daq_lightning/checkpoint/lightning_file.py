"""The weights of a Lightning `.ckpt` file, whatever else it holds: read as data, nothing in it is executed.

    zip archive:  <name>/data.pkl     a pickle: containers, numbers, and calls that rebuild tensors from
        storages
                  <name>/data/<key>   the bytes of one storage, not compressed: mapped from the file, not
                  copied

`torch.load(weights_only=True)` refuses a file that names any class it does not know, so one Path among the
hyperparameters would make the weights unreadable. Here the pickle is followed by `pickle_program`, which
imports and calls nothing. The archive is foreign input: records are looked up by name and have to lie within
the file.

Source: torch 2.13 `serialization` (`_save`, `_load`).
"""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from daq_lightning.checkpoint.pickle_program import run_pickle
from daq_lightning.checkpoint.sharded_file import ShardedFile, is_sharded_file
from daq_lightning.checkpoint.tensor_file import CheckpointError

_LOCAL_HEADER = (
    30  # bytes before the name of a zip record, whose length and that of the extra field stand at its end
)


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
            records = _records(file)
            content = run_pickle(_program(file, records), _Storages(Path(path), records))
    except _DAMAGED as error:
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


# what Python's zip and pickle readers raise for damaged input, and torch for sizes that overflow
_DAMAGED = (
    ValueError,
    OSError,
    EOFError,
    zipfile.BadZipFile,
    NotImplementedError,
    OverflowError,
    RuntimeError,
)


# The archive


@dataclass(frozen=True, kw_only=True)
class _Record:
    """A record of the archive: where its bytes are in the file."""

    offset: int
    size: int
    checksum: int


def _records(file: BinaryIO) -> dict[str, _Record]:
    """The records of an archive by name, without the archive's own name in front."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"it is not a zip archive, or it was cut off ({error})") from error
    roots = [info.filename for info in infos if re.fullmatch(r"[^/]+/data\.pkl", info.filename)]
    if len(roots) != 1:
        raise ValueError(f"it has {len(roots)} records named data.pkl instead of one")
    prefix = roots[0].removesuffix("data.pkl")
    end = file.seek(0, os.SEEK_END)
    records: dict[str, _Record] = {}
    for info in infos:
        name = info.filename.removeprefix(prefix)
        if name in records:
            raise ValueError(f"it has two records named {name}")
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or not header.startswith(b"PK\3\4"):
            raise ValueError(f"the record {name} is not where the archive says")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ValueError(f"the record {name} is compressed or encrypted, which torch.save never does")
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        offset = info.header_offset + _LOCAL_HEADER + lengths
        if offset + info.file_size > end:
            raise ValueError(f"the record {name} ends behind the end of the file")
        records[name] = _Record(offset=offset, size=info.file_size, checksum=info.CRC)
    if "constants.pkl" in records:
        raise ValueError("it is a TorchScript archive, which holds code")
    if "byteorder" in records and _bytes(file, records["byteorder"]) != b"little":
        raise ValueError("it was written on a big-endian machine")
    return records


def _program(file: BinaryIO, records: Mapping[str, _Record]) -> bytes:
    record = records["data.pkl"]
    program = _bytes(file, record)
    if record.checksum and zlib.crc32(program) != record.checksum:  # 0: saved without checksums
        raise ValueError("its record data.pkl was altered or damaged: the checksum differs")
    return program


def _bytes(file: BinaryIO, record: _Record) -> bytes:
    file.seek(record.offset)
    return file.read(record.size)


class _Storages:
    """The storages of a file by key, mapped into memory when a tensor first asks for one.

    Args:
        path: The file.
        records: Its records.
    """

    def __init__(self, path: Path, records: Mapping[str, _Record]) -> None:
        self._path, self._records = path, records
        self._mapped: Any = None
        self._known: dict[str, torch.UntypedStorage] = {}

    def __call__(self, key: str, nbytes: int) -> torch.UntypedStorage:
        record = self._records.get(f"data/{key}")
        if record is None or record.size != nbytes:
            held = "is missing" if record is None else f"has {record.size} bytes"
            raise ValueError(f"a tensor needs {nbytes} bytes of the record data/{key}, which {held}")
        if key not in self._known:
            if self._mapped is None:
                self._mapped = torch.UntypedStorage.from_file(
                    str(self._path), False, self._path.stat().st_size
                )
            part = self._mapped[record.offset : record.offset + record.size]
            # torch.save aligns records; in copies made by other zip programs they may lie anywhere
            self._known[key] = part.clone() if record.offset % 8 else part
        return self._known[key]
