"""What a weight would lose on each rung of a ladder, for those that choose: one weight at a time.

Each weight is measured in every way that its statistics allow; all are compared by the best that all have.

    curvature    c tr(E^T H_out E H_in) / tokens     E = what is written - weight; statistics of the run;
                                                     c = `Statistics.dependence`
    inputs       tr(E H_in E^T) / tokens             where no gradient was collected
    update       |E|^2 / |D|^2                       D = weight - base
                 |E|^2 / |W|^2                       a weight that has no base or did not change

Scales are searched as for the export, codes rounded to nearest. Of a large weight some bands of rows are
looked at and stand for all; of H_out they see the diagonal, for the errors of different rows hardly depend on
each other.

Legend: M out, N in, R rows that are looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from daq_lightning.numerics.objectives import as_searched
from daq_lightning.numerics.quantize import dequantize

if TYPE_CHECKING:
    from daq_lightning.checkpoint.layouts import Layout
    from daq_lightning.export.job import Job
    from daq_lightning.export.stream import Pair
    from daq_lightning.numerics.rounding.statistics import Statistics
    from daq_lightning.numerics.search.settings import ScaleSearch
    from daq_lightning.numerics.search.stages import SearchResult

SearchScales: TypeAlias = "Callable[[Job, Sequence[Pair], ScaleSearch], list[SearchResult]]"
LossKind: TypeAlias = Literal["curvature", "inputs", "update"]
_BAND, _BANDS = 128, 4  # rows of the tallest group of weights that share a scale, and how often
_WHOLE = 2 * _BAND * _BANDS  # up to here all rows are looked at


class Losses(NamedTuple):
    """What a weight would lose on one rung, measured in each of the ways.

    Attributes:
        update: As in the module; always known.
        inputs: None where no inputs were seen.
        curvature: None where no gradient came either.
    """

    update: float
    inputs: float | None
    curvature: float | None


def kind_of(measured: Mapping[str, Mapping[str, Losses]], *, collected: bool) -> tuple[LossKind, str]:
    """What all weights of an export are compared by, and why it is not the curvature if one was collected.

    Args:
        measured: Name -> rung -> losses, of all of them.
        collected: Whether a curvature was.

    Example:
        >>> kind_of({"a": {"W4A16": Losses(0.1, 2.0, None)}}, collected=True)
        ('inputs', '')
    """
    if not collected or not measured:
        return "update", ""
    of_each = {name: next(iter(rungs.values())) for name, rungs in measured.items()}
    missing = [name for name, one in of_each.items() if one.inputs is None and ".experts." not in name]
    seen = [one for one in of_each.values() if one.inputs is not None]
    if missing or not seen:
        some = f", such as {missing[0]}" if missing else ""
        return "update", f"of {len(missing) or len(of_each)} weights no curvature was collected{some}"
    return ("inputs" if any(one.curvature is None for one in seen) else "curvature"), ""


def losses_of(
    job: Job, pair: Pair, layouts: Mapping[str, Layout | None], search: SearchScales
) -> dict[str, Losses]:
    """What a weight would lose.

    Args:
        job: The export, with what was collected of the weight.
        pair: The weight and its base.
        layouts: Rung -> layout; None keeps the weight in the dtype of what is kept.
        search: Finds the scales of weights in their layouts.

    Returns:
        Rung -> losses.

    Raises:
        ValueError: NaN or Inf in the weight, by name.
    """
    rows = rows_of(pair.weight.shape[0])
    known = None if job.curvature is None else job.curvature.get(pair.plan.spec.name)
    return {
        rung: _losses(pair, _error(job, pair, layout, rows, search), rows, known)
        for rung, layout in layouts.items()
    }


def rows_of(count: int) -> list[slice]:
    """The rows of a weight that are looked at: all, or bands evenly over its height that begin where groups
    do.

    Example:
        >>> rows_of(1000), rows_of(4096)[1]
        ([slice(0, 1000, None)], slice(1536, 1664, None))
    """
    if count <= _WHOLE:
        return [slice(0, count)]
    bands = count // _BAND
    starts = [(2 * index + 1) * bands // (2 * _BANDS) * _BAND for index in range(_BANDS)]
    return [slice(start, start + _BAND) for start in starts]


def _seen(tensor_MN: Tensor, rows: Sequence[slice]) -> Tensor:
    return torch.cat([tensor_MN[band] for band in rows]) if len(rows) > 1 else tensor_MN


def _error(
    job: Job, pair: Pair, layout: Layout | None, rows: Sequence[slice], search: SearchScales
) -> Tensor:
    """E of the rows that are looked at: float32 (R, N)."""
    weight_RN = _seen(pair.weight, rows)
    if layout is None:
        return weight_RN.to(job.plan.dtype).float() - weight_RN.float()
    base_RN = None if pair.base is None else _seen(pair.base, rows)
    spec = dataclasses.replace(pair.plan.spec, shape=tuple(weight_RN.shape))
    plan = dataclasses.replace(pair.plan, form=layout, spec=spec)
    part = pair._replace(plan=plan, weight=weight_RN, base=base_RN)
    [result] = search(job, [part], job.settings.scale_search)
    read_RN = dequantize(result.codes, result.scale, layout.granularity, torch.float32, result.zero)
    return read_RN - as_searched(weight_RN).float()


def _losses(pair: Pair, error_RN: Tensor, rows: Sequence[slice], known: Statistics | None) -> Losses:
    weight_RN = _seen(pair.weight, rows).double()
    delta_RN = weight_RN - weight_RN if pair.base is None else weight_RN - _seen(pair.base, rows).double()
    size = float(delta_RN.square().sum()) or float(weight_RN.square().sum()) or 1.0
    update = float(error_RN.double().square().sum()) / size
    if known is None or not known.tokens or known.inputs is None:
        return Losses(update, None, None)
    share = pair.weight.shape[0] / error_RN.shape[0] / known.tokens
    seen_RN = error_RN @ known.inputs.to(error_RN)
    inputs = share * float((seen_RN * error_RN).sum(dtype=torch.float64))
    if known.outputs is None:
        return Losses(update, inputs, None)
    outputs_MM = known.outputs.to(error_RN)
    if len(rows) == 1:
        weighted_RN = outputs_MM @ error_RN
    else:
        weighted_RN = _seen(outputs_MM.diagonal(), rows)[:, None] * error_RN
    whole = float((weighted_RN * seen_RN).sum(dtype=torch.float64))
    return Losses(update, inputs, share * known.dependence * whole)
