"""From a job to an FP8 checkpoint: the one way a weight takes.

    Pair(plan, weight, base) -> search -> codes, scale -> file
                                       -> sums         -> report

Weights are read, searched and written one batch at a time: while one is searched, the next is read and the
last is written by threads of their own. Nothing here knows whether a mapping is a folder, a model on a GPU or
a merge of adapters.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from daq_lightning.checkpoint.destination import check_destination, check_inputs
from daq_lightning.checkpoint.folder import MANIFEST, REPORT
from daq_lightning.checkpoint.manifest import KEPT
from daq_lightning.checkpoint.writer import CheckpointWriter
from daq_lightning.export.behind import Behind
from daq_lightning.export.manifest import TensorPrints, make_manifest, prints_of
from daq_lightning.export.plan import TensorPlan
from daq_lightning.export.stream import Batch, Pair, stream
from daq_lightning.numerics.backends import delta_stats
from daq_lightning.numerics.objectives import DeltaStats
from daq_lightning.numerics.search.search import search_batch
from daq_lightning.numerics.search.stages import SearchResult
from daq_lightning.report.figures import ALPHA_STATISTICS, ExportReport, Side, TensorReport, alpha_statistics

if TYPE_CHECKING:
    from daq_lightning.export.job import Job


def run(
    job: Job,
    out: Path,
    *,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> ExportReport:
    """Writes the checkpoint of a job.

    Args:
        job: What `prepare` settled.
        out: Destination folder. An earlier export there is replaced on success; anything else is refused.
        device: Where to search; None searches where each weight lies.
        progress: Whether to show how far it is.

    Returns:
        The report, also written as `daq_report.json`.

    Raises:
        CheckpointError: A tensor cannot be read, or the destination cannot be written.
        ValueError: NaN or Inf in a weight, by name.
    """
    check_inputs(out, job.inputs())
    check_destination(out)
    reports: dict[str, TensorReport] = {}
    prints: dict[str, TensorPrints] = {}
    with (
        CheckpointWriter(out, job.plan.stored, job.settings.max_shard_bytes) as writer,
        Behind() as behind,
        contextlib.closing(stream(job, device=device, progress=progress)) as batches,
    ):

        def write(plan: TensorPlan, stored: Mapping[str, Tensor]) -> None:
            for part, tensor in stored.items():
                writer.write(plan.stored[part].name, tensor)

        def finish(pair: Pair, result: SearchResult) -> None:
            stored = job.plan.layout.pack(result.codes, result.scale)
            write(pair.plan, stored)
            prints[pair.plan.spec.name] = prints_of(stored, pair.weight, pair.base)

        def finish_kept(plan: TensorPlan, stored: Mapping[str, Tensor]) -> None:
            write(plan, stored)
            prints[plan.spec.name] = prints_of(stored)

        for batch in batches:
            if not batch[0].plan.quantize:
                [(plan, tensor, _)] = batch
                _check_finite(tensor, plan.spec.name)
                behind.run(finish_kept, plan, {KEPT: tensor.to(plan.stored[KEPT].dtype)})
                continue
            results = _search(job, batch)
            for pair, report, result in zip(batch, _reports(job, batch, results), results, strict=True):
                reports[pair.plan.spec.name] = report
                behind.run(finish, pair, result)
        behind.wait()
        report = ExportReport(
            path=str(out),
            scheme=job.plan.layout.scheme.name,
            search=dataclasses.asdict(job.settings.search),
            tensors=tuple(reports[tensor.spec.name] for tensor in job.plan.quantized),
            kept={tensor.spec.name: tensor.reason for tensor in job.plan.tensors if not tensor.quantize},
            notes=(*job.plan.notes, *_notes(job, reports)),
            dtype=str(job.plan.dtype).removeprefix("torch."),
        )
        writer.add_files(job.source.copy_files)
        if job.source.config is not None:
            writer.write_json("config.json", _config(job))
        writer.write_json(REPORT, report.to_dict())
        writer.write_json(MANIFEST, make_manifest(job, prints, writer.folder, out).to_dict())
        writer.publish()
    return report


def _search(job: Job, batch: Batch) -> list[SearchResult]:
    """The scales of a batch; without a base, a weight searched against itself keeps its absmax scale."""
    weights = [as_searched(pair.weight) for pair in batch]
    bases = [
        weight if pair.base is None else as_searched(pair.base)
        for weight, pair in zip(weights, batch, strict=True)
    ]
    return search_batch(
        weights,
        bases,
        job.plan.layout.granularity,
        job.settings.search,
        scale_format=job.plan.layout.scale_format,
        fmt=job.plan.layout.scheme.format,
        names=[pair.plan.spec.name for pair in batch],
        reader_dtype=job.plan.dtype,
    )


def _reports(job: Job, batch: Batch, results: Sequence[SearchResult]) -> list[TensorReport]:
    """The lines of a batch in the report. All that they say leaves the device in one transfer."""
    sides = [_sides(job, pair, result) for pair, result in zip(batch, results, strict=True)]
    parts: list[Tensor] = []
    for result, of_tensor in zip(results, sides, strict=True):
        parts += [alpha_statistics(result.alpha), *(stats.packed() for stats in of_tensor.values())]
    arrived = iter(torch.cat(parts).cpu().split([len(part) for part in parts]))
    reports = []
    for pair, of_tensor in zip(batch, sides, strict=True):
        alpha: dict[str, float] = dict(zip(ALPHA_STATISTICS, map(float, next(arrived).tolist()), strict=True))
        sums = {side: DeltaStats.unpacked(next(arrived)) for side in of_tensor}
        fits = bool(sums["dequantized"].delta_q_sq.isfinite())
        reports.append(
            TensorReport(
                name=pair.plan.spec.name,
                shape=pair.plan.spec.shape,
                dtype=str(pair.weight.dtype).removeprefix("torch."),
                scheme=job.plan.layout.scheme.name,
                alpha=alpha,
                searched=sums["searched"],
                absmax=sums["absmax"],
                root=sums.get("root"),
                dequantized=sums["dequantized"] if fits else None,
                without_base=job.without_base.get(pair.plan.spec.name, ""),
            )
        )
    return reports


def _sides(job: Job, pair: Pair, result: SearchResult) -> dict[Side, DeltaStats]:
    """The sums of one tensor, on its device."""
    assert result.dequantized_stats is not None
    sides: dict[Side, DeltaStats] = {
        "searched": result.stats.total(),
        "absmax": result.absmax_stats.total(),
        "dequantized": result.dequantized_stats.total(),
    }
    root = _since_root(job, pair, result.scale)
    if root is not None:
        sides["root"] = root
    return sides


def _since_root(job: Job, pair: Pair, scale: Tensor) -> DeltaStats | None:
    """Sums of the written scales against the base of the chain's first stage, where that is at hand."""
    name = pair.plan.spec.name
    if job.root is None or name not in job.root:
        return None
    root = as_searched(job.root[name]).to(pair.weight.device)
    if root.shape != pair.weight.shape:
        return None
    layout = job.plan.layout
    scale_G1 = scale.reshape(-1, 1)
    stats = delta_stats(as_searched(pair.weight), root, scale_G1, layout.granularity, layout.scheme.format)
    return stats.total().map(lambda field: field[0])


def _notes(job: Job, reports: Mapping[str, TensorReport]) -> list[str]:
    """What a reader of the report has to know: no change at all, weights without a base, and casts."""
    measured = [report.searched for name, report in reports.items() if name not in job.without_base]
    notes = []
    if measured and not any(bool(stats.n_changed) for stats in measured):
        notes.append(
            f"no weight changed ({len(measured)} compared): is the base (--base) the model before training?"
        )
    notes += [f"{name}: plain absmax scale, because {problem}." for name, problem in job.without_base.items()]
    notes += [
        f"{name}: to a reader that dequantizes to {str(job.plan.dtype).removeprefix('torch.')} some of its "
        "values are infinite: serve it with FP8 kernels, or keep it (ignore)."
        for name, report in reports.items()
        if report.dequantized is None
    ]
    kept = [tensor for tensor in job.plan.tensors if not tensor.quantize]
    cast = [tensor for tensor in kept if tensor.stored[KEPT].dtype != tensor.spec.dtype]
    if cast:
        notes.append(
            f"{len(cast)} kept tensors were cast from {str(cast[0].spec.dtype).removeprefix('torch.')} to "
            f"{str(job.plan.dtype).removeprefix('torch.')}, which FP8 readers need."
        )
    return notes


def _config(job: Job) -> dict[str, Any]:
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

    quantization = job.plan.layout.quantization_config(job.plan.ignore)
    return with_dtype(job.source.config, True) | {"quantization_config": quantization}


def _check_finite(tensor: Tensor, name: str) -> None:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    low, high = tensor.detach().aminmax()
    if not bool(low.isfinite() & high.isfinite()):
        raise ValueError(
            f"{name} has {int(tensor.isnan().sum())} NaN and {int(tensor.isinf().sum())} Inf values: the "
            "training run has diverged or the file is damaged. Export an earlier checkpoint."
        )


def check_device(device: str | torch.device | None) -> None:
    """Raises ValueError for a device that does not exist here or does not compute, such as "meta"."""
    if device is None:
        return
    try:
        torch.ones(1, dtype=torch.float32, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error


def as_searched(tensor: Tensor) -> Tensor:
    """A weight in the dtype in which it is searched and measured: float64 as float32, any other as it is."""
    return tensor.float() if tensor.dtype == torch.float64 else tensor
