"""Writing a checkpoint folder so that it is either complete or not there.

Shards are planned from names and sizes before a byte is written, so every tensor has a known place and can be
written the moment it is ready, by any thread, without a buffer. Everything goes into a hidden sibling of the
destination:

    out/../.out.partial-<random>/      shards, other files, index and config.json last; all fsynced
    out/../.out.partial-<random>.lock  held while that folder exists
    out/../.out.lock                   held while folders are renamed or leftovers are removed
    rename -> out

A kill at any moment leaves at most those siblings, which the next export to the same place removes (it knows
by the locks that no living process owns them), or takes over. An earlier export at the destination stays
until the new one is complete, and is replaced only if every file in it is its own.

Several processes write one checkpoint, each some of its files, into the folder that the first one reserved
(`files`, `folder`); that one publishes when all have finished.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from daq_lightning.checkpoint.destination import alone, cannot_write, check_destination, remove_leftovers
from daq_lightning.checkpoint.flat_bytes import tensor_bytes
from daq_lightning.checkpoint.folder import INDEX, SINGLE
from daq_lightning.checkpoint.locks import allocate, flush, lock
from daq_lightning.checkpoint.schemes import DEFAULT_SHARD_BYTES
from daq_lightning.checkpoint.tensor_file import (
    CheckpointError,
    TensorEntry,
    TensorSpec,
    make_header,
)

_FLUSH = 64 << 20  # bytes after which data is pushed to the disk, so that the final fsync has little to do


def plan_shards(
    specs: Iterable[TensorSpec | Sequence[TensorSpec]], max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> dict[str, list[TensorSpec]]:
    """Which tensor goes into which file: in order, a new file when the next one would not fit.

    Depends on names and sizes only, so that every run and every rank plans the same.

    Args:
        specs: Tensors in order; those of a sequence, such as codes and scale of a weight, stay together.
        max_shard_bytes: Size at which a new file begins.

    Returns:
        File name -> tensors: one `model.safetensors`, or `model-00001-of-0000N.safetensors` and so on.
    """
    shards: list[list[TensorSpec]] = [[]]
    used = 0
    for entry in specs:
        group = [entry] if isinstance(entry, TensorSpec) else entry
        size = sum(spec.nbytes for spec in group)
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1] += group
        used += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


class CheckpointWriter:
    """Writes one checkpoint folder; use as a context manager and call `publish` at the end.

    Leaving the context without `publish`, or with an exception, removes everything that was written.

    Args:
        out: Destination folder; may be an earlier export, which is replaced on success.
        specs: All tensors, in file order, as for `plan_shards`.
        max_shard_bytes: Size at which a new file begins.
        files: The files that this process writes; None writes all.
        folder: The folder that another process has reserved; None reserves one.
        resume: A leftover of a killed export to take over, with the files that are complete in it; these are
            not among `files`.

    Attributes:
        folder: Where the files lie until they are published.
        shards: File name -> tensors, of the whole checkpoint.
        keep: Set it to leave the folder, unpublished, for a later export to take over.

    Raises:
        CheckpointError: The destination is not free, cannot be written, or the disk is full.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        specs: Sequence[TensorSpec | Sequence[TensorSpec]],
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        *,
        files: Collection[str] | None = None,
        folder: Path | None = None,
        resume: Path | None = None,
    ) -> None:
        self.out = Path(os.path.abspath(out))
        check_destination(self.out)
        self.shards = plan_shards(specs, max_shard_bytes)
        self._mine = {file: self.shards[file] for file in (self.shards if files is None else files)}
        self._missing = {spec.name for shard in self._mine.values() for spec in shard}
        names = [spec.name for shard in self.shards.values() for spec in shard]
        if len(set(names)) != len(names):
            raise AssertionError("two tensors of one name")
        self._given, self._resume = folder, resume
        self._lock: int | None = None
        self.keep = False
        self._files: dict[Path, int] = {}
        self._unflushed = 0
        self._entries: dict[str, TensorEntry] = {}

    def __enter__(self) -> CheckpointWriter:
        with self._explained():
            if self._given is not None:
                self.folder = self._given
            else:
                self.out.parent.mkdir(parents=True, exist_ok=True)
                self._take_folder()
            try:
                if self._given is None and self._resume is None:
                    self.folder.mkdir()
                for file, specs in self._mine.items():
                    self._create(self.folder / file, specs)
            except BaseException:
                self._discard()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._discard()

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor at its place. Thread-safe for different names.

        Raises:
            CheckpointError: The disk is full or the destination is gone.
        """
        entry = self._entries[name]
        if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
            raise AssertionError(
                f"{name}: planned {entry.dtype} {entry.shape}, got {tensor.dtype} {tensor.shape}"
            )
        data, offset = tensor_bytes(tensor.cpu()), entry.offset
        with self._explained():
            while data:
                count = os.pwrite(self._files[entry.path], data[:_FLUSH], offset)
                data, offset = data[count:], offset + count
                self._unflushed += count
                if self._unflushed >= _FLUSH:
                    self._unflushed = 0
                    flush(self._files[entry.path])
        self._missing.discard(name)

    def write_json(self, file: str, content: Any) -> None:
        """Writes a JSON file into the folder."""
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        self.add_text(file, text, "backslashreplace")  # of a path that is no UTF-8, the bytes as escapes

    def add_text(self, file: str, text: str, errors: str = "surrogateescape") -> None:
        """Writes a text file into the folder; surrogates that stand for bytes as those bytes."""
        with self._explained():
            (self.folder / file).write_bytes(text.encode("utf-8", errors))

    def add_files(self, put: Callable[[Path], None]) -> None:
        """Lets a function put other files (tokenizer and so on) into the folder."""
        with self._explained():
            put(self.folder)

    def sync(self, file: str) -> None:
        """Makes one file durable."""
        with self._explained():
            os.fsync(self._files[self.folder / file])

    def finish(self) -> None:
        """Makes the files of this process durable; all its tensors are written."""
        assert not self._missing, f"{len(self._missing)} tensors were planned and not written"
        with self._explained():
            for descriptor in self._files.values():
                os.fsync(descriptor)

    def publish(self, config: dict[str, Any] | None = None) -> Path:
        """Writes index and config.json, makes everything durable and gives the folder its name.

        To be called by the process that reserved the folder, after the others have finished.

        Args:
            config: Content of config.json; None writes none.

        Returns:
            The destination.
        """
        self.finish()
        with self._explained():
            absent = [file for file in self.shards if not (self.folder / file).is_file()]
            if absent:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.folder / absent[0]))
            if len(self.shards) > 1:
                weight_map = {spec.name: file for file, specs in self.shards.items() for spec in specs}
                size = sum(spec.nbytes for specs in self.shards.values() for spec in specs)
                self.write_json(INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
            if config is not None:
                self.write_json("config.json", config)
            shards = {self.folder / file for file in self.shards}
            for path in [path for path in self.folder.rglob("*") if path not in shards]:
                _fsync(path)
            _fsync(self.folder)
            self._replace()
        return self.out

    def _create(self, path: Path, specs: list[TensorSpec]) -> None:
        header, entries = make_header(specs, path)
        descriptor = self._files[path] = os.open(path, os.O_CREAT | os.O_WRONLY, 0o644)
        allocate(descriptor, len(header) + sum(spec.nbytes for spec in specs))  # before the search, not after
        os.pwrite(descriptor, header, 0)
        self._entries |= {entry.name: entry for entry in entries}

    def _replace(self) -> None:
        """Gives the finished folder its name; an earlier export steps aside and is removed afterwards."""
        with alone(self.out):
            check_destination(self.out)
            earlier = self.out.parent / f".{self.out.name}.earlier-{secrets.token_hex(4)}"
            replaced = self.out.exists()
            if replaced:
                os.rename(self.out, earlier)
            try:
                os.rename(self.folder, self.out)
            except BaseException:
                if replaced:
                    os.rename(earlier, self.out)
                raise
            _fsync(self.out.parent)
            if replaced:
                shutil.rmtree(earlier, ignore_errors=True)

    def _take_folder(self) -> None:
        """Makes the unfinished folder, or takes over a leftover, with the lock that says who uses it."""
        with alone(self.out):
            if self._resume is not None:
                self.folder, self._lock = self._resume, lock(lock_path(self._resume), wait=False)
                if self._lock is None:
                    raise CheckpointError(f"{self._resume} is being written by another process: let it end.")
            remove_leftovers(self.out)
        if self._lock is None:
            self.folder, self._lock = _reserve(self.out)

    def _discard(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        if self._lock is None:
            return
        if not self.keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        # the lock goes last: without it nobody would know the folder for a leftover
        if not self.folder.exists():
            lock_path(self.folder).unlink(missing_ok=True)
        os.close(self._lock)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise cannot_write(self.out, error) from error


def _reserve(out: Path) -> tuple[Path, int]:
    """A name for the unfinished folder, and the lock that says that a living process uses it."""
    while True:
        folder = out.parent / f".{out.name}.partial-{secrets.token_hex(4)}"
        held = lock(lock_path(folder), new=True)
        if held is not None:  # else another export took it for a leftover before it was locked
            return folder, held


def lock_path(folder: Path) -> Path:
    """The file whose lock says that a living process writes an unfinished folder."""
    return folder.with_name(folder.name + ".lock")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
