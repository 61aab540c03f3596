"""The scale search: which multiple of the absmax scale keeps the update best?

    scale(alpha) = round_scale(alpha * absmax_scale)
    alpha*       = argmax score(sums of (weight, base, scale(alpha)))         over a coarse, then a fine grid

The incumbent is alpha = 1 and gives way only to a strictly better candidate, so the result is never worse
than plain absmax quantization on the objective. Among equally good candidates the nearest to 1 wins. Where
the update is all zero there is no evidence and alpha stays 1. Scores are taken from the very codes and scales
that are returned.

Source: arXiv 2603.22324, Algorithm 1.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from daq_lightning.numerics.backends import Backend, choose
from daq_lightning.numerics.formats import Format, Granularity, PerTensor, ScaleFormat
from daq_lightning.numerics.formats.fp8 import FP8_E4M3
from daq_lightning.numerics.objectives import DeltaStats
from daq_lightning.numerics.scales import check_scale_format, global_scale_of
from daq_lightning.numerics.search.checks import check_inputs, check_settings, not_finite
from daq_lightning.numerics.search.settings import ScaleSearch
from daq_lightning.numerics.search.stages import SearchResult, Task

_LARGE = 1 << 20  # elements of a weight that gains nothing by being copied into a stack
_POOL = 1 << 14  # elements whose sums are added up, at most


@torch.no_grad()
def search_scale(
    weight: Tensor,
    base: Tensor,
    granularity: Granularity,
    search: ScaleSearch | None = None,
    *,
    scale_format: ScaleFormat = "float32",
    name: str = "weight",
    fmt: Format = FP8_E4M3,
    backend: Backend | None = None,
    reader_dtype: torch.dtype | None = None,
    global_scale: Tensor | None = None,
) -> SearchResult:
    """Finds the scale of each group that preserves the update best, and quantizes with it.

    Args:
        weight: Fine-tuned weight, float32, bfloat16 or float16, shape (M, N), on any device.
        base: The weight before fine-tuning, same shape and device.
        granularity: `PerBlock`, `PerChannel` or `PerTensor`.
        search: Objective and candidates; None takes the defaults of `ScaleSearch`.
        scale_format: What scales are rounded to before they are scored.
        name: How error messages call the weight.
        fmt: The format of the codes.
        backend: A module of `daq_lightning.numerics.backends`; None takes the fastest for the weight's
            device.
        reader_dtype: torch.bfloat16 or torch.float16 to have the sums of a reader that rounds code * scale to
            it as well (`SearchResult.dequantized_stats`); it does not change what is found.
        global_scale: For scales in E4M3, float32 of shape (1,), a power of two, for weights that a reader
            fuses; None takes `global_scale_of` this one.

    Returns:
        `SearchResult` on the weight's device.

    Raises:
        ValueError: Not two matrices of one shape on one device, NaN or Inf in one of them, or an unknown
            scale format or reader.
        TypeError: No dense tensors, a dtype other than the three, or something else than a granularity or a
            search.

    Source: arXiv 2603.22324, Algorithm 1.

    Example:
        >>> from daq_lightning.numerics.formats import PerChannel
        >>> from daq_lightning.numerics.objectives import score
        >>> base = torch.linspace(-1, 1, 64).reshape(8, 8)
        >>> weight = base + 0.01 * base.sin()
        >>> result = search_scale(weight, base, PerChannel(), ScaleSearch(metric="cosine"))
        >>> bool((score(result.stats, "cosine") >= score(result.absmax_stats, "cosine")).all())
        True
    """
    return _search(
        weight,
        base,
        granularity,
        ScaleSearch() if search is None else search,
        scale_format=scale_format,
        name=name,
        fmt=fmt,
        backend=backend,
        reader_dtype=reader_dtype,
        global_scale=global_scale,
    )


@torch.no_grad()
def _search(
    weight: Tensor,
    base: Tensor,
    granularity: Granularity,
    search: ScaleSearch,
    *,
    scale_format: ScaleFormat,
    name: str,
    fmt: Format,
    backend: Backend | None = None,
    reader_dtype: torch.dtype | None,
    global_scale: Tensor | None,
    pool: int = 1,
) -> SearchResult:
    check_inputs(weight, base, name)
    check_settings(granularity, search)
    check_scale_format(scale_format)
    if reader_dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"reader_dtype must be torch.bfloat16, torch.float16 or None, got {reader_dtype}.")
    backend = backend or choose(weight.device)
    if scale_format != "e4m3":
        global_scale = None
    elif global_scale is None:
        global_scale = _global_scale([weight], backend, fmt)
    task = Task(
        weight=weight,
        base=base,
        granularity=granularity,
        search=search,
        format=fmt,
        scale_format=scale_format,
        reader_dtype=reader_dtype,
        global_scale=global_scale,
        pool=pool,
    )
    result = backend.search(task)
    if not bool(result.scale.isfinite().all()):
        raise ValueError(not_finite(weight, name))
    sums = result.stats
    if not bool((sums.dot + sums.delta_sq + sums.delta_q_sq + sums.error_sq).isfinite().all()):
        raise ValueError(not_finite(base, f"the base of {name}"))
    return result


def search_batch(
    weights: Sequence[Tensor],
    bases: Sequence[Tensor],
    granularity: Granularity,
    search: ScaleSearch | None = None,
    *,
    scale_format: ScaleFormat = "float32",
    names: Sequence[str],
    fmt: Format = FP8_E4M3,
    reader_dtype: torch.dtype | None = None,
    per_group: bool = True,
) -> list[SearchResult]:
    """`search_scale` for several weights of one shape at once, such as the many small experts of a layer.

    Groups are searched independently of each other, so small weights may be stacked row upon row wherever no
    group crosses the seam, and one call serves them all. Where it would, they are searched one by one, as
    large ones are. Scales in E4M3 share one global scale, as readers that fuse the weights take it.

    Args:
        weights: Matrices of one shape (M, N), dtype and device.
        bases: Their bases.
        granularity: As for `search_scale`.
        search: As for `search_scale`.
        scale_format: As for `search_scale`.
        names: How error messages call them.
        fmt: The format of the codes.
        reader_dtype: As for `search_scale`.
        per_group: Whether sums are wanted of each group; of small ones they take more memory than the weight.
            If not, those of neighbours come added up.

    Returns:
        The results of as many single calls.

    Raises:
        ValueError: As `search_scale`, with the name of the weight.
    """
    search = ScaleSearch() if search is None else search
    shape_MN = (weights[0].shape[0], weights[0].shape[1])
    seamless = (
        len(weights) > 1
        and weights[0].numel() < _LARGE
        and search.alpha_scope == "group"
        and not isinstance(granularity, PerTensor)
        and shape_MN[0] % granularity.cell(shape_MN)[0] == 0
        and all(tensor.shape == weights[0].shape for tensor in (*weights, *bases))
        and len({tensor.dtype for tensor in weights}) == len({tensor.dtype for tensor in bases}) == 1
    )
    global_scale = None
    if scale_format == "e4m3":
        global_scale = _global_scale(weights, choose(weights[0].device), fmt)
    found = functools.partial(
        _search,
        granularity=granularity,
        search=search,
        scale_format=scale_format,
        fmt=fmt,
        reader_dtype=reader_dtype,
        global_scale=global_scale,
    )
    if seamless:
        with contextlib.suppress(ValueError):  # one of them is not finite: the single searches say which
            pool = 1 if per_group else _pool(weights[0], granularity)
            stacked = found(torch.cat(list(weights)), torch.cat(list(bases)), name="weights", pool=pool)
            return _unstack(stacked, len(weights))
    return [
        found(weight, base, name=name, pool=1 if per_group else _pool(weight, granularity))
        for weight, base, name in zip(weights, bases, names, strict=True)
    ]


def _pool(weight: Tensor, granularity: Granularity) -> int:
    """How many neighbouring groups have about _POOL elements; none of another weight in a stack."""
    if weight.ndim != 2 or weight.numel() == 0:
        return 1  # refused
    shape_MN = (weight.shape[0], weight.shape[1])
    rows, cols = granularity.cell(shape_MN)
    most = max(1, _POOL // (rows * cols))
    return math.gcd(math.prod(granularity.grid(shape_MN)), 1 << (most.bit_length() - 1))


def _global_scale(weights: Sequence[Tensor], backend: Backend, fmt: Format) -> Tensor:
    largest = torch.cat([backend.absmax(weight, PerTensor()) for weight in weights])
    return global_scale_of(2 * largest if fmt.zero_point else largest, fmt)  # a range may be twice as large


def _unstack(result: SearchResult, count: int) -> list[SearchResult]:
    codes, scales, alphas = (tensor.chunk(count) for tensor in (result.codes, result.scale, result.alpha))

    def part(stats: DeltaStats, i: int) -> DeltaStats:
        return stats.map(lambda field: field.chunk(count)[i])

    return [
        SearchResult(
            codes=codes[i],
            scale=scales[i],
            alpha=alphas[i],
            stats=part(result.stats, i),
            absmax_stats=part(result.absmax_stats, i),
            dequantized_stats=None if result.dequantized_stats is None else part(result.dequantized_stats, i),
            zero=None if result.zero is None else result.zero.chunk(count)[i],
            global_scale=result.global_scale,
        )
        for i in range(count)
    ]
