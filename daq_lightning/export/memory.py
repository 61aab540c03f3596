"""What tensors take on their way through an export, and a bound on it: `--max-memory`.

    needed(job, plans)     bytes that some tensors take together: read, searched, packed, written
    Room(limit)            a reader takes before it reads, and waits; who is done gives back

Without a limit, pairs are read ahead and written behind as far as `stream` goes. With one, the next tensors
are read when there is room for all that they will need, and buffers are not kept for others. What the
process has before it begins, a text's calibration and the scales of a cache are not in it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from daq_lightning.checkpoint.tensor_file import CheckpointError, spec_in
from daq_lightning.export.progress import size_text
from daq_lightning.numerics.backends.heap import return_freed_memory

if TYPE_CHECKING:
    from daq_lightning.export.job import Job
    from daq_lightning.export.plan import TensorPlan
    from daq_lightning.export.work import Batch, Work

OVERHEAD = 64 << 20
"""Bytes for all that is not tensors: reports, records, threads and their stacks."""
_CODES = 3  # bytes of an element: codes, packed, and what is measured of them
_GROUP = 512  # bytes of the sums of a group
_FACTOR = 32  # bytes of an element of a factor, while it is made: float32, and float64 thrice


def needed(job: Job, tensors: Sequence[TensorPlan]) -> int:
    """Bytes that some tensors need at most, from reading to writing, all at a time.

    Args:
        job: What is exported.
        tensors: What is read together.
    """
    return sum(_needed(job, tensor) for tensor in tensors)


def _needed(job: Job, tensor: TensorPlan) -> int:
    count = tensor.spec.nbytes // tensor.spec.dtype.itemsize
    total = tensor.spec.nbytes
    if job.source.low_rank:
        total += 8 * count  # merged in float32, beside the product of the two factors
    if not tensor.quantize:
        return total + sum(spec.nbytes for spec in tensor.stored.values() if spec.dtype != tensor.spec.dtype)
    if tensor.spec.dtype in (torch.float32, torch.float64):
        total += 6 * count  # as it is searched, and fingerprinted in bfloat16
    base_name = job.base_names.get(tensor.spec.name)
    if base_name is not None:
        base, quantized = spec_in(job.base, base_name), bool(getattr(job.base, "quantized", False))
        total += base.nbytes + 9 * count * quantized  # codes, and two copies in float32
        total += 4 * count * (base.dtype == torch.float64)
    if job.settings.by_curvature:
        rows, cols = tensor.spec.shape[-2:]
        total += _FACTOR * (rows * rows + cols * cols) + 16 * count
    grid = tensor.layout.granularity.grid((tensor.spec.shape[0], tensor.spec.shape[1]))
    return (
        total
        + _CODES * count
        + _GROUP * grid[0] * grid[1]
        + sum(spec.nbytes for spec in tensor.stored.values())
    )


def batches_fit(job: Job, work: Work, rank: int) -> bool:
    """Whether what a rank searches together has room together."""
    return job.max_memory is None or _largest(job, work, rank)[0] <= job.max_memory - OVERHEAD


def check_memory(job: Job, work: Work, rank: int) -> None:
    """Refuses a bound that the largest tensor does not fit in.

    Raises:
        CheckpointError: Names the tensor, what it needs, and the bound.
    """
    if job.max_memory is None or batches_fit(job, work, rank):
        return
    size, names = _largest(job, work, rank)
    named = " + ".join(names) + (" needs" if len(names) == 1 else " need together")
    raise CheckpointError(
        f"max_memory={size_text(job.max_memory)!r} is less than what {named}: {size_text(size + OVERHEAD)}, "
        f"of which {size_text(OVERHEAD)} for all that is not tensors. Allow as much; nothing was written."
    )


def _largest(job: Job, work: Work, rank: int) -> tuple[int, list[str]]:
    batches: list[Batch] = [turn[rank] for turn in work.rounds if turn[rank]]
    sizes = [needed(job, batch) for batch in batches]
    if not sizes:
        return 0, []
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    return sizes[largest], [tensor.spec.name for tensor in batches[largest]]


class Room:
    """Bytes that may be taken at a time.

    Args:
        limit: How many; None for any number.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = None if limit is None else limit - OVERHEAD
        self._taken = 0
        self._changed = threading.Condition()

    def take(self, size: int, *, wait: bool) -> bool:
        """Takes bytes if they are there; else waits for them, or gives up.

        What is more than all there is waits until nothing else is taken.
        """
        if self.limit is None or not size:
            return True
        limit = self.limit

        def fits() -> bool:
            return not self._taken or self._taken + size <= limit

        with self._changed:
            if not fits() and not wait:
                return False
            self._changed.wait_for(fits)
            self._taken += size
        return_freed_memory()  # what was given back counts until then
        return True

    def giver(self, size: int) -> Callable[[], None]:
        """Gives bytes back when it is called the first time."""
        left = [size]

        def give() -> None:
            with self._changed:
                self._taken -= left.pop() if left and self.limit is not None else 0
                self._changed.notify_all()

        return give
