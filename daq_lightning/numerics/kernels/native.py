"""The CPU kernels by hand, in C++, as functions of tensors.

| source | what it does in one pass over a weight |
| --- | --- |
| native.cpp | the sums of given candidates; absmax; codes; fingerprints |
| search.cpp | a whole search, group after group in the cache |
| exact.cpp | the exact search |

C++ writes where it is told to: every buffer made here states its dtype and device, whatever torch's defaults are, and
is handed over with its size, which the library checks before it writes.

Legend: M out, N in, G groups, C chunks of a group, K candidates.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from daq_lightning.numerics.candidates import ScaleSearch, SearchResult
from daq_lightning.numerics.formats import FP8_E4M3, SCALE_FORMATS, Granularity, ScaleFormat
from daq_lightning.numerics.kernels import library
from daq_lightning.numerics.objectives import METRICS, DeltaStats

_CHUNK = 1 << 15  # elements of a unit of work
_CPU = torch.device("cpu")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Array(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_int64))


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
    )


class _Plan(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ["m", "n", "cell_rows", "cell_cols", "chunk_rows", "chunk_cols"]
    )


class _Search(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ["metric", "scale_format", "n_coarse", "coarse_stride", "n_fine"]),
        *((name, ctypes.c_double) for name in ["tau", "alpha_min", "alpha_max", "radius"]),
        *((name, _Array) for name in ["coarse", "steps"]),
    )


class _Found(ctypes.Structure):
    _fields_ = tuple((name, _Array) for name in ["scale", "alpha", "counts", "totals", "codes"])


def delta_stats_native(weight_MN: Tensor, base_MN: Tensor, scale_GK: Tensor, granularity: Granularity) -> DeltaStats:
    """See `daq_lightning.numerics.kernels.delta_stats`.

    Raises:
        LibraryMissingError: The kernel cannot be built here.
    """
    plan, chunks = _plan(weight_MN, granularity)
    groups, candidates = scale_GK.shape
    counts = torch.empty(6, groups, chunks, candidates, dtype=torch.int64, device=_CPU)
    totals = torch.empty(4, groups, chunks, candidates, dtype=torch.float64, device=_CPU)
    weight_MN, base_MN, scale_GK = _rows(weight_MN), _rows(base_MN), scale_GK.contiguous()
    _library().daq_delta_stats(
        _matrix(weight_MN),
        _matrix(base_MN),
        plan,
        _array(scale_GK),
        candidates,
        torch.get_num_threads(),
        _array(counts),
        _array(totals),
    )
    fields = [field.sum(1) if chunks > 1 else field[:, 0] for field in (*counts, *totals)]
    return DeltaStats(*fields)


def absmax_native(weight_MN: Tensor, granularity: Granularity) -> Tensor:
    """Largest magnitude of each group: float32, shape of the granularity's grid; NaN or Inf where it has one."""
    plan, chunks = _plan(weight_MN, granularity)
    grid = granularity.grid((weight_MN.shape[0], weight_MN.shape[1]))
    absmax_GC = torch.empty(grid[0] * grid[1], chunks, dtype=torch.float32, device=_CPU)
    weight_MN = _rows(weight_MN)
    _library().daq_absmax(_matrix(weight_MN), plan, torch.get_num_threads(), _array(absmax_GC))
    return absmax_GC.amax(1).reshape(grid)


def quantize_native(weight_MN: Tensor, scale: Tensor, granularity: Granularity) -> Tensor:
    """The codes of `daq_lightning.numerics.quantize.quantize`, bit for bit, for finite weights."""
    plan, _ = _plan(weight_MN, granularity)
    codes_MN = torch.empty(weight_MN.shape, dtype=torch.uint8, device=_CPU)
    weight_MN, scale = _rows(weight_MN), scale.contiguous()
    _library().daq_quantize(_matrix(weight_MN), plan, _array(scale), torch.get_num_threads(), _array(codes_MN))
    return codes_MN.view(FP8_E4M3.dtype)


def fits_cache(weight_MN: Tensor, granularity: Granularity) -> bool:
    """Whether `search_native` can search this weight: its groups have to fit a processor's cache."""
    return _plan(weight_MN, granularity)[1] == 1


def search_native(
    weight_MN: Tensor,
    base_MN: Tensor,
    granularity: Granularity,
    search: ScaleSearch,
    *,
    coarse: Tensor,
    scale_format: ScaleFormat,
) -> SearchResult:
    """The search of every group by itself, coarse to fine: the same bits as step by step in `search_scale`.

    Args:
        weight_MN: float32, bfloat16 or float16, shape (M, N), on the CPU.
        base_MN: Of the same shape.
        granularity: Which elements share a scale; see `fits_cache`.
        search: The objective and the fine stage.
        coarse: float64 candidates of the coarse stage, shape (K,) or (G, K).
        scale_format: What scales are rounded to.

    Returns:
        Scales are NaN or infinite where a group holds NaN or infinity.
    """
    plan, _ = _plan(weight_MN, granularity)
    shape_MN = (weight_MN.shape[0], weight_MN.shape[1])
    grid = granularity.grid(shape_MN)
    groups = grid[0] * grid[1]
    scale_G = torch.empty(groups, dtype=torch.float32, device=_CPU)
    alpha_G = torch.empty(groups, dtype=torch.float64, device=_CPU)
    counts = torch.zeros(6, 2, groups, dtype=torch.int64, device=_CPU)
    totals = torch.zeros(4, 2, groups, dtype=torch.float64, device=_CPU)
    codes_MN = torch.empty(shape_MN, dtype=torch.uint8, device=_CPU)
    weight_MN, base_MN, coarse = _rows(weight_MN), _rows(base_MN), coarse.contiguous()
    steps = torch.linspace(0, 1, search.n_fine, dtype=torch.float64, device=_CPU)
    stages = _Search(
        metric=METRICS.index(search.metric),
        scale_format=SCALE_FORMATS.index(scale_format),  # numbered as in search.cpp
        n_coarse=coarse.shape[-1],
        coarse_stride=coarse.shape[-1] if coarse.ndim == 2 else 0,
        n_fine=search.n_fine,
        tau=search.tau,
        alpha_min=search.alpha_min,
        alpha_max=search.alpha_max,
        radius=search.radius,
        coarse=_array(coarse),
        steps=_array(steps),
    )
    found = _Found(
        scale=_array(scale_G),
        alpha=_array(alpha_G),
        counts=_array(counts),
        totals=_array(totals),
        codes=_array(codes_MN),
    )
    _library().daq_search(_matrix(weight_MN), _matrix(base_MN), plan, stages, torch.get_num_threads(), found)
    stats, absmax_stats = (DeltaStats(*(field[which] for field in (*counts, *totals))) for which in (0, 1))
    return SearchResult(
        codes=codes_MN.view(FP8_E4M3.dtype),
        scale=scale_G.reshape(grid),
        alpha=alpha_G.reshape(grid),
        stats=stats,
        absmax_stats=absmax_stats,
    )


def exact_native(
    weight_MN: Tensor,
    base_MN: Tensor,
    scale_G: Tensor,
    granularity: Granularity,
    objective: tuple[int, float],
    eight_bits: bool,
) -> tuple[Tensor, Tensor]:
    """See `daq_lightning.numerics.exact.best_scale`; the objective is its number there and tau."""
    plan, _ = _plan(weight_MN, granularity)
    weight_MN, base_MN, scale_G = _rows(weight_MN), _rows(base_MN), scale_G.contiguous()
    best_G = torch.empty(scale_G.shape, dtype=torch.float32, device=_CPU)
    promise_G = torch.empty(scale_G.shape, dtype=torch.float64, device=_CPU)
    metric, tau = objective
    _library().daq_exact(
        _matrix(weight_MN),
        _matrix(base_MN),
        plan,
        _array(scale_G),
        metric,
        tau,
        int(eight_bits),
        torch.get_num_threads(),
        _array(best_G),
        _array(promise_G),
    )
    return best_G, promise_G


def fold_words(words: Tensor, odd: Tensor) -> Tensor:
    """One sum ``(word ^ (word >> 32)) * odd`` modulo 2^64 for each row of as many words as there are odd numbers.

    Args:
        words: int64, contiguous; the last row may be shorter.
        odd: int64.
    """
    sums = torch.empty(-(-words.numel() // odd.numel()), dtype=torch.int64, device=_CPU)
    _library().daq_fold(_array(words), words.numel(), _array(odd), odd.numel(), _array(sums))
    return sums


def _plan(weight_MN: Tensor, granularity: Granularity) -> tuple[_Plan, int]:
    """How the library cuts the weight, and how many chunks a group has."""
    m, n = weight_MN.shape
    rows, cols = granularity.cell((m, n))
    rows, cols = min(rows, m), min(cols, n)  # blocks may be larger than the weight
    chunk_cols = min(cols, _CHUNK)
    chunk_rows = min(rows, max(1, _CHUNK // chunk_cols))
    return _Plan(m, n, rows, cols, chunk_rows, chunk_cols), -(-rows // chunk_rows) * -(-cols // chunk_cols)


def _rows(weight_MN: Tensor) -> Tensor:
    """The weight itself if its columns are adjacent, else a contiguous copy."""
    if weight_MN.data_ptr() % weight_MN.itemsize:  # memory-mapped from a file, after a tensor of odd size
        return weight_MN.clone(memory_format=torch.contiguous_format)
    return weight_MN if weight_MN.stride(1) == 1 else weight_MN.contiguous()


def _matrix(weight_MN: Tensor) -> _Matrix:
    size = weight_MN.untyped_storage().nbytes() - weight_MN.storage_offset() * weight_MN.itemsize
    return _Matrix(weight_MN.data_ptr(), _DTYPES[weight_MN.dtype], weight_MN.stride(0), size)


def _array(tensor: Tensor) -> _Array:
    """Where a contiguous tensor lies, and how long it is: 0 bytes at no place if the processor cannot reach it."""
    reachable = tensor.device.type == "cpu" and tensor.is_contiguous()
    return _Array(tensor.data_ptr(), tensor.nbytes) if reachable else _Array(None, 0)


@functools.cache
def _library() -> ctypes.CDLL:
    loaded = library.library()
    integer = ctypes.c_int64
    arguments = {
        "delta_stats": [_Matrix, _Matrix, _Plan, _Array, integer, integer, _Array, _Array],
        "absmax": [_Matrix, _Plan, integer, _Array],
        "quantize": [_Matrix, _Plan, _Array, integer, _Array],
        "exact": [
            *(_Matrix, _Matrix, _Plan, _Array, integer, ctypes.c_double, integer, integer, _Array, _Array),
        ],
        "search": [_Matrix, _Matrix, _Plan, _Search, integer, _Found],
        "fold": [_Array, integer, _Array, integer, _Array],
    }
    for name, types in arguments.items():
        function = getattr(loaded, f"daq_{name}")
        function.argtypes, function.restype, function.errcheck = types, ctypes.c_char_p, _raise_problem
    return loaded


def _raise_problem(problem: bytes | None, function: Any, _: tuple[object, ...]) -> None:
    """Every entry point returns what is wrong with its arguments, or null."""
    if problem == b"out of memory":
        raise MemoryError(f"{function.__name__}: out of memory")
    if problem is not None:
        raise RuntimeError(f"{function.__name__} refused its arguments: {problem.decode()}. Please report this.")
