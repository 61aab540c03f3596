"""How good a share of an update is, what is worst, and shares and ratios in words.

good    at least 95 % of the update is served
fair    at least 80 %
bad     less
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from daq_lightning.report.rows import Row

Level: TypeAlias = Literal["good", "fair", "bad", "none"]
GOOD, FAIR = 0.95, 0.8


def level_of(served: float | None) -> Level:
    """How good a share is; "none" where there is no update."""
    if served is None:
        return "none"
    return "good" if served >= GOOD else "fair" if served >= FAIR else "bad"


def worst_rows(rows: Iterable[Row]) -> list[Row]:
    """The rows with an update, those first of which least is served; of equals, the lowest cosine."""
    return sorted(
        (row for row in rows if row.measured),
        key=lambda row: (row.searched.served, row.searched.cosine or 0.0),
    )


def percent(share: float | None) -> str:
    """A share with one decimal, rounded down: what is not whole is never called 100.0 %.

    Example:
        >>> percent(0.99996), percent(1.0), percent(None)
        ('99.9 %', '100.0 %', '-')
    """
    return "-" if share is None else f"{math.floor(share * 1000 + 1e-9) / 10:.1f} %"


def times(ratio: float) -> str:
    """A ratio in words.

    Example:
        >>> times(26.3), times(0.5)
        ('26 times', '0.50 times')
    """
    return f"{ratio:,.0f} times" if ratio >= 10 else f"{ratio:.2f} times"
