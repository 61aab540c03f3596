"""The same sums through `torch.compile`: one fused loop for C++ and for CUDA alike, from one function of tensors.

Tiles ``[T, 1, E]`` are broadcast against their scales ``[T, K, 1]`` and reduced over E. Sums are additive, so a weight
of any shape and granularity is cut into tiles of at most 2,048 elements, and all sizes are dynamic: one compile serves
every layer, granularity and number of candidates (on a CPU every dtype too, since tiles arrive in float32).

Counts of a tile are exact in float32 up to 2^24, so two of them travel in one sum: lost + 4096 * both_zero.

Rounding is float arithmetic alone on a CPU, where it vectorizes and a cast to float8 does not:

    |x| >= 2^-6     Veltkamp's splitting: c = x * (2^20 + 1), hi = c - (c - x)      keeps 4 significant bits
    |x| <  2^-6     (x + 1.5 * 2^14) - 1.5 * 2^14                                   the even grid of step 2^-9

Both equal `encode` for every float32 (a test runs over all significands). CUDA uses the hardware's cast.

Legend: M out, N in, G groups, E elements of a tile, T tiles, K candidates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from daq_lightning.numerics.formats import FP8_E4M3, Granularity, PerChannel, PerTensor
from daq_lightning.numerics.kernels.eager import delta_stats_eager
from daq_lightning.numerics.objectives import DeltaStats
from daq_lightning.numerics.quantize import encode
from daq_lightning.numerics.tiling import bands, group_sizes, to_groups

_TILE = 2048
_PACK = 4096.0  # above any count of a tile
_BAND = 1 << 17  # weights that are copied to float32 at a time; on a GPU 1/32 of the weight if that is more
_MAX, _MIN_NORMAL = FP8_E4M3.max, FP8_E4M3.min_normal  # plain numbers, which compile to constants
_SMALL, _LARGE = 2.0**-50, 2.0**50  # magnitudes whose products float32 holds; a band with others goes to `eager`


def delta_stats_compiled(weight_MN: Tensor, base_MN: Tensor, scale_GK: Tensor, granularity: Granularity) -> DeltaStats:
    """See `daq_lightning.numerics.kernels.delta_stats`; needs a compiler that `torch.compile` can use."""
    if isinstance(granularity, PerTensor):  # rows that happen to share a scale
        stats_MK = delta_stats_compiled(weight_MN, base_MN, scale_GK.expand(weight_MN.shape[0], -1), PerChannel())
        return stats_MK.map(lambda field: field.sum(0, keepdim=True))
    shape_MN = (weight_MN.shape[0], weight_MN.shape[1])
    band = _BAND if weight_MN.device.type == "cpu" else max(_BAND, weight_MN.numel() // 32)
    parts, start = [], 0
    for rows in bands(shape_MN, granularity, band):
        grid_rows, grid_cols = granularity.grid((rows.stop - rows.start, shape_MN[1]))
        stop = start + grid_rows * grid_cols
        parts.append(_band_stats(weight_MN[rows], base_MN[rows], scale_GK[start:stop], granularity))
        start = stop
    return DeltaStats(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def _band_stats(weight_MN: Tensor, base_MN: Tensor, scale_GK: Tensor, granularity: Granularity) -> DeltaStats:
    groups, candidates = scale_GK.shape
    weight_TE, base_TE = (_tiles(to_groups(tensor, granularity)) for tensor in (weight_MN, base_MN))
    tiles = weight_TE.shape[0] // groups
    scale_TK = scale_GK.repeat_interleave(tiles, 0)
    more_T, more_K = max(0, 2 - groups * tiles), max(0, 2 - candidates)  # sizes 0 and 1 are never dynamic
    weight_TE, base_TE = (pad(tensor, (0, 0, 0, more_T)) for tensor in (weight_TE, base_TE))
    scale_TK = pad(scale_TK, (0, more_K, 0, more_T), value=1.0)
    of_tiles, of_candidates = _run(weight_TE, base_TE, scale_TK)

    changed_T, delta_sq_T, smallest_T, largest_T = of_tiles
    low, high = scale_GK.aminmax()
    fits = (torch.minimum(smallest_T.min(), low) > _SMALL) & (torch.maximum(largest_T.max(), high) < _LARGE)
    if not bool(fits):
        return delta_stats_eager(weight_MN, base_MN, scale_GK, granularity)

    def per_group(sum_TK: Tensor) -> Tensor:
        return sum_TK[: groups * tiles, :candidates].double().reshape(groups, tiles, -1).sum(1).expand(-1, candidates)

    changed, delta_sq = per_group(changed_T[:, None]), per_group(delta_sq_T[:, None])
    preserved_TK, packed_TK, dot_TK, delta_q_sq_TK, error_sq_TK = of_candidates
    both_zero_TK = torch.floor(packed_TK / _PACK)
    preserved, both_zero = per_group(preserved_TK), per_group(both_zero_TK)
    lost = per_group(packed_TK - _PACK * both_zero_TK)
    shape_MN = (weight_MN.shape[0], weight_MN.shape[1])
    n = group_sizes(shape_MN, granularity, weight_MN.device)[:, None].expand(-1, candidates)
    filled = tiles * weight_TE.shape[1] - n  # zeros over zeros
    counts = (n, changed, preserved + both_zero - filled, preserved, changed - preserved - lost, lost)
    totals = (per_group(dot_TK), delta_sq, per_group(delta_q_sq_TK), per_group(error_sq_TK))
    return DeltaStats(*[count.long() for count in counts], *totals)  # pyright: ignore[reportCallIssue]


def _tiles(groups_GE: Tensor) -> Tensor:
    """Cuts groups into tiles of equal size, filled up with zeros; float32 on a CPU and for float16."""
    elements = groups_GE.shape[1]
    tiles = -(-elements // _TILE)
    size = max(2, -(-elements // tiles))
    if groups_GE.device.type == "cpu" or groups_GE.dtype == torch.float16:
        groups_GE = groups_GE.float()
    return pad(groups_GE, (0, tiles * size - elements)).reshape(-1, size).contiguous()


_Outputs = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


def _run(weight_TE: Tensor, base_TE: Tensor, scale_TK: Tensor) -> _Outputs:
    # the modes that a compiled function is specialized to are fixed here, whatever the caller has set
    device = weight_TE.device.type
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        tensors = [tensor.clone() if tensor.is_inference() else tensor for tensor in (weight_TE, base_TE, scale_TK)]
        weight_TE, base_TE, scale_TK = tensors
        return _compiled(device)(weight_TE, base_TE, scale_TK, scale_TK.reciprocal())


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
    }
    tile_sums = functools.partial(_tile_sums, rounding)
    function: Callable[..., _Outputs] = torch.compile(tile_sums, dynamic=True, fullgraph=True, options=options)
    # The first call decides: sizes that differ stay independent of each other, so do separate tensors, and a loop is
    # shared among threads only if it looks long.
    weight, base = torch.zeros(256, 1000, device=device), torch.zeros(256, 1000, device=device)
    function(weight, base, torch.ones(256, 12, device=device), torch.ones(256, 12, device=device))
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
    scaled = (w * reciprocal_TK[:, :, None]).clamp(-_MAX, _MAX)
    q = rounding(scaled) * scale_TK[:, :, None]
    delta, delta_q, error = w - b, q - b, q - w
    up, down = torch.where(w > b, 1.0, 0.0), torch.where(w < b, 1.0, 0.0)
    preserved = torch.where(q > b, up, torch.where(q < b, down, 0.0))
    lost_or_zero = torch.where(q == b, torch.where(w == b, _PACK, 1.0), 0.0)
    summands = (preserved, lost_or_zero, delta * delta_q, delta_q * delta_q, error * error)
    return of_tiles, tuple(summand.sum(-1) for summand in summands)


def round_by_arithmetic(scaled: Tensor) -> Tensor:
    """`encode`, then back to float32, for values within the range of the format."""
    shifted = scaled * (2.0**20 + 1)
    normal = shifted - (shifted - scaled)
    subnormal = (scaled + 1.5 * 2.0**14) - 1.5 * 2.0**14
    return torch.where(scaled.abs() < _MIN_NORMAL, subnormal, normal)


def _round_by_cast(scaled: Tensor) -> Tensor:
    return encode(scaled).float()
