"""Where the arithmetic of a search runs: one module for each kind of device, all with the same functions.

| backend | what it is | runs on |
| --- | --- | --- |
| `reference` | written to be read: one candidate after the other | everything |
| `cpu` | C++ that reads weight and base once for all candidates; from the wheel, or built here | CPU |
| `cuda` | Triton, likewise | CUDA |

For one scale, codes and counts are equal bit for bit among them, and float sums agree to 2e-6 of their size
(`dot`: of ``sqrt(delta_sq * delta_q_sq)``): they are added in another order. So of two candidates that are as
good as equal, each backend may take another one. Measured speeds are in README.md beside this file.

Legend: M out, N in, G groups, K candidates.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import warnings
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from daq_lightning.numerics.backends import library
from daq_lightning.numerics.formats import Format, Granularity
from daq_lightning.numerics.formats.fp8 import FP8_E4M3
from daq_lightning.numerics.objectives import DeltaStats

if TYPE_CHECKING:
    from daq_lightning.numerics.rounding.walk import RoundingTask, Walked
    from daq_lightning.numerics.search.stages import SearchResult, Task

_NOT_THE_USER = ("daq_lightning", "torch", "lightning")  # whose frames lie between a warning and its cause


class Backend(Protocol):
    """What the modules of this folder have in common. Weights are float32, bfloat16 or float16, not empty."""

    def absmax(self, weight_MN: Tensor, granularity: Granularity, /) -> Tensor:
        """See `daq_lightning.numerics.quantize.absmax`."""
        ...

    def quantize(
        self,
        weight_MN: Tensor,
        scale: Tensor,
        granularity: Granularity,
        fmt: Format,
        zero: Tensor | None = None,
        /,
    ) -> Tensor:
        """See `daq_lightning.numerics.quantize.quantize`."""
        ...

    def delta_stats(
        self,
        weight_MN: Tensor,
        base_MN: Tensor,
        scale_GK: Tensor,
        granularity: Granularity,
        fmt: Format,
        reader_dtype: torch.dtype | None = None,
        zero_GK: Tensor | None = None,
        /,
    ) -> DeltaStats:
        """See `daq_lightning.numerics.backends.delta_stats`; with a dtype, of products rounded to it."""
        ...

    def search(self, task: Task, /) -> SearchResult:
        """The whole search of one weight. Scales are NaN or infinite where the weight is."""
        ...

    def unit_upper(self, matrix_KK: Tensor, order_K: Tensor, /) -> tuple[Tensor, Tensor]:
        """See `daq_lightning.numerics.rounding.triangular.unit_upper`; float32 or float64."""
        ...

    def walk(self, task: RoundingTask, /) -> Walked:
        """See `daq_lightning.numerics.rounding.definition`."""
        ...


def choose(device: torch.device) -> Backend:
    """The fastest backend that runs on a device; warns, once, where that is the reference."""
    return _choose(device.type)


@torch.no_grad()
def delta_stats(
    weight_MN: Tensor,
    base_MN: Tensor,
    scale_GK: Tensor,
    granularity: Granularity,
    fmt: Format = FP8_E4M3,
    zero_GK: Tensor | None = None,
) -> DeltaStats:
    """Sums of every group under each of its candidate scales, by the backend of the weight's device.

    Args:
        weight_MN: float32, bfloat16 or float16, shape (M, N), finite.
        base_MN: Same shape and device, any of these dtypes, finite.
        scale_GK: float32 candidates of each group, finite and at least the smallest normal float32. Groups
            are numbered row by row of the granularity's grid.
        granularity: Which elements share a scale.
        fmt: The format of the codes.
        zero_GK: int8 zero points, for a format that has them.

    Returns:
        `DeltaStats` of shape (G, K): counts int64, sums float64.
    """
    backend = choose(weight_MN.device)
    return backend.delta_stats(weight_MN, base_MN, scale_GK, granularity, fmt, None, zero_GK)


@functools.cache
def _choose(device_type: str) -> Backend:
    if device_type == "cpu":
        name, reason = "cpu", library.why_not()
    elif device_type == "cuda":
        name, reason = "cuda", None if importlib.util.find_spec("triton") else "Triton is not installed"
    else:
        name, reason = "", f"there is no kernel for {device_type} devices"
    if reason is None:
        return _module(name)
    warnings.warn(
        f"The scale search uses its slow reference implementation: {reason}", stacklevel=_users_level()
    )
    return _module("reference")


def _module(name: str) -> Backend:
    """A backend by its name: only the one that is used is imported (`cuda` imports triton)."""
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))


def _users_level() -> int:
    """The `stacklevel` with which a warning of the caller points at the line that called into the package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USER:
        level, frame = level + 1, frame.f_back
    return level
