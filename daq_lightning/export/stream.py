"""Reading ahead, writing behind, and telling how far it is: so that the disk and the arithmetic work at once.

Threads only read, write and fingerprint, which leaves the cores to the search; at most a few tensors are held.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

from torch import Tensor

from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.export.plan import TensorPlan, size_text

Batch: TypeAlias = tuple[TensorPlan, ...]


def read_ahead(mapping: Mapping[str, Tensor], names: list[str]) -> Iterator[Tensor]:
    """The tensors of some names in order; those of a folder are read one ahead by a thread."""
    if not isinstance(mapping, Checkpoint):
        yield from (mapping[name] for name in names)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        ahead: deque[Future[Tensor]] = deque()
        for name in names:
            ahead.append(pool.submit(mapping.__getitem__, name))
            if len(ahead) > 1:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


class WriteBehind:
    """Runs calls one after the other in a thread; at most one waits. An error surfaces in the next call."""

    def __enter__(self) -> WriteBehind:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write-behind")
        self._pending: deque[Future[None]] = deque()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, function: Callable[..., None], *arguments: object) -> None:
        """Queues a call; waits while another is queued already."""
        self._pending.append(self._pool.submit(self._call, function, arguments))
        while len(self._pending) > 1:
            self._pending.popleft().result()

    @staticmethod
    def _call(function: Callable[..., None], arguments: tuple[object, ...]) -> None:
        function(*arguments)
        _return_freed_memory()

    def wait(self) -> None:
        """Waits for all calls."""
        while self._pending:
            self._pending.popleft().result()


def _return_freed_memory() -> None:
    """Lets the C library give freed memory back to the system: it would hold on to several times what is in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def with_progress(batches: Sequence[Batch], progress: bool) -> Iterator[Batch]:
    """Yields batches; shows how far it is, the rate and the time left: a bar on a terminal, else lines."""
    if not progress:
        yield from batches
        return
    total = sum(map(_size, batches))
    if not sys.stderr.isatty():
        yield from _with_lines(batches, total)
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc="FP8 export", dynamic_ncols=True) as bar:
        for batch in batches:
            yield batch
            bar.update(_size(batch))


def _size(batch: Batch) -> int:
    return sum(spec.nbytes for tensor in batch for spec in tensor.stored)


def _with_lines(batches: Sequence[Batch], total: int) -> Iterator[Batch]:
    """Progress for a log file: one line in five seconds, and one at the end."""
    done, start, last = 0, time.monotonic(), time.monotonic()
    for batch in batches:
        yield batch
        done += _size(batch)
        now = time.monotonic()
        if done == total or now - last > 5:
            last, rate = now, done / max(now - start, 1e-9)
            print(
                f"FP8 export: {done / max(total, 1):.0%} of {size_text(total)}, {rate / 1e6:.3g} MB/s, "
                f"{(total - done) / max(rate, 1e-9):.0f} s left",
                file=sys.stderr,
                flush=True,
            )
