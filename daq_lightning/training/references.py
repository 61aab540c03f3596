"""Bases that are where they are: in memory, in a folder, in a snapshot that was taken before.

A base is a reference, in primitives, that a training checkpoint can hold: what kind it is, where it is, and a
fingerprint of every tensor. The ranks of a job share the reading; each keeps what it will need itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from daq_lightning.checkpoint.fingerprint import combine, fingerprint
from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.checkpoint.tensor_file import DescribedTensors, TensorSpec, spec_in
from daq_lightning.export.ranks import Agreement, Ranks
from daq_lightning.export.turns import in_turn, shares

if TYPE_CHECKING:
    from daq_lightning.model.live import LiveModel

Kind: TypeAlias = Literal["adapters", "snapshot", "memory", "folder", "ckpt"]


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
        parts: The same, of each rank: those that it exports.
        dirpath: Where a snapshot goes.
        resumed_from: The checkpoint that the run resumes from, or None for a fresh run.
        saved: The reference in that checkpoint.
    """

    base: str
    names: tuple[str, ...]
    parts: tuple[tuple[str, ...], ...]
    dirpath: Path
    resumed_from: str | None
    saved: Mapping[str, Any] | None


def fingerprinted(
    kind: Kind, weights: Mapping[str, Tensor], parts: Sequence[Sequence[str]], ranks: Ranks, path: str = ""
) -> Base:
    """A base whose weights stay where they are: frozen under adapters, a copy, a file. A collective.

    Args:
        kind: Where that is.
        weights: Checkpoint name -> tensor; may lack some.
        parts: The names that each rank reads.
        ranks: Who reads.
        path: Folder or file.
    """
    present = [[name for name in part if name in weights] for part in parts]
    return Base(
        kind=kind, path=path, weights=weights, fingerprints=read_fingerprints(weights, present, ranks)
    )


def read_fingerprints(
    weights: Mapping[str, Tensor], parts: Sequence[Sequence[str]], ranks: Ranks
) -> dict[str, str]:
    """Name -> fingerprint, each computed on the rank that reads the tensor. A collective."""
    agreement = Agreement(ranks)
    mine: dict[str, str] = {}
    for name, tensor in in_turn(weights, parts, ranks, agreement):
        with agreement.attempt():
            mine[name] = fingerprint(tensor)
    found = ranks.union(mine)
    return {name: found[name] for part in parts for name in part}


class OwnCopies(DescribedTensors):
    """Copies of the weights that this rank exports, with the descriptions of all, as every rank has them.

    Args:
        specs: Of all.
        copies: Of this rank's.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], copies: Mapping[str, Tensor]) -> None:
        self.specs, self._copies = specs, copies

    def __getitem__(self, name: str) -> Tensor:
        return self._copies[name]


def copy_to_memory(weights: Mapping[str, Tensor], request: BaseRequest, ranks: Ranks) -> Base:
    """Copies weights to the host memory of the rank that will export them; pinned if they come from CUDA."""
    agreement = Agreement(ranks)
    copies = {}
    for name, weight in in_turn(weights, request.parts, ranks, agreement):
        with agreement.attempt():
            copies[name] = torch.empty(
                weight.shape, dtype=weight.dtype, device="cpu", pin_memory=weight.is_cuda
            ).copy_(weight)
    specs = {name: spec_in(weights, name) for name in request.names}
    return fingerprinted("memory", OwnCopies(specs, copies), request.parts, ranks)


def open_folder(request: BaseRequest, model: LiveModel, ranks: Ranks) -> Base:
    """A base that is a checkpoint folder, which may have other names for the same weights."""
    names, path = request.names, request.base

    def opened() -> tuple[Checkpoint, dict[str, str]]:
        checkpoint = Checkpoint(path)
        aliases: dict[str, str] = {}
        if any(name not in checkpoint for name in names):
            by_key = {key: name for name, key in model.architecture.keys_of(checkpoint).items()}
            aliases = {name: by_key.get(model.keys[name], name) for name in names if name not in checkpoint}
        return checkpoint, aliases

    checkpoint, aliases = ranks.together(opened)
    parts = [
        [aliases.get(name, name) for name in part if aliases.get(name, name) in checkpoint]
        for part in request.parts
    ]
    known = read_fingerprints(checkpoint, parts, ranks)
    fingerprints = {name: known[alias] for name in names if (alias := aliases.get(name, name)) in known}
    return Base(kind="folder", path=str(Path(path).absolute()), weights=checkpoint, fingerprints=fingerprints)


def open_resumed(saved: Mapping[str, Any], dirpath: Path, ranks: Ranks) -> Base:
    """The snapshot that the checkpoint of a resumed run points to, also if the run's folder was moved.

    Raises:
        MisconfigurationException: It is gone.
    """

    def opened() -> tuple[Path, Checkpoint]:
        for path in (Path(saved["path"]), dirpath / Path(saved["path"]).name):
            if path.is_dir():
                return path, Checkpoint(path)
        raise MisconfigurationException(
            f"The base snapshot {saved['path']} of the run that is resumed does not exist. Put it back, or "
            "pass base='<folder>' with the model that the run was started from."
        )

    path, checkpoint = ranks.together(opened)
    fingerprints = read_fingerprints(checkpoint, shares(list(checkpoint), ranks), ranks)
    return Base(kind="snapshot", path=str(path), weights=checkpoint, fingerprints=fingerprints)


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
