"""Additive sums over a group, and every objective and metric as a function of them.

    delta   = weight - base             both upcast to float32 first
    delta_q = code * scale - base

Sums over disjoint sets of elements add, so backends, search, metrics, ranks and reports all share
`DeltaStats` and nothing is measured twice in two ways.

| metric | score (larger is better) |
| --- | --- |
| sign | sign_equal / n |
| cosine | dot / sqrt(delta_sq * delta_q_sq); 1 if both are zero, 0 if exactly one is |
| mse | -error_sq / n; does not look at the base (Eq. 7) |
| hybrid | -[(gain - 1)^2 + tau * (delta_q_sq / delta_sq - gain^2)], gain = dot / delta_sq |

`gain` says at which strength the update survives along its own direction: 1 in full, 0 not at all. The second
term of the hybrid is the energy of the quantization noise orthogonal to the update; tau = 1 makes the hybrid
-MSE up to a factor, tau = 0 asks for the right strength and nothing else.

Sources: arXiv 2603.22324, Eq. 6 (mse), 7, 8 (sign), 9 (cosine); the hybrid is this project's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from daq_lightning.numerics.search.settings import METRICS, Metric

_COUNTS = 6  # the first fields of DeltaStats; the others are sums
MAGNITUDES = (0.0, 1e-5, 1e-4, 1e-3)
"""Lower edges of the bins of |delta|, in units of the weight; the last one has no upper edge."""


class DeltaStats(NamedTuple):
    """Additive sums. All fields have one shape: () for a tensor, (G,) per group, (G, K) per candidate.

    Counts are int64, sums float64.
    """

    n: Tensor
    """Elements."""
    n_changed: Tensor
    """Elements with delta != 0; always preserved + flipped + lost."""
    sign_equal: Tensor
    """Elements with sign(delta_q) == sign(delta), where sign(0) = 0."""
    preserved: Tensor
    """Changed elements whose delta_q has the sign of delta."""
    flipped: Tensor
    """Changed elements whose delta_q has the opposite sign."""
    lost: Tensor
    """Changed elements whose delta_q is 0."""
    dot: Tensor
    """Sum of delta * delta_q."""
    delta_sq: Tensor
    """Sum of delta^2."""
    delta_q_sq: Tensor
    """Sum of delta_q^2."""
    error_sq: Tensor
    """Sum of (code * scale - weight)^2."""

    def map(self, function: Callable[[Tensor], Tensor]) -> DeltaStats:
        """The same function applied to every sum."""
        return DeltaStats(*(function(field) for field in self))

    def add(self, other: DeltaStats) -> DeltaStats:
        """Sums over the union of two disjoint sets of elements."""
        return DeltaStats(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def total(self) -> DeltaStats:
        """Sums over all groups: shape (G, ...) -> (...)."""
        return self.map(lambda field: field.sum(0))

    def packed(self) -> Tensor:
        """All sums as one float64 tensor of shape (10, ...); exact, for counts are below 2^53."""
        return torch.stack([field.double() for field in self])

    @classmethod
    def zero(cls, device: torch.device) -> DeltaStats:
        """The sums over nothing, of shape ()."""
        return cls.unpacked(torch.zeros(len(cls._fields), dtype=torch.float64, device=device))

    @classmethod
    def unpacked(cls, packed: Tensor) -> DeltaStats:
        """The sums that `packed` packed: counts int64, sums float64."""
        return cls(*packed[:_COUNTS].long(), *packed[_COUNTS:])


def sign_rate(stats: DeltaStats) -> Tensor:
    """Share of elements whose update keeps its sign, in [0, 1] (Eq. 8)."""
    return stats.sign_equal.double() / stats.n


def cosine(stats: DeltaStats) -> Tensor:
    """Cosine between delta and delta_q, in [-1, 1] (Eq. 9). Both zero: 1. Exactly one zero: 0."""
    norms = (stats.delta_sq * stats.delta_q_sq).sqrt()
    both_zero = (stats.delta_sq == 0) & (stats.delta_q_sq == 0)
    return torch.where(norms > 0, stats.dot / norms, both_zero.to(stats.dot.dtype)).clamp(-1, 1)


def gain(stats: DeltaStats) -> Tensor:
    """Strength of the update along its direction: dot / delta_sq. An update of zero: 1 if kept, else NaN."""
    unchanged = torch.where(stats.delta_q_sq == 0, 1.0, torch.nan).to(stats.dot.dtype)
    return torch.where(stats.delta_sq > 0, stats.dot / stats.delta_sq, unchanged)


def mse(stats: DeltaStats) -> Tensor:
    """Mean squared error of the weight, equally of the delta (Eq. 6 and 7), in squared weight units."""
    return stats.error_sq.double() / stats.n


def norm(stats: DeltaStats) -> Tensor:
    """Length of the update, |delta|, in units of the weight."""
    return stats.delta_sq.double().sqrt()


def noise(stats: DeltaStats) -> Tensor:
    """Share of all elements with delta = 0 and delta_q != 0, in [0, 1]: with the shares flipped and lost it
    is what the sign rate lacks to 1."""
    unmoved = stats.sign_equal - stats.preserved  # delta = 0 and delta_q = 0
    return (stats.n - stats.n_changed - unmoved).double() / stats.n


def score(stats: DeltaStats, metric: Metric, *, tau: float = 0.01) -> Tensor:
    """The objective that a search maximizes.

    Args:
        stats: Sums of any shape.
        metric: "sign", "cosine", "mse" or "hybrid".
        tau: Weight of the orthogonal noise in the hybrid, >= 0.

    Returns:
        float64 scores of the shape of the sums. A group without any update scores -inf under "hybrid" unless
        it is reproduced exactly (then 0).

    Raises:
        ValueError: Unknown metric.

    Example:
        >>> one = lambda x: torch.tensor(x, dtype=torch.float64)
        >>> sums = DeltaStats(*map(one, (4.0, 4.0, 3.0, 3.0, 1.0, 0.0, 6.0, 4.0, 16.0, 8.0)))
        >>> [round(float(score(sums, metric)), 3) for metric in ("sign", "cosine", "mse", "hybrid")]
        [0.75, 0.75, -2.0, -0.268]
    """
    if metric == "sign":
        return sign_rate(stats)
    if metric == "cosine":
        return cosine(stats)
    if metric == "mse":
        return -mse(stats)
    if metric == "hybrid":
        rho = stats.dot / stats.delta_sq
        loss = (rho - 1).square() + tau * (stats.delta_q_sq / stats.delta_sq - rho.square())
        unchanged = torch.where(stats.delta_q_sq == 0, 0.0, -torch.inf).to(loss.dtype)
        return torch.where(stats.delta_sq > 0, -loss, unchanged)
    raise ValueError(f"Unknown metric {metric!r}: expected one of {', '.join(METRICS)}.")


def measure(weight: Tensor, base: Tensor, dequantized: Tensor) -> DeltaStats:
    """Sums of three tensors of one shape, in float64 from float32 inputs: the definition, to be read.

    Args:
        weight: The fine-tuned weight, any floating dtype.
        base: The weight before fine-tuning.
        dequantized: What a reader of the quantized file computes.

    Returns:
        `DeltaStats` of shape ().

    Raises:
        ValueError: The shapes differ.
    """
    _one_shape(weight, base, dequantized)
    return sums(weight.float().flatten(), base.float().flatten(), dequantized.float().flatten())


class MagnitudeStats(NamedTuple):
    """Additive counts by |delta|, one for each bin of `MAGNITUDES`; int64 of shape (5,)."""

    n: Tensor
    """Elements of the bin."""
    preserved: Tensor
    """Those whose delta_q has the sign of delta, where sign(0) = 0."""

    @classmethod
    def zero(cls, device: torch.device) -> MagnitudeStats:
        """The counts over nothing."""
        counts = torch.zeros(1 + len(MAGNITUDES), dtype=torch.int64, device=device)
        return cls(counts, counts.clone())


def measure_by_magnitude(weight: Tensor, base: Tensor, dequantized: Tensor) -> MagnitudeStats:
    """Whose sign survives, by the size of the update: unchanged elements, then the bins of `MAGNITUDES`.

    Args:
        weight: The fine-tuned weight, any floating dtype.
        base: The weight before fine-tuning.
        dequantized: What a reader of the quantized file computes.

    Returns:
        `MagnitudeStats`; both counts summed over bins are `n` and `sign_equal` of `measure`.

    Raises:
        ValueError: The shapes differ.
    """
    _one_shape(weight, base, dequantized)
    weight, base, dequantized = (tensor.float().flatten() for tensor in (weight, base, dequantized))
    sign, sign_q = sign_of_difference(weight, base), sign_of_difference(dequantized, base)
    edges = torch.tensor(MAGNITUDES[1:], dtype=torch.float32, device=weight.device)
    bins = 1 + torch.bucketize((weight - base).abs(), edges, right=True)
    bins = torch.where(sign == 0, 0, bins)
    counts = [torch.bincount(which, minlength=1 + len(MAGNITUDES)) for which in (bins, bins[sign_q == sign])]
    return MagnitudeStats(*counts)


def as_searched(tensor: Tensor) -> Tensor:
    """A weight in the dtype in which it is searched and measured: float64 as float32, any other as it is."""
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def sums(weight: Tensor, base: Tensor, dequantized: Tensor) -> DeltaStats:
    """Sums over the last dimension of float32 tensors that broadcast against each other."""
    delta, delta_q, error = weight - base, dequantized - base, dequantized - weight
    # compared, not subtracted: a difference of two tiny numbers may be flushed to zero on some devices
    sign, sign_q = sign_of_difference(weight, base), sign_of_difference(dequantized, base)
    changed = sign != 0
    shape = torch.broadcast_tensors(delta, delta_q)[0].shape[:-1]  # torch.broadcast_shapes imports sympy

    def count(mask: Tensor) -> Tensor:
        return mask.sum(-1, dtype=torch.int64).expand(shape)

    def total(values: Tensor) -> Tensor:
        return values.sum(-1).expand(shape)

    delta, delta_q, error = delta.double(), delta_q.double(), error.double()
    return DeltaStats(
        n=torch.full(shape, delta.shape[-1], dtype=torch.int64, device=delta.device),
        n_changed=count(changed),
        sign_equal=count(sign_q == sign),
        preserved=count(changed & (sign_q == sign)),
        flipped=count(changed & (sign_q == -sign)),
        lost=count(changed & (sign_q == 0)),
        dot=total(delta * delta_q),
        delta_sq=total(delta.square()),
        delta_q_sq=total(delta_q.square()),
        error_sq=total(error.square()),
    )


def _one_shape(weight: Tensor, base: Tensor, dequantized: Tensor) -> None:
    if not weight.shape == base.shape == dequantized.shape:
        raise ValueError(
            "weight, base and dequantized must have one shape, got "
            f"{tuple(weight.shape)}, {tuple(base.shape)} and {tuple(dequantized.shape)}."
        )


def sign_of_difference(left: Tensor, right: Tensor) -> Tensor:
    """-1, 0 or 1 as int8; compared, so that no tiny difference is flushed to zero."""
    return (left > right).to(torch.int8) - (left < right).to(torch.int8)
