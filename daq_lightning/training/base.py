"""The base of a run: the weights that the update is measured against.

| base | where the weights are | on resume |
| --- | --- | --- |
| "auto" | LoRA: the frozen weights in memory; otherwise as "snapshot" | as the chosen kind |
| "snapshot" | copied to `dirpath/base/` when training starts | read from there |
| "memory" | copied to host memory when training starts | cannot be resumed: an error |
| a folder | a Hugging Face checkpoint, or an export of this package (dequantized) | read from there |
| a `.ckpt` file | a Lightning checkpoint of the same module, or of it before adapters | read from there |
| a `.ckpt` file with adapters | merged, once, into `dirpath/base/` | read from there |

No hook sees the base weights of a resumed run, so a base is a reference: where it is, and a fingerprint of
every tensor. The callback saves the reference with the training state; a resumed run finds the same base or
stops before its first step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from daq_lightning.checkpoint.fingerprint import combine, fingerprint
from daq_lightning.checkpoint.folder import MANIFEST
from daq_lightning.checkpoint.lightning_file import read_lightning_checkpoint
from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorSpec
from daq_lightning.checkpoint.writer import CheckpointWriter
from daq_lightning.export.behind import Behind
from daq_lightning.model.live import LiveModel
from daq_lightning.model.saved_state import adapters_in
from daq_lightning.training.claims import claim, mark_shared, versions

Kind: TypeAlias = Literal["adapters", "snapshot", "memory", "folder", "ckpt"]
_SNAPSHOT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base that is at hand.

    Attributes:
        kind: Where its weights are.
        path: Folder or file; empty for weights in memory.
        weights: Checkpoint name -> tensor, lazy.
        fingerprints: Checkpoint name -> fingerprint, of the weights that are quantized.
        created: Whether it is a snapshot that this run wrote itself.
    """

    kind: Kind
    path: str
    weights: Mapping[str, Tensor] = field(repr=False)
    fingerprints: Mapping[str, str] = field(repr=False)
    created: bool = False

    @property
    def fingerprint(self) -> str:
        """One fingerprint of all tensors."""
        return combine(dict(self.fingerprints))

    def state(self) -> dict[str, Any]:
        """The reference, in primitives, for a training checkpoint."""
        return {"kind": self.kind, "path": self.path, "fingerprints": dict(self.fingerprints)}


@dataclass(frozen=True, kw_only=True)
class BaseRequest:
    """What is asked of `resolve_base`.

    Attributes:
        base: "auto", "snapshot", "memory", a folder or a `.ckpt` file.
        names: Checkpoint names of the weights that are quantized.
        dirpath: Where a snapshot goes.
        resumed_from: The checkpoint that the run resumes from, or None for a fresh run.
        saved: The reference in that checkpoint.
    """

    base: str
    names: tuple[str, ...]
    dirpath: Path
    resumed_from: str | None
    saved: Mapping[str, Any] | None


def resolve_base(request: BaseRequest, model: LiveModel) -> Base:
    """The base that a run asks for; that of a resumed run is the one it started from, or an error.

    Raises:
        MisconfigurationException: A resumed run whose base is gone or differs.
        CheckpointError: A folder or file that cannot be read.
    """
    saved, resumed = request.saved, request.resumed_from is not None
    if resumed and saved is not None and saved["kind"] == "snapshot":
        base = open_resumed(saved, request.dirpath)
    elif request.base in ("auto", "snapshot", "memory"):
        if resumed and not (request.base == "auto" and model.adapters is not None):
            raise MisconfigurationException(
                f"The run resumes from {request.resumed_from}, and the weights before training are not at "
                "hand any more: "
                + (
                    "they were kept in memory (base='memory'). "
                    if saved
                    else "its callback state holds no base. "
                )
                + "Pass base='<folder>' with the model that the run was started from."
            )
        if request.base == "auto" and model.adapters is not None:
            base = base_from_memory("adapters", model.view(model.adapters.base), request.names)
        elif request.base == "memory":
            base = copy_to_memory(model.weights, request.names)
        else:
            base = take_snapshot(model.weights, request.names, request.dirpath / "base")
    elif request.base.endswith(".ckpt"):
        base = open_lightning_checkpoint(request, model)
    else:
        base = open_folder(request.base, request.names, model)
    if resumed and saved is not None:
        check_resumed(saved, base)
    return base


def base_from_memory(kind: Kind, weights: Mapping[str, Tensor], names: Iterable[str], path: str = "") -> Base:
    """A base whose weights stay where they are: frozen under adapters, a copy, or a memory-mapped file."""
    fingerprints = {name: fingerprint(weights[name]) for name in names if name in weights}
    return Base(kind=kind, path=path, weights=weights, fingerprints=fingerprints)


def copy_to_memory(weights: Mapping[str, Tensor], names: Iterable[str]) -> Base:
    """Copies weights to host memory, pinned if they come from a CUDA device."""
    copies = {}
    for name in names:
        weight = weights[name].detach()
        copies[name] = torch.empty(
            weight.shape, dtype=weight.dtype, device="cpu", pin_memory=weight.is_cuda
        ).copy_(weight)
    return base_from_memory("memory", copies, copies)


def take_snapshot(
    weights: Mapping[str, Tensor], names: Iterable[str], folder: Path, own: Collection[Path] = ()
) -> Base:
    """Streams weights to a folder of safetensors, one at a time; an equal snapshot that is there is used
    again.

    Args:
        weights: Checkpoint name -> tensor.
        names: Which of them.
        folder: Destination. If it holds other weights, `<folder>-v1` and so on is taken.
        own: The snapshots of this run. One that another run made is marked: it stays, whatever becomes of
            that run.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    names = list(names)
    fingerprints: dict[str, str] = {}
    for target in versions(folder):
        with claim(target):  # another run that writes it is waited for: it may write the same weights
            if not target.exists():
                return _write_snapshot(weights, names, target)
            fingerprints = fingerprints or {name: fingerprint(weights[name]) for name in names}
            if _snapshot_fingerprints(target) == fingerprints:
                if target not in own:
                    mark_shared(target)
                return Base(
                    kind="snapshot", path=str(target), weights=Checkpoint(target), fingerprints=fingerprints
                )
    raise AssertionError("versions never end")


def _write_snapshot(weights: Mapping[str, Tensor], names: list[str], target: Path) -> Base:
    fingerprints: dict[str, str] = {}
    specs = [
        TensorSpec(name=name, dtype=weights[name].dtype, shape=tuple(weights[name].shape)) for name in names
    ]
    with CheckpointWriter(target, specs) as writer, Behind() as behind:
        for name in names:
            weight = weights[name].detach()
            behind.run(writer.write, name, weight)  # while it is fingerprinted
            fingerprints[name] = fingerprint(weight)
        behind.wait()
        writer.write_json(MANIFEST, {"snapshot_version": _SNAPSHOT_VERSION, "fingerprints": fingerprints})
        writer.publish()
    checkpoint = Checkpoint(target)
    return Base(
        kind="snapshot", path=str(target), weights=checkpoint, fingerprints=fingerprints, created=True
    )


def open_folder(path: str, names: Iterable[str], model: LiveModel) -> Base:
    """A base that is a checkpoint folder.

    Args:
        path: The folder.
        names: The weights that are needed.
        model: Translates names where the folder has others for the same weights.
    """
    checkpoint = Checkpoint(path)
    names = list(names)
    aliases: dict[str, str] = {}
    if any(name not in checkpoint for name in names):
        by_key = {key: name for name, key in model.architecture.keys_of(checkpoint).items()}
        aliases = {name: by_key.get(model.keys[name], name) for name in names if name not in checkpoint}
    present = [name for name in names if aliases.get(name, name) in checkpoint]
    fingerprints = {name: fingerprint(checkpoint[aliases.get(name, name)]) for name in present}
    return Base(kind="folder", path=str(Path(path).absolute()), weights=checkpoint, fingerprints=fingerprints)


def open_lightning_checkpoint(request: BaseRequest, model: LiveModel) -> Base:
    """A base that is a `.ckpt` file.

    Weights that have to be merged are written to a snapshot: computed once, they are the same bits in a
    resumed run, and the file may go.
    """
    state = read_lightning_checkpoint(request.base)
    weights = model.saved(state)
    missing = [name for name in request.names if name not in weights]
    if missing:
        raise CheckpointError(
            f"{request.base} lacks {len(missing)} of {len(request.names)} weights "
            f"({', '.join(missing[:3])}): expected a checkpoint of the LightningModule that is trained. It "
            f"holds {', '.join(list(state)[:3])}, ..."
        )
    if adapters_in(state):
        return take_snapshot(weights, request.names, request.dirpath / "base")
    return base_from_memory("ckpt", weights, request.names, path=str(Path(request.base).absolute()))


def check_resumed(saved: Mapping[str, Any], found: Base) -> None:
    """Compares the base of a resumed run with the reference that its checkpoint holds.

    Raises:
        MisconfigurationException: A tensor is missing or differs.
    """
    expected: Mapping[str, str] = saved["fingerprints"]
    different = [name for name, value in expected.items() if found.fingerprints.get(name) != value]
    if different or len(expected) != len(found.fingerprints):
        where = found.path or "the frozen weights in memory"
        raise MisconfigurationException(
            f"The base of the resumed run is not the one it started from: {len(different)} of "
            f"{len(expected)} weights in {where} are missing or differ ({', '.join(different[:3])}). Pass "
            "base='<folder>' with the model that the run was started from (it was "
            f"{saved['kind']!r}{' in ' + saved['path'] if saved['path'] else ''})."
        )


def open_resumed(saved: Mapping[str, Any], dirpath: Path) -> Base:
    """The snapshot that the checkpoint of a resumed run points to, also if the run's folder was moved.

    Raises:
        MisconfigurationException: It is gone.
    """
    for path in (Path(saved["path"]), dirpath / Path(saved["path"]).name):
        if path.is_dir():
            checkpoint = Checkpoint(path)
            fingerprints = {name: fingerprint(checkpoint[name]) for name in checkpoint}
            return Base(kind="snapshot", path=str(path), weights=checkpoint, fingerprints=fingerprints)
    raise MisconfigurationException(
        f"The base snapshot {saved['path']} of the run that is resumed does not exist. Put it back, or pass "
        "base='<folder>' with the model that the run was started from."
    )


def _snapshot_fingerprints(folder: Path) -> dict[str, str] | None:
    """The fingerprints of a snapshot as it lies on disk, or None if it is not one."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        checkpoint = Checkpoint(folder)
        return {name: fingerprint(checkpoint[name]) for name in checkpoint}
    except CheckpointError:
        return None
