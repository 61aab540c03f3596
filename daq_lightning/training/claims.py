"""Names of folders that one process at a time may take, so that several runs can share one `dirpath`.

    claim(folder)        this process alone decides about the name, until the context ends; others wait
    mark_shared(folder)  a second run uses what one has made: it stays, whatever becomes of either
    free_name(folder)    the name, or the first of `<name>-v1`, `<name>-v2` ... that neither exists nor is
    claimed

A claim is a lock on the hidden file `.<name>.claim` beside the folder. The system takes the lock from a
process that ends, however it ends; the file itself is removed with the claim and means nothing without a
lock.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from daq_lightning.checkpoint.locks import lock
from daq_lightning.checkpoint.tensor_file import CheckpointError

_SHARED = "shared"  # an empty file in the folder


@contextlib.contextmanager
def claim(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Claims the name of a folder, which may exist or not.

    Args:
        folder: The folder.
        wait: Whether to wait for another process that has it.

    Yields:
        Whether this process has the claim; always true with `wait`.

    Raises:
        CheckpointError: The folder around it cannot be written.
    """
    file = folder.with_name(f".{folder.name}.claim")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = lock(file, wait=wait)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}.") from error
    if held is None:
        yield False
        return
    try:
        yield True
    finally:
        file.unlink(missing_ok=True)  # while it is locked
        os.close(held)


@contextlib.contextmanager
def free_name(folder: Path) -> Iterator[Path]:
    """Claims the name, or the first of `<name>-v1`, `<name>-v2` ... that is free: what an earlier or another
    run wrote or writes stays.

    Yields:
        A folder that does not exist, and that no other process makes.
    """
    for name in versions(folder):
        with claim(name, wait=False) as claimed:
            if claimed and not name.exists():
                yield name
                return


def mark_shared(folder: Path) -> None:
    """Says that a second run uses a folder: from then on, no run removes it. Call it with a claim of the
    name.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    try:
        (folder / _SHARED).touch()
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}. Choose another dirpath.") from error


def remove_own(folder: Path) -> None:
    """Removes a folder that this run made, unless another run uses it too."""
    with claim(folder):  # a run that is looking at it right now is waited for: it may be about to use it
        if not (folder / _SHARED).exists():
            shutil.rmtree(folder, ignore_errors=True)


def versions(folder: Path) -> Iterator[Path]:
    """`<name>`, `<name>-v1`, `<name>-v2`, ..."""
    yield folder
    yield from (folder.with_name(f"{folder.name}-v{version}") for version in count(1))
