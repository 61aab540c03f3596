"""What the CUDA kernels share: tiles of a weight, rounding to the grid of a format, and the sums of a region.

    x = clamp(w * (1 / s), low, max),  q = round(x) * s       the hardware's conversion, or else arithmetic
    q rounded once more                                       for a reader in 16 bit
    counts and products of w - b, q - b and q - w             in float32 within a region

A region is a group, or a chunk of one, of at most 2^15 elements; a program owns it, and goes over it in tiles
of eight elements a thread. It is small enough for the caches, so every pass but the first reads from there.
Each of these eight has its own running sums, which are added up as a tree after the last tile: a sum over the
16,384 elements of a block goes through 8 + 8 + 8 additions.

Rounding is `quantize`'s to the last bit. The hardware converts to nearest even, subnormals included, and what
saturates was clamped before. Divisions are `div_rn`: "/" of float32 in Triton is not correctly rounded.

Legend: M out, N in, G groups, C chunks of a group, K candidates.

Source: PTX ISA, cvt.rn.satfinite.e4m3x2.f32 (devices of capability 8.9 and up).
"""

from __future__ import annotations

# types in a kernel are Triton's, not Python's
# pyright: reportMissingImports=false, reportArgumentType=false, reportAttributeAccessIssue=false
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from daq_lightning.numerics.formats import Format

LAUNCH = {
    "enable_fp_fusion": False,  # q - b is 0 exactly where q == b
    "maxnreg": 128,  # so that a processor runs two programs of 256 threads, and one waits while one computes
}


@dataclass(frozen=True)
class Grid:
    """What the kernels know of a format."""

    max: float
    low: float
    reach: float
    min_normal: int  # the biased exponent in float32 of the smallest normal number
    mantissa_bits: int
    hardware: bool  # whether the device converts to it
    storage: str  # of codes: "own" floating point format, "e4m3", or "integer"

    @classmethod
    def of(cls, fmt: Format, capability: tuple[int, int]) -> Grid:
        """For a device of this compute capability; (0, 0) stands for the interpreter."""
        exponent = math.frexp(fmt.min_normal)[1] - 1
        storage = "integer"
        if fmt.dtype.is_floating_point:
            storage = "own" if torch.finfo(fmt.dtype).max == fmt.max else "e4m3"
        hardware = fmt.dtype_name == "float8_e4m3fn" and storage == "own" and capability >= (8, 9)
        return cls(fmt.max, fmt.low, fmt.reached, exponent + 127, fmt.mantissa_bits, hardware, storage)


@triton.jit
def saturate(x, GRID: tl.constexpr):
    return tl.minimum(tl.maximum(x, GRID.low), GRID.max)


@triton.jit
def magic_bits(x, MIN_NORMAL: tl.constexpr, MANTISSA_BITS: tl.constexpr):
    """Bits of 1.5 * 2^(e + 23 - bits), where 2^e is the binade of x, or at least the smallest normal number.

    In their sum with x no bits are left below 2^(e - bits): it is rounded to nearest, ties to even.
    """
    binade = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, MIN_NORMAL << 23)
    return binade + (((23 - MANTISSA_BITS) << 23) | (1 << 22))


@triton.jit
def round_to_grid(x, GRID: tl.constexpr):
    """Nearest value of the format, ties to even, of values within its range."""
    if GRID.hardware:
        return x.to(tl.float8e4nv).to(tl.float32)
    magic = magic_bits(x, GRID.min_normal, GRID.mantissa_bits).to(tl.float32, bitcast=True)
    return (x + magic) - magic


@triton.jit
def encode(x, GRID: tl.constexpr):
    """The code of the nearest value: the integer; or the sign, and steps of 2^(e - bits) on top of the codes
    below the binade. Of a coarser format the value is one of E4M3, with bits as in float32."""
    if GRID.storage == "integer":
        return round_to_grid(x, GRID).to(tl.int32).to(tl.uint8)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    if GRID.storage == "e4m3":
        bits = tl.abs(round_to_grid(x, GRID)).to(tl.int32, bitcast=True)
        return (tl.where(bits == 0, 0, (bits >> 20) - 960) | sign).to(tl.uint8)
    magic = magic_bits(x, GRID.min_normal, GRID.mantissa_bits)
    steps = (tl.abs(x) + magic.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True) - magic
    lowest = (GRID.min_normal << 23) + (((23 - GRID.mantissa_bits) << 23) | (1 << 22))
    below = (magic - lowest) >> (23 - GRID.mantissa_bits)
    return (below + steps | sign).to(tl.uint8)


@triton.jit
def read_as(q, READER: tl.constexpr):
    """What a reader in 16 bit makes of code * scale: nearest, ties to even. See `read_as` in src/sums.h."""
    if READER == "torch.bfloat16":
        bits = q.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    if READER == "torch.float16":
        q = tl.minimum(tl.maximum(q, -65536.0), 65536.0)
        magic = magic_bits(q, 127 - 14, 10).to(tl.float32, bitcast=True)
        rounded = (q + magic) - magic
        return tl.where(tl.abs(rounded) == 65536.0, rounded * float("inf"), rounded)
    return q


@triton.jit
def region_of(
    program, m, n, rows, cols, chunk_rows, chunk_cols, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Where the region of a program lies, and into how many tiles it is cut."""
    across = tl.cdiv(cols, chunk_cols)
    chunks = across * tl.cdiv(rows, chunk_rows)
    group = program // chunks
    chunk = program % chunks
    grid_cols = tl.cdiv(n, cols)
    cell_top = group // grid_cols * rows
    cell_left = group % grid_cols * cols
    top = cell_top + chunk // across * chunk_rows
    left = cell_left + chunk % across * chunk_cols
    bottom = tl.minimum(tl.minimum(top + chunk_rows, cell_top + rows), m)
    tiles_across = tl.cdiv(chunk_cols, COLS)
    tiles = tiles_across * tl.cdiv(chunk_rows, ROWS)
    return top, left, bottom, cell_left + cols, n, tiles_across, tiles


@triton.jit
def places(region, tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows and columns of a tile, and which of its elements are in the region."""
    top, left, bottom, right, n, across, _ = region
    row = top + tile // across * ROWS + tl.arange(0, ROWS)[:, None]
    col = left + tile % across * COLS + tl.arange(0, COLS)[None, :]
    # not min(right, n): what is known of each, such as being a multiple of 16, lets loads be joined
    return row, col, (row < bottom) & (col < right) & (col < n)


@triton.jit
def load(matrix, stride, row, col, inside):
    """A tile in float32, with zeros beyond the region."""
    return tl.load(matrix + row * stride + col, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def fixed_sums(weight, base, weight_stride, base_stride, region, ROWS: tl.constexpr, COLS: tl.constexpr):
    """What no scale changes: how many elements changed, sum of delta^2; and, as bits, which order like sizes,
    the largest |w|, the largest |delta| and the smallest that is not 0."""
    changed = tl.zeros((ROWS, COLS), tl.int32)
    delta_sq = tl.zeros((ROWS, COLS), tl.float32)
    high = tl.zeros((ROWS, COLS), tl.int32)
    largest = tl.zeros((ROWS, COLS), tl.int32)
    smallest = tl.full((ROWS, COLS), 0x7F800000, tl.int32)
    for tile in range(region[6]):
        row, col, inside = places(region, tile, ROWS, COLS)
        w = load(weight, weight_stride, row, col, inside)
        b = load(base, base_stride, row, col, inside)
        delta = w - b
        size = delta.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        changed += (w != b).to(tl.int32)
        delta_sq += delta * delta
        high = tl.maximum(high, w.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        largest = tl.maximum(largest, size)
        smallest = tl.minimum(smallest, tl.where(w != b, size, 0x7F800000))
    return tl.sum(changed), tl.sum(delta_sq), tl.max(high), tl.max(largest), tl.min(smallest)


@triton.jit
def scaled_sums(
    weight, base, weight_stride, base_stride, region, scale,
    WANTED: tl.constexpr, READER: tl.constexpr, GRID: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Sums under a scale, or those among them that an objective needs: counts of equal signs, preserved and
    lost, then dot, delta_q^2 and error^2. Those that are not wanted are left as tiles of zeros."""
    COUNTS: tl.constexpr = WANTED == "all" or WANTED == "sign"
    DIRECTION: tl.constexpr = WANTED == "all" or WANTED == "cosine" or WANTED == "hybrid"
    ERROR: tl.constexpr = WANTED == "all" or WANTED == "mse"
    equal = tl.zeros((ROWS, COLS), tl.int32)
    preserved = tl.zeros((ROWS, COLS), tl.int32)
    lost = tl.zeros((ROWS, COLS), tl.int32)
    dot = tl.zeros((ROWS, COLS), tl.float32)
    delta_q_sq = tl.zeros((ROWS, COLS), tl.float32)
    error_sq = tl.zeros((ROWS, COLS), tl.float32)
    reciprocal = tl.math.div_rn(1.0, scale)
    for tile in range(region[6]):
        row, col, inside = places(region, tile, ROWS, COLS)
        w = load(weight, weight_stride, row, col, inside)
        b = load(base, base_stride, row, col, inside)
        q = read_as(round_to_grid(saturate(w * reciprocal, GRID), GRID) * scale, READER)
        if COUNTS:  # compared, not subtracted, as in `objectives.sums`
            same = inside & ((q > b) == (w > b)) & ((q < b) == (w < b))
            equal += same.to(tl.int32)
            preserved += (same & (w != b)).to(tl.int32)
            lost += ((q == b) & (w != b)).to(tl.int32)
        if DIRECTION:
            dot += (w - b) * (q - b)
            delta_q_sq += (q - b) * (q - b)
        if ERROR:
            error_sq += (q - w) * (q - w)
    if COUNTS:
        equal = tl.sum(equal)
        preserved = tl.sum(preserved)
        lost = tl.sum(lost)
    if DIRECTION:
        dot = tl.sum(dot)
        delta_q_sq = tl.sum(delta_q_sq)
    if ERROR:
        error_sq = tl.sum(error_sq)
    return equal, preserved, lost, dot, delta_q_sq, error_sq


@triton.jit
def store_sums(counts, totals, field, sums):
    """Three counts and three totals, each field so many places after the one before."""
    tl.store(counts, sums[0])
    tl.store(counts + field, sums[1])
    tl.store(counts + 2 * field, sums[2])
    tl.store(totals, sums[3])
    tl.store(totals + field, sums[4])
    tl.store(totals + 2 * field, sums[5])


@triton.jit
def store_fixed(changed, of_regions, field, n_changed, delta_sq, smallest, largest):
    """Elements that changed; sum of delta^2, and between which magnitudes everything lies: by those the host
    sees whether products fit float32. NaN and infinity are the largest."""
    tl.store(changed, n_changed)
    tl.store(of_regions, delta_sq)
    tl.store(of_regions + field, smallest.to(tl.float32, bitcast=True))
    tl.store(of_regions + 2 * field, largest.to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["first", "candidates"])
def delta_stats_kernel(
    weight, base, weight_stride, base_stride, scale, counts, totals, changed, of_regions,
    m, n, rows, cols, chunk_rows, chunk_cols, first, candidates,
    READER: tl.constexpr, GRID: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Sums of every candidate: counts and totals (3, R, K), changed (R), of_regions (3, R); R regions from
    the first group on."""
    program = tl.program_id(0).to(tl.int64)
    regions = tl.num_programs(0).to(tl.int64)
    chunks = tl.cdiv(cols, chunk_cols) * tl.cdiv(rows, chunk_rows)
    at = first.to(tl.int64) * chunks + program
    region = region_of(at, m, n, rows, cols, chunk_rows, chunk_cols, ROWS, COLS)
    n_changed, delta_sq, high, largest, smallest = fixed_sums(
        weight, base, weight_stride, base_stride, region, ROWS, COLS
    )
    largest = tl.maximum(high, largest)
    store_fixed(changed + program, of_regions + program, regions, n_changed, delta_sq, smallest, largest)
    for k in range(candidates):
        s = tl.load(scale + at // chunks * candidates + k)
        sums = scaled_sums(
            weight, base, weight_stride, base_stride, region, s, "all", READER, GRID, ROWS, COLS
        )
        out = program * candidates + k
        store_sums(counts + out, totals + out, regions * candidates, sums)
