"""The search of a group in one kernel: absmax scale, coarse and fine candidates, sums of the winner, codes.

A program owns a group. It takes the steps of `daq_lightning.numerics.search.stages`, as the C++ library does:
weight and base come from memory once and from the cache afterwards, and nothing but the result is written.
Candidates get only the sums that their objective needs, in float32; scores and alphas are float64. Those of a
stage are kept side by side in registers, so that a stage decides once, for all its candidates.

Legend: M out, N in, G groups, K candidates of a stage.

Source: arXiv 2603.22324, Algorithm 1.
"""

from __future__ import annotations

# types in a kernel are Triton's, not Python's
# pyright: reportMissingImports=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false
import triton
import triton.language as tl

from daq_lightning.numerics.backends.cuda_sums import (
    encode,
    fixed_sums,
    load,
    magic_bits,
    places,
    region_of,
    saturate,
    scaled_sums,
    store_fixed,
    store_sums,
)


@triton.jit
def round_scale(scale, shared, SCALE_FORMAT: tl.constexpr):
    """See `daq_lightning.numerics.quantize.round_scale`; `shared` is the global scale."""
    scale = tl.maximum(scale, 2.0**-126)
    if SCALE_FORMAT == "e4m3":
        stored = tl.minimum(tl.maximum(scale * shared, 2.0**-9), 448.0)
        magic = magic_bits(stored, 127 - 6, 3).to(tl.float32, bitcast=True)
        return tl.math.div_rn((stored + magic) - magic, shared)
    bits = scale.to(tl.int32, bitcast=True)
    if SCALE_FORMAT == "bfloat16":
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    if SCALE_FORMAT == "ue8m0":
        bits = (bits + 0x7FFFFF) & 0x7F800000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def scaled(absmax_scale, alpha, shared, SCALE_FORMAT: tl.constexpr):
    return round_scale((absmax_scale.to(tl.float64) * alpha).to(tl.float32), shared, SCALE_FORMAT)


@triton.jit
def value_of(code):
    """Of a code of E4M3, in float64."""
    normal = ((code + 960) << 20).to(tl.float32, bitcast=True).to(tl.float64)
    return tl.where(code < 8, code.to(tl.float64) * 2.0**-9, normal)


@triton.jit
def neighbours(absmax_scale, steps_K, alpha_min, alpha_max, shared, SCALE_FORMAT: tl.constexpr):
    """See `daq_lightning.numerics.search.grid.neighbours`."""
    if SCALE_FORMAT == "ue8m0":
        alpha_K = ((steps_K.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        stored = absmax_scale * shared
        normal = (stored.to(tl.int32, bitcast=True) >> 20) - 960
        code = tl.where(stored < 2.0**-6, (stored * 512).to(tl.int32), normal)
        code_K = code + steps_K.to(tl.int32)
        alpha_K = value_of(tl.minimum(tl.maximum(code_K, 1), 126)) / value_of(code)
        alpha_K = tl.where((code_K >= 1) & (code_K <= 126), alpha_K, 1.0)
    return tl.where((alpha_K >= alpha_min) & (alpha_K <= alpha_max), alpha_K, 1.0)


@triton.jit
def score(first_K, second_K, delta_sq, tau, METRIC: tl.constexpr):
    """The objective up to what is equal for all candidates of a group in which something changed; see
    `daq_lightning.numerics.objectives.score`."""
    if METRIC == "sign":
        return first_K
    if METRIC == "mse":
        return -first_K
    if METRIC == "cosine":
        norms_K = tl.sqrt(delta_sq * second_K)
        return tl.where(norms_K > 0, tl.minimum(tl.maximum(first_K / norms_K, -1.0), 1.0), 0.0)
    rho_K = first_K / delta_sq
    return -((rho_K - 1) * (rho_K - 1) + tau * (second_K / delta_sq - rho_K * rho_K))


@triton.jit
def stage(
    weight, base, weight_stride, base_stride, region, alpha_K, scale_K, count, delta_sq, tau,
    METRIC: tl.constexpr, GRID: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The best score of a stage, and of equally good candidates the alpha nearest to 1."""
    place_K = tl.arange(0, K)
    first_K = tl.zeros((K,), tl.float64)
    second_K = tl.zeros((K,), tl.float64)
    for k in range(count):
        scale = tl.sum(tl.where(place_K == k, scale_K, 0.0))
        equal, _, _, dot, delta_q_sq, error_sq = scaled_sums(
            weight, base, weight_stride, base_stride, region, scale, METRIC, "", GRID, ROWS, COLS
        )
        if METRIC == "sign":
            first_K = tl.where(place_K == k, equal.to(tl.float64), first_K)
        elif METRIC == "mse":
            first_K = tl.where(place_K == k, error_sq.to(tl.float64), first_K)
        else:
            first_K = tl.where(place_K == k, dot.to(tl.float64), first_K)
            second_K = tl.where(place_K == k, delta_q_sq.to(tl.float64), second_K)
    score_K = score(first_K, second_K, delta_sq.to(tl.float64), tau, METRIC)
    score_K = tl.where(place_K < count, score_K, float("-inf"))
    best = tl.max(score_K)
    # of 1 - d and 1 + d the latter, which does not saturate
    distance_K = tl.abs(alpha_K - 1) + tl.where(alpha_K < 1, 1e-9, 0.0)
    winner = tl.argmin(tl.where(score_K == best, distance_K, float("inf")), 0)
    return best, tl.sum(tl.where(place_K == winner, alpha_K, 0.0))


@triton.jit(do_not_specialize=["n_coarse", "n_fine"])
def search_kernel(
    weight, base, weight_stride, base_stride, settings, scale_G, alpha_G, changed_G, of_groups,
    counts, totals, codes, m, n, rows, cols, n_coarse, n_fine,
    METRIC: tl.constexpr, SCALE_FORMAT: tl.constexpr, READER: tl.constexpr, GRID: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The whole search of a group.

    Settings are float64: tau, alpha_min, alpha_max, radius, 1, the coarse candidates, the fine steps (where
    scales have a grid of their own 0 and the steps of its candidates instead), the global scale of scales in
    E4M3. Counts and totals are (3, S, G): of the scale found, of absmax, of the scale as a reader sees it.
    of_groups (3, G) is `store_fixed`'s; scales count among its magnitudes.
    """
    group = tl.program_id(0).to(tl.int64)
    groups = tl.num_programs(0).to(tl.int64)
    region = region_of(group, m, n, rows, cols, rows, cols, ROWS, COLS)
    changed, delta_sq, high, largest, smallest = fixed_sums(
        weight, base, weight_stride, base_stride, region, ROWS, COLS
    )
    largest = tl.maximum(high, largest)
    high = high.to(tl.float32, bitcast=True)
    shared, one = 1.0, 1.0
    if SCALE_FORMAT == "e4m3":
        shared = tl.load(settings + 5 + n_coarse + n_fine).to(tl.float32)
        one = tl.math.div_rn(1.0, shared)
    plain = round_scale(tl.math.div_rn(high, GRID.reach), shared, SCALE_FORMAT)
    absmax_scale = tl.where(high == 0, one, plain)

    alpha = tl.full((), 1.0, tl.float64)
    if changed > 0:  # else there is no evidence
        tau = tl.load(settings)
        alpha_min = tl.load(settings + 1)
        alpha_max = tl.load(settings + 2)
        radius = tl.load(settings + 3)
        place_K = tl.arange(0, K)
        # the incumbent and the coarse candidates: it is the nearest to 1, so it yields only to a better one
        alpha_K = tl.load(settings + 4 + place_K, mask=place_K <= n_coarse, other=1.0)
        if SCALE_FORMAT == "ue8m0" or SCALE_FORMAT == "e4m3":
            alpha_K = neighbours(absmax_scale, alpha_K, alpha_min, alpha_max, shared, SCALE_FORMAT)
        scale_K = scaled(absmax_scale, alpha_K, shared, SCALE_FORMAT)
        best, alpha = stage(
            weight, base, weight_stride, base_stride, region, alpha_K, scale_K, n_coarse + 1, delta_sq, tau,
            METRIC, GRID, ROWS, COLS, K,
        )  # fmt: skip
        bits_K = scale_K.to(tl.int32, bitcast=True)
        smallest = tl.minimum(smallest, tl.min(bits_K))
        largest = tl.maximum(largest, tl.max(bits_K))
        low = tl.maximum(alpha - radius, alpha_min)
        span = tl.maximum(tl.minimum(alpha + radius, alpha_max), low) - low
        alpha_K = low + span * tl.load(settings + 5 + n_coarse + place_K, mask=place_K < n_fine, other=0.0)
        scale_K = scaled(absmax_scale, alpha_K, shared, SCALE_FORMAT)
        better, fine = stage(
            weight, base, weight_stride, base_stride, region, alpha_K, scale_K, n_fine, delta_sq, tau,
            METRIC, GRID, ROWS, COLS, K,
        )  # fmt: skip
        bits_K = scale_K.to(tl.int32, bitcast=True)
        smallest = tl.minimum(smallest, tl.min(bits_K))
        largest = tl.maximum(largest, tl.max(bits_K))
        alpha = tl.where(better > best, fine, alpha)
    scale = scaled(absmax_scale, alpha, shared, SCALE_FORMAT)
    smallest = tl.minimum(smallest, absmax_scale.to(tl.int32, bitcast=True))
    tl.store(scale_G + group, scale)
    tl.store(alpha_G + group, alpha)
    store_fixed(changed_G + group, of_groups + group, groups, changed, delta_sq, smallest, largest)

    found = scaled_sums(weight, base, weight_stride, base_stride, region, scale, "all", "", GRID, ROWS, COLS)
    sides: tl.constexpr = 2 if READER == "" else 3
    store_sums(counts + group, totals + group, sides * groups, found)
    of_plain = scaled_sums(
        weight, base, weight_stride, base_stride, region, absmax_scale, "all", "", GRID, ROWS, COLS
    )
    store_sums(counts + groups + group, totals + groups + group, sides * groups, of_plain)
    if READER != "":
        seen = scaled_sums(
            weight, base, weight_stride, base_stride, region, scale, "all", READER, GRID, ROWS, COLS
        )
        store_sums(counts + 2 * groups + group, totals + 2 * groups + group, sides * groups, seen)
    reciprocal = tl.math.div_rn(1.0, scale)
    for tile in range(region[6]):
        row, col, inside = places(region, tile, ROWS, COLS)
        w = load(weight, weight_stride, row, col, inside)
        tl.store(codes + row * n + col, encode(saturate(w * reciprocal, GRID), GRID), mask=inside)
