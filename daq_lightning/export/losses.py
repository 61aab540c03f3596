"""What a weight would lose on each rung of a ladder, for those that choose: one weight at a time.

    curvature    tr(E^T H_out E H_in) / tokens       E = what is written - weight; statistics of the run
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
from typing import TYPE_CHECKING, Literal, TypeAlias

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


def kind_of(job: Job, names: Sequence[str]) -> tuple[LossKind, str]:
    """What all weights of an export are compared by, and why it is not the curvature if one was collected.

    Args:
        job: The export.
        names: The weights to compare.
    """
    if job.curvature is None:
        return "update", ""
    known = {name: found for name in names if (found := job.curvature.get(name)) is not None and found.tokens}
    missing = [name for name in names if name not in known and ".experts." not in name]
    if missing or not known:
        some = f", such as {missing[0]}" if missing else ""
        return "update", f"of {len(missing) or len(names)} weights no curvature was collected{some}"
    if any(found.inputs is None for found in known.values()):
        return "update", "of some weights the inputs were not collected"
    sides = {found.outputs is not None for found in known.values()}
    return ("curvature" if sides == {True} else "inputs"), ""


def losses_of(
    job: Job, pair: Pair, layouts: Mapping[str, Layout | None], kind: LossKind, search: SearchScales
) -> dict[str, float]:
    """What a weight would lose.

    Args:
        job: The export.
        pair: The weight and its base.
        layouts: Rung -> layout; None keeps the weight in the dtype of what is kept.
        kind: As `kind_of` says.
        search: Finds the scales of weights in their layouts.

    Returns:
        Rung -> loss.

    Raises:
        ValueError: NaN or Inf in the weight, by name.
    """
    rows = rows_of(pair.weight.shape[0])
    statistics = None if job.curvature is None or kind == "update" else job.curvature.get(pair.plan.spec.name)
    return {
        rung: _loss(job, pair, _error(job, pair, layout, rows, search), rows, kind, statistics)
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


def _loss(
    job: Job, pair: Pair, error_RN: Tensor, rows: Sequence[slice], kind: LossKind, known: Statistics | None
) -> float:
    share = pair.weight.shape[0] / error_RN.shape[0]
    if kind == "update":
        weight_RN = _seen(pair.weight, rows).double()
        delta_RN = weight_RN - weight_RN if pair.base is None else weight_RN - _seen(pair.base, rows).double()
        size = float(delta_RN.square().sum()) or float(weight_RN.square().sum()) or 1.0
        return float(error_RN.double().square().sum()) / size
    if known is None or not known.tokens or known.inputs is None:  # an expert that no token reached
        return 0.0
    seen_RN = error_RN @ known.inputs.to(error_RN)
    if kind == "inputs" or known.outputs is None:
        return share * float((seen_RN * error_RN).sum(dtype=torch.float64)) / known.tokens
    outputs_MM = known.outputs.to(error_RN)
    if len(rows) == 1:
        return float((outputs_MM @ error_RN * seen_RN).sum(dtype=torch.float64)) / known.tokens
    weights_R1 = _seen(outputs_MM.diagonal(), rows)[:, None]
    return share * float((weights_R1 * seen_RN * error_RN).sum(dtype=torch.float64)) / known.tokens
