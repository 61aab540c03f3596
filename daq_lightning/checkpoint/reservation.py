"""One export at a time to a destination, from before its first weight is read until it is done.

    out/../.out.writing     locked while an export to `out` lives; holds who that is

The lock is `flock`: the system takes it from a process that ends, however it ends, so that a file which a
killed one left means nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from daq_lightning.checkpoint.destination import cannot_write
from daq_lightning.checkpoint.locks import lock
from daq_lightning.checkpoint.tensor_file import CheckpointError

_MOST_BYTES = 1000


@contextlib.contextmanager
def reserved(out: Path) -> Iterator[None]:
    """Keeps every other export away from a destination until the end of the context.

    Folders around it that are not there are made, and removed in the end if they are still empty.

    Args:
        out: The destination; nothing of it is touched.

    Raises:
        CheckpointError: Another export, in this process or another, writes there; it is named. Or the
            place cannot be written, or has no locks.
    """
    out = out.absolute()
    path = out.with_name(f".{out.name}.writing")
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = lock(path, wait=False)
        if held is None:
            raise CheckpointError(
                f"{out} is being written by another export{_who(path)}: let it end, or choose another "
                "destination."
            )
        os.truncate(held, 0)
        os.write(held, _me())
    except OSError as error:
        raise cannot_write(out, error) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is locked
        os.close(held)
        for parent in made:
            with contextlib.suppress(OSError):  # something was written there
                parent.rmdir()


def _me() -> bytes:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode()


def _who(path: Path) -> str:
    """What the file says of the process that holds its lock, in words; "" if it says nothing yet."""
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read(_MOST_BYTES))
        return f" (process {int(content['pid'])} on {content['host']!s:.80}, since {content['since']!s:.30})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
