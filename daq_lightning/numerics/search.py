"""The scale search: which multiple of the absmax scale keeps the update best?

    scale(alpha) = round_scale(alpha * absmax_scale)
    alpha*       = argmax score(sums of (weight, base, scale(alpha)))         over a coarse, then a fine grid

The incumbent is alpha = 1 and gives way only to a strictly better candidate, so the result is never worse than plain
absmax quantization on the objective. Among equally good candidates the nearest to 1 wins. Where the update is all
zero there is no evidence and alpha stays 1. Scores are taken from the very codes and scales that are returned.

Three ways through the candidates: the paper's coarse and fine grids, one dense logarithmic grid over [1, 2), and the
exact optimum over all of [1, 2) (`ScaleSearch()`, `ScaleSearch.dense(n)`, `ScaleSearch.exact()`). [1, 2) covers every
distinct FP8 grid: alpha and 2 alpha give the same one up to subnormal codes, and below 1 the largest weights saturate.

Legend: M out, N in, G groups that share a scale, K candidates.

Source: arXiv 2603.22324, Algorithm 1 and section 3.1 (ranges).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from daq_lightning.numerics.exact import EXACT_METRICS, best_scale
from daq_lightning.numerics.formats import Granularity, ScaleFormat
from daq_lightning.numerics.kernels import (
    Implementation,
    choose,
    delta_stats,
    fast_absmax_scale,
    fast_quantize,
    native,
)
from daq_lightning.numerics.objectives import METRICS, DeltaStats, Metric, score
from daq_lightning.numerics.quantize import round_scale
from daq_lightning.numerics.tiling import bands

WIDE_RANGE = (0.5, 2.0)
MEDIUM_RANGE = (0.8, 1.25)
NARROW_RANGE = (0.9, 1.11)
"""The three ranges of alpha in the paper's experiments."""

_SUMS = 1 << 14  # groups times candidates whose sums are held at a time, at least
_SUMS_SHARE = 512  # and for a large weight one such sum for so many elements


@dataclass(frozen=True, kw_only=True)
class ScaleSearch:
    """How to search; checked when it is made.

    Attributes:
        metric: The objective: "sign", "cosine", "mse" or "hybrid" (see `daq_lightning.numerics.objectives`).
        alpha_min: Lower end of the range of alpha, > 0.
        alpha_max: Upper end, >= alpha_min.
        n_coarse: Candidates of the coarse stage, evenly spaced over the range, >= 1.
        n_fine: Candidates of the fine stage around the best so far, >= 0.
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
            step = torch.arange(self.n_coarse, dtype=torch.float64) / self.n_coarse
            return self.alpha_min * (self.alpha_max / self.alpha_min) ** step
        return torch.linspace(self.alpha_min, self.alpha_max, self.n_coarse, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What `search_scale` found for one weight.

    Attributes:
        codes: float8 codes, shape (M, N).
        scale: float32 multiplier, shape ``granularity.grid((M, N))``, already rounded to the scale format.
        alpha: float64 multiple of the absmax scale, same shape as `scale` (all equal under ``alpha_scope="layer"``).
        stats: Sums per group, shape (G,), of exactly these codes and scales.
        absmax_stats: Sums per group of plain absmax quantization (alpha = 1).
    """

    codes: Tensor
    scale: Tensor
    alpha: Tensor
    stats: DeltaStats
    absmax_stats: DeltaStats


@torch.no_grad()
def search_scale(
    weight: Tensor,
    base: Tensor,
    granularity: Granularity,
    search: ScaleSearch | None = None,
    *,
    scale_format: ScaleFormat = "float32",
    implementation: Implementation = "auto",
    name: str = "weight",
) -> SearchResult:
    """Finds the scale of each group that preserves the update best, and quantizes with it.

    Args:
        weight: Fine-tuned weight, float32, bfloat16 or float16, shape (M, N), on any device.
        base: The weight before fine-tuning, same shape and device.
        granularity: `PerBlock`, `PerChannel` or `PerTensor`.
        search: Objective and candidates; None takes the defaults of `ScaleSearch`.
        scale_format: What scales are rounded to before they are scored.
        implementation: Of the sums, see `daq_lightning.numerics.kernels`.
        name: How error messages call the weight.

    Returns:
        `SearchResult` on the weight's device.

    Raises:
        ValueError: Not two matrices of one shape on one device, or NaN or Inf in one of them.
        TypeError: A dtype other than the three, or an exact search in a weight that is not bfloat16.

    Source: arXiv 2603.22324, Algorithm 1.

    Example:
        >>> from daq_lightning.numerics.formats import PerChannel
        >>> base = torch.linspace(-1, 1, 64).reshape(8, 8)
        >>> weight = base + 0.01 * base.sin()
        >>> result = search_scale(weight, base, PerChannel(), ScaleSearch(metric="cosine"))
        >>> bool((score(result.stats, "cosine") >= score(result.absmax_stats, "cosine")).all())
        True
    """
    search = ScaleSearch() if search is None else search
    _check_inputs(weight, base, name)
    proposal = None
    if search.spacing == "exact" and scale_format != "ue8m0":
        if weight.dtype != torch.bfloat16:
            raise TypeError(
                f"{name}: the exact search needs bfloat16 weights, got {weight.dtype}; use ScaleSearch.dense(64), or "
                "pass weight.bfloat16() if that is what training stores."
            )
        proposal = _propose(weight, base, granularity, search, scale_format, implementation, name)
    fused = choose(implementation, weight.device) == "fused" and weight.device.type == "cpu"
    if fused and search.alpha_scope == "group" and native.fits_cache(weight, granularity):
        result = _search_in_cache(weight, base, granularity, search, scale_format, proposal)
    else:
        result = _search_in_steps(weight, base, granularity, search, scale_format, implementation, name, proposal)
    if not bool(result.scale.isfinite().all()):
        raise ValueError(_not_finite(weight, name))
    sums = result.stats
    if not bool((sums.dot + sums.delta_sq + sums.delta_q_sq + sums.error_sq).isfinite().all()):
        raise ValueError(_not_finite(base, f"the base of {name}"))
    return result


def _propose(
    weight: Tensor,
    base: Tensor,
    granularity: Granularity,
    search: ScaleSearch,
    scale_format: ScaleFormat,
    implementation: Implementation,
    name: str,
) -> Tensor:
    """The alpha of each group that the exact search promises the most of: float64, shape (G, 1)."""
    absmax = fast_absmax_scale(weight, granularity, scale_format, implementation)
    if not bool(absmax.isfinite().all()):
        raise ValueError(_not_finite(weight, name))
    best, _ = best_scale(
        *(weight, base, absmax, granularity),
        metric=search.metric,
        tau=search.tau,
        scale_format=scale_format,
        implementation=implementation,
    )
    return (best.double() / absmax.double()).reshape(-1, 1)


def _search_in_cache(
    weight: Tensor,
    base: Tensor,
    granularity: Granularity,
    search: ScaleSearch,
    scale_format: ScaleFormat,
    proposal: Tensor | None,
) -> SearchResult:
    """One pass of the C++ library: every group is read once."""
    found = native.search_native(
        *(weight, base, granularity),
        metric=search.metric,
        tau=search.tau,
        coarse=search.coarse() if proposal is None else proposal,
        n_fine=search.n_fine,
        alpha_range=(search.alpha_min, search.alpha_max),
        radius=search.radius,
        scale_format=scale_format,
    )
    return SearchResult(**found._asdict())


def _search_in_steps(
    weight: Tensor,
    base: Tensor,
    granularity: Granularity,
    search: ScaleSearch,
    scale_format: ScaleFormat,
    implementation: Implementation,
    name: str,
    proposal: Tensor | None,
) -> SearchResult:
    """Every stage for many groups at once, through the sums of any implementation and device."""
    shape_MN = (weight.shape[0], weight.shape[1])
    absmax = fast_absmax_scale(weight, granularity, scale_format, implementation)
    if not bool(absmax.isfinite().all()):
        raise ValueError(_not_finite(weight, name))

    def evaluate(rows: slice, alpha_GK: Tensor, absmax_G: Tensor) -> DeltaStats:
        scale_GK = round_scale((absmax_G.double()[:, None] * alpha_GK).float(), scale_format)
        return delta_stats(weight[rows], base[rows], scale_GK, granularity, implementation)

    if proposal is not None:
        alpha_G, stats, absmax_stats = _check_proposal(shape_MN, granularity, search, absmax, proposal, evaluate)
    elif search.alpha_scope == "group":
        alpha_G, stats, absmax_stats = _search_groups(shape_MN, granularity, search, absmax, evaluate)
    else:
        alpha_G, stats, absmax_stats = _search_layer(shape_MN, granularity, search, absmax, evaluate)
    alpha = alpha_G.reshape(absmax.shape)
    scale = round_scale((absmax.double() * alpha).float(), scale_format)
    return SearchResult(
        codes=fast_quantize(weight, scale, granularity, implementation),
        scale=scale,
        alpha=alpha,
        stats=stats,
        absmax_stats=absmax_stats,
    )


_Evaluate = Callable[[slice, Tensor, Tensor], DeltaStats]
_Found = tuple[Tensor, DeltaStats, DeltaStats]


def _search_groups(
    shape_MN: tuple[int, int], granularity: Granularity, search: ScaleSearch, absmax: Tensor, evaluate: _Evaluate
) -> _Found:
    """One alpha per group: bands of groups are independent of each other."""
    found: list[_Found] = []
    for rows, absmax_G in _bands(shape_MN, granularity, search, absmax):
        found.append(_coarse_to_fine(functools.partial(_evaluate_band, evaluate, rows, absmax_G), absmax_G, search))
    return _concatenate_found(found)


def _evaluate_band(evaluate: _Evaluate, rows: slice, absmax_G: Tensor, alpha_GK: Tensor) -> DeltaStats:
    return evaluate(rows, alpha_GK, absmax_G)


def _check_proposal(
    shape_MN: tuple[int, int],
    granularity: Granularity,
    search: ScaleSearch,
    absmax: Tensor,
    proposal: Tensor,
    evaluate: _Evaluate,
) -> _Found:
    """Takes the proposed scales where they beat absmax by the sums of their own codes."""
    found: list[_Found] = []
    start = 0
    for rows, absmax_G in _bands(shape_MN, granularity, search, absmax):
        alpha_G = proposal[start : start + len(absmax_G), 0]
        start += len(absmax_G)
        stats_GK = evaluate(rows, torch.stack([torch.ones_like(alpha_G), alpha_G], 1), absmax_G)
        absmax_stats, stats_G1 = stats_GK.map(lambda field: field[:, 0]), stats_GK.map(lambda field: field[:, 1:])
        chosen = _pick(torch.ones_like(alpha_G), absmax_stats, alpha_G[:, None], stats_G1, search)
        found.append((*chosen, absmax_stats))
    return _concatenate_found(found)


def _search_layer(
    shape_MN: tuple[int, int], granularity: Granularity, search: ScaleSearch, absmax: Tensor, evaluate: _Evaluate
) -> _Found:
    """One alpha for the weight: every stage sums over all bands before it decides."""

    def evaluate_all(alpha_1K: Tensor, per_group: bool = False) -> DeltaStats:
        parts = []
        for rows, absmax_G in _bands(shape_MN, granularity, search, absmax):
            stats_GK = evaluate(rows, alpha_1K, absmax_G)
            parts.append(stats_GK if per_group else stats_GK.map(lambda field: field.sum(0, keepdim=True)))
        if per_group:
            return _concatenate(parts)
        return _concatenate(parts).map(lambda field: field.sum(0, keepdim=True))

    alpha_1, _, _ = _coarse_to_fine(evaluate_all, absmax.flatten()[:1], search)
    both_GK = evaluate_all(torch.stack([alpha_1, torch.ones_like(alpha_1)], 1), per_group=True)
    stats, absmax_stats = (both_GK.map(lambda field, k=k: field[:, k]) for k in (0, 1))
    return alpha_1.expand(absmax.numel()), stats, absmax_stats


def _coarse_to_fine(evaluate: Callable[[Tensor], DeltaStats], like_G: Tensor, search: ScaleSearch) -> _Found:
    """Algorithm 1 for many groups at once, in two calls of `evaluate`."""
    one_G1 = torch.ones(like_G.shape[0], 1, dtype=torch.float64, device=like_G.device)
    coarse_K = search.coarse().to(like_G.device)
    alpha_GK = torch.cat([one_G1, coarse_K.expand(one_G1.shape[0], -1)], 1)
    stats_GK = evaluate(alpha_GK)
    absmax_stats = stats_GK.map(lambda field: field[:, 0])
    stats_GK = stats_GK.map(lambda field: field[:, 1:])
    alpha_G, stats = _pick(one_G1[:, 0], absmax_stats, coarse_K.expand(len(one_G1), -1), stats_GK, search)
    if search.n_fine:
        low_G = (alpha_G - search.radius).clamp(min=search.alpha_min)
        high_G = torch.maximum((alpha_G + search.radius).clamp(max=search.alpha_max), low_G)
        step_K = torch.linspace(0, 1, search.n_fine, dtype=torch.float64, device=like_G.device)
        fine_GK = low_G[:, None] + (high_G - low_G)[:, None] * step_K
        alpha_G, stats = _pick(alpha_G, stats, fine_GK, evaluate(fine_GK), search)
    return alpha_G, stats, absmax_stats


def _pick(
    alpha_G: Tensor, stats: DeltaStats, alpha_GK: Tensor, stats_GK: DeltaStats, search: ScaleSearch
) -> tuple[Tensor, DeltaStats]:
    """The best candidate if it strictly beats the incumbent; ties go to the alpha nearest 1; no update, no move."""
    score_GK = score(stats_GK, search.metric, tau=search.tau)
    best_G = score_GK.amax(1)
    # fine grids around 1 are symmetric: of 1 - d and 1 + d take the latter, which does not saturate, not a last bit
    distance_GK = (alpha_GK - 1).abs() + 1e-9 * (alpha_GK < 1)
    distance_GK = torch.where(score_GK == best_G[:, None], distance_GK, torch.inf)
    winner_G1 = distance_GK.argmin(1, keepdim=True)
    better_G = (best_G > score(stats, search.metric, tau=search.tau)) & (stats.n_changed > 0)

    def choose(candidates_GK: Tensor, incumbent_G: Tensor) -> Tensor:
        return torch.where(better_G, candidates_GK.gather(1, winner_G1)[:, 0], incumbent_G)

    chosen = DeltaStats(*(choose(new, old) for new, old in zip(stats_GK, stats, strict=True)))
    return choose(alpha_GK, alpha_G), chosen


def _bands(
    shape_MN: tuple[int, int], granularity: Granularity, search: ScaleSearch, absmax: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Row bands, few enough groups each that the sums of all candidates stay small, and their absmax scales."""
    rows, cols = granularity.cell(shape_MN)
    candidates = max(search.n_coarse + 1, search.n_fine)
    sums = max(_SUMS, shape_MN[0] * shape_MN[1] // _SUMS_SHARE)
    start = 0
    for band in bands(shape_MN, granularity, max(1, sums // candidates) * rows * cols):
        grid_rows, grid_cols = granularity.grid((band.stop - band.start, shape_MN[1]))
        yield band, absmax.flatten()[start : start + grid_rows * grid_cols]
        start += grid_rows * grid_cols


def _concatenate_found(found: list[_Found]) -> _Found:
    alphas, stats, absmax_stats = zip(*found, strict=True)
    return torch.cat(alphas), _concatenate(stats), _concatenate(absmax_stats)


def _concatenate(parts: list[DeltaStats] | tuple[DeltaStats, ...]) -> DeltaStats:
    return DeltaStats(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def _check_inputs(weight: Tensor, base: Tensor, name: str) -> None:
    if weight.ndim != 2 or base.ndim != 2 or weight.numel() == 0:
        raise ValueError(
            f"{name}: expected a non-empty matrix (M, N) and its base, got shapes {tuple(weight.shape)} and "
            f"{tuple(base.shape)}; search the 2-D slices of a stacked weight one by one."
        )
    if weight.shape != base.shape:
        raise ValueError(
            f"{name}: weight has shape {tuple(weight.shape)}, its base {tuple(base.shape)}; "
            "pass the base that this weight was trained from."
        )
    if weight.device != base.device:
        raise ValueError(f"{name}: weight is on {weight.device}, its base on {base.device}; move one with .to().")
    for tensor, role in ((weight, "weight"), (base, "base")):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(
                f"{name}: {role} has dtype {tensor.dtype}, expected float32, bfloat16 or float16; "
                "dequantize quantized weights first."
            )


def _not_finite(tensor: Tensor, name: str) -> str:
    nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    if nan + inf == 0:
        return f"{name}: values are too large for float32 sums (largest magnitude {float(tensor.abs().max()):g})."
    return (
        f"{name} of shape {tuple(tensor.shape)} has {nan} NaN and {inf} Inf values; FP8 cannot hold them. "
        "The training run has diverged or the file is damaged: export an earlier checkpoint."
    )
