"""Several weights of one shape in one search: the experts of a layer, which are many and small.

    search([w_1; w_2; ...], [b_1; b_2; ...])  =  [search(w_1, b_1); search(w_2, b_2); ...]

Groups are searched independently of each other, so weights may be stacked row upon row wherever no group crosses the
seam, and one call serves them all. Where it would, they are searched one by one.

Legend: B weights of a batch, M out, N in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from daq_lightning.numerics.candidates import ScaleSearch, SearchResult
from daq_lightning.numerics.formats import Granularity, PerTensor, ScaleFormat
from daq_lightning.numerics.search import search_scale


def search_batch(
    weights: Sequence[Tensor],
    bases: Sequence[Tensor],
    granularity: Granularity,
    search: ScaleSearch | None = None,
    *,
    scale_format: ScaleFormat = "float32",
    names: Sequence[str],
) -> list[SearchResult]:
    """`search_scale` for B weights of one shape; the results are those of B single calls.

    Args:
        weights: B matrices of one shape (M, N), dtype and device.
        bases: Their bases.
        granularity: As for `search_scale`.
        search: As for `search_scale`.
        scale_format: As for `search_scale`.
        names: How error messages call them.

    Raises:
        ValueError: As `search_scale`, with the name of the weight.
    """
    search = ScaleSearch() if search is None else search
    shape_MN = (weights[0].shape[0], weights[0].shape[1])
    seamless = (
        len(weights) > 1
        and search.alpha_scope == "group"
        and not isinstance(granularity, PerTensor)
        and shape_MN[0] % granularity.cell(shape_MN)[0] == 0
        and all(tensor.shape == weights[0].shape for tensor in (*weights, *bases))
        and len({tensor.dtype for tensor in weights}) == len({tensor.dtype for tensor in bases}) == 1
    )
    if seamless:
        try:
            stacked = search_scale(
                torch.cat(list(weights)), torch.cat(list(bases)), granularity, search, scale_format=scale_format
            )
            return _unstack(stacked, len(weights))
        except ValueError:
            pass  # one of them is not finite: the single searches say which
    return [
        search_scale(weight, base, granularity, search, scale_format=scale_format, name=name)
        for weight, base, name in zip(weights, bases, names, strict=True)
    ]


def _unstack(result: SearchResult, count: int) -> list[SearchResult]:
    codes, scales, alphas = (tensor.chunk(count) for tensor in (result.codes, result.scale, result.alpha))
    stats, absmax_stats = (
        [sums.map(lambda field, part=part: field.chunk(count)[part]) for part in range(count)]
        for sums in (result.stats, result.absmax_stats)
    )
    return [
        SearchResult(codes=codes[i], scale=scales[i], alpha=alphas[i], stats=stats[i], absmax_stats=absmax_stats[i])
        for i in range(count)
    ]
