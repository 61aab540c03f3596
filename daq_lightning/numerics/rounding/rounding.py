"""Rounding at fixed scales so that the errors of a weight cancel where the run is sensitive to them.

    loss(Q) = tr((Q - W)^T H_out (Q - W) H_in)

H_in is the curvature of a layer's inputs, H_out that of its outputs. Codes are chosen one after the other, in
the order of the curvature; each makes up for the errors of those before it, along its row and down its
column. Nearest rounding minimizes the loss only where both are diagonal.

Greedy choices carry no promise, so the loss of nearest rounding is measured as well, as far as it takes to
know that it is larger; where it is not, nearest is what comes back.

Legend: M out, N in.

Sources: GPTQ (arXiv 2210.17323) for one side, YAQA (arXiv 2505.22988) for two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from daq_lightning.numerics.backends import Backend, choose
from daq_lightning.numerics.formats import Format, Granularity
from daq_lightning.numerics.formats.fp8 import FP8_E4M3
from daq_lightning.numerics.quantize import check_scale, quantize
from daq_lightning.numerics.rounding.walk import Factor, RoundingTask

_UNSURE = 1e-5  # of a loss whose sums are float32


@dataclass(frozen=True, kw_only=True)
class RoundingResult:
    """What `round_with_curvature` made of one weight.

    Attributes:
        codes: Codes of the format, shape (M, N).
        predicted_loss: tr(E^T H_out E H_in) of these codes, of the mixed and damped curvature.
        nearest_loss: The same of nearest rounding; never smaller.
        nearest_measured: The part of `nearest_loss` that was measured, in (0, 1]: below 1 where the part
            alone is worse than these codes, so that the rest need not be known, and is extrapolated to
            about a tenth.
        kept_nearest: Whether the codes are those of nearest rounding, because none better were found.
    """

    codes: Tensor
    predicted_loss: float
    nearest_loss: float
    nearest_measured: float
    kept_nearest: bool


@torch.no_grad()
def round_with_curvature(
    weight: Tensor,
    scale: Tensor,
    granularity: Granularity,
    *,
    inputs: Factor | None = None,
    outputs: Factor | None = None,
    fmt: Format = FP8_E4M3,
    name: str = "weight",
    backend: Backend | None = None,
    zero: Tensor | None = None,
) -> RoundingResult:
    """Rounds a weight along the curvature of its inputs, its outputs or both, at fixed scales.

    Args:
        weight: float32, bfloat16 or float16, shape (M, N), finite.
        scale: float32, shape ``granularity.grid((M, N))``, as it will be stored.
        granularity: Which elements share a scale.
        inputs: The curvature of the N inputs (`factor_sides`, `factor`); None: feedback down columns only.
        outputs: The curvature of the M outputs; None: feedback along rows only (GPTQ).
        fmt: The format of the codes.
        name: How error messages call the weight.
        backend: A module of `daq_lightning.numerics.backends`; None takes the fastest for the weight's
            device.
        zero: int8, of the shape of the scale, for a format with zero points.

    Returns:
        `RoundingResult`. On the CPU the codes do not depend on the number of threads.

    Raises:
        ValueError: No matrix, NaN or Inf, or a scale or factor of another shape or device.
        TypeError: Another dtype, or something else than a `Factor`.

    Source: arXiv 2505.22988, section 3.

    Example:
        >>> from daq_lightning.numerics.formats import PerChannel
        >>> from daq_lightning.numerics.quantize import absmax_scale
        >>> from daq_lightning.numerics.rounding.curvature import factor_sides
        >>> generator = torch.Generator().manual_seed(0)
        >>> weight, x = (torch.randn(*shape, generator=generator) for shape in ((16, 32), (24, 32)))
        >>> sides = factor_sides(inputs_NN=x.T @ x)
        >>> scale = absmax_scale(weight, PerChannel())
        >>> result = round_with_curvature(weight, scale, PerChannel(), inputs=sides.inputs)
        >>> result.predicted_loss < 0.5 * result.nearest_loss
        True
    """
    _check_weight(weight, name)
    check_scale(scale, (weight.shape[0], weight.shape[1]), granularity)
    _check_factor(inputs, weight, 1, name)
    _check_factor(outputs, weight, 0, name)
    if (zero is not None) != fmt.zero_point or (zero is not None and zero.shape != scale.shape):
        raise ValueError(
            f"{name}: a zero point of the shape of the scale belongs to a format with zero points, and to no "
            "other; take both from one result of search_scale."
        )
    if scale.device != weight.device:
        raise ValueError(f"{name} is on {weight.device}, its scale on {scale.device}; move one with .to().")
    if scale.dtype != torch.float32 or not bool(((scale > 0) & scale.isfinite()).all()):
        raise ValueError(
            f"{name}: expected finite scales > 0 in float32, got {scale.dtype} from {float(scale.min()):g} "
            f"to {float(scale.max()):g}; take those of absmax_scale or search_scale."
        )
    task = RoundingTask(
        weight=weight,
        scale=scale,
        granularity=granularity,
        format=fmt,
        inputs=inputs,
        outputs=outputs,
        zero=zero,
    )
    walked = (backend or choose(weight.device)).walk(task)
    kept = not walked.loss < walked.nearest_loss * (1 - _UNSURE)
    return RoundingResult(
        codes=quantize(weight, scale, granularity, fmt, zero) if kept else walked.codes,
        predicted_loss=walked.nearest_loss if kept else walked.loss,
        nearest_loss=walked.nearest_loss,
        nearest_measured=walked.nearest_measured,
        kept_nearest=kept,
    )


def _check_weight(weight: Tensor, name: str) -> None:
    if not isinstance(weight, Tensor) or weight.layout != torch.strided:
        raise TypeError(f"{name} is a {type(weight).__name__}, expected a dense torch.Tensor.")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"{name} has dtype {weight.dtype}, expected float32, bfloat16 or float16; dequantize quantized "
            "weights first."
        )
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(
            f"{name}: expected a non-empty matrix (M, N), got shape {tuple(weight.shape)}; round the 2-D "
            "slices of a stacked weight one by one."
        )
    if weight.device.type == "meta":
        raise ValueError(f"{name} is on the meta device and holds no values; load it first.")
    if not bool(weight.isfinite().all()):
        raise ValueError(
            f"{name} has {int(weight.isfinite().logical_not().sum())} NaN or Inf values; the training run "
            "has diverged or the file is damaged: export an earlier checkpoint."
        )


def _check_factor(factor: Factor | None, weight: Tensor, dim: int, name: str) -> None:
    if factor is None:
        return
    side = ("outputs", "inputs")[dim]
    if not isinstance(factor, Factor):
        raise TypeError(
            f"{name}: {side} must be a Factor or None, got {type(factor).__name__}; see factor_sides."
        )
    size = len(factor.order)
    if size != weight.shape[dim]:
        raise ValueError(
            f"{name} of shape {tuple(weight.shape)} needs {side} of size {weight.shape[dim]}, got {size}; "
            "inputs are (N, N), outputs (M, M)."
        )
    if factor.order.device != weight.device:
        raise ValueError(
            f"{name} is on {weight.device}, the curvature of its {side} on {factor.order.device}; move the "
            "statistics with .to() before they are factored."
        )
