"""How to search for scales: the objective, and which multiples alpha of the absmax scale are tried.

Two ways through the candidates: the paper's coarse and fine grids, and one dense logarithmic grid over [1, 2)
(`ScaleSearch()`, `ScaleSearch.dense(n)`). [1, 2) covers every distinct grid of a floating point format: alpha
and 2 alpha give the same one up to subnormal codes, and below 1 the largest weights saturate.

Nothing here needs torch, so that a command line can be built from these settings at once.

Source: arXiv 2603.22324, Algorithm 1 and section 3.1 (ranges).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Metric: TypeAlias = Literal["sign", "cosine", "mse", "hybrid"]
METRICS: tuple[str, ...] = get_args(Metric)
"""The objectives, see `daq_lightning.numerics.objectives`; numbered in this order in the C++ sources."""

MOST_CANDIDATES = 1 << 14
"""Of one stage. The codes of a bfloat16 group change at some 2,000 scales per octave, so more find nothing
new, while each costs a pass over the weight, and 100 bytes for its sums with every group that is searched at
a time."""

WIDE_RANGE = (0.5, 2.0)
"""The widest range of alpha in the paper's experiments; the others are 0.8 to 1.25 and 0.9 to 1.11."""


@dataclass(frozen=True, kw_only=True)
class ScaleSearch:
    """How to search; checked when it is made.

    Attributes:
        metric: What is kept. "sign": the sign of each change. "cosine": the direction of the update.
            "hybrid": its strength along its own direction. "mse": the weights themselves, without a look at
            the base.
        alpha_min: Lower end of the range of alpha, > 0.
        alpha_max: Upper end, >= alpha_min.
        n_coarse: Candidates of the coarse stage, evenly spaced over the range, 1 to 16,384.
        n_fine: Candidates of the fine stage around the best so far, within half a coarse interval, 0 to
            16,384.
        alpha_scope: "group": each block or row has its own alpha. "layer": one alpha for the weight, as
            Algorithm 1 is printed.
        tau: Weight of the orthogonal noise in the hybrid objective, >= 0.
        spacing: Of the coarse stage. "linear": both ends included, as in the paper. "log": n_coarse steps of
            one factor, alpha_max excluded.

    Raises:
        TypeError: A field of another type.
        ValueError: A value out of range.

    Example:
        >>> ScaleSearch(metric="cosine", alpha_min=0.8, alpha_max=1.25).n_coarse
        5
        >>> ScaleSearch.dense(64, metric="mse").n_coarse
        64
    """

    metric: Metric = "hybrid"
    alpha_min: float = WIDE_RANGE[0]
    alpha_max: float = WIDE_RANGE[1]
    n_coarse: int = 5
    n_fine: int = 10
    alpha_scope: Literal["group", "layer"] = "group"
    tau: float = 0.01
    spacing: Literal["linear", "log"] = "linear"

    @classmethod
    def dense(
        cls,
        n: int,
        *,
        metric: Metric = "hybrid",
        tau: float = 0.01,
        alpha_scope: Literal["group", "layer"] = "group",
    ) -> ScaleSearch:
        """One stage of n candidates 2^(i / n) over [1, 2)."""
        return cls(
            metric=metric,
            alpha_min=1.0,
            alpha_max=2.0,
            n_coarse=n,
            n_fine=0,
            alpha_scope=alpha_scope,
            tau=tau,
            spacing="log",
        )

    @classmethod
    def absmax(cls) -> ScaleSearch:
        """No search: plain absmax quantization, measured like any other."""
        return cls(alpha_min=1.0, alpha_max=1.0, n_coarse=1, n_fine=0)

    def __post_init__(self) -> None:
        for name in ("alpha_min", "alpha_max", "tau"):
            _check_type(name, getattr(self, name), (int, float), "a number")
            object.__setattr__(self, name, float(getattr(self, name)))  # 1 and 1.0 are one setting
        for name in ("n_coarse", "n_fine"):
            _check_type(name, getattr(self, name), (int,), "an integer")
        if self.metric not in METRICS:
            raise ValueError(f"Unknown metric {self.metric!r}: expected one of {', '.join(METRICS)}.")
        if not (math.isfinite(self.alpha_min) and self.alpha_min > 0):
            raise ValueError(
                f"alpha_min must be a finite number > 0, got {self.alpha_min}; the paper uses 0.5 to 0.9."
            )
        if not (math.isfinite(self.alpha_max) and self.alpha_max >= self.alpha_min):
            raise ValueError(
                f"alpha_max must be a finite number >= alpha_min, got the range [{self.alpha_min}, "
                f"{self.alpha_max}]; swap the two, or use one of the paper's ranges such as (0.8, 1.25)."
            )
        if self.n_coarse < 1 or self.n_fine < 0:
            raise ValueError(f"n_coarse must be >= 1 and n_fine >= 0, got {self.n_coarse} and {self.n_fine}.")
        for name in ("n_coarse", "n_fine"):
            if getattr(self, name) > MOST_CANDIDATES:
                raise ValueError(
                    f"{name} must be at most {MOST_CANDIDATES:,}, got {getattr(self, name)}: the codes "
                    "change at some 2,000 scales per octave, and as many candidates mean as many passes "
                    "over the weight. ScaleSearch.dense(64) is near the optimum."
                )
        if self.alpha_scope not in ("group", "layer"):
            raise ValueError(f"Unknown alpha_scope {self.alpha_scope!r}: expected 'group' or 'layer'.")
        if not (math.isfinite(self.tau) and self.tau >= 0):
            raise ValueError(f"tau must be a finite number >= 0, got {self.tau}.")
        if self.spacing not in ("linear", "log"):
            raise ValueError(f"Unknown spacing {self.spacing!r}: expected 'linear' or 'log'.")

    @property
    def radius(self) -> float:
        """Half width of the fine stage: half a coarse interval."""
        return (self.alpha_max - self.alpha_min) / max(1, self.n_coarse - 1) / 2


def _check_type(name: str, value: object, kinds: tuple[type, ...], called: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds):  # True would pass for 1
        raise TypeError(f"{name} must be {called}, got {value!r} of type {type(value).__name__}.")
