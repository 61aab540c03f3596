"""How good a share of an update is, what is worst, and shares and ratios in words.

good    at least 95 % of the update is served
fair    at least 80 %
bad     less

And how close a model is to another in the words of llama.cpp, whose quantizations many know by sight: the
mean KLD of Q8_0 is 2.4e-4 nats a token, of Q5_K_M 4.7e-3, of Q3_K_M 5.1e-2 (Llama 3 8B, tools/perplexity).
"""

from __future__ import annotations

import itertools
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


_CLASSES = (("Q8_0", 2.4e-4), ("Q5_K_M", 4.7e-3), ("Q3_K_M", 5.1e-2))
"""Quantization of llama.cpp -> its mean KLD from the model in 16 bit."""


def level_of_divergence(kld: float) -> Level:
    """How good a mean KLD from the model in 16 bit is; "none" for NaN."""
    if math.isnan(kld):
        return "none"
    return "good" if kld <= _CLASSES[1][1] else "fair" if kld <= _CLASSES[2][1] else "bad"


def quality_class(kld: float) -> str:
    """Where a mean KLD, in nats a token, stands among the quantizations of llama.cpp.

    Example:
        >>> quality_class(1e-4), quality_class(1e-3), quality_class(0.1)
        ('Q8_0 or better', 'between Q8_0 and Q5_K_M', 'worse than Q3_K_M')
    """
    if math.isnan(kld):
        return "unknown"
    if kld <= _CLASSES[0][1]:
        return f"{_CLASSES[0][0]} or better"
    for (better, _), (worse, limit) in itertools.pairwise(_CLASSES):
        if kld <= limit:
            return f"between {better} and {worse}"
    return f"worse than {_CLASSES[-1][0]}"
