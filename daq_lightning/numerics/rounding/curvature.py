"""The curvature of one side of a weight, in the form that rounding walks along: mix, damp, order, factor.

    nrm(H) = H / mean(diag H)
    H      = nrm(statistics) + share * nrm(update) + damping * I
    H      = A D A^T            rows and columns by descending diagonal, A unit upper triangular, D diagonal

The loss of an error E = Q - W is then ``tr(E^T H_out E H_in) = sum_ij d_out_i d_in_j (A_out^T E A_in)_ij^2``:
in (A_out^T E A_in)_ij the errors of earlier rows and columns stand beside E_ij, which can make up for them.

Statistics may have any rank: damping makes the sum positive definite, and every entry of D at least as large
as the damping. One that is not shows statistics that are no sum of squares, or float32 that did not suffice.

Legend: M out, N in, of a weight; K the size of the side that is factored, M or N.

Sources: K-FAC (arXiv 1503.05671) and Shampoo (arXiv 1802.09568) for the statistics, GPTQ (arXiv 2210.17323)
and YAQA (arXiv 2505.22988) for the factors.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from daq_lightning.numerics.backends import choose
from daq_lightning.numerics.rounding.settings import RoundingSettings
from daq_lightning.numerics.rounding.walk import Factor

_ASYMMETRY = 1e-3  # of the largest entry, as sums in 16 bit may leave it
_EXACT = 2048  # up to this size float64 costs nothing beside the rest
_PRECISIONS = ((torch.float32, 1e-5), (torch.float64, 0.0))
"""And the smallest pivot, as a share of its diagonal entry, that is still right to about 1 % in it."""


class Factors(NamedTuple):
    """What `round_with_curvature` takes: a side that is None has no curvature (H = I)."""

    inputs: Factor | None
    outputs: Factor | None


@torch.no_grad()
def update_statistics(delta_MN: Tensor) -> tuple[Tensor, Tensor]:
    """``D^T D`` (N, N) and ``D D^T`` (M, M) of an update, in float32: curvature that costs no data.

    Sum the first over the weights that share an input.
    """
    delta_MN = delta_MN.float()
    return delta_MN.T @ delta_MN, delta_MN @ delta_MN.T


@torch.no_grad()
def factor_sides(
    settings: RoundingSettings | None = None,
    *,
    inputs_NN: Tensor | None = None,
    outputs_MM: Tensor | None = None,
    delta_MN: Tensor | None = None,
) -> Factors:
    """The factors of both sides of one weight from the statistics that there are.

    Args:
        settings: Shares and order; None takes the defaults of `RoundingSettings`.
        inputs_NN: Sum of x^T x over tokens, or of g^T g over gradients g of the weight.
        outputs_MM: Sum of y^T y over tokens, y the gradient at the output, or of g g^T.
        delta_MN: The update. It is mixed into what is there, and stands in for what is not.

    Returns:
        `Factors`; a side that nothing is known of is None.

    Raises:
        As `factor`.

    Example:
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> sides = factor_sides(inputs_NN=x.T @ x)
        >>> sides.outputs is None, sides.inputs.unit_upper.shape
        (True, torch.Size([8, 8]))
    """
    settings = RoundingSettings() if settings is None else settings
    wanted = delta_MN is not None and (settings.update > 0 or inputs_NN is None or outputs_MM is None)
    update_NN, update_MM = update_statistics(delta_MN) if delta_MN is not None and wanted else (None, None)

    def side(statistics: Tensor | None, update: Tensor | None, damping: float, name: str) -> Factor | None:
        if statistics is None:
            statistics, update = update, None
        if statistics is None:
            return None
        return factor(
            statistics, update, share=settings.update, damping=damping, order=settings.order, name=name
        )

    return Factors(
        inputs=side(inputs_NN, update_NN, settings.damping_in, "inputs"),
        outputs=side(outputs_MM, update_MM, settings.damping_out, "outputs"),
    )


@torch.no_grad()
def factor(
    statistics_KK: Tensor,
    update_KK: Tensor | None = None,
    *,
    share: float = 0.1,
    damping: float,
    order: bool = True,
    name: str = "statistics",
) -> Factor:
    """Mixes, damps, orders and factors the statistics of one side; weights that share them share the result.

    Args:
        statistics_KK: Symmetric and positive semi-definite, of any rank and size, float32 or float64.
        update_KK: The update's own statistics, of the same shape and device, or None.
        share: Of the update beside the statistics, >= 0.
        damping: Of the identity, > 0; both are shares of a mean diagonal of 1.
        order: By descending diagonal; else as it is.
        name: How error messages call the statistics.

    Raises:
        ValueError: Not square, not finite, not symmetric, all zero, not positive semi-definite, or an update
            of another shape or device.
        TypeError: No dense tensors in float32 or float64.

    Example:
        >>> factor(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), damping=0.001).order
        tensor([1, 0])
    """
    _check(statistics_KK, name)
    if not damping > 0:
        raise ValueError(f"{name}: damping must be > 0, got {damping}; 0.001 to 0.1 are good values.")
    if update_KK is not None and share > 0:
        _check(update_KK, f"the update beside {name}", zero=True)
        if update_KK.shape != statistics_KK.shape or update_KK.device != statistics_KK.device:
            raise ValueError(
                f"{name} of shape {tuple(statistics_KK.shape)} on {statistics_KK.device} came with an update "
                f"of shape {tuple(update_KK.shape)} on {update_KK.device}; expected statistics of one side."
            )
    smallest = float("nan")
    for dtype, least in _PRECISIONS if len(statistics_KK) > _EXACT else _PRECISIONS[1:]:
        mixed_KK = mix(statistics_KK.to(dtype), update_KK, share, damping)
        size_K = mixed_KK.diagonal().clone()
        order_K = torch.arange(len(size_K), dtype=torch.int64, device=size_K.device)
        if order:
            order_K = size_K.argsort(descending=True, stable=True)
        unit_upper_KK, diagonal_K = choose(mixed_KK.device).unit_upper(mixed_KK, order_K)
        smallest = float(diagonal_K.min())
        if smallest > damping / 2 and bool((diagonal_K > least * size_K[order_K]).all()):
            return Factor(order=order_K, unit_upper=unit_upper_KK, diagonal=diagonal_K)
    raise ValueError(
        f"{name} of shape {tuple(statistics_KK.shape)} are not positive semi-definite: with damping "
        f"{damping:g} a pivot of {smallest:.2g} is left. Expected a sum of x^T x; check how it was summed, "
        "or damp more."
    )


def mix(statistics_KK: Tensor, update_KK: Tensor | None, share: float, damping: float) -> Tensor:
    """``nrm(statistics) + share * nrm(update) + damping * I``, in the dtype of the statistics."""
    mixed_KK = statistics_KK * _normalizer(statistics_KK)
    if update_KK is not None and share > 0:
        mixed_KK.add_(update_KK, alpha=share * _normalizer(update_KK))
    mixed_KK.diagonal().add_(damping)
    return mixed_KK


def _normalizer(matrix_KK: Tensor) -> float:
    """What makes the mean of the diagonal 1; 0 for zeros (the update of a weight that was not trained)."""
    mean = float(matrix_KK.diagonal().mean(dtype=torch.float64))
    return 1 / mean if mean > 0 else 0.0


def _check(matrix: Tensor, name: str, zero: bool = False) -> None:
    if not isinstance(matrix, Tensor) or matrix.layout != torch.strided:
        raise TypeError(f"{name} are a {type(matrix).__name__}, expected a dense torch.Tensor.")
    if matrix.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} have dtype {matrix.dtype}, expected float32 or float64; sum them in float32."
        )
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.numel() == 0:
        raise ValueError(
            f"{name} have shape {tuple(matrix.shape)}, expected a square matrix: (N, N) of the inputs of a "
            "weight (M, N), or (M, M) of its outputs."
        )
    low, high = (float(x) for x in matrix.aminmax())
    size = max(-low, high)
    if not math.isfinite(size):
        count = int(matrix.isfinite().logical_not().sum())
        raise ValueError(
            f"{name} have {count} values that are NaN or Inf; the run has diverged, or they were summed "
            "in 16 bit."
        )
    # H and its transpose applied to one vector: to compare all mirrored pairs takes as long as a factor
    probe_K = torch.arange(len(matrix), dtype=matrix.dtype, device=matrix.device).cos()
    difference_K = matrix @ probe_K - matrix.T @ probe_K
    if bool(difference_K.abs().amax() > _ASYMMETRY * size * math.sqrt(len(matrix))):
        raise ValueError(
            f"{name} are not symmetric; expected a sum of x^T x. Take (H + H.T) / 2 if they are right but "
            "for rounding."
        )
    if not zero and not float(matrix.diagonal().sum()) > 0:
        raise ValueError(
            f"{name} have a trace of {float(matrix.diagonal().sum()):g}, expected one > 0: no token or "
            "gradient has reached this weight; pass None for this side."
        )
