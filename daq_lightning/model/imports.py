"""Imports of large packages without Python's search for cycles, which goes over all they make time and again.

torch and transformers make half a million objects and free hardly any; that search takes up to a quarter of
their import.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Leaves garbage in cycles uncollected until the end, or until another thread's use of it ends.

    Example:
        >>> with without_collections():
        ...     gc.isenabled()
        False
        >>> gc.isenabled()
        True
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
