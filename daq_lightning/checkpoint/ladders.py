"""Ladders of schemes for a budget of bytes: weights that lose most go up. Data and checks; imports no torch.

    budget="4.5 bits"     the mean over the weights that are quantized, scales counted
    budget="2.1 GB"       the bytes of all of them
    ladder                schemes from the lowest up; "16" keeps a weight in 16 bit

Source: the schemes, `daq_lightning.checkpoint.schemes`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from daq_lightning.checkpoint.schemes import FULL, SCHEMES

LADDERS: Mapping[str, tuple[str, ...]] = {
    "FP8_BLOCK": ("FP8_BLOCK", FULL),
    "FP8_DYNAMIC": ("FP8_DYNAMIC", FULL),
    "FP8A16": ("FP8A16", FULL),
    "MXFP8": ("MXFP8", FULL),
    "W8A8": ("W8A8", FULL),
    "W4A16": ("W4A16", "FP8A16", FULL),
    "W4A16_ASYM": ("W4A16_ASYM", "FP8A16", FULL),
    "NVFP4A16": ("NVFP4A16", "FP8A16", FULL),
    "MXFP4A16": ("MXFP4A16", "FP8A16", FULL),
}
"""Lowest scheme -> the ladder that it begins, if no other is asked for."""
_UNITS: Mapping[str, int] = {
    "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
}  # fmt: skip
_EXPECTED = "mean bits of a quantized weight ('4.5 bits'), or bytes of all of them ('2.1 GB', 2_100_000_000)"


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
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0 and unit in {"", "bits", *_UNITS}):
            raise ValueError(f"budget is {_EXPECTED}, got {budget!r}.")
        return cls(bits=value) if unit == "bits" else cls(size=int(value * _UNITS[unit or "B"]))

    def bytes_for(self, elements: int) -> int:
        """How many bytes weights of so many elements may take."""
        return math.floor(self.bits * elements / 8) if self.bits is not None else int(self.size or 0)


def check_ladder(scheme: str, ladder: Sequence[str], budget: str | int | None) -> None:
    """Raises ValueError for a ladder that is none, or that scheme or budget contradict.

    Args:
        scheme: The lowest, or "auto".
        ladder: Empty for the one that the scheme begins.
        budget: None for no budget.
    """
    if budget is not None:
        Budget.of(budget)
    if not ladder:
        return
    if budget is None:
        raise ValueError(
            f"ladder={tuple(ladder)} says where weights may go up, and budget how far: give a budget, "
            f"{_EXPECTED}."
        )
    unknown = [name for name in ladder if name not in SCHEMES and name != FULL]
    if unknown:
        raise ValueError(f"Unknown rung {unknown[0]!r} of ladder: expected {FULL!r}, {', '.join(SCHEMES)}.")
    twice = len(set(ladder)) < len(ladder)
    if twice or len(ladder) < 2 or FULL in ladder[:-1]:
        raise ValueError(
            f"ladder goes from the lowest scheme up, two or more, each once and {FULL!r} last: got "
            f"{tuple(ladder)}."
        )
    if scheme not in ("auto", ladder[0]):
        raise ValueError(f"scheme={scheme!r} is the lowest rung, but ladder begins with {ladder[0]!r}.")
