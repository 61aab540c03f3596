"""What an export writes beside its tensors: report, fingerprints, manifest, config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daq_lightning.checkpoint.fingerprint import combine, fingerprint
from daq_lightning.checkpoint.folder import INDEX, MANIFEST
from daq_lightning.checkpoint.manifest import Manifest, describe_files, relative_to
from daq_lightning.export.job import Context, ExportSettings
from daq_lightning.export.plan import ExportPlan, TensorPlan
from daq_lightning.numerics.backends import delta_stats
from daq_lightning.numerics.search.stages import SearchResult
from daq_lightning.report.figures import TensorReport, alpha_statistics, settings


def as_searched(tensor: Tensor) -> Tensor:
    """A weight in the dtype in which it is searched and measured: float64 as float32, any other as it is."""
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def make_report(
    tensor: TensorPlan, weight: Tensor, result: SearchResult, plan: ExportPlan, context: Context, note: str
) -> TensorReport:
    """The line of one quantized tensor in the report, from what its search found."""
    root = None
    if context.root is not None and tensor.spec.name in context.root:
        ancestor = as_searched(context.root[tensor.spec.name]).to(weight.device)
        if ancestor.shape == weight.shape:
            scale_G1 = result.scale.reshape(-1, 1)
            root = (
                delta_stats(as_searched(weight), ancestor, scale_G1, plan.layout.granularity)
                .total()
                .map(lambda field: field[0])
            )
    return TensorReport(
        name=tensor.spec.name,
        shape=tensor.spec.shape,
        dtype=str(weight.dtype).removeprefix("torch."),
        scheme=plan.layout.scheme,
        alpha=alpha_statistics(result.alpha),
        searched=result.stats.total().map(Tensor.cpu),
        absmax=result.absmax_stats.total().map(Tensor.cpu),
        root=None if root is None else root.map(Tensor.cpu),
        note=note,
    )


def make_notes(plan: ExportPlan, without_base: Mapping[str, str], reports: Mapping[str, TensorReport]) -> list[str]:
    """What a reader of the report has to know: no change at all, weights without a base (name -> why), and casts."""
    measured = [report.searched for name, report in reports.items() if name not in without_base]
    notes = []
    if measured and not any(bool(stats.n_changed) for stats in measured):
        notes.append(f"no weight changed ({len(measured)} compared): is the base (--base) the model before training?")
    notes += [f"{name}: plain absmax scale, because {problem}." for name, problem in without_base.items()]
    cast = [tensor for tensor in plan.tensors if not tensor.quantize and tensor.stored[0].dtype != tensor.spec.dtype]
    if cast:
        notes.append(
            f"{len(cast)} kept tensors were cast from {str(cast[0].spec.dtype).removeprefix('torch.')} to "
            f"{str(plan.dtype).removeprefix('torch.')}, which FP8 readers need."
        )
    return notes


def make_fingerprints(stored: tuple[Tensor, ...], weight: Tensor, base: Tensor | None) -> dict[str, Any]:
    """Fingerprints of a quantized tensor. Float32 and float64 weights are known by their bfloat16 copy as well, which
    is what a run usually saves of them."""
    forms = {str(weight.dtype).removeprefix("torch."): fingerprint(weight)}
    if weight.dtype in (torch.float32, torch.float64):
        forms["bfloat16"] = fingerprint(weight.bfloat16())
    return {
        "base": "" if base is None else fingerprint(base),
        "weights": forms,
        "codes": fingerprint(stored[0]),
        "scale": fingerprint(stored[1]),
    }


def make_manifest(
    plan: ExportPlan,
    choices: ExportSettings,
    context: Context,
    prints: Mapping[str, Mapping[str, Any]],
    folder: Path,
    out: Path,
) -> Manifest:
    """The manifest of an export.

    Args:
        plan: What was written.
        choices: The settings.
        context: Where it belongs.
        prints: Tensor name -> its fingerprints.
        folder: Where its files are now.
        out: Where they will be; paths are kept relative to it.
    """
    tensors = {tensor.spec.name: prints[tensor.spec.name] for tensor in plan.quantized}
    paths = {
        name: relative_to(getattr(context.lineage, name), out.absolute()) for name in ("parent", "base_path", "root")
    }
    base_fingerprint = combine({name: entry["base"] for name, entry in tensors.items() if entry["base"]})
    weight_files = frozenset(file.name for file in folder.glob("*.safetensors"))
    training = dict(context.training)
    if training.get("checkpoint"):
        training["checkpoint"] = relative_to(training["checkpoint"], out.absolute())
    return Manifest(
        scheme=plan.layout.scheme,
        dtype=str(plan.dtype).removeprefix("torch."),
        quantization_config=plan.layout.quantization_config(plan.ignore),
        settings={"search": settings(choices.search), "ignore": list(choices.ignore)},
        versions={name: _version(name) for name in ("daq-lightning", "torch", "transformers")},
        lineage=dataclasses.replace(context.lineage, base_fingerprint=base_fingerprint, **paths),
        tensors=tensors,
        kept={tensor.spec.name: prints[tensor.spec.name]["stored"] for tensor in plan.tensors if not tensor.quantize},
        files=describe_files(folder, skip=weight_files | {MANIFEST, INDEX}),
        training=training,
    )


def make_config(config: Mapping[str, Any], quantization: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the export: the model's own, in the dtype of the kept tensors, and how it is quantized."""

    def with_dtype(level: Mapping[str, Any], top: bool) -> dict[str, Any]:
        result = {
            key: with_dtype(value, False) if isinstance(value, Mapping) and key.endswith("_config") else value
            for key, value in level.items()
            if key not in ("dtype", "torch_dtype", "quantization_config")
        }
        if top or "dtype" in level or "torch_dtype" in level:
            result["dtype"] = str(dtype).removeprefix("torch.")
        return result

    return with_dtype(config, True) | {"quantization_config": dict(quantization)}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a checkout
        return "unknown"
