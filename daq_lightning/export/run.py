"""From two mappings of tensors to an FP8 checkpoint: the one way a weight takes.

    (name, weight), base[name] -> search -> codes, scale -> file
                                         -> sums         -> report

Weights are read, searched and written one tensor at a time: while one is searched, the next is read and the last is
written by threads of their own. Nothing here knows whether a mapping is a folder, a model on a GPU or a merge of
adapters.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from daq_lightning.checkpoint.fingerprint import fingerprint
from daq_lightning.checkpoint.folder import MANIFEST, REPORT
from daq_lightning.checkpoint.layouts import Container, Scheme
from daq_lightning.checkpoint.manifest import ChainFrom
from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.checkpoint.writer import DEFAULT_SHARD_BYTES, CheckpointWriter, check_destination, check_inputs
from daq_lightning.export.job import (
    Context,
    ExportSettings,
    inputs_of,
    lineage_of,
    make_context,
    make_plan,
    match_base,
)
from daq_lightning.export.manifest import (
    as_searched,
    make_config,
    make_fingerprints,
    make_manifest,
    make_notes,
    make_report,
)
from daq_lightning.export.plan import ExportPlan, TensorPlan
from daq_lightning.export.source import Source
from daq_lightning.export.stream import WriteBehind, read_ahead, with_progress
from daq_lightning.numerics.formats import ScaleFormat
from daq_lightning.numerics.objectives import DeltaStats
from daq_lightning.numerics.search.search import search_batch
from daq_lightning.numerics.search.settings import ScaleSearch
from daq_lightning.report.figures import ExportReport, TensorReport, settings
from daq_lightning.report.readers import dequantized_stats

_BATCH = 64 << 20  # bytes of weights that are searched together
Weights: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor]


def export_checkpoint(
    weights: Weights,
    base: Weights,
    out: str | os.PathLike[str],
    *,
    scheme: Scheme = "auto",
    search: ScaleSearch | None = None,
    ignore: Iterable[str] = (),
    container: Container | None = None,
    scale_format: ScaleFormat | None = None,
    missing_base: Literal["error", "absmax"] = "error",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    parent: str | None = None,
    chain_from: ChainFrom | None = None,
    device: str | None = None,
    progress: bool = False,
) -> ExportReport:
    """Writes an FP8 checkpoint whose scales preserve the difference between two sets of weights.

    Args:
        weights: The fine-tuned model: a Hugging Face folder, or checkpoint names -> tensors.
        base: The model it was trained from, likewise. An FP8 folder is dequantized.
        out: Destination folder. An earlier export there is replaced on success; anything else is refused.
        scheme: See `ExportSettings`, also for the following five.
        search: None takes the defaults of `ScaleSearch`.
        ignore: Modules to keep in high precision.
        container: Of the layout.
        scale_format: Of the scales.
        missing_base: "error" or "absmax".
        max_shard_bytes: Size at which a new file begins.
        parent: Folder of the export that this stage of a chain follows; None takes `base` if it is one.
        chain_from: Makes this a stage of a chain: whether it was trained from the parent's high-precision "weights" or
            its "deployed" ones.
        device: Where to search; None searches where each weight lies.
        progress: Whether to show a progress bar.

    Returns:
        The report, also written as `daq_report.json`.

    Raises:
        CheckpointError: A folder cannot be read, base and weights do not fit, or the destination cannot be written.
        ValueError: NaN or Inf in a weight, a device that is not there, or settings that contradict each other.

    Source: arXiv 2603.22324, Algorithm 1.
    """
    out, parent = Path(out).expanduser(), None if parent is None else os.path.expanduser(parent)
    check_device(device)
    source = Source.from_mapping(weights) if isinstance(weights, Mapping) else Source.from_folder(weights)
    choices = ExportSettings(
        scheme=scheme,
        search=ScaleSearch() if search is None else search,
        ignore=tuple(ignore),
        container=container,
        scale_format=scale_format,
        missing_base=missing_base,
        max_shard_bytes=max_shard_bytes,
    )
    reference = base if isinstance(base, Mapping) else Checkpoint(base)
    names = [tensor.spec.name for tensor in make_plan(source, choices).quantized]
    context = make_context(reference, names, parent=parent, chain_from=chain_from)
    return export(source, reference, out, choices, context=context, device=device, progress=progress)


def check_device(device: str | torch.device | None) -> None:
    """Raises ValueError for a device that does not exist here or does not compute, such as "meta"."""
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error


def export(
    source: Source,
    base: Mapping[str, Tensor],
    out: Path,
    choices: ExportSettings,
    *,
    context: Context | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> ExportReport:
    """`export_checkpoint` for a source, settings and a context that are made already."""
    context = context or Context(lineage=lineage_of(base))
    check_inputs(out, inputs_of(source, base, context))
    check_destination(out)
    plan = make_plan(source, choices)
    base_names, without_base = match_base(plan, base, source, choices)
    reports: dict[str, TensorReport] = {}
    prints: dict[str, dict[str, Any]] = {}
    dequantized: dict[str, DeltaStats] = {}
    with CheckpointWriter(out, plan.stored, choices.max_shard_bytes) as writer, WriteBehind() as behind:

        def finish(tensor: TensorPlan, stored: tuple[Tensor, ...], weight: Tensor, reference: Tensor | None) -> None:
            for spec, values in zip(tensor.stored, stored, strict=True):
                writer.write(spec.name, values)
            prints[tensor.spec.name] = make_fingerprints(stored, weight, reference) if tensor.quantize else {
                "stored": fingerprint(stored[0])
            }  # fmt: skip
            if tensor.quantize:
                known = weight if reference is None else reference
                stats = dequantized_stats(weight, known, stored[0], stored[1], plan.layout.granularity, plan.dtype)
                dequantized[tensor.spec.name] = stats.map(Tensor.cpu)

        batches = _batches(plan, choices.search)
        order = [tensor for batch in batches for tensor in batch]
        weights = read_ahead(source.weights, [tensor.spec.name for tensor in order])
        bases = read_ahead(base, [base_names[tensor.spec.name] for tensor in order if tensor.spec.name in base_names])
        for batch in with_progress(batches, progress):
            values = [next(weights) for _ in batch]
            if device is not None:
                values = [weight.to(device) for weight in values]
            if not batch[0].quantize:
                _check_finite(values[0], batch[0].spec.name)
                behind.run(finish, batch[0], (values[0].to(batch[0].stored[0].dtype),), values[0], None)
                continue
            references = [
                next(bases).to(weight.device) if tensor.spec.name in base_names else None
                for tensor, weight in zip(batch, values, strict=True)
            ]
            searched = [as_searched(weight) for weight in values]
            results = search_batch(
                searched,
                [
                    weight if known is None else as_searched(known)
                    for weight, known in zip(searched, references, strict=True)
                ],
                plan.layout.granularity,
                choices.search,
                scale_format=plan.layout.scale_format,
                names=[tensor.spec.name for tensor in batch],
            )
            for tensor, weight, reference, result in zip(batch, values, references, results, strict=True):
                note = without_base.get(tensor.spec.name, "")
                reports[tensor.spec.name] = make_report(tensor, weight, result, plan, context, note)
                behind.run(finish, tensor, (result.codes, result.scale), weight, reference)
        behind.wait()
        report = ExportReport(
            path=str(out),
            scheme=plan.layout.scheme,
            search=settings(choices.search),
            tensors=tuple(
                dataclasses.replace(reports[tensor.spec.name], dequantized=dequantized[tensor.spec.name])
                for tensor in plan.quantized
            ),
            kept={tensor.spec.name: tensor.reason for tensor in plan.tensors if not tensor.quantize},
            notes=(*plan.notes, *make_notes(plan, without_base, reports)),
            dtype=str(plan.dtype).removeprefix("torch."),
        )
        writer.add_files(source.copy_files)
        quantization = plan.layout.quantization_config(plan.ignore)
        if source.config is not None:
            writer.write_json("config.json", make_config(source.config, quantization, plan.dtype))
        writer.write_json(REPORT, report.to_dict())
        writer.write_json(MANIFEST, make_manifest(plan, choices, context, prints, writer.folder, out).to_dict())
        writer.publish()
    return report


def _batches(plan: ExportPlan, search: ScaleSearch) -> list[tuple[TensorPlan, ...]]:
    """What is searched together: experts of one layer and shape, up to a bounded size; everything else by itself."""
    batches: list[list[TensorPlan]] = []
    open_batches: dict[tuple[str, tuple[int, ...]], list[TensorPlan]] = {}
    for tensor in plan.tensors:
        layer, found, _ = tensor.spec.name.rpartition(".experts.")
        if not (tensor.quantize and tensor.role == "expert" and found and search.alpha_scope == "group"):
            batches.append([tensor])
            continue
        batch = open_batches.setdefault((layer, tensor.spec.shape), [])
        if not batch or (len(batch) + 1) * tensor.spec.nbytes > _BATCH:
            batch = open_batches[layer, tensor.spec.shape] = []
            batches.append(batch)
        batch.append(tensor)
    return [tuple(batch) for batch in batches]


def _check_finite(tensor: Tensor, name: str) -> None:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    low, high = tensor.detach().aminmax()
    if not bool(low.isfinite() & high.isfinite()):
        raise ValueError(
            f"{name} has {int(tensor.isnan().sum())} NaN and {int(tensor.isinf().sum())} Inf values: the training run "
            "has diverged or the file is damaged. Export an earlier checkpoint."
        )
