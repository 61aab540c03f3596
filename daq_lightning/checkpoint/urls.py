"""Which places are on this machine, and which on another file system."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from daq_lightning.checkpoint.tensor_file import CheckpointError


def is_url(place: object) -> bool:
    """Whether this names a place on a file system of fsspec, and no local path.

    Example:
        >>> [is_url(place) for place in ("s3://bucket/fp8", "out/fp8", "file:///out/fp8")]
        [True, False, False]
    """
    return "://" in str(place) and not str(place).startswith(("file://", "local://"))


def local_path(place: str | os.PathLike[str]) -> Path:
    """A local path as such, also one that is written as `file://`."""
    text = os.fspath(place)
    for scheme in ("file://", "local://"):
        text = text.removeprefix(scheme)
    return Path(text).expanduser()


def check_local(place: Any, role: str) -> None:
    """Raises CheckpointError for a URL where a folder of this machine is needed.

    Args:
        place: What was given.
        role: How the error calls it.
    """
    if isinstance(place, (str, os.PathLike)) and is_url(place):
        raise CheckpointError(
            f"{role}: {place} is not on this machine, and only local folders are read. Copy it here first: "
            f"python -c \"import fsspec; fs, path = fsspec.core.url_to_fs('{place}'); "
            "fs.get(path, 'copy', recursive=True)\""
        )
