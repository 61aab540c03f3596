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
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from daq_lightning.checkpoint.fingerprint import combine, fingerprint
from daq_lightning.checkpoint.layouts import Container, Scheme, make_layout
from daq_lightning.checkpoint.lineage import make_lineage
from daq_lightning.checkpoint.manifest import ChainFrom, Lineage, Manifest, describe_files, relative_to
from daq_lightning.checkpoint.reader import INDEX, MANIFEST, REPORT, Checkpoint
from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.checkpoint.writer import DEFAULT_SHARD_BYTES, CheckpointWriter, check_destination
from daq_lightning.numerics.batch import search_batch
from daq_lightning.numerics.candidates import ScaleSearch
from daq_lightning.numerics.formats import ScaleFormat
from daq_lightning.numerics.kernels import delta_stats
from daq_lightning.numerics.search import SearchResult
from daq_lightning.pipeline import WriteBehind, read_ahead, with_progress
from daq_lightning.plan import ExportPlan, TensorPlan, plan_export
from daq_lightning.report import ExportReport, TensorReport, alpha_statistics, settings
from daq_lightning.source import Source

_BATCH = 64 << 20  # bytes of weights that are searched together
Weights: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Everything that decides what an export writes.

    Attributes:
        scheme: "FP8_BLOCK", "FP8_DYNAMIC", "FP8A16", or "auto": blocks where all sizes allow it, else channels.
        search: Objective and candidates of the scale search.
        ignore: Modules to keep as they are: full names, or `re:` patterns of full names.
        container: "fp8" or "compressed-tensors"; None takes the scheme's usual one.
        scale_format: None, or "ue8m0" for scales that are powers of two.
        missing_base: What to do with a weight that the base lacks or has in another shape: "error", or "absmax" to
            quantize it without a search and say so in the report.
        max_shard_bytes: Size at which a new safetensors file begins.
    """

    scheme: Scheme = "auto"
    search: ScaleSearch = field(default_factory=ScaleSearch)
    ignore: tuple[str, ...] = ()
    container: Container | None = None
    scale_format: ScaleFormat | None = None
    missing_base: Literal["error", "absmax"] = "error"
    max_shard_bytes: int = DEFAULT_SHARD_BYTES

    def __post_init__(self) -> None:
        if self.scheme != "auto":
            make_layout(self.scheme, container=self.container, scale_format=self.scale_format)
        if self.missing_base not in ("error", "absmax"):
            raise ValueError(f"Unknown missing_base {self.missing_base!r}: expected 'error' or 'absmax'.")
        if self.max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes must be at least 1, got {self.max_shard_bytes}.")


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
        ValueError: NaN or Inf in a weight, or settings that contradict each other.

    Source: arXiv 2603.22324, Algorithm 1.
    """
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
    return export(source, reference, Path(out), choices, context=context, device=device, progress=progress)


def make_plan(source: Source, choices: ExportSettings) -> ExportPlan:
    """The plan of an export: reads no weight and writes nothing."""
    return plan_export(
        source.specs,
        source.keys,
        source.architecture,
        scheme=choices.scheme,
        container=choices.container,
        scale_format=choices.scale_format,
        ignore=choices.ignore,
    )


@dataclass(frozen=True, kw_only=True)
class Context:
    """Where an export belongs, beyond the weights themselves.

    Attributes:
        lineage: Its place in a chain of exports.
        root: The base of the first stage: what is kept of the change since then is reported too.
        training: Step, epoch and checkpoint of the run that made the weights.
    """

    lineage: Lineage = field(default_factory=Lineage)
    root: Mapping[str, Tensor] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)


def make_context(
    base: Mapping[str, Tensor], names: Iterable[str], *, parent: str | None = None, chain_from: ChainFrom | None = None
) -> Context:
    """The context of an export outside a training run; its arguments and errors are those of `make_lineage`."""
    lineage, root = make_lineage(_lineage_of(base), base, names, parent=parent, chain_from=chain_from)
    return Context(lineage=lineage, root=root)


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
    check_destination(out)
    context = context or Context(lineage=_lineage_of(base))
    for role, mapping in (("weights", source.weights), ("base", base), ("chain's root", context.root)):
        if isinstance(mapping, Checkpoint) and mapping.path.resolve() == out.resolve():
            raise CheckpointError(f"{out} is the folder of the {role}: choose another destination.")
    plan = make_plan(source, choices)
    base_names, without_base = match_base(plan, base, source, choices)
    reports: dict[str, TensorReport] = {}
    prints: dict[str, dict[str, Any]] = {}
    with CheckpointWriter(out, plan.stored, choices.max_shard_bytes) as writer, WriteBehind() as behind:

        def finish(tensor: TensorPlan, stored: tuple[Tensor, ...], weight: Tensor, reference: Tensor | None) -> None:
            for spec, values in zip(tensor.stored, stored, strict=True):
                writer.write(spec.name, values)
            prints[tensor.spec.name] = _fingerprints(stored, weight, reference) if tensor.quantize else {
                "stored": fingerprint(stored[0])
            }  # fmt: skip

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
            results = search_batch(
                values,
                [weight if known is None else known for weight, known in zip(values, references, strict=True)],
                plan.layout.granularity,
                choices.search,
                scale_format=plan.layout.scale_format,
                names=[tensor.spec.name for tensor in batch],
            )
            for tensor, weight, reference, result in zip(batch, values, references, results, strict=True):
                note = without_base.get(tensor.spec.name, "")
                reports[tensor.spec.name] = _report(tensor, weight, result, plan, context, note)
                behind.run(finish, tensor, (result.codes, result.scale), weight, reference)
        behind.wait()
        report = ExportReport(
            path=str(out),
            scheme=plan.layout.scheme,
            search=settings(choices.search),
            tensors=tuple(reports[tensor.spec.name] for tensor in plan.quantized),
            kept={tensor.spec.name: tensor.reason for tensor in plan.tensors if not tensor.quantize},
            notes=(*plan.notes, *_notes(plan, without_base)),
        )
        writer.add_files(source.copy_files)
        quantization = plan.layout.quantization_config(plan.ignore)
        if source.config is not None:
            writer.write_json("config.json", _make_config(source.config, quantization, plan.dtype))
        writer.write_json(REPORT, report.to_dict())
        writer.write_json(MANIFEST, _manifest(plan, choices, context, prints, writer.folder, out).to_dict())
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


def _report(
    tensor: TensorPlan, weight: Tensor, result: SearchResult, plan: ExportPlan, context: Context, note: str
) -> TensorReport:
    root = None
    if context.root is not None and tensor.spec.name in context.root:
        ancestor = context.root[tensor.spec.name].to(weight.device)
        if ancestor.shape == weight.shape:
            scale_G1 = result.scale.reshape(-1, 1)
            root = delta_stats(weight, ancestor, scale_G1, plan.layout.granularity).total().map(lambda field: field[0])
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


def _fingerprints(stored: tuple[Tensor, ...], weight: Tensor, base: Tensor | None) -> dict[str, Any]:
    """Fingerprints of a quantized tensor. Float32 weights are known by their bfloat16 copy as well, which is what a
    run usually saves of them."""
    forms = {str(weight.dtype).removeprefix("torch."): fingerprint(weight)}
    if weight.dtype == torch.float32:
        forms["bfloat16"] = fingerprint(weight.bfloat16())
    return {
        "base": "" if base is None else fingerprint(base),
        "weights": forms,
        "codes": fingerprint(stored[0]),
        "scale": fingerprint(stored[1]),
    }


def match_base(
    plan: ExportPlan, base: Mapping[str, Tensor], source: Source, choices: ExportSettings
) -> tuple[dict[str, str], dict[str, str]]:
    """Weight name -> base name for every quantized weight, and why the others have none."""
    by_identity: dict[tuple[str, str], str] = {}
    if isinstance(base, Checkpoint) and any(tensor.spec.name not in base for tensor in plan.quantized):
        by_identity = {_identity(name, key): name for name, key in source.architecture.keys_of(base).items()}
    names, problems = {}, {}
    for tensor in plan.quantized:
        name = tensor.spec.name
        base_name = name if name in base else by_identity.get(_identity(name, tensor.key), name)
        if base_name not in base:
            problems[name] = "the base has no such weight"
            continue
        shape = base.specs[base_name].shape if isinstance(base, Checkpoint) else tuple(base[base_name].shape)
        if shape != tensor.spec.shape:
            problems[name] = f"the base has shape {shape}, the weight {tensor.spec.shape}"
        else:
            names[name] = base_name
    if problems and choices.missing_base == "error":
        listed = "; ".join(f"{name}: {problem}" for name, problem in list(problems.items())[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        where = f" {base.path}" if isinstance(base, Checkpoint) else ""
        raise CheckpointError(
            f"The base{where} does not fit {len(problems)} of {len(plan.quantized)} weights: {listed}{more}. Pass the "
            "model that this one was trained from, or missing_base='absmax' to quantize those weights without a search."
        )
    return names, problems


def _identity(name: str, key: str) -> tuple[str, str]:
    """What a tensor is whatever prefix its checkpoint uses: memory name, and which slice of a stack of experts."""
    _, found, expert = name.rpartition(".experts.")
    return key, expert if found else ""


def _notes(plan: ExportPlan, without_base: Mapping[str, str]) -> list[str]:
    notes = [f"{name}: plain absmax scale, because {problem}." for name, problem in without_base.items()]
    cast = [tensor for tensor in plan.tensors if not tensor.quantize and tensor.stored[0].dtype != tensor.spec.dtype]
    if cast:
        notes.append(
            f"{len(cast)} kept tensors were cast from {str(cast[0].spec.dtype).removeprefix('torch.')} to "
            f"{str(plan.dtype).removeprefix('torch.')}, which FP8 readers need."
        )
    return notes


def _lineage_of(base: Mapping[str, Tensor]) -> Lineage:
    """The lineage of an export that is not part of a chain."""
    path = str(base.path.absolute()) if isinstance(base, Checkpoint) else ""
    return Lineage(base_kind="folder" if path else "memory", base_path=path, root=path)


def _manifest(
    plan: ExportPlan,
    choices: ExportSettings,
    context: Context,
    prints: Mapping[str, Mapping[str, Any]],
    folder: Path,
    out: Path,
) -> Manifest:
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


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a checkout
        return "unknown"


def _make_config(config: Mapping[str, Any], quantization: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
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


def _check_finite(tensor: Tensor, name: str) -> None:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    low, high = tensor.detach().aminmax()
    if not bool(low.isfinite() & high.isfinite()):
        raise ValueError(
            f"{name} has {int(tensor.isnan().sum())} NaN and {int(tensor.isinf().sum())} Inf values: the training run "
            "has diverged or the file is damaged. Export an earlier checkpoint."
        )
