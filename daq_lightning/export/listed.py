"""Which modules config.json names as not quantized, in all the names that readers know them by.

    Linear modules       checkpoint name, memory name
    experts that stay    of each expert; and of the module that holds all of them, which readers replace whole

Source: vLLM 0.33 `is_layer_skipped` (fp8: full names), `get_moe_method` (compressed-tensors: names of the
experts' projections, which a stack does not have: a pattern stands for them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from daq_lightning.model.fusion import experts_of
from daq_lightning.model.outline import Outline, owner_of

if TYPE_CHECKING:
    from daq_lightning.export.plan import TensorPlan


def ignore_list(tensors: Sequence[TensorPlan], outline: Outline, container: str) -> tuple[str, ...]:
    """Every module that a reader might take for a quantized one: checkpoint names, then memory names."""
    quantized = {tensor.key.removesuffix(".weight") for tensor in tensors if tensor.quantize}
    unquantized = [name for name in outline.linear_modules if name not in quantized]
    by_key = {tensor.key: tensor.spec.name for tensor in tensors}
    on_disk = [by_key.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight") for name in unquantized]
    kept = [tensor for tensor in tensors if not tensor.quantize]
    # of matrices that this model does not have (such as layers for speculation) nobody knows that they are
    # not Linear
    unknown = [
        tensor.spec.name.removesuffix(".weight")
        for tensor in kept
        if outline.is_transformers
        and tensor.spec.name.endswith(".weight")
        and len(tensor.spec.shape) == 2
        and owner_of(tensor.key) not in outline.modules
    ]
    of_experts = [tensor.spec.name.removesuffix(".weight") for tensor in kept if tensor.role == "expert"]
    owners = [owner_of(tensor.key) for tensor in kept if tensor.role in ("expert", "stack")]
    stacks = [stack for tensor in kept if tensor.role == "stack" for stack in _stacks(tensor)]
    patterns = [experts_of(f"{stack}.") for stack in stacks] if container == "compressed-tensors" else []
    return tuple(dict.fromkeys([*on_disk, *unknown, *of_experts, *unquantized, *owners, *stacks, *patterns]))


def _stacks(tensor: TensorPlan) -> list[str]:
    """What servers call the experts of a layer that are in one tensor."""
    owner = owner_of(tensor.key)
    return [owner if owner.endswith("experts") else f"{owner_of(owner)}.experts"]
