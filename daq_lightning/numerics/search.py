"""The scale search: which multiple of the absmax scale keeps the update best?

    scale(alpha) = round_scale(alpha * absmax_scale)
    alpha*       = argmax score(sums of (weight, base, scale(alpha)))         over a coarse, then a fine grid

The incumbent is alpha = 1 and gives way only to a strictly better candidate, so the result is never worse than plain
absmax quantization on the objective. Among equally good candidates the nearest to 1 wins. Where the update is all
zero there is no evidence and alpha stays 1. Scores are taken from the very codes and scales that are returned.

Source: arXiv 2603.22324, Algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from daq_lightning.numerics.candidates import ScaleSearch, SearchResult
from daq_lightning.numerics.exact import best_scale
from daq_lightning.numerics.formats import Granularity, ScaleFormat
from daq_lightning.numerics.kernels import (
    Implementation,
    choose,
    delta_stats,
    fast_absmax_scale,
    fast_quantize,
    native,
)
from daq_lightning.numerics.objectives import DeltaStats
from daq_lightning.numerics.quantize import check_scale_format, round_scale
from daq_lightning.numerics.stages import Stages
from daq_lightning.numerics.tiling import bands, to_groups


@torch.no_grad()
def search_scale(
    weight: Tensor,
    base: Tensor,
    granularity: Granularity,
    search: ScaleSearch | None = None,
    *,
    scale_format: ScaleFormat = "float32",
    implementation: Implementation = "auto",
    name: str = "weight",
) -> SearchResult:
    """Finds the scale of each group that preserves the update best, and quantizes with it.

    Args:
        weight: Fine-tuned weight, float32, bfloat16 or float16, shape (M, N), on any device.
        base: The weight before fine-tuning, same shape and device.
        granularity: `PerBlock`, `PerChannel` or `PerTensor`.
        search: Objective and candidates; None takes the defaults of `ScaleSearch`.
        scale_format: What scales are rounded to before they are scored.
        implementation: Of the sums, see `daq_lightning.numerics.kernels`.
        name: How error messages call the weight.

    Returns:
        `SearchResult` on the weight's device.

    Raises:
        ValueError: Not two matrices of one shape on one device, NaN or Inf in one of them, or an unknown scale format.
        TypeError: No dense tensors, a dtype other than the three, something else than a granularity or a search, or
            an exact search in a weight that is not bfloat16.

    Source: arXiv 2603.22324, Algorithm 1.

    Example:
        >>> from daq_lightning.numerics.formats import PerChannel
        >>> from daq_lightning.numerics.objectives import score
        >>> base = torch.linspace(-1, 1, 64).reshape(8, 8)
        >>> weight = base + 0.01 * base.sin()
        >>> result = search_scale(weight, base, PerChannel(), ScaleSearch(metric="cosine"))
        >>> bool((score(result.stats, "cosine") >= score(result.absmax_stats, "cosine")).all())
        True
    """
    search = ScaleSearch() if search is None else search
    _check_inputs(weight, base, name)
    _check_settings(granularity, search)
    check_scale_format(scale_format)
    task = _Task(weight, base, granularity, search, scale_format, implementation, name)
    if task.exact and weight.dtype != torch.bfloat16:
        raise TypeError(
            f"{name}: the exact search needs bfloat16 weights, got {weight.dtype}; use ScaleSearch.dense(64), or "
            "pass weight.bfloat16() if that is what training stores."
        )
    fused = choose(implementation, weight.device) == "fused" and weight.device.type == "cpu"
    if fused and search.alpha_scope == "group" and native.fits_cache(weight, granularity):
        result = task.in_cache()
    else:
        result = task.in_steps()
    sums = result.stats
    if not bool((sums.dot + sums.delta_sq + sums.delta_q_sq + sums.error_sq).isfinite().all()):
        raise ValueError(_not_finite(base, f"the base of {name}"))
    return result


@dataclass(frozen=True)
class _Task:
    """The arguments of `search_scale`, checked."""

    weight: Tensor
    base: Tensor
    granularity: Granularity
    search: ScaleSearch
    scale_format: ScaleFormat
    implementation: Implementation
    name: str

    @property
    def exact(self) -> bool:
        """Whether to look for the exact optimum; among powers of two, 1 is the only scale of [1, 2)."""
        return self.search.spacing == "exact" and self.scale_format != "ue8m0"

    def in_cache(self) -> SearchResult:
        """One pass of the C++ library: every group is read once."""
        coarse = self.proposal(self.absmax())[:, None] if self.exact else self.search.coarse()
        result = native.search_native(
            self.weight, self.base, self.granularity, self.search, coarse=coarse, scale_format=self.scale_format
        )
        self.check(result.scale)
        return result

    def in_steps(self) -> SearchResult:
        """Every stage for many groups at once."""
        absmax = self.absmax()
        stages = Stages(
            shape=(self.weight.shape[0], self.weight.shape[1]),
            granularity=self.granularity,
            search=self.search,
            absmax=absmax.flatten(),
            evaluate=self.evaluate,
        )
        if self.exact:
            found = stages.of_proposal(self.proposal(absmax))
        elif self.search.alpha_scope == "group":
            found = stages.of_groups()
        else:
            found = stages.of_layer()
        alpha = torch.where(self.empty(absmax), 1.0, found.alpha.reshape(absmax.shape))
        scale = round_scale((absmax.double() * alpha).float(), self.scale_format)
        return SearchResult(
            codes=fast_quantize(self.weight, scale, self.granularity, self.implementation),
            scale=scale,
            alpha=alpha,
            stats=found.stats,
            absmax_stats=found.absmax_stats,
        )

    def evaluate(self, rows: slice, alpha_GK: Tensor, absmax_G: Tensor) -> DeltaStats:
        scale_GK = round_scale((absmax_G.double()[:, None] * alpha_GK).float(), self.scale_format)
        return delta_stats(self.weight[rows], self.base[rows], scale_GK, self.granularity, self.implementation)

    def absmax(self) -> Tensor:
        absmax = fast_absmax_scale(self.weight, self.granularity, self.scale_format, self.implementation)
        self.check(absmax)
        return absmax

    def empty(self, absmax: Tensor) -> Tensor:
        """Which groups are all zero: their scale is 1 whatever the layer's alpha."""
        if self.search.alpha_scope == "group" or not bool((absmax == 1).any()):
            return torch.zeros_like(absmax, dtype=torch.bool)
        largest = [
            to_groups(self.weight[rows], self.granularity).abs().amax(1)
            for rows in bands((self.weight.shape[0], self.weight.shape[1]), self.granularity, 1 << 20)
        ]
        return (torch.cat(largest) == 0).reshape(absmax.shape)

    def check(self, scale: Tensor) -> None:
        if not bool(scale.isfinite().all()):
            raise ValueError(_not_finite(self.weight, self.name))

    def proposal(self, absmax: Tensor) -> Tensor:
        """The alpha of each group that the exact search promises the most of: float64, shape (G,)."""
        best, _ = best_scale(
            *(self.weight, self.base, absmax, self.granularity),
            metric=self.search.metric,
            tau=self.search.tau,
            scale_format=self.scale_format,
            implementation=self.implementation,
        )
        return (best.double() / absmax.double()).flatten()


def _check_settings(granularity: object, search: object) -> None:
    if not isinstance(granularity, Granularity):
        raise TypeError(
            "granularity must be PerTensor(), PerChannel() or PerBlock(rows, cols), "
            f"got {granularity!r}; the three are in daq_lightning."
        )
    if not isinstance(search, ScaleSearch):
        raise TypeError(f"search must be a ScaleSearch, got {search!r}; write ScaleSearch(metric=...).")


def _check_inputs(weight: Tensor, base: Tensor, name: str) -> None:
    for tensor, role in ((weight, "weight"), (base, "base")):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name}: {role} is a {type(tensor).__name__}, expected a torch.Tensor; convert it with "
                "torch.as_tensor(...)."
            )
        if tensor.layout != torch.strided:
            raise TypeError(
                f"{name}: {role} has the layout {tensor.layout}, expected a dense tensor; convert it with .to_dense()."
            )
    if weight.ndim != 2 or base.ndim != 2 or weight.numel() == 0:
        raise ValueError(
            f"{name}: expected a non-empty matrix (M, N) and its base, got shapes {tuple(weight.shape)} and "
            f"{tuple(base.shape)}; search the 2-D slices of a stacked weight one by one."
        )
    if weight.shape != base.shape:
        raise ValueError(
            f"{name}: weight has shape {tuple(weight.shape)}, its base {tuple(base.shape)}; "
            "pass the base that this weight was trained from."
        )
    if weight.device != base.device:
        raise ValueError(f"{name}: weight is on {weight.device}, its base on {base.device}; move one with .to().")
    if weight.device.type == "meta":
        raise ValueError(f"{name}: weight and base are on the meta device and hold no values; load them first.")
    for tensor, role in ((weight, "weight"), (base, "base")):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(
                f"{name}: {role} has dtype {tensor.dtype}, expected float32, bfloat16 or float16; "
                "dequantize quantized weights first."
            )


def _not_finite(tensor: Tensor, name: str) -> str:
    nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    if nan + inf == 0:
        return f"{name}: values are too large for float32 sums (largest magnitude {float(tensor.abs().max()):g})."
    return (
        f"{name} of shape {tuple(tensor.shape)} has {nan} NaN and {inf} Inf values; FP8 cannot hold them. "
        "The training run has diverged or the file is damaged: export an earlier checkpoint."
    )
