"""The CUDA backend: a kernel in Triton whose programs hold a tile in registers and try all candidates on it.

    x = clamp(w * (1 / s), -max, max),  q = round(x) * s      the hardware's cast, or else arithmetic
    q rounded once more                                       for a reader in 16 bit
    counts and products of w - b, q - b and q - w             in float32 within a tile, float64 across tiles

A program is one warp with a tile of 1,024 elements, so sums never leave the warp. Tiles are cut from the
weight in place, without a copy; offsets are 64 bits wide. Triton is imported with this module and nowhere
else. What is not measured against all candidates (absmax, codes) is left to torch.

The reciprocals of the scales are computed by torch, as in `quantize`; a division in Triton need not round
correctly.

Legend: M out, N in, G groups, T tiles of a group, K candidates.
"""

from __future__ import annotations

import math
import os

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from daq_lightning.numerics.backends import reference
from daq_lightning.numerics.formats import Format, Granularity
from daq_lightning.numerics.objectives import DeltaStats
from daq_lightning.numerics.quantize import absmax, quantize
from daq_lightning.numerics.rounding import blocked, triangular
from daq_lightning.numerics.search.stages import Kernels, SearchResult, Task, search_in_steps
from daq_lightning.numerics.tiling import group_sizes

_TILE = 1024  # elements: 32 of weight and 32 of base in the registers of each thread
_OUTPUTS = 1 << 24  # tiles times candidates whose sums are held at a time, 24 bytes each
# magnitudes whose products float32 holds; a weight with others goes to `reference`
_SMALL, _LARGE = 2.0**-50, 2.0**50
# the interpreter and older devices have no float8 cast that rounds as the hardware's does
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


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
) -> DeltaStats:
    """See `daq_lightning.numerics.backends.delta_stats`."""
    m, n = weight_MN.shape
    rows, cols = granularity.cell((m, n))
    tile_cols = min(triton.next_power_of_2(cols), _TILE)
    tile_rows = _TILE // tile_cols
    tiles_across, tiles_down = triton.cdiv(cols, tile_cols), triton.cdiv(rows, tile_rows)
    tiles, (groups, candidates) = tiles_across * tiles_down, scale_GK.shape
    weight_MN, base_MN = (x if x.stride(1) == 1 else x.contiguous() for x in (weight_MN, base_MN))
    scale_GK = scale_GK.contiguous()
    reciprocal_GK = scale_GK.reciprocal()
    sizes_G = group_sizes((m, n), granularity, weight_MN.device)
    parts = []
    step = max(1, _OUTPUTS // (tiles * candidates))
    for first in range(0, groups, step):
        count = min(step, groups - first)
        counts = weight_MN.new_empty(3, count, tiles, candidates, dtype=torch.int32)
        totals = weight_MN.new_empty(3, count, tiles, candidates, dtype=torch.float32)
        of_tiles = weight_MN.new_empty(4, count, tiles, dtype=torch.float32)
        _kernel[(count * tiles,)](  # pyright: ignore[reportIndexIssue]
            weight_MN,
            base_MN,
            scale_GK,
            reciprocal_GK,
            counts,
            totals,
            of_tiles,
            m,
            n,
            weight_MN.stride(0),
            base_MN.stride(0),
            first,
            count,
            candidates,
            rows,
            cols,
            triton.cdiv(n, cols),
            tiles_across,
            tiles,
            TILE_ROWS=tile_rows,
            TILE_COLS=tile_cols,
            MAX=fmt.max,
            MIN_NORMAL=math.frexp(fmt.min_normal)[1] - 1 + 127,  # its biased exponent in float32
            MANTISSA_BITS=fmt.mantissa_bits,
            HARDWARE_CAST=fmt.dtype_name == "float8_e4m3fn" and _hardware_cast(weight_MN.device),
            READER="" if reader_dtype is None else str(reader_dtype),
            num_warps=1,  # pyright: ignore[reportCallIssue]
            enable_fp_fusion=False,  # pyright: ignore[reportCallIssue]  (q - b is 0 exactly where q == b)
        )
        changed_GT, delta_sq_GT, smallest_GT, largest_GT = of_tiles
        low, high = scale_GK[first : first + count].aminmax()
        fits = (torch.minimum(smallest_GT.min(), low) > _SMALL) & (
            torch.maximum(largest_GT.max(), high) < _LARGE
        )
        if not bool(fits):
            return reference.delta_stats(weight_MN, base_MN, scale_GK, granularity, fmt, reader_dtype)
        preserved, lost, both_zero = counts.sum(2, dtype=torch.int64)
        dot, delta_q_sq, error_sq = totals.sum(2, dtype=torch.float64)
        changed = changed_GT.sum(1, dtype=torch.float64).long()[:, None].expand(count, candidates)
        delta_sq = delta_sq_GT.sum(1, dtype=torch.float64)[:, None].expand(count, candidates)
        sizes = sizes_G[first : first + count, None].expand(count, candidates)
        filled = tiles * tile_rows * tile_cols - sizes  # zeros over zeros
        parts.append(
            DeltaStats(
                n=sizes,
                n_changed=changed,
                sign_equal=preserved + both_zero - filled,
                preserved=preserved,
                flipped=changed - preserved - lost,
                lost=lost,
                dot=dot,
                delta_sq=delta_sq,
                delta_q_sq=delta_q_sq,
                error_sq=error_sq,
            )
        )
    return DeltaStats(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def _hardware_cast(device: torch.device) -> bool:
    return not _INTERPRETED and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def _round(x, MIN_NORMAL: tl.constexpr, MANTISSA_BITS: tl.constexpr, HARDWARE_CAST: tl.constexpr):
    """Nearest value of the format, ties to even, of values within its range."""
    if HARDWARE_CAST:
        return x.to(tl.float8e4nv).to(tl.float32)
    # adding 1.5 * 2^(e + 23 - bits), where 2^e is the binade of x (at least that of the smallest normal
    # number), leaves no bits below 2^(e - bits)
    binade = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, MIN_NORMAL << 23)
    magic = (binade + (((23 - MANTISSA_BITS) << 23) | (1 << 22))).to(tl.float32, bitcast=True)
    return (x + magic) - magic


@triton.jit
def _read(q, READER: tl.constexpr):
    """What a reader in 16 bit makes of code * scale: nearest, ties to even. See `read_as` in src/sums.h."""
    if READER == "torch.bfloat16":
        bits = q.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    if READER == "torch.float16":
        q = tl.minimum(tl.maximum(q, -65536.0), 65536.0)
        rounded = _round(q, 127 - 14, 10, False)  # pyright: ignore[reportArgumentType]
        return tl.where(tl.abs(rounded) == 65536.0, rounded * float("inf"), rounded)
    return q


@triton.jit(do_not_specialize=["first_group", "count", "candidates"])
def _kernel(
    weight, base, scale, reciprocal, counts, totals, of_tiles,
    m, n, weight_stride, base_stride, first_group, count,
    candidates, rows, cols, grid_cols, tiles_across, tiles,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
    MAX: tl.constexpr, MIN_NORMAL: tl.constexpr, MANTISSA_BITS: tl.constexpr, HARDWARE_CAST: tl.constexpr,
    READER: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    group = first_group + program // tiles
    tile = program % tiles
    # within the cell, and within the weight: the rest is filled with zeros
    cell_row = tile // tiles_across * TILE_ROWS + tl.arange(0, TILE_ROWS).to(tl.int64)
    cell_col = tile % tiles_across * TILE_COLS + tl.arange(0, TILE_COLS).to(tl.int64)
    row = group // grid_cols * rows + cell_row
    col = group % grid_cols * cols + cell_col
    inside = ((cell_row < rows) & (row < m))[:, None] & ((cell_col < cols) & (col < n))[None, :]
    w = tl.load(weight + row[:, None] * weight_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(base + row[:, None] * base_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    w = tl.reshape(w, (TILE_ROWS * TILE_COLS,))
    b = tl.reshape(b, (TILE_ROWS * TILE_COLS,))
    delta = w - b
    up = w > b
    down = w < b
    changed = up | down
    field = count.to(tl.int64) * tiles
    tl.store(of_tiles + program, tl.sum(changed.to(tl.float32), 0))
    tl.store(of_tiles + field + program, tl.sum(delta * delta, 0))
    tl.store(of_tiles + 2 * field + program, tl.min(tl.where(changed, tl.abs(delta), float("inf")), 0))
    tl.store(of_tiles + 3 * field + program, tl.max(tl.maximum(tl.abs(delta), tl.abs(w)), 0))

    field = field * candidates
    for k in range(candidates):
        s = tl.load(scale + group * candidates + k)
        r = tl.load(reciprocal + group * candidates + k)
        x = tl.minimum(tl.maximum(w * r, -MAX), MAX)
        q = _read(_round(x, MIN_NORMAL, MANTISSA_BITS, HARDWARE_CAST) * s, READER)
        delta_q = q - b
        error = q - w
        # three counts of up to 1,024 in two sums of 32 bits
        above = q > b
        equal = q == b
        preserved = tl.where(above, up.to(tl.int32), tl.where(equal, 0, down.to(tl.int32)))
        lost = tl.where(equal, tl.where(changed, 1, 65536), 0)
        packed = tl.sum(lost, 0)
        out = program * candidates + k
        tl.store(counts + out, tl.sum(preserved, 0))
        tl.store(counts + field + out, packed & 65535)  # pyright: ignore[reportOperatorIssue]
        tl.store(counts + 2 * field + out, packed >> 16)  # pyright: ignore[reportOperatorIssue]
        tl.store(totals + out, tl.sum(delta * delta_q, 0))
        tl.store(totals + field + out, tl.sum(delta_q * delta_q, 0))
        tl.store(totals + 2 * field + out, tl.sum(error * error, 0))
