"""What quantization kept of an update, as torchmetrics: signs, cosine, gain, error, norm and noise.

    delta = weight - base,    delta_q = quantized - base,    value = function of sums over all elements seen

The states are the additive sums of `daq_lightning.numerics`, the same ones that the search scores. They add
over layers, steps and ranks, so a "pooled" value is that of all elements together; with
`reduction="tensor_mean"` it is the mean of the values of the tensors, large and small alike, each `update`
bringing one. Pooled, the metrics of `delta_metrics` share one update in a `MetricCollection`.

Counts are int64 (a float32 count sticks at 2^24) and sums float64; no cast of the module or of the metric
changes that. Under DDP every rank holds the same weights: give each rank other layers, or do not sync.

Sources: arXiv 2603.22324, Eq. 6 (mean squared error), 8 (sign rate), 9 (cosine).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from daq_lightning.numerics import objectives
from daq_lightning.numerics.objectives import DeltaStats, MagnitudeStats

Reduction: TypeAlias = Literal["pooled", "tensor_mean"]


def delta_metrics(
    prefix: str | None = None, *, sync: bool = True, reduction: Reduction = "pooled"
) -> MetricCollection:
    """The metrics of an update, under the keys "sign_rate", "cosine", "gain", "mse", "norm" and "noise".

    Args:
        prefix: Put before every key, for example "daq/".
        sync: Whether `compute` adds up the sums of all ranks, which all ranks must then call. False where one
            rank alone has seen everything.
        reduction: "pooled" for values of all elements together, "tensor_mean" for means over tensors.

    Returns:
        A `MetricCollection`; pooled, its members form one compute group with one update for all.

    Example:
        >>> metrics = delta_metrics(prefix="daq/")
        >>> metrics.update(torch.tensor([1.5, 2.0]), torch.tensor([1.25, 2.25]), torch.tensor([1.0, 2.0]))
        >>> {key: float(value) for key, value in metrics.compute().items()}["daq/sign_rate"]
        0.5
    """
    kinds = {
        "sign_rate": SignPreservationRate,
        "cosine": DeltaCosineSimilarity,
        "gain": DeltaGain,
        "mse": DeltaMeanSquaredError,
        "norm": DeltaNorm,
        "noise": DeltaNoise,
    }
    members: dict[str, Metric | MetricCollection] = {
        key: kind(reduction=reduction, sync_on_compute=sync) for key, kind in kinds.items()
    }
    one_group = [list(members)] if reduction == "pooled" else False
    return MetricCollection(members, prefix=prefix, compute_groups=one_group)


class SumsMetric(Metric):
    """A metric whose states are additive sums, which no cast touches. Takes the arguments of `Metric`."""

    full_state_update = False
    is_differentiable = False
    sums: type[Any]
    """The NamedTuple of the states; a field that ends in _max holds a maximum, not a sum."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        default = torch.get_default_device()
        device = torch.device("cpu") if default.type == "meta" else default  # on meta, sums would be lost
        for field, zero in self.sums.zero(device)._asdict().items():
            self.add_state(field, default=zero, dist_reduce_fx="max" if field.endswith("_max") else "sum")

    @property
    def stats(self) -> Any:
        """The sums of everything seen since the last reset."""
        return self.sums(*(getattr(self, field) for field in self.sums._fields))

    def _add(self, seen: Any) -> None:
        for field, new in seen._asdict().items():
            mine = getattr(self, field)
            join = torch.maximum if field.endswith("_max") else torch.add
            setattr(self, field, join(mine, new.to(mine)))

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draws values with matplotlib (`pip install daq-lightning[plot]`); returns the figure and its axis.

        Args:
            val: What `compute` or `forward` returned, or a list of such over steps; None calls `compute`.
            ax: A matplotlib axis; None makes a figure.
        """
        return self._plot(val, ax)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        """Lets `fn` move the states, never cast them: `.to(dtype)` would ruin counts and sums."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, exclude_state)


class _DeltaMetric(SumsMetric):
    """A function of `DeltaStats`; subclasses say which one. Besides the arguments of `Metric` it takes
    `reduction`: "pooled", or "tensor_mean" (see `delta_metrics`), which leaves tensors of value NaN out."""

    sums = DeltaStats

    def __init__(self, *, reduction: Reduction = "pooled", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if reduction not in ("pooled", "tensor_mean"):
            raise ValueError(f'Expected reduction "pooled" or "tensor_mean", got {reduction!r}.')
        self.reduction = reduction
        if reduction == "tensor_mean":
            self.add_state("value_sum", default=self.stats.dot.clone(), dist_reduce_fx="sum")
            self.add_state("n_tensors", default=self.stats.n.clone(), dist_reduce_fx="sum")

    @staticmethod
    @abstractmethod
    def _score(stats: DeltaStats) -> Tensor:
        """The value of sums of shape ()."""

    def update(
        self, quantized: Tensor | DeltaStats, weight: Tensor | None = None, base: Tensor | None = None
    ) -> None:
        """Adds a weight, or sums that were taken elsewhere.

        Args:
            quantized: The dequantized weight, as a reader of the file computes it; or `DeltaStats` of any
                shape (its entries are sums over disjoint elements and are added up).
            weight: The fine-tuned weight, of the same shape; left out after `DeltaStats`.
            base: The weight before fine-tuning, of the same shape; left out after `DeltaStats`.

        Raises:
            TypeError: Neither three tensors nor one `DeltaStats`.
            ValueError: The three shapes differ.
        """
        if isinstance(quantized, DeltaStats) and weight is None and base is None:
            seen = quantized.map(torch.sum)
        elif isinstance(quantized, Tensor) and isinstance(weight, Tensor) and isinstance(base, Tensor):
            seen = objectives.measure(weight, base, quantized)
        else:
            given = ", ".join(type(argument).__name__ for argument in (quantized, weight, base))
            raise TypeError(
                f"Expected the tensors (quantized, weight, base) or one DeltaStats, got ({given}); "
                "pass result.stats of a search, or the dequantized weight with the weight and its base."
            )
        self._add(seen)
        if self.reduction == "tensor_mean":
            value = self._value(seen).to(self.value_sum)
            self.value_sum = self.value_sum + torch.where(value.isnan(), 0.0, value)
            self.n_tensors = self.n_tensors + ~value.isnan()

    def compute(self) -> Tensor:
        """The value over everything seen: a float64 scalar, NaN when no element was seen."""
        return self._value(self.stats) if self.reduction == "pooled" else self.value_sum / self.n_tensors

    def _value(self, stats: DeltaStats) -> Tensor:
        return torch.where(stats.n > 0, self._score(stats), torch.nan)


class SignPreservationRate(_DeltaMetric):
    """Share of elements whose update keeps its sign, in [0, 1].

    Formula: ``mean(sign(delta_q) == sign(delta))`` with sign(0) = 0 (Eq. 8).

    Example:
        >>> SignPreservationRate()(torch.tensor([1.5, 2]), torch.tensor([1.25, 3]), torch.tensor([1.0, 2]))
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    _score = staticmethod(objectives.sign_rate)


class DeltaCosineSimilarity(_DeltaMetric):
    """Cosine between the update and what quantization left of it, in [-1, 1].

    Formula: ``dot(delta, delta_q) / sqrt(|delta|^2 |delta_q|^2)`` (Eq. 9); 1 if both are zero, 0 if exactly
    one is. It rises when the update is amplified: read it beside `DeltaGain`.

    Example:
        >>> DeltaCosineSimilarity()(torch.tensor([1.5, 2]), torch.tensor([1.3, 2.4]), torch.tensor([1.0, 2]))
        tensor(0.6000, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = True
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0
    _score = staticmethod(objectives.cosine)


class DeltaGain(_DeltaMetric):
    """Strength at which the update survives along its own direction: 1 in full, 0 not at all, above 1
    amplified.

    Formula: ``dot(delta, delta_q) / |delta|^2``. An update of zero has gain 1 if it is kept, else NaN.

    Example:
        >>> DeltaGain()(torch.tensor([1.5, 2.0]), torch.tensor([1.25, 2.0]), torch.tensor([1.0, 2.0]))
        tensor(2., dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = None
    _score = staticmethod(objectives.gain)


class DeltaMeanSquaredError(_DeltaMetric):
    """Mean squared error of the quantized weight, which is also that of the update (Eq. 6 and 7).

    Formula: ``mean((quantized - weight)^2)``, in squared units of the weight.

    Example:
        >>> DeltaMeanSquaredError()(torch.tensor([1.5, 2.0]), torch.tensor([1.25, 2.25]), torch.zeros(2))
        tensor(0.0625, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = False
    plot_lower_bound = 0.0
    _score = staticmethod(objectives.mse)


class DeltaNorm(_DeltaMetric):
    """Length of the update: how much there is to keep, in units of the weight.

    Formula: ``sqrt(sum(delta^2))`` over all elements.

    Example:
        >>> DeltaNorm()(torch.tensor([1.5, 2.0]), torch.tensor([1.3, 2.4]), torch.tensor([1.0, 2.0]))
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = None
    plot_lower_bound = 0.0
    _score = staticmethod(objectives.norm)


class DeltaNoise(_DeltaMetric):
    """Share of elements that training left alone and quantization did not, in [0, 1].

    Formula: ``mean(delta == 0 and delta_q != 0)``; 1 - sign rate is this and the shares flipped and lost.

    Example:
        >>> DeltaNoise()(torch.tensor([1.5, 2.5]), torch.tensor([1.25, 2.0]), torch.tensor([1.0, 2.0]))
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    _score = staticmethod(objectives.noise)


class PreservationByMagnitude(SumsMetric):
    """Share of elements whose update keeps its sign, by the size of the update: small ones go first.

    Formula: ``mean(sign(delta_q) == sign(delta))`` over the elements with delta = 0 ("unchanged"), 0 <
    |delta| < 1e-5, and so on; NaN in a bin without elements. All elements are pooled.

    Example:
        >>> metric = PreservationByMagnitude()
        >>> float(metric(torch.ones(2), torch.tensor([0.5, 1.5]), torch.zeros(2))["preserved_from_1e-3"])
        1.0
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    sums = MagnitudeStats
    keys = ("unchanged", "below_1e-5", "1e-5_to_1e-4", "1e-4_to_1e-3", "from_1e-3")

    def update(self, quantized: Tensor, weight: Tensor, base: Tensor) -> None:
        """Adds a weight: dequantized, fine-tuned and before fine-tuning, of one shape."""
        self._add(objectives.measure_by_magnitude(weight, base, quantized))

    def compute(self) -> dict[str, Tensor]:
        """The share of each bin, float64 scalars under "preserved_" and the bin."""
        shares = self.stats.preserved.double() / self.stats.n
        return {f"preserved_{key}": share for key, share in zip(self.keys, shares, strict=True)}
