"""What systems do differently with files: locks between processes, room on the disk, pushing data to it.

    lock(path)              waits until no other process has the lock, then takes it
    lock(path, wait=False)  takes it, or gives None at once
    allocate, flush         as good as the system has it

A lock is `flock` on a file that its owner removes, while it holds the lock, when it is done: the file means
nothing without the lock, which the system takes from a process that ends, however it ends. Linux and macOS
have that; Windows does not, and is refused: without locks one export could remove what another one writes.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from daq_lightning.checkpoint.tensor_file import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


def check_locks() -> None:
    """Refuses a system that has no such locks.

    Raises:
        CheckpointError: This is Windows.
    """
    if fcntl is None:
        raise CheckpointError(
            "Exports are written on Linux and macOS: this system has no file locks (flock) that would keep "
            "two exports apart. On Windows, run this in WSL."
        )


def lock(path: Path, *, wait: bool = True, new: bool = False) -> int | None:
    """Locks a file, which is made if it is not there.

    Args:
        path: The file.
        wait: Whether to wait for another process that has the lock.
        new: Whether the file must not be there yet.

    Returns:
        A descriptor, which holds the lock until it is closed; None if another process has the lock (without
        `wait`), or has removed the new file before it was locked.

    Raises:
        CheckpointError: As `check_locks`, or the file system has no locks.
        OSError: The file cannot be made or opened, or, if it must be new, is there.
    """
    check_locks()
    assert fcntl is not None
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | (os.O_EXCL if new else 0), 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:  # else its owner has removed it since: the name is free
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError) and error.errno in _NO_LOCKS:
                raise CheckpointError(
                    f"The file system of {path.parent} has no file locks (flock: {error.strerror}), which "
                    "keep two exports apart. NFS has them where its lock service runs; Lustre with the "
                    "mount option flock. Choose a destination on another file system."
                ) from error
            raise
        os.close(descriptor)
        if new:
            return None


def allocate(descriptor: int, size: int) -> None:
    """Reserves room for a file, so that a full disk is known now, where the system can say it."""
    os.truncate(descriptor, size)
    reserve = getattr(os, "posix_fallocate", None)  # macOS has none: there, the writes tell
    if reserve is None:
        return
    try:
        reserve(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def flush(descriptor: int) -> None:
    """Pushes what was written to the disk, without the times of the file where the system can leave them."""
    getattr(os, "fdatasync", os.fsync)(descriptor)  # macOS has fsync only
