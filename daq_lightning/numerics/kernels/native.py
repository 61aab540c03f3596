"""The CPU kernels by hand, in C++: built once per machine with the compiler found there.

| source | what it does in one pass over a weight |
| --- | --- |
| native.cpp | the sums of given candidates; absmax; codes; fingerprints |
| search.cpp | a whole search, group after group in the cache |
| exact.cpp | the exact search |

The library knows nothing of Python or torch, so it builds in seconds and runs without the interpreter's lock.

Built libraries are kept in the user's cache folder under a name that hashes the source, the flags and everything that
the compiler predefines for this processor: another compiler version or another machine on a shared home builds its own.

Legend: M out, N in, G groups, C chunks of a group, K candidates.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from daq_lightning.numerics.candidates import ScaleSearch, SearchResult
from daq_lightning.numerics.formats import FP8_E4M3, Granularity, ScaleFormat
from daq_lightning.numerics.objectives import METRICS, DeltaStats

_CHUNK = 1 << 15  # elements of a unit of work
_COMPILERS = ("c++", "g++", "clang++")
# no -ffast-math: rounding relies on (x + m) - m being evaluated as written, and sums must see a base that is NaN
_FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fopenmp-simd", "-ffp-contract=off"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffinite-math-only", "-fno-signed-zeros"),
)
_CPU_FLAGS = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SCALE_FORMATS = get_args(ScaleFormat)  # numbered as in search.cpp


class CompilerMissingError(RuntimeError):
    """No C++ compiler on this machine can build the kernel."""


class _Matrix(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("dtype", ctypes.c_int64), ("stride", ctypes.c_int64))


class _Plan(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ["m", "n", "cell_rows", "cell_cols", "chunk_rows", "chunk_cols"]
    )


class _Search(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ["metric", "scale_format", "n_coarse", "coarse_stride", "n_fine"]),
        *((name, ctypes.c_double) for name in ["tau", "alpha_min", "alpha_max", "radius"]),
        *((name, ctypes.c_void_p) for name in ["coarse", "steps"]),
    )


class _Found(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ["scale", "alpha", "counts", "totals", "codes"])


def delta_stats_native(weight_MN: Tensor, base_MN: Tensor, scale_GK: Tensor, granularity: Granularity) -> DeltaStats:
    """See `daq_lightning.numerics.kernels.delta_stats`.

    Raises:
        CompilerMissingError: The kernel cannot be built here.
    """
    plan, chunks = _plan(weight_MN, granularity)
    groups, candidates = scale_GK.shape
    counts = torch.empty(6, groups, chunks, candidates, dtype=torch.int64)
    totals = torch.empty(4, groups, chunks, candidates, dtype=torch.float64)
    weight_MN, base_MN, scale_GK = _rows(weight_MN), _rows(base_MN), scale_GK.contiguous()
    _library().daq_delta_stats(
        *(_matrix(weight_MN), _matrix(base_MN), plan),
        *(scale_GK.data_ptr(), candidates, torch.get_num_threads(), counts.data_ptr(), totals.data_ptr()),
    )
    fields = [field.sum(1) if chunks > 1 else field[:, 0] for field in (*counts, *totals)]
    return DeltaStats(*fields)


def absmax_native(weight_MN: Tensor, granularity: Granularity) -> Tensor:
    """Largest magnitude of each group: float32, shape of the granularity's grid; NaN or Inf where it has one."""
    plan, chunks = _plan(weight_MN, granularity)
    grid = granularity.grid((weight_MN.shape[0], weight_MN.shape[1]))
    absmax_GC = torch.empty(grid[0] * grid[1], chunks)
    weight_MN = _rows(weight_MN)
    _library().daq_absmax(_matrix(weight_MN), plan, torch.get_num_threads(), absmax_GC.data_ptr())
    return absmax_GC.amax(1).reshape(grid)


def quantize_native(weight_MN: Tensor, scale: Tensor, granularity: Granularity) -> Tensor:
    """The codes of `daq_lightning.numerics.quantize.quantize`, bit for bit, for finite weights."""
    plan, _ = _plan(weight_MN, granularity)
    codes_MN = torch.empty(weight_MN.shape, dtype=torch.uint8)
    weight_MN, scale = _rows(weight_MN), scale.contiguous()
    _library().daq_quantize(*(_matrix(weight_MN), plan, scale.data_ptr(), torch.get_num_threads(), codes_MN.data_ptr()))
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
    scale_G, alpha_G = torch.empty(groups), torch.empty(groups, dtype=torch.float64)
    counts = torch.zeros(6, 2, groups, dtype=torch.int64)
    totals = torch.zeros(4, 2, groups, dtype=torch.float64)
    codes_MN = torch.empty(shape_MN, dtype=torch.uint8)
    weight_MN, base_MN, coarse = _rows(weight_MN), _rows(base_MN), coarse.contiguous()
    steps = torch.linspace(0, 1, search.n_fine, dtype=torch.float64)
    stages = _Search(
        *(METRICS.index(search.metric), _SCALE_FORMATS.index(scale_format)),
        *(coarse.shape[-1], coarse.shape[-1] if coarse.ndim == 2 else 0, search.n_fine),
        *(search.tau, search.alpha_min, search.alpha_max, search.radius, coarse.data_ptr(), steps.data_ptr()),
    )
    found = _Found(*(tensor.data_ptr() for tensor in (scale_G, alpha_G, counts, totals, codes_MN)))
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
    best_G, promise_G = torch.empty_like(scale_G), torch.empty(scale_G.shape, dtype=torch.float64)
    weight_MN, base_MN, scale_G = _rows(weight_MN), _rows(base_MN), scale_G.contiguous()
    _library().daq_exact(
        *(_matrix(weight_MN), _matrix(base_MN), plan, scale_G.data_ptr(), *objective, int(eight_bits)),
        *(torch.get_num_threads(), best_G.data_ptr(), promise_G.data_ptr()),
    )
    return best_G, promise_G


def fold_words(words: Tensor, odd: Tensor) -> Tensor:
    """One sum ``(word ^ (word >> 32)) * odd`` modulo 2^64 for each row of as many words as there are odd numbers.

    Args:
        words: int64, contiguous; the last row may be shorter.
        odd: int64.
    """
    sums = torch.empty(-(-words.numel() // odd.numel()), dtype=torch.int64)
    _library().daq_fold(words.data_ptr(), words.numel(), odd.data_ptr(), odd.numel(), sums.data_ptr())
    return sums


def why_not() -> str | None:
    """None if the kernel is built or can be built here (some seconds, once per machine), else the reason."""
    try:
        _library()
    except CompilerMissingError as reason:
        return str(reason)
    return None


def _plan(weight_MN: Tensor, granularity: Granularity) -> tuple[_Plan, int]:
    """How the library cuts the weight, and how many chunks a group has."""
    m, n = weight_MN.shape
    rows, cols = granularity.cell((m, n))
    chunk_cols = min(cols, _CHUNK)
    chunk_rows = min(rows, max(1, _CHUNK // chunk_cols))
    return _Plan(m, n, rows, cols, chunk_rows, chunk_cols), -(-rows // chunk_rows) * -(-cols // chunk_cols)


def _rows(weight_MN: Tensor) -> Tensor:
    """The weight itself if its columns are adjacent, else a contiguous copy."""
    return weight_MN if weight_MN.stride(1) == 1 else weight_MN.contiguous()


def _matrix(weight_MN: Tensor) -> _Matrix:
    return _Matrix(weight_MN.data_ptr(), _DTYPES[weight_MN.dtype], weight_MN.stride(0))


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_build()))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.daq_delta_stats.argtypes = [_Matrix, _Matrix, _Plan, pointer, integer, integer, pointer, pointer]
    library.daq_absmax.argtypes = [_Matrix, _Plan, integer, pointer]
    library.daq_quantize.argtypes = [_Matrix, _Plan, pointer, integer, pointer]
    library.daq_exact.argtypes = [
        *(_Matrix, _Matrix, _Plan, pointer, integer, ctypes.c_double, integer, integer, pointer, pointer)
    ]
    library.daq_search.argtypes = [_Matrix, _Matrix, _Plan, _Search, integer, _Found]
    library.daq_fold.argtypes = [pointer, integer, pointer, integer, pointer]
    for name in ("delta_stats", "absmax", "quantize", "exact", "search", "fold"):
        getattr(library, f"daq_{name}").restype = None
    return library


@functools.cache
def _build() -> Path:
    """Path of the library for this processor, built if it is not there yet."""
    headers = [Path(__file__).with_name(name) for name in ("native.h", "sums.h")]
    sources = [Path(__file__).with_name(name) for name in ("native.cpp", "search.cpp", "exact.cpp")]
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else list(_COMPILERS)
    compilers = [path for path in map(shutil.which, wanted) if path]
    if not compilers:
        raise CompilerMissingError(f"No C++ compiler found (looked for {', '.join(wanted)}); install one or set CXX.")
    errors = []
    for compiler in compilers:
        for cpu_flags in _CPU_FLAGS:
            command = [compiler, *_FLAGS, *cpu_flags]
            processor = subprocess.run([*command, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True)
            if processor.returncode:
                errors.append(processor.stderr)
                continue
            texts = (path.read_bytes() for path in (*headers, *sources))
            key = hashlib.sha256(b"".join([*texts, *map(os.fsencode, command), processor.stdout]))
            library = _cache_folder() / f"native_{key.hexdigest()[:24]}.so"
            if library.exists():
                return library
            # built beside its place and renamed: processes that build at the same time never see half a file
            handle, unfinished = tempfile.mkstemp(dir=library.parent, suffix=".tmp")
            os.close(handle)
            built = subprocess.run([*command, *map(str, sources), "-o", unfinished], capture_output=True)
            if not built.returncode:
                os.replace(unfinished, library)
                return library
            errors.append(built.stderr)
            os.unlink(unfinished)
    raise CompilerMissingError(
        f"{compilers[0]} cannot build {sources[0]}: {errors[-1].decode(errors='replace')[-500:]}"
    )


def _cache_folder() -> Path:
    """The user's cache folder, or one of this process where that cannot be written."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "daq_lightning"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="daq_lightning_"))
