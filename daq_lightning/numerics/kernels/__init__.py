"""The sums of every candidate scale: one signature, one result, several implementations.

| implementation | what it is | runs on |
| --- | --- | --- |
| eager | the reference, written to be read: one candidate after the other | everything |
| compiled | one function of tensors through `torch.compile` | CPU with a C++ compiler, CUDA |
| fused | by hand: reads weight and base once for all candidates; C++ on a CPU, Triton on CUDA | the same |
| auto | fused, else eager with one warning (`compiled` needs the same compilers) | everything |

Counts are equal bit for bit among them, float sums to 2e-6 of their size (`dot`: of ``sqrt(delta_sq * delta_q_sq)``).
Measured speeds are in README.md beside this file.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import warnings
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from daq_lightning.numerics.formats import FP8_E4M3, Granularity, ScaleFormat
from daq_lightning.numerics.kernels import library, native
from daq_lightning.numerics.kernels.compiled import delta_stats_compiled
from daq_lightning.numerics.kernels.eager import delta_stats_eager
from daq_lightning.numerics.objectives import DeltaStats
from daq_lightning.numerics.quantize import absmax_scale, quantize, round_scale

Implementation: TypeAlias = Literal["auto", "eager", "compiled", "fused"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)
_NOT_THE_USER = ("daq_lightning", "torch", "lightning")  # whose frames lie between a warning and its cause


@torch.no_grad()
def delta_stats(
    weight_MN: Tensor,
    base_MN: Tensor,
    scale_GK: Tensor,
    granularity: Granularity,
    implementation: Implementation = "auto",
) -> DeltaStats:
    """Sums of every group under each of its candidate scales.

    Args:
        weight_MN: float32, bfloat16 or float16, shape (M, N), finite.
        base_MN: Same shape and device, any of these dtypes, finite.
        scale_GK: float32 candidates of each group, finite and at least the smallest normal float32. Groups are
            numbered row by row of the granularity's grid.
        granularity: Which elements share a scale.
        implementation: "auto" takes the fastest that runs on the weight's device.

    Returns:
        `DeltaStats` of shape (G, K): counts int64, sums float64.

    Raises:
        ValueError: Unknown implementation.
        RuntimeError: "fused" or "compiled" was asked for by name and cannot run here.
    """
    chosen = choose(implementation, weight_MN.device)
    if chosen == "eager":
        return delta_stats_eager(weight_MN, base_MN, scale_GK, granularity)
    if chosen == "compiled":
        return delta_stats_compiled(weight_MN, base_MN, scale_GK, granularity)
    if weight_MN.device.type == "cpu":
        return native.delta_stats_native(weight_MN, base_MN, scale_GK, granularity)
    from daq_lightning.numerics.kernels.fused import delta_stats_fused  # imports triton

    return delta_stats_fused(weight_MN, base_MN, scale_GK, granularity)


def choose(implementation: Implementation, device: torch.device) -> Implementation:
    """What "auto" means on this device; any other name is returned as it is.

    Raises:
        ValueError: Unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"Unknown implementation {implementation!r}: expected one of {', '.join(IMPLEMENTATIONS)}.")
    if implementation != "auto":
        return implementation
    return _auto(device.type)


@functools.cache
def _auto(device_type: str) -> Implementation:
    if device_type == "cpu":
        reason = library.why_not()
    elif device_type == "cuda":
        reason = None if importlib.util.find_spec("triton") else "Triton is not installed"
    else:
        reason = f"there is no kernel for {device_type} devices"
    if reason is None:
        return "fused"
    warnings.warn(f"The scale search uses its slow reference implementation: {reason}", stacklevel=_users_level())
    return "eager"


def _users_level() -> int:
    """The `stacklevel` with which a warning of the caller points at the line that called into the package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USER:
        level, frame = level + 1, frame.f_back
    return level


def fast_absmax_scale(
    weight_MN: Tensor, granularity: Granularity, scale_format: ScaleFormat, implementation: Implementation
) -> Tensor:
    """`absmax_scale`, in the C++ kernel where that is in use."""
    if choose(implementation, weight_MN.device) != "fused" or weight_MN.device.type != "cpu":
        return absmax_scale(weight_MN, granularity, scale_format=scale_format)
    absmax = native.absmax_native(weight_MN, granularity)
    return torch.where(absmax == 0, 1.0, round_scale(absmax / FP8_E4M3.max, scale_format))


def fast_quantize(weight_MN: Tensor, scale: Tensor, granularity: Granularity, implementation: Implementation) -> Tensor:
    """`quantize`, in the C++ kernel where that is in use: the same codes bit for bit."""
    if choose(implementation, weight_MN.device) != "fused" or weight_MN.device.type != "cpu":
        return quantize(weight_MN, scale, granularity)
    return native.quantize_native(weight_MN, scale, granularity)
