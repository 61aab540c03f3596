"""The CUDA backend: kernels in Triton, as functions of tensors.

| source | what it does |
| --- | --- |
| cuda_sums.py | the sums of given candidates |
| cuda_search.py | a whole search, one program a group |

A program reads its weights from memory once, and from the cache beside its processor for all further
candidates; offsets are 64 bits wide. Where a group is too large for that, where the layer has one alpha, or
where products leave float32, the search goes step by step. Triton is imported by these modules and nowhere
else. What is not measured against all candidates (absmax and codes of a search in steps) is left to torch.

Legend: M out, N in, G groups, C chunks of a group, R regions (G times C), K candidates.
"""

from __future__ import annotations

# pyright: reportMissingImports=false, reportCallIssue=false, reportIndexIssue=false
import os
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from daq_lightning.numerics.backends import reference
from daq_lightning.numerics.backends.cuda_search import search_kernel
from daq_lightning.numerics.backends.cuda_sums import LAUNCH, Grid, delta_stats_kernel
from daq_lightning.numerics.formats import Format, Granularity
from daq_lightning.numerics.objectives import DeltaStats
from daq_lightning.numerics.quantize import absmax, quantize
from daq_lightning.numerics.rounding import blocked, triangular
from daq_lightning.numerics.search.grid import coarse, fine_steps, neighbour_steps
from daq_lightning.numerics.search.stages import Kernels, SearchResult, Task, pooled, search_in_steps
from daq_lightning.numerics.tiling import group_sizes

_CHUNK = 1 << 15  # elements that a program owns: 128 KiB of weight and base in bfloat16
_TILE, _A_THREAD = 2048, 8  # elements that a program, and one of its threads, hold at a time
_CANDIDATES = 1 << 7  # of a stage that is decided in registers; more would be spilled
_OUTPUTS = 1 << 24  # regions times candidates whose sums are held at a time, 24 bytes each
# magnitudes whose products float32 holds; a weight with others goes to `reference`
_SMALL, _LARGE = 2.0**-50, 2.0**50
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


# both as they are: matrix products
unit_upper, walk = triangular.unit_upper, blocked.walk


class Cut(NamedTuple):
    """How a weight is cut: into cells, a cell into chunks, and a chunk into tiles."""

    rows: int
    cols: int
    chunk_rows: int
    chunk_cols: int
    tile_rows: int
    tile_cols: int

    @classmethod
    def of(cls, shape_MN: tuple[int, int], granularity: Granularity) -> Cut:
        """Of a weight of this shape; blocks may be larger than it."""
        rows, cols = map(min, granularity.cell(shape_MN), shape_MN)
        chunk_cols = min(cols, _CHUNK)
        chunk_rows = min(rows, max(1, _CHUNK // chunk_cols))
        tile_cols = min(triton.next_power_of_2(chunk_cols), _TILE)
        tile_rows = min(triton.next_power_of_2(chunk_rows), _TILE // tile_cols)
        return cls(rows, cols, chunk_rows, chunk_cols, tile_rows, tile_cols)

    @property
    def chunks(self) -> int:
        """Of a cell."""
        return triton.cdiv(self.rows, self.chunk_rows) * triton.cdiv(self.cols, self.chunk_cols)

    @property
    def warps(self) -> int:
        """Of a program."""
        return max(1, self.tile_rows * self.tile_cols // (32 * _A_THREAD))


def search(task: Task) -> SearchResult:
    """See `daq_lightning.numerics.backends.Backend`: in one kernel where each group fits the cache.
    Formats with zero points go step by step, by the reference."""
    found = _search_in_cache(task) if fits_cache(task) else None
    if found is not None:
        return found
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
    """See `daq_lightning.numerics.backends.delta_stats`; with zero points, by the reference."""
    if zero_GK is not None:
        return reference.delta_stats(weight_MN, base_MN, scale_GK, granularity, fmt, reader_dtype, zero_GK)
    shape_MN, device = (weight_MN.shape[0], weight_MN.shape[1]), weight_MN.device
    cut = Cut.of(shape_MN, granularity)
    chunks, (groups, candidates) = cut.chunks, scale_GK.shape
    inputs_MN = _rows(weight_MN), _rows(base_MN)
    scale_GK = scale_GK.contiguous()
    sizes_G = group_sizes(shape_MN, granularity, device)
    parts = []
    step = max(1, _OUTPUTS // (chunks * candidates))
    for first in range(0, groups, step):
        count = min(step, groups - first)
        counts = torch.empty(3, count, chunks, candidates, dtype=torch.int32, device=device)
        totals = torch.empty(3, count, chunks, candidates, dtype=torch.float32, device=device)
        changed_GC = torch.empty(count, chunks, dtype=torch.int32, device=device)
        of_regions = torch.empty(3, count, chunks, dtype=torch.float32, device=device)
        delta_stats_kernel[(count * chunks,)](
            *inputs_MN,
            *(matrix.stride(0) for matrix in inputs_MN),
            scale_GK,
            counts,
            totals,
            changed_GC,
            of_regions,
            *shape_MN,
            *cut[:4],
            first,
            candidates,
            READER=_reader(reader_dtype),
            GRID=Grid.of(fmt, _capability(device)),
            ROWS=cut.tile_rows,
            COLS=cut.tile_cols,
            num_warps=cut.warps,
            **LAUNCH,
        )
        if not _fits_float32(of_regions, *scale_GK[first : first + count].aminmax()):
            return reference.delta_stats(weight_MN, base_MN, scale_GK, granularity, fmt, reader_dtype)
        shape_GK = (count, candidates)
        parts.append(
            _stats(
                sizes_G[first : first + count, None].expand(shape_GK),
                changed_GC.sum(1, dtype=torch.int64)[:, None].expand(shape_GK),
                of_regions[0].sum(1, dtype=torch.float64)[:, None].expand(shape_GK),
                counts.sum(2, dtype=torch.int64),
                totals.sum(2, dtype=torch.float64),
            )
        )
    return DeltaStats(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def fits_cache(task: Task) -> bool:
    """Whether every group is searched by itself and fits the cache, and its candidates the registers."""
    candidates = max(1 + len(_candidates(task)[0]), len(_candidates(task)[1]))
    chunks = Cut.of(task.shape, task.granularity).chunks
    in_one = task.search.alpha_scope == "group" and not task.format.zero_point
    return in_one and chunks == 1 and candidates <= _CANDIDATES


def _search_in_cache(task: Task) -> SearchResult | None:
    """The search of every group by itself, coarse to fine; None where products leave float32."""
    device, stages = task.weight.device, task.search
    cut = Cut.of(task.shape, task.granularity)
    grid = task.granularity.grid(task.shape)
    groups, sides = grid[0] * grid[1], 2 if task.reader_dtype is None else 3
    first_K, second_K = _candidates(task)
    incumbent = 0.0 if task.own_grid else 1.0  # in steps, or alpha
    limits = [stages.tau, stages.alpha_min, stages.alpha_max, stages.radius, incumbent]
    settings = torch.cat([torch.tensor(limits, dtype=torch.float64, device="cpu"), first_K, second_K])
    settings = settings.to(device)
    if task.global_scale is not None:
        settings = torch.cat([settings, task.global_scale.double()])
    inputs_MN = _rows(task.weight), _rows(task.base)
    scale_G = torch.empty(groups, dtype=torch.float32, device=device)
    alpha_G = torch.empty(groups, dtype=torch.float64, device=device)
    changed_G = torch.empty(groups, dtype=torch.int32, device=device)
    of_groups = torch.empty(3, groups, dtype=torch.float32, device=device)
    counts = torch.empty(3, sides, groups, dtype=torch.int32, device=device)
    totals = torch.empty(3, sides, groups, dtype=torch.float32, device=device)
    codes_MN = torch.empty(task.shape, dtype=torch.uint8, device=device)
    search_kernel[(groups,)](
        *inputs_MN,
        *(matrix.stride(0) for matrix in inputs_MN),
        settings,
        scale_G,
        alpha_G,
        changed_G,
        of_groups,
        counts,
        totals,
        codes_MN,
        *task.shape,
        cut.rows,
        cut.cols,
        len(first_K),
        len(second_K),
        METRIC=stages.metric,
        SCALE_FORMAT=task.scale_format,
        READER=_reader(task.reader_dtype),
        GRID=Grid.of(task.format, _capability(device)),
        ROWS=cut.tile_rows,
        COLS=cut.tile_cols,
        K=triton.next_power_of_2(max(len(first_K) + 1, len(second_K))),
        num_warps=cut.warps,
        **LAUNCH,
    )
    if not _fits_float32(of_groups):
        return None
    sizes_G = group_sizes(task.shape, task.granularity, device)
    changed_G, delta_sq_G = changed_G.long(), of_groups[0].double()
    counts, totals = counts.long(), totals.double()
    stats = [
        pooled(_stats(sizes_G, changed_G, delta_sq_G, counts[:, side], totals[:, side]), task.pool)
        for side in range(sides)
    ]
    return SearchResult(
        codes=codes_MN.view(task.format.dtype),
        scale=scale_G.reshape(grid),
        alpha=alpha_G.reshape(grid),
        stats=stats[0],
        absmax_stats=stats[1],
        dequantized_stats=None if task.reader_dtype is None else stats[2],
        global_scale=task.global_scale,
    )


def _candidates(task: Task) -> tuple[Tensor, Tensor]:
    """The alphas of the coarse stage and the steps of the fine one; or the neighbours of the plain scale, in
    steps, and none."""
    if task.own_grid:
        steps_K = neighbour_steps(task.search, task.scale_format).double()
        return steps_K, steps_K[:0]
    return coarse(task.search), fine_steps(task.search)


def _stats(sizes: Tensor, changed: Tensor, delta_sq: Tensor, counts: Tensor, totals: Tensor) -> DeltaStats:
    """From int64 counts and float64 totals, stacked as `cuda_sums.store_sums` stores them."""
    sign_equal, preserved, lost = counts
    dot, delta_q_sq, error_sq = totals
    return DeltaStats(
        n=sizes,
        n_changed=changed,
        sign_equal=sign_equal,
        preserved=preserved,
        flipped=changed - preserved - lost,
        lost=lost,
        dot=dot,
        delta_sq=delta_sq,
        delta_q_sq=delta_q_sq,
        error_sq=error_sq,
    )


def _fits_float32(of_regions: Tensor, *scales: Tensor) -> bool:
    """Whether no product of two differences overflows or vanishes: one look at the device."""
    _, smallest, largest = of_regions
    every = torch.stack([smallest.min(), largest.max(), *scales])
    return bool(((every[::2] > _SMALL) & (every[1::2] < _LARGE)).all())  # NaN is neither


def _rows(weight_MN: Tensor) -> Tensor:
    """The weight itself if its columns are adjacent, else a contiguous copy."""
    return weight_MN if weight_MN.stride(1) == 1 else weight_MN.contiguous()


def _reader(dtype: torch.dtype | None) -> str:
    return "" if dtype is None else str(dtype)


def _capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a device; (0, 0) in the interpreter, which has no conversion to float8."""
    return (0, 0) if _INTERPRETED else torch.cuda.get_device_capability(device)
