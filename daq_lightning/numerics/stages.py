"""The stages of a search, each for many groups at once, through the sums of any implementation on any device.

    incumbent  alpha = 1
    coarse     the candidates of the search, or a proposal
    fine       an even grid around the best so far

The incumbent gives way only to a strictly better candidate. Among equally good ones the nearest to 1 wins.
search.cpp beside the CPU kernels takes the same steps group by group.

Legend: M out, N in, G groups that share a scale, K candidates.

Source: arXiv 2603.22324, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from daq_lightning.numerics.candidates import ScaleSearch
from daq_lightning.numerics.formats import Granularity
from daq_lightning.numerics.objectives import DeltaStats, score
from daq_lightning.numerics.tiling import bands

_SUMS = 1 << 14  # groups times candidates whose sums are held at a time, at least
_SUMS_SHARE = 512  # and for a large weight one such sum for so many elements


class Found(NamedTuple):
    """The alpha of every group, float64 of shape (G,), and the sums under it and under alpha = 1."""

    alpha: Tensor
    stats: DeltaStats
    absmax_stats: DeltaStats


Evaluate: TypeAlias = Callable[[slice, Tensor, Tensor], DeltaStats]
"""(rows, alpha_GK, absmax scales of their groups) -> sums of shape (G, K)."""


@dataclass(frozen=True, kw_only=True)
class Stages:
    """A search over one weight.

    Attributes:
        shape: (M, N).
        granularity: Which elements share a scale.
        search: The candidates and the objective.
        absmax: The absmax scales, shape (G,).
        evaluate: Gives the sums.
    """

    shape: tuple[int, int]
    granularity: Granularity
    search: ScaleSearch
    absmax: Tensor
    evaluate: Evaluate

    def of_groups(self) -> Found:
        """One alpha per group: bands of groups are independent of each other."""

        def search_band(rows: slice, absmax_G: Tensor) -> Found:
            return _coarse_to_fine(lambda alpha_GK: self.evaluate(rows, alpha_GK, absmax_G), absmax_G, self.search)

        return _join([search_band(rows, self.absmax[groups]) for rows, groups in self._bands()])

    def of_layer(self) -> Found:
        """One alpha for the weight: every stage sums over all bands before it decides."""

        def evaluate_all(alpha_1K: Tensor) -> DeltaStats:
            parts = [
                self.evaluate(rows, alpha_1K, self.absmax[groups]).map(lambda field: field.sum(0, keepdim=True))
                for rows, groups in self._bands()
            ]
            return _concatenate(parts).map(lambda field: field.sum(0, keepdim=True))

        alpha_1 = _coarse_to_fine(evaluate_all, self.absmax[:1], self.search).alpha
        both_1K = torch.stack([alpha_1, torch.ones_like(alpha_1)], 1)
        both_GK = _concatenate([self.evaluate(rows, both_1K, self.absmax[groups]) for rows, groups in self._bands()])
        stats, absmax_stats = (both_GK.map(lambda field, k=k: field[:, k]) for k in (0, 1))
        return Found(alpha_1.expand(self.absmax.numel()), stats, absmax_stats)

    def of_proposal(self, alpha_G: Tensor) -> Found:
        """The proposed alphas where they beat 1 by the sums of their own codes."""
        found = []
        for rows, groups in self._bands():
            proposed_G, one_G = alpha_G[groups], torch.ones_like(alpha_G[groups])
            stats_GK = self.evaluate(rows, torch.stack([one_G, proposed_G], 1), self.absmax[groups])
            absmax_stats, stats_G1 = stats_GK.map(lambda field: field[:, 0]), stats_GK.map(lambda field: field[:, 1:])
            found.append(Found(*_pick(one_G, absmax_stats, proposed_G[:, None], stats_G1, self.search), absmax_stats))
        return _join(found)

    def _bands(self) -> Iterator[tuple[slice, slice]]:
        """Row bands, few enough groups each that the sums of all candidates stay small, and their groups."""
        rows, cols = self.granularity.cell(self.shape)
        candidates = max(self.search.n_coarse + 1, self.search.n_fine)
        sums = max(_SUMS, self.shape[0] * self.shape[1] // _SUMS_SHARE)
        start = 0
        for band in bands(self.shape, self.granularity, max(1, sums // candidates) * rows * cols):
            grid_rows, grid_cols = self.granularity.grid((band.stop - band.start, self.shape[1]))
            yield band, slice(start, start + grid_rows * grid_cols)
            start += grid_rows * grid_cols


def _coarse_to_fine(evaluate: Callable[[Tensor], DeltaStats], like_G: Tensor, search: ScaleSearch) -> Found:
    """Algorithm 1 for many groups at once, in two calls of `evaluate`."""
    one_G1 = torch.ones(like_G.shape[0], 1, dtype=torch.float64, device=like_G.device)
    coarse_K = search.coarse().to(like_G.device)
    alpha_GK = torch.cat([one_G1, coarse_K.expand(one_G1.shape[0], -1)], 1)
    stats_GK = evaluate(alpha_GK)
    absmax_stats = stats_GK.map(lambda field: field[:, 0].clone())  # a view would keep the sums of all candidates
    stats_GK = stats_GK.map(lambda field: field[:, 1:])
    alpha_G, stats = _pick(one_G1[:, 0], absmax_stats, coarse_K.expand(len(one_G1), -1), stats_GK, search)
    if search.n_fine:
        low_G = (alpha_G - search.radius).clamp(min=search.alpha_min)
        high_G = torch.maximum((alpha_G + search.radius).clamp(max=search.alpha_max), low_G)
        step_K = torch.linspace(0, 1, search.n_fine, dtype=torch.float64, device=like_G.device)
        fine_GK = low_G[:, None] + (high_G - low_G)[:, None] * step_K
        alpha_G, stats = _pick(alpha_G, stats, fine_GK, evaluate(fine_GK), search)
    return Found(alpha_G, stats, absmax_stats)


def _pick(
    alpha_G: Tensor, stats: DeltaStats, alpha_GK: Tensor, stats_GK: DeltaStats, search: ScaleSearch
) -> tuple[Tensor, DeltaStats]:
    """The best candidate if it strictly beats the incumbent; ties go to the alpha nearest 1; no update, no move."""
    score_GK = score(stats_GK, search.metric, tau=search.tau)
    best_G = score_GK.amax(1)
    # fine grids around 1 are symmetric: of 1 - d and 1 + d take the latter, which does not saturate, not a last bit
    distance_GK = (alpha_GK - 1).abs() + 1e-9 * (alpha_GK < 1).double()
    distance_GK = torch.where(score_GK == best_G[:, None], distance_GK, torch.inf)
    winner_G1 = distance_GK.argmin(1, keepdim=True)
    better_G = (best_G > score(stats, search.metric, tau=search.tau)) & (stats.n_changed > 0)

    def choose(candidates_GK: Tensor, incumbent_G: Tensor) -> Tensor:
        return torch.where(better_G, candidates_GK.gather(1, winner_G1)[:, 0], incumbent_G)

    chosen = DeltaStats(*(choose(new, old) for new, old in zip(stats_GK, stats, strict=True)))
    return choose(alpha_GK, alpha_G), chosen


def _join(found: list[Found]) -> Found:
    alphas, stats, absmax_stats = zip(*found, strict=True)
    return Found(torch.cat(alphas), _concatenate(stats), _concatenate(absmax_stats))


def _concatenate(parts: list[DeltaStats] | tuple[DeltaStats, ...]) -> DeltaStats:
    return DeltaStats(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
