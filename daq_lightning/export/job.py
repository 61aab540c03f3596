"""What is settled before an export reads its first weight, once: plan, bases and lineage.

    prepare(source, base, settings) -> Job        job.plan is what a dry run shows; `run(job, out)` writes

The callback prepares when training starts, so that whatever does not fit is known before the first step, and
keeps its job: each export only puts another source and step into it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from daq_lightning.checkpoint.manifest import ChainFrom, Lineage
from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.export.kept import KeptFormat
from daq_lightning.export.kv_cache import CacheScales, constant_scales, in_container, with_cache
from daq_lightning.export.lineage import ancestors, make_lineage
from daq_lightning.export.match import match_base
from daq_lightning.export.plan import ExportPlan, plan_export
from daq_lightning.export.ranks import ALONE, Ranks
from daq_lightning.export.rungs import Placed
from daq_lightning.export.settings import ExportSettings
from daq_lightning.export.source import Source, described
from daq_lightning.numerics.rounding.settings import RoundingChoice
from daq_lightning.numerics.rounding.statistics import Curvature
from daq_lightning.report.placement import Placement

if TYPE_CHECKING:
    from daq_lightning.export.calibration import Calibration
    from daq_lightning.export.curvature import Collect

_LISTED = 5


@dataclass(frozen=True, kw_only=True)
class Job:
    """An export, settled.

    Attributes:
        source: The fine-tuned model.
        base: The weights before fine-tuning.
        settings: What the user chose.
        plan: What happens to each tensor of the source.
        base_names: Weight name -> its name in the base, for every quantized weight that has a base.
        without_base: Weight name -> why it has none; it is quantized without a search.
        lineage: Its place in a chain of exports.
        root: The base of the chain's first stage: what is kept of the change since then is reported too.
        training: Step, epoch and checkpoint of the run that made the weights.
        curvature: What was collected of the weights' curvature, of those at hand; None where nothing collects
            it.
        collected: Gives that of the weights that a rank exports; None where no run collects it. A collective.
        calibration: What it is going to be collected from, where no run has.
        cache: The scales of cached keys and values; None without, and until they are found.
        placement: Which weights the budget put on which rung; None without one, or before it is measured.
        kept: The format of the base, where that is kept.
        max_memory: Bytes that tensors on their way may take at a time; None for as many as there are.
    """

    source: Source
    base: Mapping[str, Tensor] = field(repr=False)
    settings: ExportSettings
    plan: ExportPlan
    base_names: Mapping[str, str]
    without_base: Mapping[str, str]
    lineage: Lineage
    root: Mapping[str, Tensor] | None = field(repr=False)
    training: Mapping[str, Any] = field(default_factory=dict)
    curvature: Curvature | None = field(default=None, repr=False)
    collected: Collect | None = field(default=None, repr=False)
    calibration: Calibration | None = None
    cache: CacheScales | None = None
    placement: Placement | None = field(default=None, repr=False)
    kept: KeptFormat | None = field(default=None, repr=False)
    max_memory: int | None = None

    @property
    def quantization_config(self) -> dict[str, Any]:
        """What config.json says of the quantized weights."""
        if self.kept is not None:
            return self.kept.quantization_config
        return self.plan.layouts.quantization_config(self.plan.ignore)

    def parts(self) -> dict[str, str]:
        """All that decides what is written, in words."""
        return parts_of(self.plan, self.settings) | {
            "the bases of the weights": json.dumps(dict(self.base_names)),
            "the scales of the KV cache": json.dumps({} if self.cache is None else dict(self.cache.values)),
            "the model's config.json": json.dumps(
                _without_dtypes(self.source.config), sort_keys=True, default=str
            ),
            "the calibration": "" if self.calibration is None else str(self.calibration.described()),
        }

    def inputs(self) -> list[tuple[str, Path]]:
        """The folders and files that the export reads or names as its origin, with their roles."""
        roles = (("fine-tuned model", self.source.weights), ("base", self.base), ("chain's root", self.root))
        read = [
            (role, place)
            for role, mapping in roles
            if isinstance(mapping, Checkpoint)
            for place in mapping.places
        ]
        stages = ancestors(self.lineage)
        text = None if self.calibration is None else self.calibration.text
        return [
            *read,
            *(() if text is None else [("calibration text", text)]),
            *(("parent" if stage is stages[0] else "chain's earlier stage", stage) for stage in stages),
        ]

    def against(self, base: Mapping[str, Tensor], *, kind: str, path: str) -> Job:
        """The same export measured against a later base, which holds every weight of the plan by name."""
        lineage = dataclasses.replace(self.lineage, base_kind=kind, base_path=path)
        names = {tensor.spec.name: tensor.spec.name for tensor in self.plan.quantized}
        return dataclasses.replace(self, base=base, base_names=names, without_base={}, lineage=lineage)

    def planned_as(self, settings: ExportSettings) -> Job:
        """The same export under other settings, of which scheme and ignored modules may differ.

        Raises:
            CheckpointError: As for `plan_export`.
        """
        placement = None if settings.budget is None else self.placement
        placed = None if placement is None else placed_by(placement)
        kept = (self.kept or KeptFormat.of(self.base)) if settings.scheme == "keep" else None
        plan = plan_of(self.source, settings, placed, kept)
        quantized = {tensor.spec.name for tensor in plan.quantized}
        return dataclasses.replace(
            self,
            settings=settings,
            plan=plan,
            placement=None if placement is None else placement.of(plan.placed),
            kept=kept,
            base_names={name: base for name, base in self.base_names.items() if name in quantized},
            without_base={name: why for name, why in self.without_base.items() if name in quantized},
        )

    def placed_as(self, placement: Placement) -> Job:
        """The same export with its weights on the rungs of a placement."""
        return dataclasses.replace(self, placement=placement).planned_as(self.settings)

    def after_training(
        self, source: Source, training: Mapping[str, Any], collected: Collect | None = None
    ) -> Job:
        """The same export with the weights of another step of the run, and what was collected until then.

        Raises:
            CheckpointError: The source has other tensors than the one that was planned.
        """
        if source.specs != self.source.specs:
            changed = sorted({spec.name for spec in set(source.specs) ^ set(self.source.specs)})
            raise CheckpointError(
                f"The model has other tensors than when training began: {', '.join(changed[:_LISTED])} "
                "appeared, went or changed dtype or shape. Add layers and cast the model before `fit`."
            )
        return dataclasses.replace(self, source=source, training=training, collected=collected)


def prepare(
    source: Source,
    base: Mapping[str, Tensor],
    settings: ExportSettings,
    *,
    plan: ExportPlan | None = None,
    lineage: Lineage | None = None,
    parent: str | None = None,
    chain_from: ChainFrom | None = None,
    ranks: Ranks = ALONE,
    curvature: Curvature | None = None,
    calibration: Calibration | None = None,
    max_memory: int | None = None,
) -> Job:
    """Plans an export, finds the base of every weight and checks its place in a chain. Writes nothing.

    Args:
        source: The fine-tuned model.
        base: The weights before fine-tuning, under the names of any form of the same model.
        settings: What the user chose.
        plan: The plan of source and settings, where it is made already.
        lineage: What is known of the base; None takes that of the folder or mapping.
        parent: Folder of the stage before; None takes the base's folder if that is an export.
        chain_from: Whether training began with the parent's "weights" or its "deployed" ones; None begins a
            chain.
        ranks: The processes that will share the work; all of them call this.
        curvature: What codes are chosen along; may be filled later. Without it, `rounding="auto"` is nearest,
            unless the format of the base is kept.
        calibration: What it is collected from by `run`, in its place.
        max_memory: Bytes that tensors on their way may take at a time.

    Raises:
        CheckpointError: Nothing to quantize, a base that does not fit, a base that is not what `chain_from`
            says, or an adapter that is to be rounded along its own update.
    """
    given = plan
    keeps = settings.scheme == "keep"
    if settings.rounding == "auto":
        chosen: RoundingChoice = "nearest" if curvature is None and not keeps else "curvature"
        settings = dataclasses.replace(settings, rounding=chosen)
    by_update = settings.by_curvature and curvature is None and calibration is None
    if by_update and source.low_rank and not keeps:
        raise CheckpointError(
            "rounding='curvature' has only the update to go by here, and this one is an adapter's: its few "
            "directions say nothing of all others, and codes chosen along them are worse than nearest. Give "
            "it a text (calibrate='FILE.txt'), let the model write one (calibrate='self'), or use "
            "rounding='nearest'."
        )

    def settle() -> tuple[
        ExportPlan, KeptFormat | None, Mapping[str, Tensor], dict[str, str], dict[str, str]
    ]:
        kept = KeptFormat.of(base) if keeps else None
        plan = given or plan_of(source, settings, kept=kept)
        known = described(base, [tensor.spec.name for tensor in plan.quantized])
        return (plan, kept, known, *match_base(plan, known, source, settings))

    plan, kept, bases, base_names, without_base = ranks.together(settle)
    names = [tensor.spec.name for tensor in plan.quantized]
    known = lineage_of(bases) if lineage is None else lineage
    lineage, root = make_lineage(known, bases, names, parent=parent, chain_from=chain_from, ranks=ranks)
    job = Job(
        source=source,
        base=bases,
        settings=settings,
        plan=plan,
        base_names=base_names,
        without_base=without_base,
        lineage=lineage,
        root=root,
        curvature=curvature,
        calibration=calibration,
        cache=constant_scales(plan, settings),
        kept=kept,
        max_memory=max_memory,
    )
    ranks.check_equal("The plan of the export", job.parts)
    return job


def plan_of(
    source: Source,
    settings: ExportSettings,
    placed: Mapping[str, Placed] | None = None,
    kept: KeptFormat | None = None,
) -> ExportPlan:
    """The plan of weights and cache; errors are those of `plan_export`, `in_container` and `with_cache`.

    Args:
        source: The fine-tuned model.
        settings: What the user chose.
        placed: The rungs of weights, as a budget places them.
        kept: The format of a base, where that is kept.
    """
    if kept is not None:
        own = kept.settings(source, settings)
        return kept.applied(plan_export(source.specs, source.outline, own, kept=kept.layouts))
    chosen = in_container(source.specs, source.outline, settings)
    return with_cache(plan_export(source.specs, source.outline, chosen, placed), source.outline, settings)


def parts_of(plan: ExportPlan, settings: ExportSettings) -> dict[str, str]:
    """What a plan says, in words: each tensor under its name, and what holds for all."""
    tensors = {
        tensor.spec.name: (
            f"{tensor.spec.dtype} {list(tensor.spec.shape)}, {tensor.reason}, stored as "
            f"{[(spec.name, str(spec.dtype), list(spec.shape)) for spec in tensor.stored.values()]}"
        )
        for tensor in plan.tensors
    }
    return tensors | {
        "the list of unquantized modules": ", ".join(plan.ignore),
        "the settings": str(settings),
    }


def placed_by(placement: Placement) -> dict[str, Placed]:
    """The rung of each weight of a placement."""
    return {name: Placed(group.rung, group.reason) for group in placement.groups for name in group.names}


def lineage_of(base: Mapping[str, Tensor]) -> Lineage:
    """The lineage of an export that is not part of a chain."""
    path = str(base.path.absolute()) if isinstance(base, Checkpoint) else ""
    return Lineage(base_kind="folder" if path else "memory", base_path=path, root=path)


def _without_dtypes(config: Any) -> Any:
    """What a config decides: not dtypes, which the plan does, and which `save_pretrained` sets on a rank."""
    if not isinstance(config, Mapping):
        return config
    kept = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    return {name: _without_dtypes(value) for name, value in kept.items()}
