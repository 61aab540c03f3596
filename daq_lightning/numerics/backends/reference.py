"""The reference backend: one candidate after the other, on pieces small enough to keep memory bounded.

Legend: M out, N in, G groups, E elements of a group, K candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daq_lightning.numerics.encode import encode
from daq_lightning.numerics.formats import Format, Granularity
from daq_lightning.numerics.objectives import DeltaStats, sums
from daq_lightning.numerics.quantize import absmax, quantize
from daq_lightning.numerics.rounding import blocked, triangular
from daq_lightning.numerics.search.stages import Kernels, SearchResult, Task, search_in_steps
from daq_lightning.numerics.tiling import group_sizes, patches, to_groups

_PIECE = 1 << 16  # elements that are held in float32 and float64 at a time


# both as they are: matrix products
unit_upper, walk = triangular.unit_upper, blocked.walk


def search(task: Task) -> SearchResult:
    """See `daq_lightning.numerics.backends.Backend`."""
    return search_in_steps(task, Kernels(absmax=absmax, delta_stats=delta_stats, quantize=quantize))


def delta_stats(
    weight_MN: Tensor,
    base_MN: Tensor,
    scale_GK: Tensor,
    granularity: Granularity,
    fmt: Format,
    reader_dtype: torch.dtype | None = None,
    zero_GK: Tensor | None = None,
) -> DeltaStats:
    """See `daq_lightning.numerics.backends.delta_stats`; int8 zero points for a format that has them."""
    shape_MN = (weight_MN.shape[0], weight_MN.shape[1])
    parts = []
    for patch, groups in patches(shape_MN, granularity, _PIECE):
        weight_GE, base_GE = to_groups(weight_MN[patch], granularity), to_groups(base_MN[patch], granularity)
        zero = None if zero_GK is None else zero_GK[groups]
        parts.append(_patch_stats(weight_GE, base_GE, scale_GK[groups], fmt, reader_dtype, zero))
    stats = DeltaStats(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
    # the zeros that fill up a ragged block count as elements with equal signs, and nowhere else
    fill_G1 = (stats.n - group_sizes(shape_MN, granularity, weight_MN.device)[:, None])[:, :1]
    return stats._replace(n=stats.n - fill_G1, sign_equal=stats.sign_equal - fill_G1)


def _patch_stats(
    weight_GE: Tensor,
    base_GE: Tensor,
    scale_GK: Tensor,
    fmt: Format,
    reader_dtype: torch.dtype | None,
    zero_GK: Tensor | None,
) -> DeltaStats:
    groups = weight_GE.shape[0]
    step = max(1, _PIECE // groups)
    total: DeltaStats | None = None
    for start in range(0, weight_GE.shape[1], step):
        weight = weight_GE[:, start : start + step].float()
        base = base_GE[:, start : start + step].float()
        columns = []
        for k, scale_G in enumerate(scale_GK.unbind(1)):
            zero_G1 = None if zero_GK is None else zero_GK[:, k, None].float()
            codes = encode(weight * scale_G.reciprocal()[:, None], fmt, zero_G1).float()
            codes = codes if zero_G1 is None else codes - zero_G1
            seen = codes * scale_G[:, None]
            seen = seen if reader_dtype is None else seen.to(reader_dtype).float()
            columns.append(sums(weight, base, seen))
        piece = DeltaStats(*(torch.stack(fields, 1) for fields in zip(*columns, strict=True)))
        total = piece if total is None else total.add(piece)
    assert total is not None
    return total
