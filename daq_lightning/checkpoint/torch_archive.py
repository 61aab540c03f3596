"""What `torch.save` wrote, read as data: nothing in it is executed.

    zip archive:  <name>/data.pkl     a pickle: containers, numbers, and calls that rebuild tensors from
        storages
                  <name>/data/<key>   the bytes of one storage, not compressed: not copied

The pickle is followed by `pickle_program`, which imports and calls nothing. The archive is foreign input:
records are looked up by name and have to lie within the file.

Source: torch 2.13 `serialization` (`_save`, `_load`).
"""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from daq_lightning.checkpoint.pickle_program import run_pickle

_LOCAL_HEADER = (
    30  # bytes before the name of a zip record, whose length and that of the extra field stand at its end
)

# what Python's zip and pickle readers raise for damaged input, and torch for sizes that overflow
DAMAGED = (
    ValueError,
    OSError,
    EOFError,
    zipfile.BadZipFile,
    NotImplementedError,
    OverflowError,
    RuntimeError,
)


def read_archive(file: BinaryIO, whole: Callable[[], Any]) -> Any:
    """The object in an archive, made of containers, numbers, strings, tensors and stand-ins.

    Args:
        file: The archive.
        whole: Gives the `UntypedStorage` of all its bytes, of which the storages of the tensors are parts;
            called when a tensor first asks for one.

    Raises:
        DAMAGED: It is no such archive, cut off, or a tensor does not fit its storage.
    """
    records = _records(file)
    return run_pickle(_program(file, records), _Storages(whole, records))


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
    """The storages of an archive by key.

    Args:
        whole: See `read_archive`.
        records: Its records.
    """

    def __init__(self, whole: Callable[[], Any], records: Mapping[str, _Record]) -> None:
        self._whole, self._records = whole, records
        self._bytes: Any = None
        self._known: dict[str, torch.UntypedStorage] = {}

    def __call__(self, key: str, nbytes: int) -> torch.UntypedStorage:
        record = self._records.get(f"data/{key}")
        if record is None or record.size != nbytes:
            held = "is missing" if record is None else f"has {record.size} bytes"
            raise ValueError(f"a tensor needs {nbytes} bytes of the record data/{key}, which {held}")
        if key not in self._known:
            if self._bytes is None:
                self._bytes = self._whole()
            part: Any = self._bytes[record.offset : record.offset + record.size]
            # torch.save aligns records; in copies made by other zip programs they may lie anywhere
            self._known[key] = part.clone() if record.offset % 8 else part
        return self._known[key]
