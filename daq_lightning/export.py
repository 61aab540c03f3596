"""From two mappings of tensors to an FP8 checkpoint: the one way a weight takes.

    (name, weight), base[name] -> search -> codes, scale -> file
                                         -> sums         -> report

Weights are read, searched and written one tensor at a time: while one is searched, the next is read and the last is
written by threads of their own. Nothing here knows whether a mapping is a folder, a model on a GPU or a merge of
adapters.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from daq_lightning.architecture import Architecture
from daq_lightning.checkpoint.layouts import Container, Scheme, make_layout
from daq_lightning.checkpoint.reader import MANIFEST, REPORT, Checkpoint, companion_files
from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorSpec
from daq_lightning.checkpoint.writer import DEFAULT_SHARD_BYTES, CheckpointWriter, check_destination
from daq_lightning.numerics.formats import ScaleFormat
from daq_lightning.numerics.search import ScaleSearch, search_scale
from daq_lightning.plan import ExportPlan, TensorPlan, plan_export
from daq_lightning.report import ExportReport, TensorReport, alpha_statistics, settings

MANIFEST_VERSION = 1
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


@dataclass(frozen=True, kw_only=True)
class Source:
    """The fine-tuned model, wherever it is.

    Attributes:
        weights: Checkpoint name -> tensor, may be lazy.
        specs: The same names with dtypes and shapes, in file order.
        keys: Checkpoint name -> memory name.
        architecture: The model's modules.
        config: Content of config.json, or None for a model that has none.
        copy_files: Puts tokenizer, generation config and the like into a folder.
    """

    weights: Mapping[str, Tensor]
    specs: tuple[TensorSpec, ...]
    keys: Mapping[str, str]
    architecture: Architecture
    config: Mapping[str, Any] | None
    copy_files: Callable[[Path], None]

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Source:
        """The source that a Hugging Face model folder is."""
        checkpoint = Checkpoint(path)
        architecture = Architecture.from_folder(checkpoint.path)
        keys = architecture.keys_of(checkpoint)
        _check_complete(checkpoint, architecture, keys)
        return cls(
            weights=checkpoint,
            specs=tuple(
                spec
                for name, spec in checkpoint.specs.items()
                if not _is_tied_copy(name, checkpoint, architecture, keys)
            ),
            keys=keys,
            architecture=architecture,
            config=checkpoint.config,
            copy_files=lambda folder: _copy_companions(checkpoint.path, folder),
        )

    @classmethod
    def from_mapping(cls, weights: Mapping[str, Tensor], model: nn.Module | None = None) -> Source:
        """The source that tensors under checkpoint names are.

        Args:
            weights: Checkpoint name -> tensor.
            model: Says what the tensors are (may be on the meta device). None takes every matrix named `*.weight`
                for a Linear weight, unless its name speaks of an embedding, norm, router or head.
        """
        architecture = Architecture(_guess_modules(weights) if model is None else model)
        specs = tuple(
            TensorSpec(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape)) for name, tensor in weights.items()
        )
        return cls(
            weights=weights,
            specs=specs,
            keys=architecture.keys_of(weights),
            architecture=architecture,
            config=None,
            copy_files=lambda folder: None,
        )


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
    return export(source, reference, Path(out), choices, device=device, progress=progress)


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


def export(
    source: Source,
    base: Mapping[str, Tensor],
    out: Path,
    choices: ExportSettings,
    *,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> ExportReport:
    """`export_checkpoint` for a source and settings that are made already."""
    check_destination(out)
    for role, mapping in (("weights", source.weights), ("base", base)):
        if isinstance(mapping, Checkpoint) and mapping.path.resolve() == out.resolve():
            raise CheckpointError(f"{out} is the folder of the {role}: choose another destination.")
    plan = make_plan(source, choices)
    base_names, without_base = match_base(plan, base, source, choices)
    reports: list[TensorReport] = []
    with CheckpointWriter(out, plan.stored, choices.max_shard_bytes) as writer, _Behind() as behind:
        weights = _stream(source.weights, [tensor.spec.name for tensor in plan.tensors])
        bases = _stream(base, [base_names[tensor.spec.name] for tensor in plan.quantized
                               if tensor.spec.name in base_names])  # fmt: skip
        for tensor, weight in zip(_with_progress(plan.tensors, progress), weights, strict=True):
            if device is not None:
                weight = weight.to(device)
            if not tensor.quantize:
                _check_finite(weight, tensor.spec.name)
                behind.run(writer.write, tensor.spec.name, weight.to(tensor.stored[0].dtype))
                continue
            note = without_base.get(tensor.spec.name, "")
            reference = weight if note else next(bases).to(weight.device)
            report, stored = _search_one(tensor, weight, reference, plan, choices, note)
            reports.append(report)
            for spec, values in zip(tensor.stored, stored, strict=True):
                behind.run(writer.write, spec.name, values)
        behind.wait()
        report = ExportReport(
            path=str(out),
            scheme=plan.layout.scheme,
            search=settings(choices.search),
            tensors=tuple(reports),
            kept={tensor.spec.name: tensor.reason for tensor in plan.tensors if not tensor.quantize},
            notes=(*plan.notes, *_notes(plan, without_base)),
        )
        writer.add_files(source.copy_files)
        quantization = plan.layout.quantization_config(plan.ignore)
        writer.write_json(MANIFEST, _manifest(plan, quantization))
        writer.write_json(REPORT, report.to_dict())
        writer.publish(None if source.config is None else _make_config(source.config, quantization, plan.dtype))
    return report


def _search_one(
    tensor: TensorPlan, weight: Tensor, base: Tensor, plan: ExportPlan, choices: ExportSettings, note: str
) -> tuple[TensorReport, tuple[Tensor, Tensor]]:
    result = search_scale(
        weight,
        base,
        plan.layout.granularity,
        choices.search,
        scale_format=plan.layout.scale_format,
        name=tensor.spec.name,
    )
    report = TensorReport(
        name=tensor.spec.name,
        shape=tensor.spec.shape,
        dtype=str(weight.dtype).removeprefix("torch."),
        scheme=plan.layout.scheme,
        alpha=alpha_statistics(result.alpha),
        searched=result.stats.total().map(Tensor.cpu),
        absmax=result.absmax_stats.total().map(Tensor.cpu),
        note=note,
    )
    return report, (result.codes, result.scale)


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


def _check_complete(checkpoint: Checkpoint, architecture: Architecture, keys: Mapping[str, str]) -> None:
    missing = architecture.missing(keys.values())
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise CheckpointError(
            f"{checkpoint.path} lacks {', '.join(missing[:4])}{more}, which the model of its config.json has: the "
            "folder is incomplete. Copy or save it again."
        )
    parameters = dict(architecture.model.named_parameters(remove_duplicate=False))
    for name, spec in checkpoint.specs.items():
        expected = parameters.get(keys[name])
        if keys[name] == name and expected is not None and tuple(expected.shape) != spec.shape:
            raise CheckpointError(
                f"{checkpoint.path}: {name} has shape {spec.shape}, by config.json it should have "
                f"{tuple(expected.shape)}. Files and config.json are of different models."
            )


def _is_tied_copy(name: str, checkpoint: Checkpoint, architecture: Architecture, keys: Mapping[str, str]) -> bool:
    """Whether this is a second copy of a tied tensor, which no export writes."""
    target = architecture.tied_to(keys[name])
    original = next((other for other, key in keys.items() if key == target), None) if target else None
    if original is None or original == name:
        return False
    if not torch.equal(checkpoint[name], checkpoint[original]):
        raise CheckpointError(
            f"{checkpoint.path}: by config.json {name} is tied to {original}, but the files hold different values, of "
            "which servers would use only one. Set tie_word_embeddings to false in config.json or save the model again."
        )
    return True


def _notes(plan: ExportPlan, without_base: Mapping[str, str]) -> list[str]:
    notes = [f"{name}: plain absmax scale, because {problem}." for name, problem in without_base.items()]
    cast = [tensor for tensor in plan.tensors if not tensor.quantize and tensor.stored[0].dtype != tensor.spec.dtype]
    if cast:
        notes.append(
            f"{len(cast)} kept tensors were cast from {str(cast[0].spec.dtype).removeprefix('torch.')} to "
            f"{str(plan.dtype).removeprefix('torch.')}, which FP8 readers need."
        )
    return notes


def _manifest(plan: ExportPlan, quantization: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format_version": MANIFEST_VERSION,
        "scheme": plan.layout.scheme,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "quantization_config": dict(quantization),
    }


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


def _copy_companions(source: Path, folder: Path) -> None:
    for file in companion_files(source):
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def _guess_modules(weights: Mapping[str, Tensor]) -> nn.Module:
    """A skeleton whose Linear modules are the matrices that look like Linear weights by name."""
    root = nn.Module()
    for name, tensor in weights.items():
        path, _, parameter = name.rpartition(".")
        words = path.lower()
        kept = any(word in words for word in ("embed", "norm", "router", "wte", "wpe")) or words.endswith(
            (".gate", "shared_expert_gate")
        )
        if parameter != "weight" or tensor.ndim != 2 or kept or not path:
            continue
        parent, (*parents, leaf) = root, path.split(".")
        for part in parents:  # not add_module, which refuses names such as "type"
            parent = parent._modules.setdefault(part, nn.Module()) or root
        with torch.device("meta"):
            linear = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
        if leaf in parent._modules:
            linear._modules.update(parent._modules[leaf]._modules)  # type: ignore[union-attr]
        parent._modules[leaf] = linear
    return root


def _stream(mapping: Mapping[str, Tensor], names: list[str]) -> Iterator[Tensor]:
    """The tensors of some names in order; those of a folder are read one ahead by a thread."""
    if not isinstance(mapping, Checkpoint):
        yield from (mapping[name] for name in names)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        ahead: deque[Future[Tensor]] = deque()
        for name in names:
            ahead.append(pool.submit(mapping.__getitem__, name))
            if len(ahead) > 1:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


class _Behind:
    """Runs calls one after the other in a thread; at most two wait. An error surfaces in the next call."""

    def __enter__(self) -> _Behind:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write-behind")
        self._pending: deque[Future[None]] = deque()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, function: Callable[[str, Tensor], None], name: str, tensor: Tensor) -> None:
        self._pending.append(self._pool.submit(function, name, tensor))
        while len(self._pending) > 2:
            self._pending.popleft().result()

    def wait(self) -> None:
        while self._pending:
            self._pending.popleft().result()


def _with_progress(tensors: tuple[TensorPlan, ...], progress: bool) -> Iterator[TensorPlan]:
    if not progress:
        yield from tensors
        return
    total = sum(spec.nbytes for tensor in tensors for spec in tensor.stored)
    if not sys.stderr.isatty():
        yield from _with_lines(tensors, total)
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc="FP8 export", dynamic_ncols=True) as bar:
        for tensor in tensors:
            yield tensor
            bar.update(sum(spec.nbytes for spec in tensor.stored))


def _with_lines(tensors: tuple[TensorPlan, ...], total: int) -> Iterator[TensorPlan]:
    """Progress for a log file: one line in five seconds, and one at the end."""
    done, start, last = 0, time.monotonic(), time.monotonic()
    for tensor in tensors:
        yield tensor
        done += sum(spec.nbytes for spec in tensor.stored)
        now = time.monotonic()
        if done == total or now - last > 5:
            last, rate = now, done / max(now - start, 1e-9)
            print(
                f"FP8 export: {done / max(total, 1):.0%} of {total / 1e9:.3g} GB, {rate / 1e6:.3g} MB/s, "
                f"{(total - done) / max(rate, 1e-9):.0f} s left",
                file=sys.stderr,
                flush=True,
            )
