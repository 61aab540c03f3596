"""Which rank exports what, and in which order all of them go through the tensors together.

    shards   planned from names and sizes alone, so that any number of ranks writes the same bytes
    deal     the largest file first, each to the rank that has the least so far
    rounds   in each, every rank has one batch of its own (or none, when it is done)

In a sharded model, reading a tensor is work for all ranks. Rounds let all of them search at the same time:
in the order of the files, one rank after the other would have all the work.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorSpec

if TYPE_CHECKING:
    from daq_lightning.checkpoint.writer import CheckpointWriter
    from daq_lightning.export.plan import ExportPlan, TensorPlan
    from daq_lightning.export.ranks import Ranks

_BATCH = 64 << 20  # bytes of weights that are searched together
_VISIBLE = 20.0  # seconds until a folder that one node made is seen by another

Batch: TypeAlias = "tuple[TensorPlan, ...]"
Round: TypeAlias = "tuple[Batch, ...]"
"""The batch of each rank, in their order."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The part of each rank.

    Attributes:
        owners: File -> the rank that writes it; those that are complete already are left out.
        rounds: What is done, in order.
    """

    owners: Mapping[str, int]
    rounds: tuple[Round, ...]

    @property
    def weights(self) -> dict[str, int]:
        """Name of a tensor -> the rank that exports it."""
        return {
            plan.spec.name: rank for turn in self.rounds for rank, batch in enumerate(turn) for plan in batch
        }

    def files(self, rank: int) -> frozenset[str]:
        """The files of a rank."""
        return files_of(self.owners, rank)


def deal(shards: Mapping[str, Sequence[TensorSpec]], size: int) -> dict[str, int]:
    """File -> rank, by bytes: the largest file first, each to the rank that has the least so far.

    Example:
        >>> import torch
        >>> one, two = (TensorSpec(name="w", dtype=torch.int8, shape=(n,)) for n in (1, 2))
        >>> deal({"a": [one], "b": [two], "c": [one]}, 2)
        {'b': 0, 'a': 1, 'c': 1}
    """
    load = [0] * size
    owners = {}
    sizes = {file: sum(spec.nbytes for spec in specs) for file, specs in shards.items()}
    for file in sorted(shards, key=lambda file: (-sizes[file], file)):
        owners[file] = load.index(min(load))
        load[owners[file]] += sizes[file]
    return owners


def files_of(owners: Mapping[str, int], rank: int) -> frozenset[str]:
    """The files that `deal` gave to a rank."""
    return frozenset(file for file, owner in owners.items() if owner == rank)


def share_out(
    plan: ExportPlan,
    shards: Mapping[str, Sequence[TensorSpec]],
    ranks: Ranks,
    *,
    together: bool,
    complete: Collection[str] = (),
) -> Work:
    """The work of an export.

    Args:
        plan: Of the export.
        shards: File -> what it holds.
        ranks: Who works.
        together: Whether weights may share a search, which alphas of a whole layer forbid.
        complete: Files that are there already.
    """
    owners = deal({file: specs for file, specs in shards.items() if file not in complete}, ranks.size)
    batches = [batches_of(part, together=together) for part in dealt(plan, shards, owners, ranks)]
    return Work(owners=owners, rounds=tuple(zip_longest(*batches, fillvalue=())))


def dealt(
    plan: ExportPlan, shards: Mapping[str, Sequence[TensorSpec]], owners: Mapping[str, int], ranks: Ranks
) -> list[list[TensorPlan]]:
    """The tensors of each rank: those in its files."""
    owner_of = {spec.name: owner for file, owner in owners.items() for spec in shards[file]}
    parts: list[list[TensorPlan]] = [[] for _ in range(ranks.size)]
    for tensor in plan.tensors:
        first = next(iter(tensor.stored.values())).name
        if first in owner_of:
            parts[owner_of[first]].append(tensor)
    return parts


def batches_of(tensors: Sequence[TensorPlan], *, together: bool) -> list[Batch]:
    """What is searched together: what is rounded together, or, up to a bounded size, experts of one layer and
    shape."""
    batches: list[list[TensorPlan]] = []
    open_batches: dict[tuple[str, tuple[int, ...]], list[TensorPlan]] = {}
    rounded: dict[str, list[TensorPlan]] = {}
    for tensor in tensors:
        if tensor.together:
            if tensor.together not in rounded:
                batches.append(rounded.setdefault(tensor.together, []))
            rounded[tensor.together].append(tensor)
            continue
        layer, found, _ = tensor.spec.name.rpartition(".experts.")
        if not (together and tensor.quantize and tensor.role == "expert" and found):
            batches.append([tensor])
            continue
        batch = open_batches.setdefault((layer, tensor.spec.shape), [])
        if not batch or (len(batch) + 1) * tensor.spec.nbytes > _BATCH:
            batch = open_batches[layer, tensor.spec.shape] = []
            batches.append(batch)
        batch.append(tensor)
    return [tuple(batch) for batch in batches]


def open_on_all(
    make: Callable[[Path | None], CheckpointWriter], ranks: Ranks, stack: contextlib.ExitStack
) -> CheckpointWriter:
    """The writer of this rank: rank 0 reserves a folder, the others join it. A collective.

    Args:
        make: Makes the writer of this rank, given the folder to join, or None to reserve one.
        ranks: Who writes.
        stack: Closes it.

    Raises:
        CheckpointError: The destination cannot be written, or the ranks do not share a file system there.
    """

    def joined(folder: Path) -> CheckpointWriter:
        _wait_for(folder, ranks)
        return stack.enter_context(make(folder))

    first = ranks.together(lambda: stack.enter_context(make(None)) if ranks.rank == 0 else None)
    folder = ranks.gather(None if first is None else first.folder)[0]
    assert folder is not None
    writer = ranks.together(lambda: first or joined(folder))
    return writer


def _wait_for(folder: Path, ranks: Ranks) -> None:
    """Waits until this node sees what rank 0 made; network file systems take a moment."""
    end = time.monotonic() + _VISIBLE
    while not folder.is_dir():
        if time.monotonic() > end:
            raise CheckpointError(
                f"Rank {ranks.rank} on {socket.gethostname()} does not see {folder}, which rank 0 made: the "
                "ranks write one checkpoint together and need a file system that all of them share. Choose a "
                "destination (with a URL, a TMPDIR) on one (NFS, Lustre, ...), or run on one node."
            )
        time.sleep(0.05)
