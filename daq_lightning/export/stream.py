"""The weights of an export on their way: read ahead, handed out in batches of pairs, written behind.

    Pair(plan, weight, base | None)        one tensor, with what it is measured against

A weight and its base come out of one place, together: nothing can put a weight beside another's base. While a
batch is searched, the next pair is read and the last result is written by threads of their own, so that the
disk and the arithmetic work at once. At most a few tensors are held; buffers and threads end with the stream.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from daq_lightning.checkpoint.buffers import Buffers
from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.export.progress import with_progress
from daq_lightning.numerics.backends.heap import return_freed_memory

if TYPE_CHECKING:
    from daq_lightning.export.job import Job
    from daq_lightning.export.plan import ExportPlan, TensorPlan

_BATCH = 64 << 20  # bytes of weights that are searched together
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


def stream(
    job: Job, *, device: str | torch.device | None = None, progress: bool = False
) -> Generator[Batch, None, None]:
    """The tensors of a job in batches: experts of one layer and shape together, everything else by itself.

    Args:
        job: What is exported; its weights and bases are read once each.
        device: Where pairs are moved to; None leaves each where it lies.
        progress: Whether to show how far it is.
    """
    batches = batches_of(job.plan, together=job.settings.search.alpha_scope == "group")
    order = [plan for batch in batches for plan in batch]
    with contextlib.closing(_read_ahead(job, order)) as pairs:
        for batch in with_progress(batches, _size) if progress else batches:
            yield tuple(_on_device(next(pairs), device) for _ in batch)


def batches_of(plan: ExportPlan, *, together: bool) -> list[tuple[TensorPlan, ...]]:
    """What is searched together, up to a bounded size.

    Args:
        plan: Of the export.
        together: Whether weights may share a search, which alphas of a whole layer forbid.
    """
    batches: list[list[TensorPlan]] = []
    open_batches: dict[tuple[str, tuple[int, ...]], list[TensorPlan]] = {}
    for tensor in plan.tensors:
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


def _read_ahead(job: Job, order: Sequence[TensorPlan]) -> Generator[Pair, None, None]:
    """Pairs in order. What lies in a folder is read ahead; what lives in memory is taken when due."""
    buffers = Buffers()
    pool = ThreadPoolExecutor(2, thread_name_prefix="read-ahead")

    def ask(mapping: Mapping[str, Tensor], name: str) -> Callable[[], Tensor]:
        if isinstance(mapping, Checkpoint):
            return pool.submit(mapping.read, name, buffers).result
        return partial(mapping.__getitem__, name)

    ahead: deque[tuple[TensorPlan, Callable[[], Tensor], Callable[[], Tensor] | None]] = deque()
    try:
        for plan in order:
            base_name = job.base_names.get(plan.spec.name)
            base = None if base_name is None else ask(job.base, base_name)
            ahead.append((plan, ask(job.source.weights, plan.spec.name), base))
            if len(ahead) == _AHEAD:
                yield _take(*ahead.popleft())
        while ahead:
            yield _take(*ahead.popleft())
    finally:
        pool.shutdown(cancel_futures=True)
        buffers.close()
        return_freed_memory()


def _take(plan: TensorPlan, weight: Callable[[], Tensor], base: Callable[[], Tensor] | None) -> Pair:
    return Pair(plan, weight(), None if base is None else base())


def _on_device(pair: Pair, device: str | torch.device | None) -> Pair:
    weight = pair.weight if device is None else pair.weight.to(device)
    return pair._replace(weight=weight, base=None if pair.base is None else pair.base.to(weight.device))


def _size(batch: tuple[TensorPlan, ...]) -> int:
    return sum(spec.nbytes for plan in batch for spec in plan.stored.values())
