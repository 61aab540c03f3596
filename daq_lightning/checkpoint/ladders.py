"""Ladders of schemes for a budget of bytes: is what a user asks for one? Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from daq_lightning.checkpoint.budget import EXPECTED, Budget
from daq_lightning.checkpoint.schemes import FULL, SCHEMES


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
            f"{EXPECTED}."
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
