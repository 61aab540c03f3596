"""Where an export goes: a folder of this machine, or one elsewhere that it is uploaded to when it is whole.

    with opened(out, ranks) as place:            refused before anything is measured; nobody else writes there
        report = place.export(job, write)        writes it to a folder, then the upload

What goes elsewhere is written to a folder in TMPDIR first, see `staging_folder`. It is removed when the
upload is complete, and kept when that failed: the same export with `resume` then goes on with the upload.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from daq_lightning.checkpoint.destination import check_destination, check_inputs
from daq_lightning.checkpoint.fingerprint import fingerprint
from daq_lightning.checkpoint.folder import RawCheckpoint, read_json, replace_json, sha256_of
from daq_lightning.checkpoint.manifest import Manifest
from daq_lightning.checkpoint.remote import Remote, staging_folder
from daq_lightning.checkpoint.reservation import reserved
from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.checkpoint.urls import is_url, local_path
from daq_lightning.export.finished import InterruptedExportError, Records
from daq_lightning.report.figures import ExportReport

if TYPE_CHECKING:
    from daq_lightning.export.job import Job
    from daq_lightning.export.ranks import Ranks


@dataclass(kw_only=True)
class Place:
    """The destination of an export, held by it.

    Attributes:
        folder: Where it is written, on this machine.
        url: Where it is uploaded to; "" for an export that stays in the folder.
        ranks: Who exports.
    """

    folder: Path
    url: str
    ranks: Ranks
    _delivered: bool = field(default=False, init=False)

    @property
    def where(self) -> Path | str:
        """The destination: the folder, or the URL."""
        return self.url or self.folder

    def export(self, job: Job, write: Callable[..., ExportReport], *, resume: bool = False) -> ExportReport:
        """Writes an export and uploads it. A collective.

        Args:
            job: What is exported.
            write: `run` with all arguments but the place: the folder `out`, and whether it goes `elsewhere`.
            resume: Whether to take an export that is whole, and was not uploaded, as it is.

        Returns:
            The report, whose path is the destination.

        Raises:
            CheckpointError: As `write`, or the upload failed; the error names the folder.
        """
        report = None
        if self.url and resume:
            report = self.ranks.first(lambda: self._whole(job))
        if report is None:
            report = write(out=self.folder, elsewhere=bool(self.url))
        if not self.url:
            return report
        self.ranks.first(lambda: self._upload(job))
        return dataclasses.replace(report, path=self.url)

    def _upload(self, job: Job) -> None:
        records = Records(job)
        if records.possible:
            replace_json(self._note, {"digest": records.digest})
        try:
            Remote(self.url).upload(self.folder)
        except CheckpointError as error:
            again = ", or run again with --resume (in Python resume=True) to upload it" * records.possible
            raise CheckpointError(
                f"The export was not uploaded: {error} It is complete in {self.folder}: copy it from there, "
                f"daq_manifest.json last{again}."
            ) from error
        except KeyboardInterrupt as error:
            again = ": run again with --resume (in Python resume=True) to upload it" * records.possible
            raise InterruptedExportError(
                f"The export is complete in {self.folder} and was not uploaded{again}."
            ) from error
        self._delivered = True

    def close(self) -> None:
        """Removes the folder of an export that is uploaded."""
        if self._delivered:
            self._note.unlink(missing_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _note(self) -> Path:
        """What says which export the folder holds."""
        return self.folder.with_name(f".{self.folder.name}.upload")

    def _whole(self, job: Job) -> ExportReport | None:
        """The report of an export that is here and was not uploaded, if it is the same, file by file."""
        records = Records(job)
        try:
            if not records.possible or read_json(self._note).get("digest") != records.digest:
                return None
            manifest, raw = Manifest.load(self.folder), RawCheckpoint(self.folder)
            stored = manifest.stored()
            as_written = set(stored) == set(raw) and all(
                sha256_of(self.folder / name) == described["sha256"]
                for name, described in manifest.files.items()
            )
            if not (as_written and all(fingerprint(raw.read(name)) == stored[name] for name in stored)):
                return None
            return ExportReport.load(self.folder)
        except (CheckpointError, OSError):  # cut off, or another one
            return None


@contextlib.contextmanager
def opened(out: str | os.PathLike[str], ranks: Ranks, job: Job | None = None) -> Iterator[Place]:
    """The destination of an export, for as long as that lives. A collective.

    Args:
        out: A folder, or a URL of fsspec.
        ranks: Who exports; rank 0 holds it.
        job: What is exported, if its inputs are known.

    Raises:
        CheckpointError: It holds something else than an earlier export, is (in) an input, cannot be written,
            or another export is about to write it.
    """
    url = os.fspath(out).rstrip("/") if is_url(os.fspath(out)) else ""
    with contextlib.ExitStack() as stack:

        def hold() -> Path:
            folder = staging_folder(url) if url else local_path(out)
            if job is not None:
                check_inputs(folder, job.inputs())
            check_destination(folder)
            stack.enter_context(reserved(folder))
            if url:
                Remote(url).check()
            return folder

        place = Place(folder=ranks.first(hold), url=url, ranks=ranks)
        if ranks.rank == 0:
            stack.callback(place.close)
        yield place


def check_place(out: str | os.PathLike[str], *, write: bool) -> None:
    """Raises CheckpointError for a destination that an export could not have; holds and leaves nothing.

    Args:
        out: A folder, or a URL of fsspec.
        write: Whether to write a small file to a URL, and remove it, to see whether that is allowed.
    """
    if is_url(os.fspath(out)):
        Remote(os.fspath(out)).check(write=write)
    else:
        check_destination(local_path(out))
