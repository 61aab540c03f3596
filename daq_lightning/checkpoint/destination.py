"""The place of an export: what may be replaced there, what an export leaves when it is killed, and who may
rename.

An earlier export is replaced only if every file in it is its own (a model card that somebody has edited is
not), and never if it is, or holds, an input.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from daq_lightning.checkpoint.folder import CARD, MANIFEST, REPORT
from daq_lightning.checkpoint.locks import check_locks, lock
from daq_lightning.checkpoint.manifest import foreign_files
from daq_lightning.checkpoint.tensor_file import CheckpointError


def check_destination(out: Path) -> None:
    """Refuses a destination that holds something else than an earlier export, before any work is done.

    Nothing is created.

    Raises:
        CheckpointError: The destination is a file, a folder that is not an export or holds files of others,
            or cannot be written; or the system has no file locks.
    """
    check_locks()
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise CheckpointError(f"{out} exists and is not a folder: choose another destination.")
    while out.is_dir():
        looked_at = out.stat()
        try:
            if any(out.iterdir()):
                _check_replaceable(out)
            break
        except (CheckpointError, OSError):
            # unless another export has replaced the folder while it was looked at
            if out.is_dir() and os.path.samestat(out.stat(), looked_at):
                raise
    parent = out.absolute().parent
    try:
        while not parent.exists():
            parent = parent.parent
    except OSError as error:
        raise cannot_write(out, error) from error
    if not parent.is_dir():
        raise cannot_write(out, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(parent)))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{out} cannot be written: no permission for {parent}.")


def _check_replaceable(out: Path) -> None:
    """Refuses a folder that holds any file of others: replacing it would delete that."""
    if not (out / REPORT).is_file():
        raise CheckpointError(
            f"{out} exists and was not written by this package (it has no {REPORT}): choose another "
            "destination, or remove the folder yourself."
        )
    try:
        foreign = foreign_files(out)
    except CheckpointError as error:
        raise CheckpointError(
            f"{out} exists and cannot be replaced, because its {MANIFEST} does not say which files are its "
            f"own: {str(error).rstrip('.')}. Choose another destination, or remove the folder yourself."
        ) from error
    if foreign == [CARD]:
        raise CheckpointError(
            f"{out} is an earlier export with a model card {CARD} that was edited or added since, so "
            "replacing it would delete that text: move the file away, or choose another destination."
        )
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise CheckpointError(
            f"{out} is an earlier export, but {', '.join(foreign[:3])}{more} in it is not listed in its "
            f"{MANIFEST}, so replacing it would delete what is not of that export: move it away, or choose "
            "another destination."
        )


def check_inputs(out: Path, inputs: Iterable[tuple[str, Path]]) -> None:
    """Refuses a destination that an input of the export would not survive, through links and mounts too.

    Args:
        out: The destination.
        inputs: What is read, as (role, folder or file).

    Raises:
        CheckpointError: An input lies at or below the destination (or one of its leftovers, which are
            removed), or the destination lies in an input that is an export, whose manifest would no longer
            hold.
    """
    removed = [out, *_leftovers(out)]
    for role, path in inputs:
        for place in removed:
            if any(_is_within(part, place) for part in _parts(path)):
                raise CheckpointError(
                    f"The {role} {path} is in {place}, which this export would replace: choose another "
                    "destination."
                )
        if (path / MANIFEST).is_file() and _is_within(out, path):
            raise CheckpointError(
                f"{out} is in the {role} {path}, an export that would no longer be what its {MANIFEST} says: "
                "choose another destination."
            )


def _parts(path: Path) -> list[Path]:
    """An input and the files that it only links to, as the hub's cache does."""
    links = [entry for entry in path.iterdir() if entry.is_symlink()] if path.is_dir() else []
    return [path, *links]


def _is_within(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies in it; by what the folders are, not by how they are called."""
    if not folder.exists():
        return False
    real = path.resolve()
    return any(parent.exists() and parent.samefile(folder) for parent in (real, *real.parents))


def remove_leftovers(out: Path) -> None:
    """Removes what killed exports to this destination left behind; puts back an export that was being
    replaced.

    To be called while no other export to this destination renames folders; see `alone`.
    """
    for path in out.parent.glob(f".{_escape(out.name)}.earlier-*"):
        if out.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.rename(path, out)
    for path in out.parent.glob(f".{_escape(out.name)}.partial-*.lock"):
        with contextlib.suppress(OSError):
            held = lock(path, wait=False)
            if held is None:  # a living process writes there
                continue
            try:
                folder = path.with_suffix("")
                if folder.exists():
                    shutil.rmtree(folder)
                path.unlink()
            finally:
                os.close(held)


def unfinished(out: Path) -> list[Path]:
    """The folders that killed exports to this destination left unfinished."""
    return [
        path.with_suffix("")
        for path in sorted(out.absolute().parent.glob(f".{_escape(out.name)}.partial-*.lock"))
        if path.with_suffix("").is_dir()
    ]


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keeps other exports to this destination, in any process, from renaming folders there until the end.

    Between two renames a living export's earlier folder looks like the leftover of a killed one.
    """
    path = out.parent / f".{out.name}.lock"
    held = lock(path)
    assert held is not None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(held)


def cannot_write(out: Path, error: OSError) -> CheckpointError:
    """The error of a destination that cannot be written, with what to do about a full disk."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(out.parent).free if out.parent.exists() else 0
        return CheckpointError(
            f"{out} could not be written: {error.strerror} ({free / 1e9:.2f} GB free there). Nothing was "
            "left behind; free some space or choose another destination."
        )
    return CheckpointError(f"{out} could not be written: {error}. Nothing was left behind.")


def _leftovers(out: Path) -> list[Path]:
    names = (f".{_escape(out.name)}.earlier-*", f".{_escape(out.name)}.partial-*")
    return [path for name in names for path in out.absolute().parent.glob(name) if path.is_dir()]


def _escape(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)
