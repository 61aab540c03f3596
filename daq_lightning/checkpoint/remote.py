"""A destination on another file system: whatever fsspec can open, such as `s3://`, `gs://` or `memory://`.

    written first    .daq_upload.json     the files that are, or were, there: it is ours what they list
    removed          daq_manifest.json    of an earlier export
    written          all other files      sizes compared
    removed          files of the earlier export that this one does not have
    written last     daq_manifest.json    an export without it is not whole
    removed          .daq_upload.json

An upload that is cut off leaves no manifest, and a list by which the next one knows what it may replace.
There are no locks on such systems: exports of several machines to one place are not kept apart.

Source: fsspec 2024.2 to 2026.9, `AbstractFileSystem`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from daq_lightning.checkpoint.folder import CARD, INDEX, MANIFEST, REPORT, read_json
from daq_lightning.checkpoint.manifest import Manifest, own_files
from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.numerics.backends.cache_folder import why_not_ours

MARKER = ".daq_upload.json"
_PROBE = ".daq_probe"
_LISTED = 3
_Value = TypeVar("_Value")


def staging_folder(url: str) -> Path:
    """Where an export is written before it is uploaded: in the folder for temporary files (TMPDIR), in one
    that only this user can write. The same URL has the same folder, so that what was cut off is found.

    Raises:
        CheckpointError: There is no such folder.
    """
    root = Path(tempfile.gettempdir()).absolute() / f"daq-lightning-{os.getuid()}"
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        problem = why_not_ours(root)
    except OSError as error:
        problem = str(error)
    if problem:
        raise CheckpointError(
            f"Exports to {url} are written to {root} first, which cannot be used: {problem}. Set TMPDIR to "
            "another folder."
        )
    parent, _, name = url.rstrip("/").rpartition("/")
    return root / hashlib.sha256(parent.encode()).hexdigest()[:16] / (name or "export")


class Remote:
    """A folder on a file system of fsspec.

    Args:
        url: Such as "s3://bucket/folder". Options of the file system come from where it takes them itself:
            the environment, or fsspec's own configuration files.

    Raises:
        CheckpointError: The package for such a file system is missing, or the URL makes no sense to it.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        try:
            self._files, root = url_to_fs(self.url)
        except ImportError as error:
            raise CheckpointError(
                f"{url}: the package for this file system is missing ({str(error).rstrip('.')}): install "
                "it with pip, or choose a local destination."
            ) from error
        except Exception as error:  # of any file system
            raise CheckpointError(f"{url} cannot be used: {error}.") from error
        self._root = str(root).rstrip("/")

    def names(self) -> set[str]:
        """The files that are there, as paths from the folder.

        Raises:
            CheckpointError: It cannot be reached.
        """

        def listed() -> set[str]:
            self._files.invalidate_cache()
            try:
                found = self._files.find(self._root)
            except FileNotFoundError:
                return set()
            if found == [self._root]:
                raise CheckpointError(f"{self.url} is a file: choose another destination.")
            return {str(path)[len(self._root) :].lstrip("/") for path in found}

        return self._asked("cannot be reached", listed)

    def check(self, *, write: bool = True) -> None:
        """Refuses what an export must not replace, and a place that cannot be written.

        Args:
            write: Whether to write a small file there, and remove it, to see whether that is allowed.

        Raises:
            CheckpointError: It holds files that no export wrote, or it cannot be read or written.
        """
        names = self.names()
        if names:
            self._check_replaceable(names)
        if not write:
            return
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder) / _PROBE
            probe.write_bytes(b"daq-lightning looks whether it may write here\n")
            self._asked("cannot be written", lambda: self._put(probe, _PROBE))
        with contextlib.suppress(Exception):  # a file too many hurts nobody
            self._remove(_PROBE)

    def upload(self, folder: Path) -> None:
        """Uploads a folder with a manifest, in the order above, in place of an earlier export.

        Raises:
            CheckpointError: A file could not be written, or is not there whole; the folder is as it was.
        """
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        there = self.names() - {_PROBE}
        if there:  # what came since is not of an export
            self._check_replaceable(there)
        self._asked("could not be written", lambda: self._upload(folder, names, there))

    def fetch(self, names: Collection[str], folder: Path) -> None:
        """Copies some files that are there into a local folder."""
        for name in names:
            self._asked("cannot be read", partial(self._files.get_file, self._at(name), str(folder / name)))

    def remove(self) -> None:
        """Removes all files, the manifest first: what is left of it is not whole."""
        for name in sorted(self.names(), key=lambda name: name != MANIFEST):
            self._asked("could not be removed", partial(self._remove, name))

    def _upload(self, folder: Path, names: set[str], there: set[str]) -> None:
        with tempfile.TemporaryDirectory() as place:
            marker = Path(place) / MARKER
            marker.write_text(json.dumps({"files": sorted(names | there)}), "utf-8")
            self._put(marker, MARKER)
        if MANIFEST in there:
            self._remove(MANIFEST)
        for name in sorted(names - {MANIFEST}):
            self._put(folder / name, name)
        for name in sorted(there - names - {MARKER}):
            self._remove(name)
        self._put(folder / MANIFEST, MANIFEST)
        self._remove(MARKER)

    def _put(self, file: Path, name: str) -> None:
        self._files.put_file(str(file), self._at(name))
        self._files.invalidate_cache()
        size, expected = self._files.info(self._at(name))["size"], file.stat().st_size
        if size != expected:
            raise OSError(f"{name} has {size} bytes there, and {expected} here")

    def _remove(self, name: str) -> None:
        self._files.rm_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _check_replaceable(self, names: set[str]) -> None:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            self.fetch(names & {MARKER, MANIFEST, INDEX, CARD}, folder)
            if MARKER in names:  # an upload that was cut off
                files: Any = read_json(folder / MARKER).get("files")
                known = {MARKER, *(map(str, files) if isinstance(files, list) else ())}
            elif {MANIFEST, REPORT} <= names:
                listed, shards = own_files(folder, Manifest.load(folder))
                known = listed | shards
            else:
                known = set()
        foreign = sorted(names - known - {_PROBE})
        if foreign:
            more = f" and {len(foreign) - _LISTED} more" if len(foreign) > _LISTED else ""
            raise CheckpointError(
                f"{self.url} holds {', '.join(foreign[:_LISTED])}{more}, which no export by this package "
                "wrote (or a model card that was edited since), so replacing it would delete what is not "
                "of an export: choose another destination."
            )

    def _asked(self, failed: str, act: Callable[[], _Value]) -> _Value:
        """What the file system answers; any error of it in words."""
        try:
            return act()
        except CheckpointError:
            raise
        except Exception as error:  # of any file system
            shown = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise CheckpointError(
                f"{self.url} {failed}: {shown}. Look at the address, the credentials and the connection."
            ) from error
