"""Which scales a search tries, what it maximizes, and what it returns.

Three ways through the candidates: the paper's coarse and fine grids, one dense logarithmic grid over [1, 2), and the
exact optimum over all of [1, 2) (`ScaleSearch()`, `ScaleSearch.dense(n)`, `ScaleSearch.exact()`). [1, 2) covers every
distinct FP8 grid: alpha and 2 alpha give the same one up to subnormal codes, and below 1 the largest weights saturate.

Source: arXiv 2603.22324, Algorithm 1 and section 3.1 (ranges).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from daq_lightning.numerics.objectives import EXACT_METRICS, METRICS, DeltaStats, Metric

MOST_CANDIDATES = 1 << 14
"""Of one stage. The codes of a bfloat16 group change at some 2,000 scales per octave, so more find nothing new, while
each costs a pass over the weight, and 100 bytes for its sums with every group that is searched at a time."""

WIDE_RANGE = (0.5, 2.0)
MEDIUM_RANGE = (0.8, 1.25)
NARROW_RANGE = (0.9, 1.11)
"""The three ranges of alpha in the paper's experiments."""


@dataclass(frozen=True, kw_only=True)
class ScaleSearch:
    """How to search; checked when it is made.

    Attributes:
        metric: The objective: "sign", "cosine", "mse" or "hybrid" (see `daq_lightning.numerics.objectives`).
        alpha_min: Lower end of the range of alpha, > 0.
        alpha_max: Upper end, >= alpha_min.
        n_coarse: Candidates of the coarse stage, evenly spaced over the range, 1 to 16,384.
        n_fine: Candidates of the fine stage around the best so far, 0 to 16,384.
        fine_radius: Half width of the fine stage, in alpha. None: half a coarse interval.
        alpha_scope: "group": each block or row has its own alpha. "layer": one alpha for the weight, as Algorithm 1
            is printed.
        tau: Weight of the orthogonal noise in the hybrid objective, >= 0.
        spacing: Of the coarse stage. "linear": both ends included, as in the paper. "log": n_coarse steps of one
            factor, alpha_max excluded. "exact": no candidates; the optimum over [1, 2) whatever the range says.

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
    fine_radius: float | None = None
    alpha_scope: Literal["group", "layer"] = "group"
    tau: float = 0.01
    spacing: Literal["linear", "log", "exact"] = "linear"

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
    def exact(cls, *, metric: Metric = "hybrid", tau: float = 0.01) -> ScaleSearch:
        """The optimum over all scales of [1, 2) x absmax: bfloat16 weights; cosine, mse or hybrid; one alpha a group.

        See `daq_lightning.numerics.exact`.
        """
        return cls(metric=metric, alpha_min=1.0, alpha_max=2.0, n_coarse=1, n_fine=0, tau=tau, spacing="exact")

    def __post_init__(self) -> None:
        for name in ("alpha_min", "alpha_max", "tau", "fine_radius"):
            if not (name == "fine_radius" and self.fine_radius is None):
                _check_type(name, getattr(self, name), (int, float), "a number")
        for name in ("n_coarse", "n_fine"):
            _check_type(name, getattr(self, name), int, "an integer")
        if self.metric not in METRICS:
            raise ValueError(f"Unknown metric {self.metric!r}: expected one of {', '.join(METRICS)}.")
        if not (math.isfinite(self.alpha_min) and self.alpha_min > 0):
            raise ValueError(f"alpha_min must be a finite number > 0, got {self.alpha_min}; the paper uses 0.5 to 0.9.")
        if not (math.isfinite(self.alpha_max) and self.alpha_max >= self.alpha_min):
            raise ValueError(
                f"alpha_max must be a finite number >= alpha_min, got the range [{self.alpha_min}, {self.alpha_max}]; "
                "swap the two, or use one of the paper's ranges such as (0.8, 1.25)."
            )
        if self.n_coarse < 1 or self.n_fine < 0:
            raise ValueError(f"n_coarse must be >= 1 and n_fine >= 0, got {self.n_coarse} and {self.n_fine}.")
        for name in ("n_coarse", "n_fine"):
            if getattr(self, name) > MOST_CANDIDATES:
                raise ValueError(
                    f"{name} must be at most {MOST_CANDIDATES:,}, got {getattr(self, name)}: the codes change at some "
                    "2,000 scales per octave, and as many candidates mean as many passes over the weight. "
                    "ScaleSearch.dense(64) is near the optimum."
                )
        if self.fine_radius is not None and not (math.isfinite(self.fine_radius) and self.fine_radius > 0):
            raise ValueError(f"fine_radius must be a finite number > 0 or None, got {self.fine_radius}.")
        if self.alpha_scope not in ("group", "layer"):
            raise ValueError(f"Unknown alpha_scope {self.alpha_scope!r}: expected 'group' or 'layer'.")
        if not (math.isfinite(self.tau) and self.tau >= 0):
            raise ValueError(f"tau must be a finite number >= 0, got {self.tau}.")
        if self.spacing not in ("linear", "log", "exact"):
            raise ValueError(f"Unknown spacing {self.spacing!r}: expected 'linear', 'log' or 'exact'.")
        if self.spacing == "exact" and (self.metric not in EXACT_METRICS or self.alpha_scope != "group"):
            raise ValueError(
                f"The exact search maximizes {', '.join(EXACT_METRICS)} for each group, got metric {self.metric!r} and "
                f"alpha_scope {self.alpha_scope!r}; use ScaleSearch.dense(64, metric=..., alpha_scope=...) instead."
            )

    @classmethod
    def absmax(cls) -> ScaleSearch:
        """No search: plain absmax quantization, measured like any other."""
        return cls(alpha_min=1.0, alpha_max=1.0, n_coarse=1, n_fine=0)

    @property
    def radius(self) -> float:
        """Half width of the fine stage: `fine_radius`, or half a coarse interval."""
        if self.fine_radius is not None:
            return self.fine_radius
        return (self.alpha_max - self.alpha_min) / max(1, self.n_coarse - 1) / 2

    def coarse(self) -> Tensor:
        """The candidates of the coarse stage: float64, shape (n_coarse,)."""
        if self.spacing == "log":
            step = torch.arange(self.n_coarse, dtype=torch.float64, device="cpu") / self.n_coarse
            return self.alpha_min * (self.alpha_max / self.alpha_min) ** step
        return torch.linspace(self.alpha_min, self.alpha_max, self.n_coarse, dtype=torch.float64, device="cpu")


def _check_type(name: str, value: object, kind: type | tuple[type, ...], called: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} must be {called}, got {value!r} of type {type(value).__name__}.")


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What `search_scale` found for one weight.

    Attributes:
        codes: float8 codes, shape (M, N).
        scale: float32 multiplier, shape ``granularity.grid((M, N))``, already rounded to the scale format.
        alpha: float64 multiple of the absmax scale, same shape as `scale`. Under ``alpha_scope="layer"``
            all are equal, but for groups of zeros, which keep 1.
        stats: Sums per group, shape (G,), of exactly these codes and scales.
        absmax_stats: Sums per group of plain absmax quantization (alpha = 1).
    """

    codes: Tensor
    scale: Tensor
    alpha: Tensor
    stats: DeltaStats
    absmax_stats: DeltaStats
