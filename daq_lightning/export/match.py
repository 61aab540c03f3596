"""Which weight of a base belongs to which weight of an export: by name, else by what it is in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.checkpoint.tensor_file import CheckpointError, spec_in

if TYPE_CHECKING:
    from daq_lightning.export.plan import ExportPlan
    from daq_lightning.export.settings import ExportSettings
    from daq_lightning.export.source import Source

_LISTED = 5


def match_base(
    plan: ExportPlan, base: Mapping[str, Tensor], source: Source, settings: ExportSettings
) -> tuple[dict[str, str], dict[str, str]]:
    """Weight name -> base name for every quantized weight, and why the others have none.

    Args:
        plan: Of the weights.
        base: What they are compared with.
        source: Where they come from.
        settings: Say whether each must have a base.

    Raises:
        CheckpointError: One has none, or one of another shape, and must.
    """
    by_identity: dict[tuple[str, str], str] = {}
    if isinstance(base, Checkpoint) and any(tensor.spec.name not in base for tensor in plan.quantized):
        by_identity = {_identity(name, key): name for name, key in source.keys_of(base).items()}
    names, problems = {}, {}
    for tensor in plan.quantized:
        name = tensor.spec.name
        base_name = name if name in base else by_identity.get(_identity(name, tensor.key), name)
        if base_name not in base:
            problems[name] = "the base has no such weight"
            continue
        shape = spec_in(base, base_name).shape
        if shape != tensor.spec.shape:
            problems[name] = f"the base has shape {shape}, the weight {tensor.spec.shape}"
        else:
            names[name] = base_name
    if problems and settings.missing_base == "error":
        listed = "; ".join(f"{name}: {problem}" for name, problem in list(problems.items())[:_LISTED])
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        where = f" {base.path}" if isinstance(base, Checkpoint) else ""
        raise CheckpointError(
            f"The base{where} does not fit {len(problems)} of {len(plan.quantized)} weights: {listed}{more}. "
            "Pass the model that this one was trained from, or missing_base='absmax' to quantize those "
            "weights without a search."
        )
    return names, problems


def _identity(name: str, key: str) -> tuple[str, str]:
    """What a tensor is, whatever its checkpoint's prefix: memory name, and which slice of a stack."""
    _, found, expert = name.rpartition(".experts.")
    return key, expert if found else ""
