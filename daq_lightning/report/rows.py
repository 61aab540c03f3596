"""A report by layer and projection: the rows of tables and heat maps, as many as a person can look at.

    model.layers.3.mlp.experts.17.down_proj.weight  ->  layer "model.layers.3", projection
                                                        "mlp.experts.*.down_proj"

The first number of a name is its layer; any later one counts experts and the like, whose sums are added.

The share that is served is 1 - |gain - 1|, not below 0: an update at 1.9 times its strength is not served
to 190 %. Over several weights it is their mean by delta^2, so that one that is amplified does not make up
for one that is lost:

    served = sum of max(0, delta_sq - |dot - delta_sq|) / sum of delta_sq
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from daq_lightning.numerics.objectives import DeltaStats
from daq_lightning.report.figures import ALPHA_STATISTICS, ExportReport, Side, TensorReport, figures
from daq_lightning.report.levels import level_of
from daq_lightning.report.names import split_name

SIDES: tuple[Side, ...] = ("searched", "absmax", "dequantized")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What became of the update of one or more weights, for one kind of reader.

    A figure that says nothing is None: without an update there is no gain.

    Attributes:
        served: Share of the update that is served at its strength, 0 to 1.
        gain: Strength along the update's direction.
        cosine: Between the update and what is left of it.
        sign_rate: Share of elements whose change keeps its sign.
        lost: Share of the CHANGED elements that come out as the value of the base.
        flipped: Share of the changed elements that come out on the other side of the base.
        noise: Norm of the rounding error over the norm of the update.
        delta_rms: Root of the mean squared change, over all elements, in units of the weight.
        error_rms: The same of the rounding error.
        delta_sq: Sum of the squared changes.
        changed: Share of elements that training changed.
    """

    served: float | None
    gain: float | None
    cosine: float | None
    sign_rate: float | None
    lost: float | None
    flipped: float | None
    noise: float | None
    delta_rms: float | None
    error_rms: float | None
    delta_sq: float
    changed: float | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One projection of one layer.

    Attributes:
        name: The weight, or for several the pattern with `*` in place of a number.
        layer: Up to its first number; "" if it has none.
        projection: What comes after.
        names: The weights, in file order.
        worst_name: That of them of which least is served.
        worst_served: How much of it; None without an update.
        poor: How many of them are bad on their own.
        shape: Of the first.
        alpha: min, mean, max and moved; means over the weights.
        searched: Under the written scales, in FP8 kernels.
        absmax: Under plain scales.
        dequantized: Of the written scales for readers that dequantize; None where not all were measured.
        without_base: Why it was not compared; "" if it was.
    """

    name: str
    layer: str
    projection: str
    names: tuple[str, ...]
    worst_name: str
    worst_served: float | None
    poor: int
    shape: tuple[int, ...]
    alpha: dict[str, float]
    searched: Figures
    absmax: Figures
    dequantized: Figures | None
    without_base: str

    @property
    def measured(self) -> bool:
        """Whether there is an update to speak of."""
        return not self.without_base and self.searched.served is not None

    def to_dict(self) -> dict[str, Any]:
        """Its entry in the data to download."""
        sides = {side: vars(of_side) for side in SIDES if (of_side := getattr(self, side)) is not None}
        about = {
            "weights": len(self.names),
            "worst": self.worst_name,
            "worst_served": self.worst_served,
            "shape": list(self.shape),
        }
        without = {"without_base": self.without_base} if self.without_base else {}
        return {"name": self.name, **about, "alpha": self.alpha, **sides, **without}


def figures_of(stats: Sequence[DeltaStats]) -> Figures:
    """The figures of some weights together."""
    listed = [[field.item() for field in of_tensor] for of_tensor in stats]
    sums = torch.tensor(listed, dtype=torch.float64, device="cpu")  # (weights, sums)
    added = DeltaStats(*sums.sum(0))
    values = figures(added)
    n, changed, delta_sq = float(added.n), float(added.n_changed), float(added.delta_sq)
    update, error = math.sqrt(delta_sq), math.sqrt(float(added.error_sq))
    each = DeltaStats(*sums.unbind(1))
    served = (each.delta_sq - (each.dot - each.delta_sq).abs()).clamp(min=0).sum()
    has_update = delta_sq > 0
    return Figures(
        served=_finite(float(served) / delta_sq) if has_update else None,
        gain=_finite(values["gain"]) if has_update else None,
        cosine=_finite(values["cosine"]) if has_update else None,
        sign_rate=_finite(values["sign_rate"]),
        lost=_finite(float(added.lost) / changed) if changed > 0 else None,
        flipped=_finite(float(added.flipped) / changed) if changed > 0 else None,
        noise=_finite(error / update) if has_update else None,
        delta_rms=_finite(update / math.sqrt(n)) if n > 0 else None,
        error_rms=_finite(error / math.sqrt(n)) if n > 0 else None,
        delta_sq=delta_sq if math.isfinite(delta_sq) else 0.0,
        changed=_finite(changed / n) if n > 0 else None,
    )


def rows_of(report: ExportReport) -> list[Row]:
    """A row for every layer and projection, in file order."""
    groups: dict[tuple[str, str, str, str], list[TensorReport]] = {}
    for tensor in report.tensors:
        prefix, layer, projection = split_name(tensor.name)
        groups.setdefault((prefix, layer, projection, tensor.without_base), []).append(tensor)
    return [
        _row(layer, projection, without_base, members)
        for (_, layer, projection, without_base), members in groups.items()
    ]


def totals_of(report: ExportReport) -> dict[Side, Figures]:
    """The figures of all weights that have a base, for each side that was measured for all of them."""
    measured = [tensor for tensor in report.tensors if not tensor.without_base]
    stats: dict[Side, list[Any]] = {side: [getattr(tensor, side) for tensor in measured] for side in SIDES}
    return {side: figures_of(of_side) for side, of_side in stats.items() if measured and None not in of_side}


def _row(layer: str, projection: str, without_base: str, members: Sequence[TensorReport]) -> Row:
    each = [_served_of_one(member.searched) for member in members]
    worst = min(range(len(each)), key=each.__getitem__)  # the first of equals
    alphas = [[float(member.alpha[key]) for member in members] for key in ALPHA_STATISTICS]
    reduced = (min(alphas[0]), _mean(alphas[1]), max(alphas[2]), _mean(alphas[3]))
    read = [member.dequantized for member in members if member.dequantized is not None]
    return Row(
        name=members[0].name if len(members) == 1 else ".".join(filter(None, (layer, projection))),
        layer=layer,
        projection=projection,
        names=tuple(member.name for member in members),
        worst_name=members[worst].name,
        worst_served=_finite(each[worst]),
        poor=0 if without_base else sum(level_of(_finite(served)) == "bad" for served in each),
        shape=members[0].shape,
        alpha=dict(zip(ALPHA_STATISTICS, reduced, strict=True)),
        searched=figures_of([member.searched for member in members]),
        absmax=figures_of([member.absmax for member in members]),
        dequantized=figures_of(read) if len(read) == len(members) else None,
        without_base=without_base,
    )


def _served_of_one(stats: DeltaStats) -> float:
    """The share that is served of one weight; infinite without an update."""
    dot, delta_sq = float(stats.dot), float(stats.delta_sq)
    return max(0.0, 1 - abs(dot / delta_sq - 1)) if delta_sq > 0 else math.inf


def _mean(values: Sequence[float]) -> float:
    return sum(value / len(values) for value in values)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
