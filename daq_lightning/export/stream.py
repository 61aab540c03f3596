"""The weights of an export on their way: read ahead, handed out in batches of pairs, written behind.

    Pair(plan, weight, base | None)        one tensor, with what it is measured against

A weight and its base come out of one place, together: nothing can put a weight beside another's base. While a
batch is searched, the next pair is read and the last result is written by threads of their own, so that the
disk and the arithmetic work at once. At most a few tensors are held; buffers and threads end with the stream.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from daq_lightning.checkpoint.buffers import Buffers
from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.checkpoint.tensor_file import LazyTensors
from daq_lightning.export.memory import Room, check_memory, needed
from daq_lightning.export.progress import with_progress
from daq_lightning.export.ranks import ALONE, Agreement, Ranks
from daq_lightning.numerics.backends.heap import return_freed_memory

if TYPE_CHECKING:
    from daq_lightning.export.job import Job
    from daq_lightning.export.plan import TensorPlan
    from daq_lightning.export.work import Round, Work

_AHEAD = 2  # pairs that are being read or wait to be taken


class Pair(NamedTuple):
    """One tensor of an export.

    Attributes:
        plan: What happens to it.
        weight: The fine-tuned tensor, on the device of the search.
        base: The tensor before fine-tuning, on the same device; None where there is none or none is needed.
    """

    plan: TensorPlan
    weight: Tensor
    base: Tensor | None


Batch: TypeAlias = tuple[Pair, ...]
Read: TypeAlias = Callable[[], Tensor | None]


def stream(
    job: Job,
    work: Work,
    ranks: Ranks = ALONE,
    agreement: Agreement | None = None,
    *,
    device: str | torch.device | None = None,
    progress: bool = False,
    what: str = "Export",
    room: Room | None = None,
) -> Generator[Batch, None, None]:
    """The tensors of a job that this rank exports, in batches.

    All ranks go through the rounds of the work together, since in a sharded model each weight is read by all
    of them; what goes wrong on one ends the stream of all.

    Args:
        job: What is exported; its weights and bases are read once each.
        work: What each rank does.
        ranks: Who works.
        agreement: Of the ranks; None makes one.
        device: Where pairs are moved to; None leaves each where it lies.
        progress: Whether to show how far all ranks are, on rank 0.
        what: What is done, in a word, for that.
        room: What tensors may take at a time. Whoever passes it gives back what a batch takes; else a batch
            is done with when the next is asked for.

    Raises:
        CheckpointError: As for `check_memory`, and whatever reading raises.
    """
    agreement = Agreement(ranks) if agreement is None else agreement
    shown = with_progress(work.rounds, _size, what) if progress and ranks.rank == 0 else work.rounds
    given, room = room is not None, room or Room(job.max_memory)
    check_memory(job, work, ranks.rank)
    with contextlib.closing(_ReadAhead(job, work, ranks, room)) as ahead:
        for turn in shown:
            done = room.giver(needed(job, turn[ranks.rank]) if room.limit else 0)
            pairs = _pairs(ahead, turn, agreement, device)
            handed_out = bool(pairs) and not agreement.failed
            if handed_out:
                yield pairs
            del pairs  # before the next are read
            if not (given and handed_out):
                done()
            agreement.settle()


def _pairs(
    ahead: _ReadAhead, turn: Round, agreement: Agreement, device: str | torch.device | None
) -> tuple[Pair, ...]:
    pairs: list[Pair] = []
    for _ in range(ahead.asked_in(turn)):
        with agreement.attempt():
            pair = ahead.take()
            if pair is not None:
                pairs.append(_on_device(pair, device))
    return tuple(pairs)


class _ReadAhead:
    """Pairs in order. What lies in a folder is read ahead; what lives in memory is taken when due."""

    def __init__(self, job: Job, work: Work, ranks: Ranks, room: Room) -> None:
        self._job, self._rank, self._room = job, ranks.rank, room
        self._made = {} if job.cache is None else job.cache.tensors
        self._shared = any(
            isinstance(mapping, LazyTensors) and mapping.collective
            for mapping in (job.source.weights, job.base)
        )
        self._steps = (step for turn in work.rounds for step in self._steps_in(turn))
        self._ahead: deque[tuple[TensorPlan, Read, Read]] = deque()
        self._upcoming: tuple[int, TensorPlan, int] | None = None
        self._buffers = None if room.limit else Buffers()  # which are held for what may come
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="read-ahead")

    def asked_in(self, turn: Round) -> int:
        """How many pairs this rank has to take in a round: its own, and those it helps to read."""
        return sum(1 for _ in self._steps_in(turn))

    def take(self) -> Pair | None:
        """The next pair, if this rank is the one that exports it."""
        while len(self._ahead) < _AHEAD and (step := self._upcoming or next(self._steps, None)) is not None:
            owner, plan, size = self._upcoming = step
            if not self._room.take(size, wait=not self._ahead):
                break
            self._upcoming = None
            base_name = self._job.base_names.get(plan.spec.name)
            base = _nothing if base_name is None else self._ask(self._job.base, base_name, owner)
            made = plan.spec.name in self._made
            weights = self._made if made else self._job.source.weights
            self._ahead.append((plan, self._ask(weights, plan.spec.name, owner), base))
        plan, read_weight, read_base = self._ahead.popleft()
        try:
            weight = read_weight()
        finally:  # the others read the base together with this rank, whatever became of the weight
            base = read_base()
        return None if weight is None else Pair(plan, weight, base)

    def close(self) -> None:
        """Ends the threads and lets the buffers go."""
        self._pool.shutdown(cancel_futures=True)
        self._ahead.clear()
        if self._buffers is not None:
            self._buffers.close()
        return_freed_memory()

    def _steps_in(self, turn: Round) -> Iterator[tuple[int, TensorPlan, int]]:
        """Who exports what; with the first of a batch, the bytes that the batch needs."""
        for owner, batch in enumerate(turn):
            if self._shared or owner == self._rank:
                size = needed(self._job, batch) if self._room.limit and owner == self._rank else 0
                yield from ((owner, plan, 0 if i else size) for i, plan in enumerate(batch))

    def _ask(self, mapping: Mapping[str, Tensor], name: str, owner: int) -> Read:
        if isinstance(mapping, LazyTensors) and mapping.collective:
            return partial(mapping.on, name, owner)
        if owner != self._rank:
            return _nothing
        if isinstance(mapping, Checkpoint):
            return self._pool.submit(mapping.read, name, self._buffers).result
        return partial(mapping.__getitem__, name)


def _nothing() -> None:
    return None


def _on_device(pair: Pair, device: str | torch.device | None) -> Pair:
    weight = pair.weight if device is None else pair.weight.to(device)
    return pair._replace(weight=weight, base=None if pair.base is None else pair.base.to(weight.device))


def _size(turn: Round) -> int:
    return sum(spec.nbytes for batch in turn for plan in batch for spec in plan.stored.values())
