"""Fingerprints of what an export read and wrote, and the manifest that signs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from daq_lightning.checkpoint.fingerprint import combine, fingerprint
from daq_lightning.checkpoint.folder import INDEX, MANIFEST
from daq_lightning.checkpoint.manifest import KEPT, Manifest, describe_files, relative_to

if TYPE_CHECKING:
    from daq_lightning.export.job import Job


@dataclass(frozen=True, kw_only=True)
class TensorPrints:
    """Fingerprints of one tensor.

    Attributes:
        stored: Part, as its layout names it, -> what the file holds.
        weights: dtype -> the weight that a quantized tensor was made from. Float32 and float64 weights are
            known by their bfloat16 copy as well, which is what a run usually saves of them.
        base: The base that it was searched against; "" without one.
    """

    stored: Mapping[str, str]
    weights: Mapping[str, str] = field(default_factory=dict)
    base: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The entry of a quantized tensor in the manifest."""
        return {"base": self.base, "weights": dict(self.weights), **self.stored}


def prints_of(
    stored: Mapping[str, Tensor], weight: Tensor | None = None, base: Tensor | None = None
) -> TensorPrints:
    """The fingerprints of a tensor.

    Args:
        stored: Part -> tensor, as written.
        weight: What a quantized tensor was made from; None for one that is kept.
        base: What it was searched against, if anything.
    """
    weights = {}
    if weight is not None:
        weights[str(weight.dtype).removeprefix("torch.")] = fingerprint(weight)
        if weight.dtype in (torch.float32, torch.float64):
            weights["bfloat16"] = fingerprint(weight.bfloat16())
    return TensorPrints(
        stored={part: fingerprint(tensor) for part, tensor in stored.items()},
        weights=weights,
        base="" if base is None else fingerprint(base),
    )


def make_manifest(job: Job, prints: Mapping[str, TensorPrints], folder: Path, out: Path) -> Manifest:
    """The manifest of an export.

    Args:
        job: What was exported.
        prints: Tensor name -> its fingerprints.
        folder: Where its files are now.
        out: Where they will be; paths are kept relative to it.
    """
    plan, lineage = job.plan, job.lineage
    tensors = {tensor.spec.name: prints[tensor.spec.name] for tensor in plan.quantized}
    kept = {tensor.spec.name: prints[tensor.spec.name] for tensor in plan.tensors if not tensor.quantize}
    here = out.absolute()
    weight_files = frozenset(file.name for file in folder.glob("*.safetensors"))
    training = dict(job.training)
    if training.get("checkpoint"):
        training["checkpoint"] = relative_to(training["checkpoint"], here)
    return Manifest(
        scheme=plan.layout.scheme.name,
        dtype=str(plan.dtype).removeprefix("torch."),
        quantization_config=plan.layout.quantization_config(plan.ignore),
        settings={"search": dataclasses.asdict(job.settings.search), "ignore": list(job.settings.ignore)},
        versions={name: _version(name) for name in ("daq-lightning", "torch", "transformers")},
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


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a checkout
        return "unknown"
