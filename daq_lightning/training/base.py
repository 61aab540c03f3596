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

import contextlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from daq_lightning.checkpoint.fingerprint import fingerprint
from daq_lightning.checkpoint.folder import MANIFEST
from daq_lightning.checkpoint.lightning_file import read_lightning_checkpoint
from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.checkpoint.tensor_file import CheckpointError, spec_in
from daq_lightning.checkpoint.writer import CheckpointWriter, plan_shards
from daq_lightning.export.behind import Behind
from daq_lightning.export.ranks import ALONE, Agreement, Ranks
from daq_lightning.export.turns import in_turn, shares
from daq_lightning.export.work import deal, files_of, open_on_all
from daq_lightning.model.live import LiveModel
from daq_lightning.model.saved_state import adapters_in
from daq_lightning.training.claims import claim, mark_shared, versions
from daq_lightning.training.references import (
    Base,
    BaseRequest,
    check_resumed,
    copy_to_memory,
    fingerprinted,
    open_folder,
    open_resumed,
    read_fingerprints,
)
from daq_lightning.training.tidy import tidy

_SNAPSHOT_VERSION = 1


def resolve_base(request: BaseRequest, model: LiveModel, ranks: Ranks) -> Base:
    """The base that a run asks for; that of a resumed run is the one it started from, or an error.

    A collective: the ranks share the reading and the writing, and all get the same reference.

    Raises:
        MisconfigurationException: A resumed run whose base is gone or differs.
        CheckpointError: A folder or file that cannot be read.
    """
    saved, resumed = request.saved, request.resumed_from is not None
    ranks.first(lambda: tidy(request.dirpath))
    if resumed and saved is not None and saved["kind"] == "snapshot":
        base = open_resumed(saved, request.dirpath, ranks)
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
            frozen = model.view(model.adapters.base, collective=model.sharded)
            base = fingerprinted("adapters", frozen, request.parts, ranks)
        elif request.base == "memory":
            base = copy_to_memory(model.weights, request, ranks)
        else:
            base = take_snapshot(model.weights, request.names, request.dirpath / "base", ranks)
    elif request.base.endswith(".ckpt"):
        base = open_lightning_checkpoint(request, model, ranks)
    else:
        base = open_folder(request, model, ranks)
    if resumed and saved is not None:
        check_resumed(saved, base)
    return base


def open_lightning_checkpoint(request: BaseRequest, model: LiveModel, ranks: Ranks) -> Base:
    """A base that is a `.ckpt` file.

    Weights that have to be merged are written to a snapshot: computed once, they are the same bits in a
    resumed run, and the file may go.
    """

    def opened() -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        state = read_lightning_checkpoint(request.base)
        weights = model.saved(state)
        missing = [name for name in request.names if name not in weights]
        if missing:
            raise CheckpointError(
                f"{request.base} lacks {len(missing)} of {len(request.names)} weights "
                f"({', '.join(missing[:3])}): expected a checkpoint of the LightningModule that is trained. "
                f"It holds {', '.join(list(state)[:3])}, ..."
            )
        return state, weights

    state, weights = ranks.together(opened)
    if adapters_in(state):
        return take_snapshot(weights, request.names, request.dirpath / "base", ranks)
    return fingerprinted("ckpt", weights, request.parts, ranks, path=str(Path(request.base).absolute()))


def take_snapshot(
    weights: Mapping[str, Tensor],
    names: Iterable[str],
    folder: Path,
    ranks: Ranks = ALONE,
    own: Collection[Path] = (),
) -> Base:
    """Streams weights to a folder of safetensors, one at a time; an equal snapshot that is there is used
    again.

    Args:
        weights: Checkpoint name -> tensor.
        names: Which of them.
        folder: Destination. If it holds other weights, `<folder>-v1` and so on is taken.
        ranks: Who writes; all of them call this.
        own: The snapshots of this run. One that another run made is marked: it stays, whatever becomes of
            that run.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    names = list(names)
    fingerprints: dict[str, str] = {}
    for target in versions(folder):
        with contextlib.ExitStack() as stack:

            def claimed(target: Path = target, stack: contextlib.ExitStack = stack) -> bool:
                # another run that writes it is waited for: it may write the same weights
                stack.enter_context(claim(target))
                return target.exists()

            if not ranks.first(claimed):
                return _write_snapshot(weights, names, target, ranks)
            fingerprints = fingerprints or read_fingerprints(weights, shares(names, ranks), ranks)
            if _snapshot_fingerprints(target, ranks) == fingerprints:
                if target not in own:
                    ranks.first(lambda target=target: mark_shared(target))
                return Base(
                    kind="snapshot", path=str(target), weights=Checkpoint(target), fingerprints=fingerprints
                )
    raise AssertionError("versions never end")


def _write_snapshot(weights: Mapping[str, Tensor], names: list[str], target: Path, ranks: Ranks) -> Base:
    specs = [spec_in(weights, name) for name in names]
    shards = plan_shards(specs)
    owners = deal(shards, ranks.size)
    parts: list[list[str]] = [[] for _ in range(ranks.size)]
    for file, owner in owners.items():
        parts[owner] += [spec.name for spec in shards[file]]
    agreement = Agreement(ranks)
    mine: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        files = files_of(owners, ranks.rank)
        writer = open_on_all(
            lambda folder: CheckpointWriter(target, specs, files=files, folder=folder), ranks, stack
        )
        behind = stack.enter_context(Behind())
        for name, weight in in_turn(weights, parts, ranks, agreement):
            with agreement.attempt():
                behind.run(writer.write, name, weight)  # while it is fingerprinted
                mine[name] = fingerprint(weight)
        ranks.together(lambda: (behind.wait(), writer.finish()))
        found = ranks.union(mine)
        fingerprints = {name: found[name] for name in names}

        def publish() -> None:
            writer.write_json(MANIFEST, {"snapshot_version": _SNAPSHOT_VERSION, "fingerprints": fingerprints})
            writer.publish()

        ranks.first(publish)
    checkpoint = ranks.together(lambda: Checkpoint(target))
    return Base(
        kind="snapshot", path=str(target), weights=checkpoint, fingerprints=fingerprints, created=True
    )


def _snapshot_fingerprints(folder: Path, ranks: Ranks) -> dict[str, str] | None:
    """The fingerprints of a snapshot as it lies on disk, or None if it is not one."""
    if not ranks.first(lambda: (folder / MANIFEST).is_file()):
        return None
    try:
        checkpoint = ranks.together(lambda: Checkpoint(folder))
        return read_fingerprints(checkpoint, shares(list(checkpoint), ranks), ranks)
    except CheckpointError:
        return None
