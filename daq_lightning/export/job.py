"""What is settled before an export reads its first weight: settings, plan, the base of every weight, the lineage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from daq_lightning.checkpoint.layouts import Container, Scheme, make_layout
from daq_lightning.checkpoint.manifest import ChainFrom, Lineage, Manifest
from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.checkpoint.writer import DEFAULT_SHARD_BYTES
from daq_lightning.export.lineage import make_lineage
from daq_lightning.export.plan import ExportPlan, plan_export
from daq_lightning.export.source import Source
from daq_lightning.numerics.formats import ScaleFormat
from daq_lightning.numerics.search.settings import ScaleSearch


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
    lineage, root = make_lineage(lineage_of(base), base, names, parent=parent, chain_from=chain_from)
    return Context(lineage=lineage, root=root)


def inputs_of(source: Source, base: Mapping[str, Tensor], context: Context) -> list[tuple[str, Path]]:
    """The folders and files that an export reads or names as its origin, with their roles."""
    inputs = [
        (role, place)
        for role, mapping in (("fine-tuned model", source.weights), ("base", base), ("chain's root", context.root))
        if isinstance(mapping, Checkpoint)
        for place in mapping.places
    ]
    stages: list[Path] = []
    stage = Path(context.lineage.parent) if context.lineage.parent else None
    while stage is not None and stage.is_dir() and not any(stage.samefile(known) for known in stages):
        stages.append(stage)
        try:
            lineage = Manifest.load(stage).lineage
        except CheckpointError:  # of an ancestor of the parent, which `chain` reports
            break
        stage = stage / lineage.parent if lineage.parent else None
    return [*inputs, *(("parent" if stage is stages[0] else "chain's earlier stage", stage) for stage in stages)]


def lineage_of(base: Mapping[str, Tensor]) -> Lineage:
    """The lineage of an export that is not part of a chain."""
    path = str(base.path.absolute()) if isinstance(base, Checkpoint) else ""
    return Lineage(base_kind="folder" if path else "memory", base_path=path, root=path)
