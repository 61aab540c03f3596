"""What the C library keeps of freed memory."""

from __future__ import annotations

import ctypes


def return_freed_memory() -> None:
    """Lets the C library give freed memory back to the system: after an export it holds several times what is
    in use.

    A call takes milliseconds and changes nothing but the size of the process; without glibc it does nothing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
