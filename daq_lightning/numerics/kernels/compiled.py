"""The same sums through `torch.compile`: one fused loop for C++ and for CUDA alike, from one function of tensors.

Tiles ``[T, 1, E]`` are broadcast against their scales ``[T, K, 1]`` and reduced over E. Sums are additive, so a weight
of any shape and granularity is cut into tiles of at most 2,048 elements, and all sizes are dynamic: one compile serves
every layer, granularity and number of candidates (on a CPU every dtype too, since tiles arrive in float32).

Counts of a tile are exact in float32 up to 2^24, so two of them travel in one sum: lost + 4096 * both_zero.

All sums stay the same if weight and base change sign together; so tiles hold |w| and sign(w) * base, and rounding sees
no negative values. On a CPU it is float arithmetic alone, which vectorizes where a cast to float8 does not:

    saturation   x - relu(x - 448)
    rounding     c = max(x, 2^-6) * (2^20 + 1), c - (c - x)

The latter is Veltkamp's splitting, which keeps 4 significant bits, and below 2^-6 the multiples of 2^-9. The maximum is
taken as relu(x - 2^-6) + 2^-6, whose last bit may be wrong except where x is a tie: there it is exact, and so is c.
All of this equals `encode` for every float32 up to 2^20 (a test runs over all significands). CUDA uses the hardware's
cast.

Legend: M out, N in, G groups, E elements of a tile, T tiles, K candidates.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from daq_lightning.numerics.formats import FP8_E4M3, Granularity, PerChannel, PerTensor
from daq_lightning.numerics.kernels.eager import delta_stats_eager
from daq_lightning.numerics.objectives import DeltaStats
from daq_lightning.numerics.quantize import encode
from daq_lightning.numerics.tiling import group_sizes, patches, to_groups

_TILE = 2048
_LIFT = 2.0**60  # of products of differences, which keep their sign where one of them is tiny
_PACK = 4096.0  # above any count of a tile
_BAND = 1 << 17  # weights that are copied to float32 at a time, or 1/8 of the weight if that is more,
_CPU_BAND = 1 << 20  # on a CPU up to this many: they are used again while they are in its cache
_MAX, _MIN_NORMAL = FP8_E4M3.max, FP8_E4M3.min_normal  # plain numbers, which compile to constants
_SMALL, _LARGE = 2.0**-50, 2.0**25  # magnitudes whose products float32 holds; a patch with others goes to `eager`
_MAX_SCALED = 2.0**20  # of values over their scale, likewise


def delta_stats_compiled(weight_MN: Tensor, base_MN: Tensor, scale_GK: Tensor, granularity: Granularity) -> DeltaStats:
    """See `daq_lightning.numerics.kernels.delta_stats`; needs a compiler that `torch.compile` can use."""
    if isinstance(granularity, PerTensor):  # rows that happen to share a scale
        stats_MK = delta_stats_compiled(weight_MN, base_MN, scale_GK.expand(weight_MN.shape[0], -1), PerChannel())
        return stats_MK.map(lambda field: field.sum(0, keepdim=True))
    shape_MN = (weight_MN.shape[0], weight_MN.shape[1])
    groups, candidates = scale_GK.shape
    pieces, cuts = [], []
    share = weight_MN.numel() // 8
    band = max(_BAND, min(share, _CPU_BAND) if weight_MN.device.type == "cpu" else share)
    for patch, span in patches(shape_MN, granularity, band):
        pieces.append(_patch_sums(weight_MN[patch], base_MN[patch], scale_GK[span], granularity))
        cuts.append((patch, span))
    fits, *sums = (torch.cat(parts) for parts in zip(*pieces, strict=True))

    def per_group(sum_T: Tensor) -> Tensor:
        return sum_T.reshape(groups, -1, *sum_T.shape[1:]).sum(1, dtype=torch.float64).reshape(groups, -1)

    changed_T, delta_sq_T, preserved_TK, packed_TK, dot_TK, delta_q_sq_TK, error_sq_TK = sums
    both_zero_TK = torch.floor(packed_TK / _PACK)
    lost = per_group(packed_TK - _PACK * both_zero_TK)
    changed, preserved, both_zero = per_group(changed_T), per_group(preserved_TK), per_group(both_zero_TK)
    n = group_sizes(shape_MN, granularity, weight_MN.device)[:, None]
    filled = changed_T.numel() // groups * _tile_size(granularity, shape_MN) - n  # zeros over zeros
    counts = (n, changed, preserved + both_zero - filled, preserved, changed - preserved - lost, lost)
    dot, delta_sq = per_group(dot_TK) / _LIFT, per_group(delta_sq_T)
    totals = (dot, delta_sq, per_group(delta_q_sq_TK), per_group(error_sq_TK))
    fields = [field.expand(-1, candidates) for field in (*(count.long() for count in counts), *totals)]
    stats = DeltaStats(*fields)  # pyright: ignore[reportCallIssue]
    for (patch, span), fine in zip(cuts, fits.tolist(), strict=True):
        if not fine:
            exact = delta_stats_eager(weight_MN[patch], base_MN[patch], scale_GK[span], granularity)
            stats = stats.map(torch.Tensor.clone)
            for field, values in zip(stats, exact, strict=True):
                field[span] = values
    return stats


def _patch_sums(weight_MN: Tensor, base_MN: Tensor, scale_GK: Tensor, granularity: Granularity) -> tuple[Tensor, ...]:
    """Whether float32 can hold the products of a patch, and the sums of its tiles."""
    candidates = scale_GK.shape[1]
    size = _tile_size(granularity, (weight_MN.shape[0], weight_MN.shape[1]))
    weight_TE, base_TE = (_tiles(tensor, granularity, size) for tensor in _align(weight_MN, base_MN))
    tiles = weight_TE.shape[0]
    scale_TK = scale_GK.repeat_interleave(tiles // scale_GK.shape[0], 0)
    rows, columns = max(2, tiles), max(2, candidates)  # sizes 0 and 1 are never dynamic
    scale_TK = _fill(scale_TK, rows, columns, 1.0)
    reciprocal_TK = scale_TK.reciprocal()
    weight_TE, base_TE = (_fill(tensor, rows, tensor.shape[1]) for tensor in (weight_TE, base_TE))
    of_tiles, of_candidates = _run(weight_TE, base_TE, scale_TK, reciprocal_TK)

    changed_T, delta_sq_T, smallest_T, largest_T = of_tiles
    low, high = scale_GK.aminmax()
    fits = (torch.minimum(smallest_T.min(), low) > _SMALL) & (torch.maximum(largest_T.max(), high) < _LARGE)
    fits &= (largest_T * reciprocal_TK.amax(1)).max() < _MAX_SCALED
    sums_TK = (sum_TK[:tiles, :candidates] for sum_TK in of_candidates)
    return fits[None], changed_T[:tiles], delta_sq_T[:tiles], *sums_TK


def _align(weight: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """``|w|`` and ``sign(w) * b``, by moving sign bits."""
    if weight.dtype != base.dtype:
        weight, base = weight.float(), base.float()
    bits = torch.int16 if weight.itemsize == 2 else torch.int32
    sign = weight.view(bits) & torch.iinfo(bits).min
    return (weight.view(bits) ^ sign).view(weight.dtype), (base.view(bits) ^ sign).view(base.dtype)


def _tile_size(granularity: Granularity, shape_MN: tuple[int, int]) -> int:
    elements = math.prod(granularity.cell(shape_MN))
    return max(2, -(-elements // -(-elements // _TILE)))


def _tiles(weight_MN: Tensor, granularity: Granularity, size: int) -> Tensor:
    """Cuts groups into tiles of equal size, filled up with zeros; float32 on a CPU and for float16."""
    as_float = weight_MN.device.type == "cpu" or weight_MN.dtype == torch.float16
    groups_GE = to_groups(weight_MN, granularity, torch.float32 if as_float else weight_MN.dtype)
    groups, elements = groups_GE.shape
    return _fill(groups_GE, groups, -(-elements // size) * size).reshape(-1, size).contiguous()


def _fill(tensor: Tensor, rows: int, columns: int, value: float = 0.0) -> Tensor:
    more_rows, more_columns = rows - tensor.shape[0], columns - tensor.shape[1]
    return pad(tensor, (0, more_columns, 0, more_rows), value=value) if more_rows or more_columns else tensor


_Outputs = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


def _run(*tensors: Tensor) -> _Outputs:
    # the modes that a compiled function is specialized to are fixed here, whatever the caller has set
    device = tensors[0].device.type
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        return _compiled(device)(*(tensor.clone() if tensor.is_inference() else tensor for tensor in tensors))


@functools.cache
def _compiled(device: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], _Outputs]:
    rounding = round_by_arithmetic if device == "cpu" else _round_by_cast
    # never write [T, K, E] to memory, however often it is read; and on a GPU do not fuse products into differences:
    # q - b must be 0 where q == b
    options: dict[str, str | int | bool | Callable[..., object]] = {
        "realize_opcount_threshold": 1000,
        "realize_reads_threshold": 1000,
        "realize_acc_reads_threshold": 1000,
        "emulate_precision_casts": device != "cpu",
        "cpp.dynamic_threads": True,  # else the number of threads at the first compile is cached on disk
    }
    tile_sums = functools.partial(_tile_sums, rounding)
    function: Callable[..., _Outputs] = torch.compile(tile_sums, dynamic=True, fullgraph=True, options=options)
    # the first call decides: sizes that differ stay independent of each other, so do separate tensors
    weight, base = (torch.zeros(256, 1000, dtype=torch.float32, device=device) for _ in range(2))
    scale, reciprocal = (torch.ones(256, 12, dtype=torch.float32, device=device) for _ in range(2))
    function(weight, base, scale, reciprocal)
    return function


def _tile_sums(
    rounding: Callable[[Tensor], Tensor], weight_TE: Tensor, base_TE: Tensor, scale_TK: Tensor, reciprocal_TK: Tensor
) -> _Outputs:
    w, b = weight_TE.float(), base_TE.float()
    delta = w - b
    size, changed = delta.abs(), (w != b)
    of_tiles = (
        torch.where(changed, 1.0, 0.0).sum(-1),
        (delta * delta).sum(-1),
        torch.where(changed, size, torch.inf).amin(-1),
        torch.maximum(size, w.abs()).amax(-1),
    )
    w, b = w[:, None, :], b[:, None, :]
    q = rounding(w * reciprocal_TK[:, :, None]) * scale_TK[:, :, None]
    delta, delta_q, error = w - b, q - b, q - w
    product = delta * _LIFT * delta_q
    preserved = torch.where(product > 0, 1.0, 0.0)
    lost_or_zero = torch.where(delta_q == 0, torch.where(delta == 0, _PACK, 1.0), 0.0)
    summands = (preserved, lost_or_zero, product, delta_q * delta_q, error * error)
    return of_tiles, tuple(summand.sum(-1) for summand in summands)


def round_by_arithmetic(scaled: Tensor) -> Tensor:
    """`encode`, then back to float32, for values from 0 to 2^20."""
    scaled = scaled - torch.relu(scaled - _MAX)
    shifted = (torch.relu(scaled - _MIN_NORMAL) + _MIN_NORMAL) * (2.0**20 + 1)
    return shifted - (shifted - scaled)


def _round_by_cast(scaled: Tensor) -> Tensor:
    return encode(scaled).float()
