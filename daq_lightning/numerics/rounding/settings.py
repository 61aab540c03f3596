"""How statistics of a run become the curvature that rounding follows.

Nothing here needs torch, so that a command line can be built from these settings at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RoundingSettings:
    """How to mix and damp; checked when it is made. Shares are of a matrix whose mean diagonal is 1.

    The defaults are those that were best for full fine-tuning with K-FAC statistics. For LoRA take
    ``update=0``; without statistics of outputs ``damping_out=0.1``; for the update alone ``damping_in=0.1,
    damping_out=0.3, order=False``.

    Attributes:
        update: Share of the update's own D^T D and D D^T beside the statistics, >= 0.
        damping_in: Share of the identity in the curvature of the inputs, > 0.
        damping_out: The same for the outputs, > 0.
        order: Rounds the rows and columns of the largest curvature first.

    Raises:
        TypeError: A field of another type.
        ValueError: A value out of range.

    Example:
        >>> RoundingSettings(update=0).damping_in
        0.001
    """

    update: float = 0.1
    damping_in: float = 0.001
    damping_out: float = 0.01
    order: bool = True

    def __post_init__(self) -> None:
        for name in ("update", "damping_in", "damping_out"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}.")
            if not (math.isfinite(value) and (value > 0 or (value == 0 and name == "update"))):
                least = ">= 0" if name == "update" else "> 0"
                raise ValueError(f"{name} must be finite and {least}, got {value}.")
        if not isinstance(self.order, bool):
            raise TypeError(f"order must be True or False, got {self.order!r}.")
