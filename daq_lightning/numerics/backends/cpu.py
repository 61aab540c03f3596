"""The CPU backend: kernels by hand, in C++, as functions of tensors.

| source | what it does in one pass over a weight |
| --- | --- |
| src/passes.cpp | the sums of given candidates; absmax; codes |
| src/search.cpp | a whole search, group after group in the cache |
| src/factor.cpp | the factors of a curvature |
| src/rounding.cpp | rounding with curvature, block after block |

C++ writes where it is told to: every buffer made here states its dtype and device, whatever torch's defaults
are, and is handed over with its size, which the library checks before it writes.

Legend: M out, N in, G groups, C chunks of a group, K candidates.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from daq_lightning.numerics.backends.library import Array, array, entry_point
from daq_lightning.numerics.backends.structs import (
    FormatStruct,
    FoundStruct,
    MatrixStruct,
    PlanStruct,
    SearchStruct,
    SideStruct,
)
from daq_lightning.numerics.formats import SCALE_FORMATS, Format, Granularity
from daq_lightning.numerics.objectives import DeltaStats
from daq_lightning.numerics.rounding.walk import Factor, RoundingTask, Walked
from daq_lightning.numerics.search.grid import coarse, fine_steps, neighbour_steps
from daq_lightning.numerics.search.settings import METRICS
from daq_lightning.numerics.search.stages import Kernels, SearchResult, Task, search_in_steps

_CHUNK = 1 << 15  # elements of a unit of work
_CPU = torch.device("cpu")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def search(task: Task) -> SearchResult:
    """See `daq_lightning.numerics.backends.Backend`: in the cache where each group fits it, else in steps."""
    if task.search.alpha_scope == "group" and fits_cache(task.weight, task.granularity):
        return _search_in_cache(task)
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
    """See `daq_lightning.numerics.backends.delta_stats`."""
    plan, chunks = _plan(weight_MN, granularity)
    groups, candidates = scale_GK.shape
    counts = torch.empty(6, groups, chunks, candidates, dtype=torch.int64, device=_CPU)
    totals = torch.empty(4, groups, chunks, candidates, dtype=torch.float64, device=_CPU)
    weight_MN, base_MN, scale_GK = _rows(weight_MN), _rows(base_MN), scale_GK.contiguous()
    zero_GK = None if zero_GK is None else zero_GK.contiguous()
    _entry_point("delta_stats")(
        _matrix(weight_MN),
        _matrix(base_MN),
        plan,
        _format(fmt),
        array(scale_GK),
        _zeros(zero_GK),
        candidates,
        _reader(reader_dtype),
        torch.get_num_threads(),
        array(counts),
        array(totals),
    )
    fields = [field.sum(1) if chunks > 1 else field[:, 0] for field in (*counts, *totals)]
    return DeltaStats(*fields)


def absmax(weight_MN: Tensor, granularity: Granularity) -> Tensor:
    """See `daq_lightning.numerics.quantize.absmax`."""
    plan, chunks = _plan(weight_MN, granularity)
    grid = granularity.grid((weight_MN.shape[0], weight_MN.shape[1]))
    absmax_GC = torch.empty(grid[0] * grid[1], chunks, dtype=torch.float32, device=_CPU)
    weight_MN = _rows(weight_MN)
    _entry_point("absmax")(_matrix(weight_MN), plan, torch.get_num_threads(), array(absmax_GC))
    return absmax_GC.amax(1).reshape(grid)


def quantize(
    weight_MN: Tensor, scale: Tensor, granularity: Granularity, fmt: Format, zero: Tensor | None = None
) -> Tensor:
    """The codes of `daq_lightning.numerics.quantize.quantize`, bit for bit, for finite weights."""
    plan, _ = _plan(weight_MN, granularity)
    codes_MN = torch.empty(weight_MN.shape, dtype=torch.uint8, device=_CPU)
    weight_MN, scale = _rows(weight_MN), scale.contiguous()
    zero = None if zero is None else zero.contiguous()
    _entry_point("quantize")(
        _matrix(weight_MN),
        plan,
        _format(fmt),
        array(scale),
        _zeros(zero),
        torch.get_num_threads(),
        array(codes_MN),
    )
    return codes_MN.view(fmt.dtype)


def unit_upper(matrix_KK: Tensor, order_K: Tensor) -> tuple[Tensor, Tensor]:
    """See `daq_lightning.numerics.rounding.triangular.unit_upper`."""
    size, matrix_KK, order_K = len(matrix_KK), matrix_KK.contiguous(), order_K.contiguous()
    upper_KK = torch.empty(size, size, dtype=torch.float32, device=_CPU)
    diagonal_K = torch.empty(size, dtype=torch.float64, device=_CPU)
    _entry_point("unit_upper")(
        array(matrix_KK),
        array(order_K),
        size,
        8 * matrix_KK.itemsize,
        torch.get_num_threads(),
        array(upper_KK),
        array(diagonal_K),
    )
    return upper_KK, diagonal_K


def walk(task: RoundingTask) -> Walked:
    """See `daq_lightning.numerics.rounding.definition`."""
    plan, _ = _plan(task.weight, task.granularity)
    codes_MN = torch.empty(task.shape, dtype=torch.uint8, device=_CPU)
    losses = torch.empty(3, dtype=torch.float64, device=_CPU)
    weight_MN, scale = _rows(task.weight), task.scale.contiguous()
    zero = None if task.zero is None else task.zero.contiguous()
    inputs, outputs = _side(task.inputs, task.shape[1]), _side(task.outputs, task.shape[0])
    _entry_point("walk")(
        _matrix(weight_MN),
        plan,
        _format(task.format),
        array(scale),
        _zeros(zero),
        SideStruct(*map(array, inputs)),
        SideStruct(*map(array, outputs)),
        torch.get_num_threads(),
        array(codes_MN),
        array(losses),
    )
    loss, nearest_loss, part = losses.tolist()
    return Walked(codes_MN.view(task.format.dtype), loss, nearest_loss / part, part)


def fits_cache(weight_MN: Tensor, granularity: Granularity) -> bool:
    """Whether every group fits a processor's cache, so that it can be searched there."""
    return _plan(weight_MN, granularity)[1] == 1


def _search_in_cache(task: Task) -> SearchResult:
    """The search of every group by itself, coarse to fine: the same bits as step by step."""
    plan, _ = _plan(task.weight, task.granularity)
    grid = task.granularity.grid(task.shape)
    groups = grid[0] * grid[1]
    scale_G = torch.empty(groups, dtype=torch.float32, device=_CPU)
    alpha_G = torch.empty(groups, dtype=torch.float64, device=_CPU)
    sides = 2 if task.reader_dtype is None else 3
    counts = torch.empty(6, sides, groups // task.pool, dtype=torch.int64, device=_CPU)
    totals = torch.empty(4, sides, groups // task.pool, dtype=torch.float64, device=_CPU)
    codes_MN = torch.empty(task.shape, dtype=torch.uint8, device=_CPU)
    zero_G = torch.empty(groups, dtype=torch.int8, device=_CPU) if task.format.zero_point else None
    weight_MN, base_MN = _rows(task.weight), _rows(task.base)
    coarse_K, steps_K = coarse(task.search), fine_steps(task.search)
    if task.own_grid:
        coarse_K, steps_K = neighbour_steps(task.search, task.scale_format).double(), steps_K[:0]
    stages = SearchStruct(
        metric=METRICS.index(task.search.metric),
        scale_format=SCALE_FORMATS.index(task.scale_format),
        n_coarse=len(coarse_K),
        n_fine=len(steps_K),
        tau=task.search.tau,
        alpha_min=task.search.alpha_min,
        alpha_max=task.search.alpha_max,
        radius=task.search.radius,
        coarse=array(coarse_K),
        steps=array(steps_K),
        reader=_reader(task.reader_dtype),
        global_scale=1.0 if task.global_scale is None else float(task.global_scale),
        pool=task.pool,
    )
    found = FoundStruct(
        scale=array(scale_G),
        alpha=array(alpha_G),
        counts=array(counts),
        totals=array(totals),
        codes=array(codes_MN),
        zero=_zeros(zero_G),
    )
    _entry_point("search")(
        _matrix(weight_MN),
        _matrix(base_MN),
        plan,
        _format(task.format),
        stages,
        torch.get_num_threads(),
        found,
    )
    stats = [DeltaStats(*(field[side] for field in (*counts, *totals))) for side in range(sides)]
    return SearchResult(
        codes=codes_MN.view(task.format.dtype),
        scale=scale_G.reshape(grid),
        alpha=alpha_G.reshape(grid),
        stats=stats[0],
        absmax_stats=stats[1],
        dequantized_stats=None if task.reader_dtype is None else stats[2],
        global_scale=task.global_scale,
        zero=None if zero_G is None else zero_G.reshape(grid),
    )


def _plan(weight_MN: Tensor, granularity: Granularity) -> tuple[PlanStruct, int]:
    """How the library cuts the weight, and how many chunks a group has."""
    m, n = weight_MN.shape
    rows, cols = granularity.cell((m, n))
    rows, cols = min(rows, m), min(cols, n)  # blocks may be larger than the weight
    chunk_cols = min(cols, _CHUNK)
    chunk_rows = min(rows, max(1, _CHUNK // chunk_cols))
    plan = PlanStruct(m, n, rows, cols, chunk_rows, chunk_cols)
    return plan, -(-rows // chunk_rows) * -(-cols // chunk_cols)


def _rows(weight_MN: Tensor) -> Tensor:
    """The weight itself if its columns are adjacent, else a contiguous copy."""
    if weight_MN.data_ptr() % weight_MN.itemsize:  # memory-mapped from a file, after a tensor of odd size
        return weight_MN.clone(memory_format=torch.contiguous_format)
    return weight_MN if weight_MN.stride(1) == 1 else weight_MN.contiguous()


def _side(factor: Factor | None, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order, A and d; an empty A stands for the identity."""
    if factor is None:
        ones = torch.ones(size, dtype=torch.float64, device=_CPU)
        return torch.arange(size, dtype=torch.int64, device=_CPU), ones[:0].float(), ones
    return factor.order.contiguous(), factor.unit_upper.contiguous(), factor.diagonal.contiguous()


def _reader(dtype: torch.dtype | None) -> int:
    return _DTYPES[torch.float32 if dtype is None else dtype]


def _format(fmt: Format) -> FormatStruct:
    own = fmt.dtype.is_floating_point and torch.finfo(fmt.dtype).max == fmt.max
    storage = 0 if own else 1 if fmt.dtype.is_floating_point else 2  # a Storage in src/common.h
    more = int(fmt.zero_point)  # code - zero has a bit more
    normal, mantissa_bits = fmt.min_normal * 2**more, fmt.mantissa_bits + more
    return FormatStruct(fmt.max, fmt.low, fmt.reached, normal, mantissa_bits, storage)


def _zeros(zero: Tensor | None) -> Array:
    """Zero points, or none at all; the caller holds them."""
    return Array(None, 0) if zero is None else array(zero)


def _matrix(weight_MN: Tensor) -> MatrixStruct:
    size = weight_MN.untyped_storage().nbytes() - weight_MN.storage_offset() * weight_MN.itemsize
    return MatrixStruct(weight_MN.data_ptr(), _DTYPES[weight_MN.dtype], weight_MN.stride(0), size)


@functools.cache
def _entry_point(name: str) -> Callable[..., None]:
    integer = ctypes.c_int64
    of_weight, of_both = [MatrixStruct, PlanStruct], [MatrixStruct, MatrixStruct, PlanStruct]
    arguments = {
        "unit_upper": [Array, Array, integer, integer, integer, Array, Array],
        "walk": [*of_weight, FormatStruct, Array, Array, SideStruct, SideStruct, integer, Array, Array],
        "absmax": [*of_weight, integer, Array],
        "quantize": [*of_weight, FormatStruct, Array, Array, integer, Array],
        "delta_stats": [*of_both, FormatStruct, Array, Array, integer, integer, integer, Array, Array],
        "search": [*of_both, FormatStruct, SearchStruct, integer, FoundStruct],
    }
    return entry_point(name, arguments[name])
