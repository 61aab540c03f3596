"""The best scale among ALL of [1, 2) x absmax, for cosine, MSE and hybrid on bfloat16 weights.

Elements of a group with one magnitude |w| share one code c under any scale s, with the sign of w. So four
sums per magnitude, n, sum(delta) with that sign, and for the group ||w||^2, <delta, w> and ||delta||^2, give
for every s

    error_sq   = s^2 A - 2 s C + ||w||^2              A = sum n c^2,   C = sum n c |w|,   P = sum c delta
    dot        = s P - <delta, w> + ||delta||^2
    delta_q_sq = error_sq + 2 (s P - <delta, w>) + ||delta||^2

A, C and P change only where some |w| / s passes a midpoint between two codes. A bfloat16 magnitude is m / 128
* 2^l with m = 128 ... 255, codes repeat from binade to binade, and s runs over one octave: so the breakpoints
are the ratios of m and the midpoints' significands, the same ones for every group. Between two of them each
objective is a smooth function of s with at most one maximum, known in closed form:

    mse        s = C / A
    hybrid     a quadratic in s
    cosine     with B = P - C, p = ||delta||^2 - <delta, w> and g = ||base||^2:   s = (p B - P g) / (P B - p
    A)

A search over alpha >= 1 covers every grid: below 1 the largest weights saturate, and 2 x the scale is the
same grid up to subnormal codes. Scales that are exact ties between codes have 8 significant bits; they are
candidates by themselves, and the only ones when the scale format is bfloat16.

Not covered: within 2^-22 of a breakpoint where two magnitudes change code at once, rounding to float32 may
let one of them pass before the other. Groups whose absmax scale lies outside 2^-110 ... 2^110 keep it.

An oracle for the dense search, which tries 64 scales where this tries all.

Legend: M out, N in, G groups, S classes of magnitudes (levels x 128), J intervals and points of the scale.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from daq_lightning.numerics.encode import encode
from daq_lightning.numerics.formats import Granularity, ScaleFormat
from daq_lightning.numerics.formats.fp8 import FP8_E4M3
from daq_lightning.numerics.objectives import DeltaStats, Metric, score
from daq_lightning.numerics.tiling import bands, group_sizes, to_groups

_LOWEST = -10  # levels l: below, codes are 0 under every scale of the octave
_NORMAL = -4  # from this level on, codes are normal numbers under every scale
_HAIR = 2.0**-22
_BAND = 1 << 20  # weights at a time
_GROUPS = 64  # groups times some thousand intervals whose scores are held at a time


EXACT_METRICS = ("cosine", "mse", "hybrid")
"""Those whose optimum over all scales can be found; "sign" has none but among candidates."""


@torch.no_grad()
def best_scale(
    weight_MN: Tensor,
    base_MN: Tensor,
    scale: Tensor,
    granularity: Granularity,
    *,
    metric: Metric,
    tau: float,
    scale_format: ScaleFormat = "float32",
) -> tuple[Tensor, Tensor]:
    """The best scale of each group in [scale, 2 * scale].

    Args:
        weight_MN: bfloat16, shape (M, N), finite.
        base_MN: Any of the three dtypes.
        scale: absmax scale, already rounded to the format, shape ``granularity.grid((M, N))``.
        granularity: Which elements share a scale.
        metric: "cosine", "mse" or "hybrid".
        tau: Of the hybrid.
        scale_format: "float32" or "bfloat16" ("ue8m0" leaves nothing to sweep).

    Returns:
        The scale and the score that it promises (float64), shaped like `scale`. A group without any change
        keeps its scale and promises NaN.
    """
    eight_bits = scale_format == "bfloat16"
    scale_G = scale.flatten()
    shape_MN = (weight_MN.shape[0], weight_MN.shape[1])
    sizes_G = group_sizes(shape_MN, granularity, weight_MN.device)
    parts, start = [], 0
    for rows in bands(shape_MN, granularity, _BAND):
        weight_GE, base_GE = to_groups(weight_MN[rows], granularity), to_groups(base_MN[rows], granularity)
        for first in range(0, weight_GE.shape[0], _GROUPS):
            part = slice(first, first + _GROUPS)
            scale_part = scale_G[start + first : start + first + len(weight_GE[part])]
            best_G, promise_G = _sweep(weight_GE[part], base_GE[part], scale_part, metric, tau, eight_bits)
            if metric == "mse":  # the filling of ragged blocks adds no error
                promise_G *= weight_GE.shape[1] / sizes_G[start + first : start + first + len(best_G)]
            parts.append((best_G, promise_G))
        start += weight_GE.shape[0]
    best, promise = (torch.cat(column).reshape(scale.shape) for column in zip(*parts, strict=True))
    return best, promise


class _Sums(NamedTuple):
    """Of every group, in units of the absmax scale's binade."""

    n: Tensor  # (G, S), times 4^l in the classes with normal codes
    delta: Tensor  # (G, S), times 2^l there
    w_sq: Tensor  # (G,)
    delta_w: Tensor  # (G,)
    delta_sq: Tensor  # (G,)
    changed: Tensor  # (G,)


def _sweep(
    weight_GE: Tensor, base_GE: Tensor, scale_G: Tensor, metric: Metric, tau: float, eight_bits: bool
) -> tuple[Tensor, Tensor]:
    unit_G = torch.ldexp(torch.ones_like(scale_G), torch.frexp(scale_G)[1] - 1).double()
    start_G1 = (scale_G / unit_G)[:, None]
    sums = _sum_magnitudes(weight_GE, base_GE, unit_G)
    low_J, high_J, code_SJ = (part.to(scale_G.device) for part in _intervals(eight_bits))
    value_S = _magnitudes(scale_G.device)
    A_GJ = sums.n @ code_SJ.square()
    C_GJ = (sums.n * value_S) @ code_SJ
    P_GJ = sums.delta @ code_SJ
    low_GJ, high_GJ = torch.maximum(low_J, start_G1), torch.minimum(high_J, 2 * start_G1)
    inside_GJ = (low_GJ < high_GJ) | ((low_J == high_J) & (low_J >= start_G1) & (low_J <= 2 * start_G1))

    def objective(s_GJ: Tensor) -> Tensor:
        error_sq = s_GJ * (s_GJ * A_GJ - 2 * C_GJ) + sums.w_sq[:, None]
        shift = s_GJ * P_GJ - sums.delta_w[:, None]
        delta_sq = sums.delta_sq[:, None].expand_as(shift)
        n = sums.n.new_full((), weight_GE.shape[1])
        dot, delta_q_sq = shift + delta_sq, (error_sq + 2 * shift + delta_sq).clamp(min=0)
        stats = DeltaStats(*(n,) * 6, dot=dot, delta_sq=delta_sq, delta_q_sq=delta_q_sq, error_sq=error_sq)
        return torch.where(inside_GJ, score(stats, metric, tau=tau), -torch.inf)

    # well inside an interval, so that float32 codes are the promised ones
    middle_GJ = (low_GJ + high_GJ) / 2
    low_GJ, high_GJ = low_GJ * (1 + _HAIR), high_GJ * (1 - _HAIR)
    narrow_GJ = low_GJ >= high_GJ
    low_GJ, high_GJ = torch.where(narrow_GJ, middle_GJ, low_GJ), torch.where(narrow_GJ, middle_GJ, high_GJ)
    peak_GJ = _peak(sums, A_GJ, C_GJ, P_GJ, metric, tau).nan_to_num()
    tried = [
        (s, objective(s)) for s in (low_GJ, high_GJ, torch.maximum(torch.minimum(peak_GJ, high_GJ), low_GJ))
    ]
    scale_GX, score_GX = (torch.cat(column, 1) for column in zip(*tried, strict=True))
    promise_G1, winner_G1 = score_GX.nan_to_num(nan=-torch.inf).max(1, keepdim=True)
    best_G = (scale_GX.gather(1, winner_G1)[:, 0] * unit_G).float()
    if metric == "mse":
        promise_G1 = promise_G1 * unit_G[:, None].square()
    usable_G = sums.changed & (unit_G >= 2.0**-110) & (unit_G <= 2.0**110)
    return torch.where(usable_G, best_G, scale_G), torch.where(usable_G, promise_G1[:, 0], torch.nan)


def _peak(sums: _Sums, A: Tensor, C: Tensor, P: Tensor, metric: Metric, tau: float) -> Tensor:
    """Where the objective is stationary; NaN or infinite where it is nowhere."""
    w_sq, delta_w, delta_sq = (field[:, None] for field in (sums.w_sq, sums.delta_w, sums.delta_sq))
    if metric == "mse":
        return C / A
    if metric == "cosine":
        B, p, g = P - C, delta_sq - delta_w, w_sq - 2 * delta_w + delta_sq
        return (p * B - P * g) / (P * B - p * A)
    start, slope = 1 - delta_w / delta_sq, P / delta_sq  # gain = start + slope * s
    above = slope * (1 - start) + tau * (start * slope - (P - C) / delta_sq)
    return above / (slope.square() * (1 - tau) + tau * A / delta_sq)


def _sum_magnitudes(weight_GE: Tensor, base_GE: Tensor, unit_G: Tensor) -> _Sums:
    weight = weight_GE.double() / unit_G[:, None]
    delta = (weight_GE.float() - base_GE.float()).double() / unit_G[:, None]
    mantissa, exponent = torch.frexp(weight.abs())  # mantissa in [0.5, 1)
    level_GE = exponent - 1
    # the classes from _NORMAL on have codes that differ by powers of two: one class for all of them, in units
    # of 2^l
    two_GE = torch.ldexp(torch.ones_like(weight), torch.where(level_GE < _NORMAL, 0, level_GE))
    bin_GE = ((level_GE.clamp(max=_NORMAL) - _LOWEST) * 128 + (mantissa * 256 - 128)).long()
    classes = (_NORMAL - _LOWEST + 1) * 128
    bin_GE = torch.where((bin_GE < 0) | (weight == 0), classes, bin_GE)  # one more class, thrown away
    n_GS = weight.new_zeros(len(weight), classes + 1).scatter_add_(1, bin_GE, two_GE.square())
    delta_GS = torch.zeros_like(n_GS).scatter_add_(1, bin_GE, delta * weight.sign() * two_GE)
    return _Sums(
        n_GS[:, :-1],
        delta_GS[:, :-1],
        weight.square().sum(1),
        (delta * weight).sum(1),
        delta.square().sum(1),
        (weight_GE.float() != base_GE.float()).any(1),
    )


def _magnitudes(device: torch.device | str = "cpu") -> Tensor:
    """m / 128 * 2^l of all classes, level by level; those with normal codes last, at l = 0."""
    mantissa = 1 + torch.arange(128, dtype=torch.float64, device=device) / 128
    return torch.cat([mantissa * 2.0**level for level in [*range(_LOWEST, _NORMAL), 0]])


@functools.cache
def _intervals(eight_bits: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Ends of the intervals and points of the scale in [1, 4], and the code of every class there."""
    mantissa = _magnitudes()[-128:]
    four = torch.full((1,), 4.0, dtype=torch.float64, device="cpu")
    point = torch.cat([mantissa, 2 * mantissa, four])
    low, high = point, point
    if not eight_bits:
        odd = torch.arange(1, 32, 2, dtype=torch.float64, device="cpu")
        midpoints = torch.cat([odd[8:] / 16] + [odd[:8] / 2**k for k in range(4)])
        midpoints = midpoints[(midpoints >= 1) & (midpoints < 2)]
        ratio = (mantissa[:, None] / midpoints).flatten()
        ratio = torch.cat([torch.where(ratio < 1, 2 * ratio, ratio), four / 4]).unique()
        edge = torch.cat([ratio, 2 * ratio, four])
        low, high = torch.cat([low, edge[:-1]]), torch.cat([high, edge[1:]])
    # the one rounding of the package says what the codes are: at a point itself, else in the middle of the
    # interval
    middle = ((low + high) / 2).float()
    quotient_SJ = _magnitudes().float()[:, None] * middle.reciprocal()
    return low, high, encode(quotient_SJ.clamp(max=FP8_E4M3.max), FP8_E4M3).double()
