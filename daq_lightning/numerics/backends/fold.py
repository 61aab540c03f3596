"""The sums of a fingerprint by the C++ library: a pass over bytes, which is no part of a search.

Source: see `daq_lightning.checkpoint.fingerprint`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from daq_lightning.numerics.backends.library import Array, array, entry_point


def fold_words(words: Tensor, odd: Tensor) -> Tensor:
    """One sum ``(word ^ (word >> 32)) * odd`` modulo 2^64 for each row of as many words as there are odd
    numbers.

    Args:
        words: int64, contiguous, on the CPU; the last row may be shorter.
        odd: int64.

    Raises:
        LibraryMissingError: There is no library; see `daq_lightning.numerics.backends.library.why_not`.
    """
    sums = torch.empty(-(-words.numel() // odd.numel()), dtype=torch.int64, device="cpu")
    _fold()(array(words), words.numel(), array(odd), odd.numel(), array(sums))
    return sums


@functools.cache
def _fold() -> Callable[..., None]:
    return entry_point("fold", [Array, ctypes.c_int64, Array, ctypes.c_int64, Array])
