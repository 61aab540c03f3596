"""A chain of exports: each stage fine-tuned from the one before.

    root base -> stage 1 -> stage 2 -> ...          each export's manifest names its parent by folder and fingerprint

Continual learning trains each stage from the last one, either from its high-precision weights or from the deployed
FP8 model. The two differ by the quantization error, so which one it was is said (`chain_from`) and checked, never
guessed. `Chain.open(folder).verify()` finds any file of any stage that was altered, is missing or does not belong.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from daq_lightning.checkpoint.manifest import ChainFrom, Lineage, Manifest
from daq_lightning.checkpoint.reader import INDEX, MANIFEST, Checkpoint, RawCheckpoint
from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.numerics.fingerprint import fingerprint


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One export of a chain."""

    folder: Path
    manifest: Manifest


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The lineage of an export.

    Attributes:
        stages: From the first to the one that was opened.

    Example:
        >>> Chain.open("exports/stage3").verify()  # doctest: +SKIP
        []
    """

    stages: tuple[Stage, ...]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Chain:
        """Reads the manifests from an export back to the first stage.

        Raises:
            CheckpointError: A stage is missing, has no valid manifest, or is not the parent its child names.
        """
        stages: list[Stage] = []
        path, expected = Path(folder), ""
        while True:
            manifest = Manifest.load(path)
            if expected and manifest.fingerprint != expected:
                raise CheckpointError(
                    f"{path} is not the parent that {stages[-1].folder} was made from: it was exported again or "
                    "replaced since. Put the original back, or export the later stages again."
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
        return (first.folder / first.manifest.lineage.base_path).resolve() if first.manifest.lineage.base_path else None

    def verify(self) -> list[str]:
        """Compares every file of every stage with its manifest.

        Returns:
            One line for each tensor or file that was altered, is missing, or does not belong; empty if all is well.
        """
        return [problem for stage in self.stages for problem in _verify_stage(stage)]


def make_lineage(
    *,
    base_kind: str,
    base_path: str,
    base_fingerprint: str,
    base: Mapping[str, Tensor],
    names: Iterable[str],
    parent: str | None = None,
    chain_from: ChainFrom | None = None,
) -> Lineage:
    """The place of a new export in a chain, after checking that its base is what it is said to be.

    Args:
        base_kind: Where the base came from.
        base_path: Its folder or file, or empty.
        base_fingerprint: One fingerprint of it.
        base: Its tensors.
        names: The tensors that are quantized.
        parent: Folder of the stage before; None begins a chain.
        chain_from: Whether the base is the parent's high-precision "weights" or its "deployed" ones.

    Raises:
        CheckpointError: The base is an export and nothing says so, or it is not what `chain_from` says.
    """
    is_export = bool(base_path) and (Path(base_path) / MANIFEST).is_file() and base_kind == "folder"
    if parent is None and not is_export:
        if chain_from is not None:
            raise CheckpointError(f"chain_from={chain_from!r} needs parent='<folder of the stage before>'.")
        return Lineage(base_kind=base_kind, base_path=base_path, base_fingerprint=base_fingerprint, root=base_path)
    parent = parent or base_path
    if chain_from not in ("weights", "deployed"):
        raise CheckpointError(
            f"{parent} is an export: say what this stage was trained from with chain_from='deployed' (its dequantized "
            "FP8 weights) or chain_from='weights' (the high-precision weights it was made from)."
        )
    chain = Chain.open(parent)
    stage = chain.stages[-1]
    _check_base(stage, chain_from, base, list(names))
    return Lineage(
        stage=stage.manifest.lineage.stage + 1,
        parent=parent,
        parent_fingerprint=stage.manifest.fingerprint,
        chain_from=chain_from,
        base_kind=base_kind,
        base_path=base_path,
        base_fingerprint=base_fingerprint,
        root=str(chain.root or ""),
    )


def _check_base(stage: Stage, chain_from: ChainFrom, base: Mapping[str, Tensor], names: list[str]) -> None:
    recorded, deployed = stage.manifest.tensors, Checkpoint(stage.folder)
    wrong = []
    for name in names:
        if name not in recorded or name not in base:
            continue
        if chain_from == "deployed":
            equal = torch.equal(deployed[name].float(), base[name].detach().cpu().float())
        else:
            equal = fingerprint(base[name]) in recorded[name]["weights"].values()
        if not equal:
            wrong.append(name)
    if wrong:
        what = {
            "weights": "the high-precision weights it was exported from",
            "deployed": "its dequantized FP8 weights",
        }[chain_from]
        other = "deployed" if chain_from == "weights" else "weights"
        raise CheckpointError(
            f"chain_from={chain_from!r} says that this stage began with {what}, but {len(wrong)} of {len(names)} base "
            f"weights differ from those of {stage.folder} ({', '.join(wrong[:3])}). Pass the base that training really "
            f"began with, or chain_from={other!r}."
        )


def _verify_stage(stage: Stage) -> Iterator[str]:
    folder, manifest = stage.folder, stage.manifest
    for name, described in manifest.files.items():
        file = folder / name
        if not file.is_file():
            yield f"{file} is missing"
        elif hashlib.sha256(file.read_bytes()).hexdigest() != described["sha256"]:
            yield f"{file} was altered"
    try:
        raw = RawCheckpoint(folder)
    except CheckpointError as error:
        yield str(error)
        return
    expected = dict(manifest.kept)
    scale_suffix = "_scale_inv" if manifest.quantization_config.get("quant_method") == "fp8" else "_scale"
    for name, prints in manifest.tensors.items():
        expected[name] = prints["codes"]
        expected[name + scale_suffix] = prints["scale"]
    for name, value in expected.items():
        if name not in raw:
            yield f"{folder}: the tensor {name} is missing"
        elif fingerprint(raw[name]) != value:
            yield f"{raw.entries[name].path}: the tensor {name} was altered"
    for name in raw:
        if name not in expected:
            yield f"{raw.entries[name].path}: the tensor {name} does not belong to this export"
    known = {*manifest.files, MANIFEST, INDEX, *(entry.path.name for entry in raw.entries.values())}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.relative_to(folder).as_posix() not in known:
            yield f"{file} does not belong to this export"
