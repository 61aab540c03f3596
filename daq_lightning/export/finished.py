"""What is finished of an export, and records of it on disk, from which a later export goes on.

    .<file>.done     beside each complete file of an unfinished export, written when that file is durable

A record holds what the report and the manifest say of the tensors in its file, and a digest of all that they
depend on: plan, settings, versions, and which input files there were. It counts if the digest is the same
now, the record is as it was written, and every tensor in the file still has its fingerprint. There are
records only of exports from folders: a model in memory is gone when its process is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from daq_lightning.checkpoint.destination import unfinished
from daq_lightning.checkpoint.fingerprint import fingerprint
from daq_lightning.checkpoint.folder import read_json
from daq_lightning.checkpoint.manifest import package_version
from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorSpec, read_header
from daq_lightning.report.figures import TensorReport

if TYPE_CHECKING:
    from daq_lightning.export.job import Job


@dataclass(frozen=True, kw_only=True)
class TensorPrints:
    """Fingerprints of one tensor.

    Attributes:
        stored: Part, as its layout names it, -> what the file holds.
        weights: dtype -> the weight that a quantized tensor was made from. Float32 and float64 weights are
            known by their bfloat16 copy as well, which is what a run usually saves of them.
        base: The base that it was searched against; "" without one.
    """

    stored: Mapping[str, str]
    weights: Mapping[str, str] = field(default_factory=dict)
    base: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The entry of a quantized tensor in the manifest."""
        return {"base": self.base, "weights": dict(self.weights), **self.stored}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> TensorPrints:
        """The fingerprints of an entry, as `to_dict` wrote it."""
        stored = {part: value for part, value in entry.items() if part not in ("base", "weights")}
        return cls(stored=stored, weights=entry["weights"], base=entry["base"])


def prints_of(
    stored: Mapping[str, Tensor], weight: Tensor | None = None, base: Tensor | None = None
) -> TensorPrints:
    """The fingerprints of a tensor.

    Args:
        stored: Part -> tensor, as written.
        weight: What a quantized tensor was made from; None for one that is kept.
        base: What it was searched against, if anything.
    """
    weights = {}
    if weight is not None:
        weights[str(weight.dtype).removeprefix("torch.")] = fingerprint(weight)
        if weight.dtype in (torch.float32, torch.float64):
            weights["bfloat16"] = fingerprint(weight.bfloat16())
    return TensorPrints(
        stored={part: fingerprint(tensor) for part, tensor in stored.items()},
        weights=weights,
        base="" if base is None else fingerprint(base),
    )


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Tensors that are written, with all that is said of them.

    Attributes:
        reports: Of the quantized ones.
        prints: Of all.
        files: The files that hold nothing else, as far as they were looked at.
    """

    reports: dict[str, TensorReport] = field(default_factory=dict)
    prints: dict[str, TensorPrints] = field(default_factory=dict)
    files: tuple[str, ...] = ()

    @classmethod
    def joined(cls, parts: Iterable[Finished]) -> Finished:
        """All of some parts."""
        whole = cls()
        files: list[str] = []
        for part in parts:
            whole.reports.update(part.reports)
            whole.prints.update(part.prints)
            files += part.files
        return cls(reports=whole.reports, prints=whole.prints, files=tuple(files))

    def to_dict(self, names: Iterable[str] | None = None) -> dict[str, Any]:
        """Plain values, of some tensors or of all: small, and quick to send to another rank."""
        chosen = self.prints if names is None else names
        return {
            name: {
                "prints": self.prints[name].to_dict(),
                "report": self.reports[name].to_dict() if name in self.reports else None,
            }
            for name in chosen
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], files: tuple[str, ...] = ()) -> Finished:
        """The tensors that `to_dict` wrote."""
        return cls(
            reports={
                name: TensorReport.from_dict(name, entry["report"])
                for name, entry in content.items()
                if entry["report"] is not None
            },
            prints={name: TensorPrints.from_dict(entry["prints"]) for name, entry in content.items()},
            files=files,
        )


class Records:
    """The records of one export.

    Args:
        job: The export.

    Attributes:
        possible: Whether there are any.
        digest: Of all that decides about the files; "" where there are no records.
    """

    def __init__(self, job: Job) -> None:
        self.possible = isinstance(job.source.weights, Checkpoint) and isinstance(job.base, Checkpoint)
        self.digest = _digest(job) if self.possible else ""
        self._plan = {tensor.spec.name: tensor for tensor in job.plan.tensors}

    def of(self, file: str, specs: Sequence[TensorSpec]) -> Record:
        """The record of a file that is being written."""
        stored = {spec.name for spec in specs}
        names = [
            name
            for name, tensor in self._plan.items()
            if any(spec.name in stored for spec in tensor.stored.values())
        ]
        return Record(file=file, digest=self.digest, names=tuple(names), left=set(names))

    def read(self, folder: Path, file: str, specs: Sequence[TensorSpec]) -> Finished:
        """What a file of an unfinished export holds, after checking it; nothing if it is not complete."""
        path = folder / _name(file)
        if not (self.possible and path.is_file()):
            return Finished()
        try:
            content = read_json(path)
            tensors: Any = content.get("tensors")
            if content.get("digest") != self.digest or content.get("sha256") != _sha256(tensors):
                return Finished()
            done = Finished.from_dict(tensors, (file,))
            entries = read_header(folder / file)
            if set(done.prints) != set(self.of(file, specs).names):
                return Finished()
            for name, prints in done.prints.items():
                for part, spec in self._plan[name].stored.items():
                    entry = entries[spec.name]
                    same = entry.dtype == spec.dtype and entry.shape == spec.shape
                    if not (same and fingerprint(entry.read()) == prints.stored[part]):
                        return Finished()
        except (CheckpointError, OSError, KeyError):  # the file is cut off, or another one
            return Finished()
        return done

    def count(self, folder: Path) -> int:
        """How many files of an unfinished export have a record of this export; not checked further."""
        found = 0
        for path in folder.glob(_name("*")):
            try:
                found += read_json(path).get("digest") == self.digest
            except CheckpointError:
                continue
        return found

    @staticmethod
    def remove(folder: Path) -> None:
        """Removes all records: what is published holds none."""
        for path in folder.glob(_name("*")):
            path.unlink()


@dataclass(kw_only=True)
class Record:
    """The record of one file, while it is being written."""

    file: str
    digest: str
    names: tuple[str, ...]
    left: set[str]

    def completed_by(self, name: str) -> bool:
        """Notes that a tensor is written; whether that was the last, and a record is wanted."""
        if name not in self.left:
            return False
        self.left.discard(name)
        return not self.left and bool(self.digest)

    def content(self, finished: Finished) -> tuple[str, dict[str, Any]]:
        """Name and content of the record."""
        tensors = finished.to_dict(self.names)
        return _name(self.file), {"digest": self.digest, "sha256": _sha256(tensors), "tensors": tensors}


class InterruptedExportError(KeyboardInterrupt):
    """An export was interrupted, and can go on from what it completed."""


def interrupted(records: Records, folder: Path, total: int) -> InterruptedExportError | None:
    """What to say of an interrupted export; None if no file of it is complete.

    Args:
        records: Of the export.
        folder: Where its files are.
        total: How many there will be.
    """
    complete = records.count(folder) if records.possible else 0
    if not complete:
        return None
    return InterruptedExportError(
        f"{complete} of {total} files are complete in {folder}: run again with --resume (in Python "
        "resume=True) to go on from them; without it, they are removed."
    )


def find_leftover(out: Path, records: Records) -> Path | None:
    """The unfinished export to a destination that has most files in common with this one."""
    if not records.possible:
        return None
    found = [(records.count(folder), folder) for folder in unfinished(out)]
    count, folder = max(found, default=(0, None), key=lambda pair: pair[0])
    return folder if count else None


def _name(file: str) -> str:
    return f".{file}.done"


def _digest(job: Job) -> str:
    """Depends on everything that decides about the bytes of the files."""
    inputs = [
        [role, file.name, file.stat().st_size, file.stat().st_mtime_ns]
        for role, place in job.inputs()
        for file in ([place] if place.is_file() else sorted(place.iterdir()))
        if file.suffix in (".safetensors", ".json") and file.is_file()
    ]
    return _sha256([job.parts(), inputs, package_version("daq-lightning"), job.lineage.base_path])


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
