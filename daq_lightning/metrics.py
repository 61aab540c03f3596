"""What quantization kept of an update, as torchmetrics: sign rate, cosine, gain and mean squared error.

    delta = weight - base,    delta_q = quantized - base,    value = function of sums over all elements seen

The states are the additive sums of `daq_lightning.numerics.objectives`, the same ones that the search scores.
They add over layers, steps and ranks, so a value is that of all elements together, not a mean of per-layer
values, and the four metrics share one update in a `MetricCollection`.

Counts are int64 (a float32 count sticks at 2^24) and sums float64; no cast of the module or of the metric
changes that. Under DDP every rank holds the same weights: give each rank other layers, or do not sync.

Sources: arXiv 2603.22324, Eq. 6 (mean squared error), 8 (sign rate), 9 (cosine).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from daq_lightning.numerics.objectives import DeltaStats, cosine, gain, measure, mse, sign_rate

_COUNTS = ("n", "n_changed", "sign_equal", "preserved", "flipped", "lost")


def delta_metrics(prefix: str | None = None, *, sync: bool = True) -> MetricCollection:
    """The four metrics, under the keys "sign_rate", "cosine", "gain" and "mse", with one update for all.

    Args:
        prefix: Put before every key, for example "daq/".
        sync: Whether `compute` adds up the sums of all ranks, which all ranks must then call. False where one
            rank alone has seen everything.

    Returns:
        A `MetricCollection` whose members form one compute group.

    Example:
        >>> metrics = delta_metrics(prefix="daq/")
        >>> metrics.update(torch.tensor([1.5, 2.0]), torch.tensor([1.25, 2.25]), torch.tensor([1.0, 2.0]))
        >>> {key: float(value) for key, value in metrics.compute().items()}["daq/sign_rate"]
        0.5
    """
    members: dict[str, Metric | MetricCollection] = {
        "sign_rate": SignPreservationRate(sync_on_compute=sync),
        "cosine": DeltaCosineSimilarity(sync_on_compute=sync),
        "gain": DeltaGain(sync_on_compute=sync),
        "mse": DeltaMeanSquaredError(sync_on_compute=sync),
    }
    return MetricCollection(members, prefix=prefix, compute_groups=[list(members)])


class _DeltaMetric(Metric):
    """A function of the additive sums; subclasses say which one. Takes the keyword arguments of `Metric`."""

    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        device = torch.get_default_device()
        if device.type == "meta":  # where sums would be lost
            device = torch.device("cpu")
        for field in DeltaStats._fields:
            dtype = torch.int64 if field in _COUNTS else torch.float64
            self.add_state(field, default=torch.zeros((), dtype=dtype, device=device), dist_reduce_fx="sum")

    @staticmethod
    @abstractmethod
    def _score(stats: DeltaStats) -> Tensor:
        """The value of sums of shape ()."""

    @property
    def stats(self) -> DeltaStats:
        """The sums of everything seen since the last reset, each of shape ()."""
        return DeltaStats(*(getattr(self, field) for field in DeltaStats._fields))

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
            seen = measure(weight, base, quantized)
        else:
            given = ", ".join(type(argument).__name__ for argument in (quantized, weight, base))
            raise TypeError(
                f"Expected the tensors (quantized, weight, base) or one DeltaStats, got ({given}); "
                "pass result.stats of a search, or the dequantized weight with the weight and its base."
            )
        for field, mine, new in zip(DeltaStats._fields, self.stats, seen, strict=True):
            setattr(self, field, mine + new.to(mine))

    def compute(self) -> Tensor:
        """The value over everything seen: a float64 scalar, NaN when no element was seen."""
        stats = self.stats
        return torch.where(stats.n > 0, self._score(stats), torch.nan)

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Draws one value, or a line of values over steps.

        Args:
            val: What `compute` or `forward` returned, or a list of such values; None calls `compute`.
            ax: A matplotlib axis; None makes a figure.

        Returns:
            The figure and its axis.

        Raises:
            ModuleNotFoundError: matplotlib is not installed (`pip install daq-lightning[plot]`).
        """
        return self._plot(val, ax)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        """Lets `fn` move the states, never cast them: `.to(dtype)` would ruin counts and sums."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, exclude_state)


class SignPreservationRate(_DeltaMetric):
    """Share of elements whose update keeps its sign, in [0, 1].

    Formula: ``mean(sign(delta_q) == sign(delta))`` with sign(0) = 0 (Eq. 8).

    Example:
        >>> metric = SignPreservationRate()
        >>> metric.update(torch.tensor([1.5, 2.0]), torch.tensor([1.25, 2.25]), torch.tensor([1.0, 2.0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    _score = staticmethod(sign_rate)


class DeltaCosineSimilarity(_DeltaMetric):
    """Cosine between the update and what quantization left of it, in [-1, 1].

    Formula: ``dot(delta, delta_q) / sqrt(|delta|^2 |delta_q|^2)`` (Eq. 9); 1 if both are zero, 0 if exactly
    one is. It rises when the update is amplified: read it beside `DeltaGain`.

    Example:
        >>> metric = DeltaCosineSimilarity()
        >>> metric.update(torch.tensor([1.5, 2.0]), torch.tensor([1.3, 2.4]), torch.tensor([1.0, 2.0]))
        >>> metric.compute()
        tensor(0.6000, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = True
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0
    _score = staticmethod(cosine)


class DeltaGain(_DeltaMetric):
    """Strength at which the update survives along its own direction: 1 in full, 0 not at all, above 1
    amplified.

    Formula: ``dot(delta, delta_q) / |delta|^2``. An update of zero has gain 1 if it is kept, else NaN.

    Example:
        >>> metric = DeltaGain()
        >>> metric.update(torch.tensor([1.5, 2.0]), torch.tensor([1.25, 2.0]), torch.tensor([1.0, 2.0]))
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = None
    _score = staticmethod(gain)


class DeltaMeanSquaredError(_DeltaMetric):
    """Mean squared error of the quantized weight, which is also that of the update (Eq. 6 and 7).

    Formula: ``mean((quantized - weight)^2)``, in squared units of the weight.

    Example:
        >>> metric = DeltaMeanSquaredError()
        >>> metric.update(torch.tensor([1.5, 2.0]), torch.tensor([1.25, 2.25]), torch.tensor([1.0, 2.0]))
        >>> metric.compute()
        tensor(0.0625, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = False
    plot_lower_bound = 0.0
    _score = staticmethod(mse)
