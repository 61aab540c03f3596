"""A search step by step, each stage for many groups at once, from the sums that any backend gives.

    incumbent  alpha = 1
    coarse     the candidates of the search
    fine       an even grid around the best so far

or, for scales with a grid of their own, one stage over their neighbours (see `grid`). A format with zero
points has under each alpha that of the ends of the group times alpha; where each group has its own alpha, the
zero points beside that of the alpha found are tried at the end.

The incumbent gives way only to a strictly better candidate. Among equally good ones the nearest to 1 wins.
search.cpp in the CPU backend takes the same steps group by group, in the same float64: the
same bits.

Legend: M out, N in, G groups that share a scale, K candidates.

Source: arXiv 2603.22324, Algorithm 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from daq_lightning.numerics.formats import Format, Granularity, ScaleFormat
from daq_lightning.numerics.objectives import DeltaStats, score
from daq_lightning.numerics.scales import absmax_to_scale, round_scale, zero_of
from daq_lightning.numerics.search.grid import STEPS_AN_OCTAVE, coarse, fine, neighbour_steps, neighbours
from daq_lightning.numerics.search.settings import ScaleSearch
from daq_lightning.numerics.tiling import bands, extremes

_SUMS = 1 << 14  # groups times candidates whose sums are held at a time, at least
_SUMS_SHARE = 512  # and for a large weight one such sum for so many elements


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a backend is to search: two matrices of one shape on one device, and how."""

    weight: Tensor
    base: Tensor
    granularity: Granularity
    search: ScaleSearch
    format: Format
    scale_format: ScaleFormat
    reader_dtype: torch.dtype | None = None
    global_scale: Tensor | None = None
    pool: int = 1
    """Neighbouring groups whose sums come added up; a divisor of their number."""

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)."""
        return (self.weight.shape[0], self.weight.shape[1])

    @property
    def own_grid(self) -> bool:
        """Whether scales are searched on the grid of their own format."""
        return self.search.alpha_scope == "group" and self.scale_format in STEPS_AN_OCTAVE


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What `search_scale` found for one weight.

    Attributes:
        codes: Codes of the format, shape (M, N).
        scale: float32 multiplier, shape ``granularity.grid((M, N))``, already rounded to the scale format.
        alpha: float64 multiple of the absmax scale, same shape as `scale`. Under ``alpha_scope="layer"``
            all are equal, but for groups of zeros, which keep 1.
        stats: Sums per group, shape (G,), of exactly these codes and scales; or fewer, of neighbouring groups
            added up.
        absmax_stats: Sums per group of plain absmax quantization (alpha = 1).
        dequantized_stats: Sums per group of these codes and scales for a reader that rounds their product to
            16 bit; None unless asked for.
        global_scale: For scales in E4M3, float32 of shape (1,): ``scale * global_scale`` is what is stored
            of a scale, exactly. Else None.
        zero: For a format with zero points, int8 of the shape of `scale`: a code times its scale is
            ``(code - zero) * scale``. Else None.
    """

    codes: Tensor
    scale: Tensor
    alpha: Tensor
    stats: DeltaStats
    absmax_stats: DeltaStats
    dequantized_stats: DeltaStats | None = None
    global_scale: Tensor | None = None
    zero: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The functions of a backend that a search step by step is made of."""

    absmax: Callable[[Tensor, Granularity], Tensor]
    delta_stats: Callable[
        [Tensor, Tensor, Tensor, Granularity, Format, torch.dtype | None, Tensor | None], DeltaStats
    ]
    quantize: Callable[[Tensor, Tensor, Granularity, Format, Tensor | None], Tensor]


def pooled(stats: DeltaStats, pool: int) -> DeltaStats:
    """Sums of so many neighbouring groups each, shape (G,) -> (G / pool,)."""
    return stats if pool == 1 else stats.map(lambda field: field.reshape(-1, pool).sum(1))


def search_in_steps(task: Task, kernels: Kernels) -> SearchResult:
    """The search of a task. Scales are NaN or infinite where the weight is."""
    ends = extremes(task.weight, task.granularity) if task.format.zero_point else None
    absmax = kernels.absmax(task.weight, task.granularity) if ends is None else ends[1] - ends[0]
    scale = absmax_to_scale(absmax, task.scale_format, task.format, task.global_scale)
    scale_G = scale.flatten()

    def zeros(groups: slice, alpha_GK: Tensor) -> Tensor | None:
        if ends is None:
            return None
        smallest_G1, largest_G1 = (end.flatten()[groups, None] for end in ends)
        scale_GK = _scaled(scale_G[groups, None], alpha_GK, task)
        return zero_of((smallest_G1.double() * alpha_GK).float(), largest_G1, scale_GK, task.format)

    def evaluate(band: _Band, alpha_GK: Tensor, zero_GK: Tensor | None = None) -> DeltaStats:
        scale_GK = _scaled(scale_G[band.groups, None], alpha_GK, task)
        zero_GK = zeros(band.groups, alpha_GK) if zero_GK is None else zero_GK
        weight, base = task.weight[band.rows], task.base[band.rows]
        return kernels.delta_stats(weight, base, scale_GK, task.granularity, task.format, None, zero_GK)

    found = (
        _search_layer(task, evaluate, zeros)
        if task.search.alpha_scope == "layer"
        else _search_groups(task, evaluate, zeros, scale_G)
    )
    # a group of zeros has scale 1 whatever the alpha of its layer
    alpha = torch.where(absmax == 0, 1.0, found.alpha.reshape(scale.shape))
    best = _scaled(scale, alpha, task)
    zero = None if found.zero is None else found.zero.reshape(scale.shape)
    dequantized_stats = None
    if task.reader_dtype is not None:
        best_G1, zero_G1 = best.reshape(-1, 1), None if zero is None else zero.reshape(-1, 1)
        stats_G1 = kernels.delta_stats(
            task.weight, task.base, best_G1, task.granularity, task.format, task.reader_dtype, zero_G1
        )
        dequantized_stats = stats_G1.map(lambda field: field[:, 0])
    return SearchResult(
        codes=kernels.quantize(task.weight, best, task.granularity, task.format, zero),
        scale=best,
        alpha=alpha,
        stats=pooled(found.stats, task.pool),
        absmax_stats=pooled(found.absmax_stats, task.pool),
        dequantized_stats=None if dequantized_stats is None else pooled(dequantized_stats, task.pool),
        global_scale=task.global_scale,
        zero=zero,
    )


def _scaled(scale: Tensor, alpha: Tensor, task: Task) -> Tensor:
    return round_scale((scale.double() * alpha).float(), task.scale_format, task.global_scale)


class _Band(NamedTuple):
    """Some rows of the weight, and the groups that lie in them."""

    rows: slice
    groups: slice


class _Found(NamedTuple):
    """The alpha of every group, float64 of shape (G,), its zero point if any, and the sums under it and under
    alpha = 1."""

    alpha: Tensor
    zero: Tensor | None
    stats: DeltaStats
    absmax_stats: DeltaStats


_Evaluate: TypeAlias = Callable[..., DeltaStats]
"""(band, alpha_GK of its groups, zero points if they are not those of alpha) -> sums of shape (G, K)."""
_Zeros: TypeAlias = Callable[[slice, Tensor], Tensor | None]
"""(groups, their alpha_GK) -> their zero points under them, (G, K), where the format has any."""


def _search_groups(task: Task, evaluate: _Evaluate, zeros: _Zeros, scale_G: Tensor) -> _Found:
    """One alpha per group: bands of groups are independent of each other."""
    found = []
    for band in _bands(task):
        one_G, own_GK = _ones(band.groups.stop - band.groups.start, task), None
        if task.own_grid:
            own_GK = neighbours(scale_G[band.groups], task.search, task.scale_format, task.global_scale)
        of_band = functools.partial(evaluate, band)
        part = _coarse_to_fine(of_band, one_G, task.search, own_GK)
        zero_G1 = zeros(band.groups, part.alpha[:, None])
        found.append(part if zero_G1 is None else _zero_points(part, zero_G1, of_band, task))
    alphas, zero, stats, absmax_stats = zip(*found, strict=True)
    zero_G = torch.cat(zero) if task.format.zero_point else None
    return _Found(torch.cat(alphas), zero_G, _concatenate(stats), _concatenate(absmax_stats))


def _zero_points(found: _Found, zero_G1: Tensor, evaluate: Callable[..., DeltaStats], task: Task) -> _Found:
    """The zero points beside those of the alphas that were found."""
    beside_2 = torch.tensor([1, -1], dtype=torch.int8, device=zero_G1.device)
    zero_G2 = (zero_G1 + beside_2).clamp(int(task.format.low), int(task.format.max))
    alpha_G2 = found.alpha[:, None].expand(-1, 2)
    stats_G2 = evaluate(alpha_G2, zero_G2)
    zero_G, stats = _pick(zero_G1[:, 0], found.stats, zero_G2, stats_G2, task.search, alpha_G2)
    return _Found(found.alpha, zero_G, stats, found.absmax_stats)


def _search_layer(task: Task, evaluate: _Evaluate, zeros: _Zeros) -> _Found:
    """One alpha for the weight: every stage sums over all bands before it decides."""
    cut = list(_bands(task))

    def evaluate_all(alpha_1K: Tensor) -> DeltaStats:
        parts = [evaluate(band, alpha_1K).map(lambda field: field.sum(0, keepdim=True)) for band in cut]
        return _concatenate(parts).map(lambda field: field.sum(0, keepdim=True))

    one_1 = _ones(1, task)
    alpha_1 = _coarse_to_fine(evaluate_all, one_1, task.search).alpha
    both_1K = torch.stack([alpha_1, one_1], 1)
    both_GK = _concatenate([evaluate(band, both_1K) for band in cut])
    stats, absmax_stats = (both_GK.map(lambda field, k=k: field[:, k]) for k in (0, 1))
    alpha_G = alpha_1.expand(cut[-1].groups.stop)
    zero_G1 = zeros(slice(None), alpha_G[:, None])
    return _Found(alpha_G, None if zero_G1 is None else zero_G1[:, 0], stats, absmax_stats)


def _bands(task: Task) -> Iterator[_Band]:
    """Bands with few enough groups each that the sums of all candidates stay small."""
    rows, cols = task.granularity.cell(task.shape)
    candidates = max(task.search.n_coarse + 1, task.search.n_fine)
    if task.own_grid:
        candidates = 1 + len(neighbour_steps(task.search, task.scale_format))
    sums = max(_SUMS, task.shape[0] * task.shape[1] // _SUMS_SHARE)
    start = 0
    for band in bands(task.shape, task.granularity, max(1, sums // candidates) * rows * cols):
        grid_rows, grid_cols = task.granularity.grid((band.stop - band.start, task.shape[1]))
        yield _Band(band, slice(start, start + grid_rows * grid_cols))
        start += grid_rows * grid_cols


def _coarse_to_fine(
    evaluate: Callable[[Tensor], DeltaStats],
    one_G: Tensor,
    search: ScaleSearch,
    own_GK: Tensor | None = None,
) -> _Found:
    """Algorithm 1 for many groups at once, in two calls of `evaluate`; in one over their own candidates."""
    coarse_GK = coarse(search).to(one_G.device).expand(len(one_G), -1) if own_GK is None else own_GK
    stats_GK = evaluate(torch.cat([one_G[:, None], coarse_GK], 1))
    # a view would keep the sums of all candidates
    absmax_stats = stats_GK.map(lambda field: field[:, 0].clone())
    stats_GK = stats_GK.map(lambda field: field[:, 1:])
    alpha_G, stats = _pick(one_G, absmax_stats, coarse_GK, stats_GK, search)
    if search.n_fine and own_GK is None:
        fine_GK = fine(search, alpha_G)
        alpha_G, stats = _pick(alpha_G, stats, fine_GK, evaluate(fine_GK), search)
    return _Found(alpha_G, None, stats, absmax_stats)


def _pick(
    kept_G: Tensor,
    stats: DeltaStats,
    tried_GK: Tensor,
    stats_GK: DeltaStats,
    search: ScaleSearch,
    alpha_GK: Tensor | None = None,
) -> tuple[Tensor, DeltaStats]:
    """The best candidate if it beats the incumbent; ties go to the alpha nearest 1; no update, no move.

    What is tried is alpha, or else something under these alphas."""
    alpha_GK = tried_GK if alpha_GK is None else alpha_GK
    score_GK = score(stats_GK, search.metric, tau=search.tau)
    best_G = score_GK.amax(1)
    # fine grids around 1 are symmetric: of 1 - d and 1 + d take the latter, which does not saturate, not a
    # last bit
    distance_GK = (alpha_GK - 1).abs() + 1e-9 * (alpha_GK < 1).double()
    distance_GK = torch.where(score_GK == best_G[:, None], distance_GK, torch.inf)
    winner_G1 = distance_GK.argmin(1, keepdim=True)
    better_G = (best_G > score(stats, search.metric, tau=search.tau)) & (stats.n_changed > 0)

    def choose(candidates_GK: Tensor, incumbent_G: Tensor) -> Tensor:
        return torch.where(better_G, candidates_GK.gather(1, winner_G1)[:, 0], incumbent_G)

    chosen = DeltaStats(*(choose(new, old) for new, old in zip(stats_GK, stats, strict=True)))
    return choose(tried_GK, kept_G), chosen


def _ones(count: int, task: Task) -> Tensor:
    return torch.ones(count, dtype=torch.float64, device=task.weight.device)


def _concatenate(parts: list[DeltaStats] | tuple[DeltaStats, ...]) -> DeltaStats:
    return DeltaStats(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
