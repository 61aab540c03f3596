"""JSON that is kept from one process to the next, in the user's cache folder.

The folder is that of the compiled kernels, under the same rules: what others could have written is not read.
A file holds its content and a digest of name and content; where the two do not fit, it counts as not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from daq_lightning.numerics.backends.cache_folder import cache_folder, why_not_ours

_MOST_BYTES = 1 << 24


def read_cached(name: str) -> Any:
    """The content that was kept under a name; None if there is none, or none that can be trusted."""
    folder, _ = cache_folder()
    if folder is None:
        return None
    path = folder / f"{name}.json"
    try:
        if why_not_ours(path) is not None or not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return None
        kept = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(kept, dict) or set(kept) != {"digest", "content"}:
        return None
    return kept["content"] if kept["digest"] == _digest(name, kept["content"]) else None


def write_cached(name: str, content: Any) -> None:
    """Keeps what JSON can hold under a name, in place of what was there; nothing where that cannot be."""
    folder, _ = cache_folder()
    kept = json.dumps({"digest": _digest(name, content), "content": content}).encode()
    if folder is None or len(kept) > _MOST_BYTES:
        return
    with contextlib.suppress(OSError):  # read-only or full
        handle, unfinished = tempfile.mkstemp(dir=folder, suffix=".tmp")  # which nobody else may write
        try:
            with open(handle, "wb") as file:
                file.write(kept)
            os.replace(unfinished, folder / f"{name}.json")  # nobody ever sees half a file
        finally:
            Path(unfinished).unlink(missing_ok=True)


def _digest(name: str, content: Any) -> str:
    return hashlib.sha256(json.dumps([name, content]).encode()).hexdigest()
