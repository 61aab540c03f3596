"""Amounts as a user says them: what quantized weights may take together, and memory. Imports nothing.

"4.5 bits"       the mean over the weights that are quantized, scales counted
"2.1 GB", 9000   the bytes of all of them
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

_UNITS: Mapping[str, int] = {
    "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
}  # fmt: skip
EXPECTED = "mean bits of a quantized weight ('4.5 bits'), or bytes of all of them ('2.1 GB', 2_100_000_000)"


def memory_of(memory: str | int, name: str = "max_memory") -> int:
    """Bytes of memory as a user says them; `name` is the argument's, for the message.

    Raises:
        ValueError: It is no number of bytes.

    Example:
        >>> memory_of("2GB"), memory_of("1.5 GiB"), memory_of(4096)
        (2000000000, 1610612736, 4096)
    """
    said = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", str(memory))
    try:
        size = float(said[1]) * _UNITS[said[2] or "B"] if said else 0
    except (KeyError, ValueError):
        size = 0
    if not 1 <= size < math.inf or isinstance(memory, bool):
        raise ValueError(f"{name}={memory!r}: expected a number of bytes, such as '2 GB' or '2GB'.")
    return int(size)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What quantized weights may take, scales included; one of the two.

    Attributes:
        bits: The mean of a weight's element.
        size: Bytes of all weights together.
    """

    bits: float | None = None
    size: int | None = None

    @classmethod
    def of(cls, budget: str | int) -> Budget:
        """A budget as a user says it.

        Raises:
            ValueError: It is none.

        Example:
            >>> Budget.of("4.5 bits"), Budget.of("2 kB")
            (Budget(bits=4.5, size=None), Budget(bits=None, size=2000))
        """
        number, _, unit = str(budget).strip().partition(" ")
        unit = unit.strip()
        try:
            value = math.nan if isinstance(budget, bool) else float(number)
            value *= 1 if unit == "bits" else _UNITS[unit or "B"]
        except (KeyError, ValueError):
            value = math.nan
        if not 0 < value < math.inf:
            raise ValueError(f"budget is {EXPECTED}, got {budget!r}.")
        return cls(bits=value) if unit == "bits" else cls(size=int(value))

    def bytes_for(self, elements: int) -> int:
        """How many bytes weights of so many elements may take."""
        return math.floor(self.bits * elements / 8) if self.bits is not None else int(self.size or 0)
