"""Imports of large packages without Python's search for cycles, which looks at all that they make again and again.

torch and transformers make half a million objects and free hardly any: a quarter of their import is that search.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Leaves garbage in cycles uncollected until the end; of threads that use it at once the last one ends it.

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
