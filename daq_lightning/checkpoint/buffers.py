"""Memory for tensors that are read one after another.

New memory costs more time (the system hands out and zeroes every page) than copying a file from its cache
into it, so a buffer is used again as soon as no tensor refers to it any more.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

_SMALL, _LARGE = 1 << 20, 64 << 20  # bytes; smaller ones cost nothing, larger ones would be held for too long
_KEPT = 8


class Buffers:
    """A pool of buffers that belongs to one pass over a checkpoint; `close` lets all of them go.

    torch keeps the memoryview that a tensor was made from alive as long as the tensor's storage, views of it
    included; its end gives the buffer back.
    """

    def __init__(self) -> None:
        self._free: list[bytearray] = []
        self._kept = _KEPT
        self._lock = threading.RLock()  # a buffer may come back while one is taken, in the same thread

    def take(self, nbytes: int) -> Tensor:
        """Uninitialized bytes that belong to the caller: uint8, shape (nbytes,), on the CPU."""
        if not _SMALL <= nbytes <= _LARGE:
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        with self._lock:
            fitting = [buffer for buffer in self._free if nbytes <= len(buffer) <= 2 * nbytes]
            buffer = min(fitting, key=len, default=None)
            if buffer is not None:
                self._free = [other for other in self._free if other is not buffer]
        if buffer is None:
            buffer = bytearray(nbytes)
        view = memoryview(buffer)[:nbytes]
        weakref.finalize(view, self._give_back, buffer).atexit = False
        return torch.frombuffer(view, dtype=torch.uint8)

    def close(self) -> None:
        """Frees what is at hand, and whatever comes back later."""
        with self._lock:
            self._free, self._kept = [], 0

    def _give_back(self, buffer: bytearray) -> None:
        with self._lock:
            self._free = [buffer, *self._free][: self._kept]
