"""The folder of this user where the package keeps what is dear to make: `$XDG_CACHE_HOME/daq_lightning`.

What is kept there is run or believed later, so nobody else may have been able to write it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


def cache_folder() -> tuple[Path | None, str]:
    """The user's cache folder; or None, and why there is none that can be trusted."""
    parent = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not parent.is_absolute():  # then the XDG specification has it ignored
        try:
            parent = Path.home() / ".cache"
        except RuntimeError:  # HOME is not set, and the system does not know the user
            return None, "there is no home folder"
        if not parent.is_absolute():
            return None, f"the home folder {parent.parent} is not an absolute path"
    folder = parent / "daq_lightning"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        problem = why_not_ours(folder)
    except OSError as error:
        return None, str(error)
    return (None, problem) if problem else (folder, "")


def why_not_ours(path: Path) -> str | None:
    """None if only this user (and root) can have written a file or folder, else what speaks against it."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return f"{path} is a link"
    if status.st_uid != os.geteuid():
        return f"{path} belongs to another user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be written by other users"
    return None
