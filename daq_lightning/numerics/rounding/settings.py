"""How statistics of a run become the curvature that rounding follows.

Nothing here needs torch, so that a command line can be built from these settings at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

RoundingChoice: TypeAlias = Literal["auto", "nearest", "curvature"]
"""How codes are chosen once scales are fixed."""


@dataclass(frozen=True, kw_only=True)
class RoundingSettings:
    """How to mix and damp; checked when it is made. Shares are of a matrix whose mean diagonal is 1.

    The defaults are those that were best for full fine-tuning with K-FAC statistics in 8 bit; `suited` has
    those for less than that.

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

    @classmethod
    def suited(cls, *, inputs: bool, outputs: bool, low_rank: bool, bits: int = 8) -> RoundingSettings:
        """What measured best for the statistics that there are.

        Args:
            inputs: Whether those of the inputs are known; the update stands in for them otherwise.
            outputs: Whether those of the outputs are known, likewise.
            low_rank: Whether the update is that of an adapter, whose few directions say nothing of the others
                and which is left out.
            bits: Of a code. Errors of four bits are large enough to show what a few batches got wrong: more
                damping.

        Example:
            >>> RoundingSettings.suited(inputs=False, outputs=False, low_rank=False).order
            False
        """
        if not inputs and not outputs:
            return cls(damping_in=0.1, damping_out=0.3, order=False)
        if not outputs:
            return cls(update=0.0, damping_out=0.1)
        update = 0.0 if low_rank else cls.update
        return cls(update=update) if bits > 4 else cls(update=update, damping_in=0.03, damping_out=0.1)

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
