"""A chain of exports: each stage fine-tuned from the one before.

    root base -> stage 1 -> stage 2 -> ...          each export's manifest names its parent by folder and
    fingerprint

Continual learning trains each stage from the last one. `Chain.open(folder).verify()` finds any file of any
stage that was altered, is missing or does not belong; the model card `README.md` may be edited.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daq_lightning.checkpoint.fingerprint import fingerprint
from daq_lightning.checkpoint.folder import CARD, INDEX, MANIFEST, RawCheckpoint, inside, sha256_of
from daq_lightning.checkpoint.manifest import Manifest
from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.report.figures import ExportReport


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One export of a chain."""

    folder: Path
    manifest: Manifest

    def totals(self) -> dict[str, Any]:
        """The totals of its report; empty if that cannot be read, which `Chain.verify` says."""
        try:
            return ExportReport.load(self.folder).to_dict()["totals"]
        except CheckpointError:
            return {}


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The lineage of an export.

    Attributes:
        stages: From the first to the one that was opened.
    """

    stages: tuple[Stage, ...]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Chain:
        """Reads the manifests from an export back to the first stage.

        Raises:
            CheckpointError: A stage is missing, has no valid manifest, or is not the parent its child names.
        """
        stages: list[Stage] = []
        path, expected = Path(folder).expanduser(), ""
        while True:
            manifest = Manifest.load(path)
            if expected and manifest.fingerprint != expected:
                raise CheckpointError(
                    f"{path} is not the parent that {stages[-1].folder} was made from: it was exported again "
                    "or replaced since. Put the original back, or export the later stages again."
                )
            if any(path.resolve() == stage.folder.resolve() for stage in stages):
                raise CheckpointError(f"{path} is its own ancestor: the manifests were tampered with.")
            stages.append(Stage(folder=path, manifest=manifest))
            lineage = manifest.lineage
            if not lineage.parent:
                return cls(stages=tuple(reversed(stages)))
            path, expected = path / lineage.parent, lineage.parent_fingerprint

    @property
    def root(self) -> Path | None:
        """The base of the first stage, or None if it was in memory only."""
        first = self.stages[0]
        return (
            (first.folder / first.manifest.lineage.base_path).resolve()
            if first.manifest.lineage.base_path
            else None
        )

    def table(self) -> str:
        """The lineage as text: what each stage was made from, and what is left of its change."""
        lines = [f"root  {self.root or 'in memory, not kept'}"]
        for stage in self.stages:
            lineage, totals = stage.manifest.lineage, stage.totals()
            begun = (
                f"from the parent's {lineage.chain_from} weights" if lineage.chain_from else lineage.base_kind
            )
            lines.append(f"stage {lineage.stage}  {stage.folder.resolve()}  {stage.manifest.scheme}, {begun}")
            for side, label in (("searched", "since its base"), ("root", "since the root")):
                if side in totals:
                    figures = {name: totals[side].get(name) for name in ("gain", "cosine", "sign_rate")}
                    shown = "  ".join(
                        f"{name} {value:.4f}" for name, value in figures.items() if value is not None
                    )
                    lines.append(f"         kept of the change {label}: {shown}")
        return "\n".join(lines)

    def verify(self) -> list[str]:
        """Compares every file of every stage with its manifest.

        Returns:
            One line for each tensor or file that was altered, is missing, or does not belong; empty if all is
            well.
        """
        return [problem for stage in self.stages for problem in _verify_stage(stage)]


def _verify_stage(stage: Stage) -> Iterator[str]:
    folder, manifest = stage.folder, stage.manifest
    for name, described in manifest.files.items():
        if name == CARD:  # a text for people, that whoever publishes the model goes on writing
            continue
        file = folder / name
        if not file.is_file():
            yield f"{file} is missing"
            continue
        try:
            if sha256_of(inside(folder, name)) != described["sha256"]:
                yield f"{file} was altered"
        except CheckpointError as error:  # a link out of the folder
            yield str(error)
    try:
        ExportReport.load(folder)
        raw = RawCheckpoint(folder)
    except CheckpointError as error:
        yield str(error)
        return
    expected = manifest.stored()
    for name, value in expected.items():
        if name not in raw:
            yield f"{folder}: the tensor {name} is missing"
        elif fingerprint(raw[name]) != value:
            yield f"{raw.entries[name].path}: the tensor {name} was altered"
    for name in raw:
        if name not in expected:
            yield f"{raw.entries[name].path}: the tensor {name} does not belong to this export"
    known = {*manifest.files, CARD, MANIFEST, INDEX, *(entry.path.name for entry in raw.entries.values())}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.relative_to(folder).as_posix() not in known:
            yield f"{file} does not belong to this export"
