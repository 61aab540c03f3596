"""The manifest of an export, which signs all that was read and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from daq_lightning.checkpoint.fingerprint import combine
from daq_lightning.checkpoint.folder import INDEX, MANIFEST
from daq_lightning.checkpoint.manifest import (
    KEPT,
    Manifest,
    describe_files,
    package_version,
    relative_to,
)

if TYPE_CHECKING:
    from daq_lightning.export.finished import TensorPrints
    from daq_lightning.export.job import Job


def make_manifest(job: Job, prints: Mapping[str, TensorPrints], folder: Path, out: Path | None) -> Manifest:
    """The manifest of an export.

    Args:
        job: What was exported.
        prints: Tensor name -> its fingerprints.
        folder: Where its files are now.
        out: Where they will be, and paths are kept relative to it; None for another machine.
    """
    plan, lineage = job.plan, job.lineage
    tensors = {tensor.spec.name: prints[tensor.spec.name] for tensor in plan.quantized}
    kept = {tensor.spec.name: prints[tensor.spec.name] for tensor in plan.tensors if not tensor.quantize}
    here, budget = None if out is None else out.absolute(), job.settings.budget
    weight_files = frozenset(file.name for file in folder.glob("*.safetensors"))
    training = dict(job.training)
    if training.get("checkpoint"):
        training["checkpoint"] = relative_to(training["checkpoint"], here)
    return Manifest(
        scheme=plan.layouts.scheme,
        dtype=str(plan.dtype).removeprefix("torch."),
        quantization_config=job.quantization_config,
        settings={
            "search": dataclasses.asdict(job.settings.scale_search),
            "rounding": job.settings.rounding,
            "ignore": list(job.settings.ignore),
            **({} if job.calibration is None else {"calibration": job.calibration.described()}),
            **({} if job.settings.kv_cache is None else {"kv_cache": job.settings.kv_cache}),
            **({} if budget is None else {"budget": budget, "ladder": list(job.settings.ladder)}),
        },
        versions={name: package_version(name) for name in ("daq-lightning", "torch", "transformers")},
        lineage=dataclasses.replace(
            lineage,
            base_fingerprint=combine({name: entry.base for name, entry in tensors.items() if entry.base}),
            parent=relative_to(lineage.parent, here),
            base_path=relative_to(lineage.base_path, here),
            root=relative_to(lineage.root, here),
        ),
        tensors={name: entry.to_dict() for name, entry in tensors.items()},
        kept={name: entry.stored[KEPT] for name, entry in kept.items()},
        files=describe_files(folder, skip=weight_files | {MANIFEST, INDEX}),
        training=training,
    )
