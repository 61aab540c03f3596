"""What an export says of itself: the report's lines of a batch, its notes, and config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from daq_lightning.checkpoint.families import family_of
from daq_lightning.checkpoint.manifest import KEPT
from daq_lightning.numerics.backends import delta_stats
from daq_lightning.numerics.objectives import DeltaStats, as_searched
from daq_lightning.numerics.rounding.written import stats_of_codes
from daq_lightning.numerics.search.stages import SearchResult
from daq_lightning.report.figures import ALPHA_STATISTICS, Side, TensorReport, alpha_statistics
from daq_lightning.report.recovery import note_on_merge
from daq_lightning.report.rounding import notes_on_rounding

if TYPE_CHECKING:
    from daq_lightning.export.job import Job
    from daq_lightning.export.rounding import Chosen
    from daq_lightning.export.sampled import Looked
    from daq_lightning.export.stream import Batch, Pair


def batch_reports(
    job: Job, batch: Batch, chosen: Sequence[Chosen], samples: Sequence[Looked | None]
) -> list[TensorReport]:
    """The lines of a batch in the report. All that they say leaves the device in one transfer.

    Args:
        job: What is exported.
        batch: Weights of one shape, or that share an input, with their bases.
        chosen: Their codes and scales.
        samples: What was looked at of each more closely, if anything.
    """
    sides = [_sides(job, pair, one) for pair, one in zip(batch, chosen, strict=True)]
    parts: list[Tensor] = []
    for one, of_tensor, looked in zip(chosen, sides, samples, strict=True):
        parts += [alpha_statistics(one.result.alpha), *(stats.packed() for stats in of_tensor.values())]
        parts += [] if looked is None else looked.packed()
    arrived = iter(torch.cat(parts).cpu().split([len(part) for part in parts]))
    reports = []
    for pair, of_tensor, one, looked in zip(batch, sides, chosen, samples, strict=True):
        alpha: dict[str, float] = dict(zip(ALPHA_STATISTICS, map(float, next(arrived).tolist()), strict=True))
        sums = {side: DeltaStats.unpacked(next(arrived)) for side in of_tensor}
        by_step = None if looked is None else looked.by_step(arrived)
        curve = None if looked is None else looked.alpha_curve(arrived)
        fits = bool(sums["dequantized"].delta_q_sq.isfinite())
        reports.append(
            TensorReport(
                name=pair.plan.spec.name,
                shape=pair.plan.spec.shape,
                dtype=str(pair.weight.dtype).removeprefix("torch."),
                scheme=pair.plan.layout.scheme.name,
                alpha=alpha,
                searched=sums["searched"],
                absmax=sums["absmax"],
                root=sums.get("root"),
                plain=sums.get("plain"),
                dequantized=sums["dequantized"] if fits else None,
                rounding=one.rounding,
                without_base=job.without_base.get(pair.plan.spec.name, ""),
                by_step=by_step,
                curve=curve,
            )
        )
    return reports


def _sides(job: Job, pair: Pair, chosen: Chosen) -> dict[Side, DeltaStats]:
    """The sums of one tensor, on its device."""
    result = chosen.result
    assert result.dequantized_stats is not None
    sides: dict[Side, DeltaStats] = {
        "searched": result.stats.total(),
        "absmax": result.absmax_stats.total(),
        "dequantized": result.dequantized_stats.total(),
    }
    root = _since_root(job, pair, result)
    if root is not None:
        sides["root"] = root
    if chosen.plain is not None:
        sides["plain"] = chosen.plain.total()
    return sides


def _since_root(job: Job, pair: Pair, result: SearchResult) -> DeltaStats | None:
    """Sums of what is written against the base of the chain's first stage, where that is at hand."""
    name = pair.plan.spec.name
    if job.root is None or name not in job.root:
        return None
    root = as_searched(job.root[name]).to(pair.weight.device)
    if root.shape != pair.weight.shape:
        return None
    layout, weight = pair.plan.layout, as_searched(pair.weight)
    if job.settings.by_curvature or job.kept is not None:
        return stats_of_codes(weight, root, result.codes, result.scale, layout.granularity, zero=result.zero)
    scale_G1 = result.scale.reshape(-1, 1)
    zero_G1 = None if result.zero is None else result.zero.reshape(-1, 1)
    stats = delta_stats(weight, root, scale_G1, layout.granularity, layout.scheme.format, zero_G1)
    return stats.total().map(lambda field: field[0])


def notes_of(job: Job, reports: Mapping[str, TensorReport]) -> list[str]:
    """What a reader of the report has to know: no change at all, weights without a base, and casts."""
    measured = [report.searched for name, report in reports.items() if name not in job.without_base]
    notes = [] if job.placement is None else job.placement.lines()
    family = family_of(job.plan.layouts.scheme)
    if measured and not any(bool(stats.n_changed) for stats in measured):
        notes.append(
            f"no weight changed ({len(measured)} compared): is the base (--base) the model before training?"
        )
    if job.kept is not None and measured:
        merged = note_on_merge(list(reports.values()), job.plan.layouts.scheme)
        notes += [merged] if merged else []
    notes += [f"{name}: plain absmax scale, because {problem}." for name, problem in job.without_base.items()]
    notes += [
        f"{name}: to a reader that dequantizes to {str(job.plan.dtype).removeprefix('torch.')} some of its "
        f"values are infinite: serve it with {family} kernels, or keep it (ignore)."
        for name, report in reports.items()
        if report.dequantized is None
    ]
    notes += notes_on_rounding({name: report.rounding for name, report in reports.items()})
    kept = [tensor for tensor in job.plan.tensors if not tensor.quantize]
    cast = [tensor for tensor in kept if tensor.stored[KEPT].dtype != tensor.spec.dtype]
    if cast:
        notes.append(
            f"{len(cast)} kept tensors were cast from {str(cast[0].spec.dtype).removeprefix('torch.')} to "
            f"{str(job.plan.dtype).removeprefix('torch.')}, which readers need."
        )
    return notes


def config_of(job: Job) -> dict[str, Any]:
    """config.json of the export: the model's own, in the dtype of the kept tensors, and how it is
    quantized."""
    assert job.source.config is not None

    def with_dtype(level: Mapping[str, Any], top: bool) -> dict[str, Any]:
        result = {
            key: with_dtype(value, False) if isinstance(value, Mapping) and key.endswith("_config") else value
            for key, value in level.items()
            if key not in ("dtype", "torch_dtype", "quantization_config")
        }
        if top or "dtype" in level or "torch_dtype" in level:
            result["dtype"] = str(job.plan.dtype).removeprefix("torch.")
        return result

    return with_dtype(job.source.config, True) | {"quantization_config": job.quantization_config}
