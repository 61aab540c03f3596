"""PEFT adapters inside a live model: the frozen weight, and the merged weight in float32, under checkpoint
names.

    base[name]     the frozen weight in memory, as it is          (original_module, where PEFT trains a copy)
    weights[name]  base + scaling * B @ A, on access              (the trained copy, where there is one)

With LoRA the base of the delta is already in memory: nothing is stored. PEFT's own `merge_adapter` adds in
place and in the model's dtype, which rounds much of a small update away and leaves other weights behind after
`unmerge`; here one weight at a time is merged out of place, and the model is only read. The values may also
be those of a saved state, such as an earlier checkpoint of the run (values.py).

The names are those of the model as it was before PEFT (adapter_tree.py). Tied weights that training pulled
apart are refused: PEFT's merge would add both updates to the one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from daq_lightning.checkpoint.adapter_config import moves_base
from daq_lightning.model.adapters.tree import (
    DORA,
    Slot,
    adapter_configs,
    check_config,
    check_slot,
    check_state,
    find_root,
    from_peft,
    is_embedding,
    unwrap,
    walk,
)
from daq_lightning.model.saved_state import Values
from daq_lightning.model.sharded import tensor_on
from daq_lightning.numerics.lora import LoraFactors, merge_lora, merge_lora_bias, merge_lora_experts

Gather: TypeAlias = Callable[[Tensor], Tensor | None]
"""Makes a tensor of the model whole; gives None on a rank that does not get it."""
_UNTIE = (
    "Train them as one with LoraConfig(ensure_weight_tying=True); or untie the model before adding adapters "
    "(tie_word_embeddings=False in its config, the output layer a clone of the embedding); or export the "
    "model that merge_and_unload() returns, if only modules_to_save are concerned."
)


@dataclass(frozen=True, kw_only=True)
class AdaptedWeights:
    """A model with PEFT adapters as two mappings over the names of its checkpoint.

    Both are ordered like the `state_dict` of the model without adapters, and hold its parameters and
    persistent buffers, tied names included. Tensors are read on access: they are detached, and neither the
    model nor the mapping keeps anything.

    Attributes:
        weights: What the model computes with: merged in float32 where LoRA adapts it (on the device of the
            weight), the trained copy as it is for `modules_to_save`, else the tensor of `base`. What is
            sharded is gathered: all ranks ask for the same names in the same order.
        base: The frozen tensors, without a copy. Raises ValueError for `displaced` names.
        model: The model that the names refer to, such as the `PreTrainedModel`.
        path: Name of the model with its adapters in the module that was searched; empty for that module
            itself.
        outlines: The dtypes and shapes of `weights`, as tensors on the meta device: nothing is computed.
        frozen: The same of `base`; of a displaced name, that of the trained tensor.
        identities: Equal for names of one tensor in memory (tied weights).
        adapted: Names whose tensor in `weights` differs from that in `base`.
        displaced: Names whose tensor in memory is not the base: left trainable (`bias="all"`, unfrozen
            layers), or moved by the initialisation (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA). Their base must
            come from elsewhere.
    """

    weights: AdaptedTensors
    base: AdaptedTensors
    model: nn.Module
    path: str
    outlines: Mapping[str, Tensor]
    frozen: Mapping[str, Tensor]
    identities: Mapping[str, int]
    adapted: tuple[str, ...]
    displaced: tuple[str, ...]


def find_adapters(module: nn.Module, state: Mapping[str, Tensor] | None = None) -> AdaptedWeights | None:
    """Finds the PEFT adapters inside a module: a PeftModel, or layers injected into a model.

    Args:
        module: A LightningModule, a PeftModel, a transformers model with `add_adapter`, or any module.
        state: A saved `state_dict` of the module, to read the values from; None reads the module. See
            `Values`.

    Returns:
        None if there is no PEFT layer.

    Raises:
        ValueError: Adapters that cannot be merged exactly, by name and with what to do; or two adapted
            models.
        CheckpointError: A state that does not fit the module, now or when a tensor is read.
    """
    if not any(from_peft(part) for part in module.modules()):
        return None
    root = find_root(module)
    configs = adapter_configs(root)
    for name, config in configs.items():
        check_config(name, config)
    slots = dict(walk(root, ""))
    for name, slot in slots.items():
        check_slot(name, slot)
    adapted = tuple(name for name, slot in slots.items() if slot.changed)
    if not adapted:
        raise ValueError(
            "The model has PEFT layers, but none of its adapters "
            f"({', '.join(configs) or 'none configured'}) is active: activate one with set_adapter(name)."
        )
    live, values = Values(module), Values(module, state)
    _check_ties(slots, live)
    displaced = {
        name: reason
        for name, slot in slots.items()
        if (reason := _displacement(name, slot, configs)) is not None
    }

    def base(name: str, slot: Slot, gather: Gather) -> Tensor | None:
        if name in displaced:
            raise ValueError(displaced[name])
        return gather(values(slot.owner, slot.key))

    return AdaptedWeights(
        weights=AdaptedTensors(slots, partial(_merged, values)),
        base=AdaptedTensors(slots, base),
        model=unwrap(root),
        path=next(path for path, part in module.named_modules() if part is root),
        outlines={name: _outline(slot) for name, slot in slots.items()},
        frozen={
            name: _outline(slot) if name in displaced else _like(slot.tensor) for name, slot in slots.items()
        },
        identities={name: id(slot.tensor) for name, slot in slots.items()},
        adapted=adapted,
        displaced=tuple(displaced),
    )


class AdaptedTensors(Mapping[str, Tensor]):
    """Slots read on access; of a sharded model, `on` is the way to read them.

    Attributes:
        slots: Name -> where a tensor lives, and what adapts it.
    """

    def __init__(self, slots: Mapping[str, Slot], read: Callable[[str, Slot, Gather], Tensor | None]) -> None:
        self.slots, self._read = slots, read

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._read(name, self.slots[name], lambda part: tensor_on(part, None))
        assert tensor is not None
        return tensor

    def on(self, name: str, owner: int) -> Tensor | None:
        """The tensor on one rank, None on the others: a collective, see `tensor_on`."""
        return self._read(name, self.slots[name], lambda part: tensor_on(part, owner))

    def __contains__(self, name: object) -> bool:
        return name in self.slots

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)


def _outline(slot: Slot) -> Tensor:
    tensor = slot.trained
    merged = slot.copy is None and bool(slot.adapters)
    return _like(tensor, torch.float32 if merged else None)


def _like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="meta")


@torch.no_grad()
def _merged(values: Values, name: str, slot: Slot, gather: Gather) -> Tensor | None:
    """The weight that the model computes with; None where `gather` gives nothing, on the other ranks."""
    if slot.copy is not None:
        return gather(values(*slot.copy))
    for layer, _ in slot.adapters:
        check_state(name, layer)
    weight = gather(values(slot.owner, slot.key))
    if slot.key == "bias":
        biases = [(gather(values(layer.lora_B[a], "bias")), layer.scaling[a]) for layer, a in slot.adapters]
        if weight is None or not biases:
            return weight
        return merge_lora_bias(weight, [(bias, scaling) for bias, scaling in biases if bias is not None])
    adapters = [factors_of(values, layer, adapter, gather) for layer, adapter in slot.adapters]
    if weight is None or not adapters:
        return weight
    here = [factors for factors in adapters if factors is not None]
    layouts = {is_embedding(layer) or bool(layer.fan_in_fan_out) for layer, _ in slot.adapters}
    if len(layouts) > 1:
        raise ValueError(
            f"{name} has adapters for both (in, out) and (out, in) storage: adapt it in one way only."
        )
    if weight.ndim == 3:  # stacked experts: (E, out, in) in transformers unless they say is_transposed
        return merge_lora_experts(weight, here, transposed=not slot.adapters[0][0]._did_swap_in_out_features)
    return merge_lora(weight, here, transposed=layouts.pop())


def factors_of(
    values: Callable[[nn.Module, str], Tensor], layer: Any, adapter: str, gather: Gather
) -> LoraFactors | None:
    """The factors of one adapter of a layer; None where `gather` gives nothing."""
    if is_embedding(layer):
        A_RN, B_MR = values(layer.lora_embedding_A, adapter), values(layer.lora_embedding_B, adapter)
    else:
        A_RN, B_MR = values(layer.lora_A[adapter], "weight"), values(layer.lora_B[adapter], "weight")
    dora = type(layer.lora_variant.get(adapter)).__name__ in DORA
    magnitude = gather(values(layer.lora_magnitude_vector[adapter], "weight")) if dora else None
    A_RN, B_MR = gather(A_RN), gather(B_MR)  # type: ignore[assignment]
    if A_RN is None or B_MR is None:
        return None
    return LoraFactors(A_RN=A_RN, B_MR=B_MR, scaling=float(layer.scaling[adapter]), magnitude=magnitude)


def _check_ties(slots: Mapping[str, Slot], values: Values) -> None:
    """Names of one tensor must stay one: PEFT adapts each by itself, and its merge adds to both."""
    groups: dict[int, list[str]] = {}
    for name, slot in slots.items():
        groups.setdefault(id(slot.tensor), []).append(name)
    for first, *others in groups.values():
        for other in others:
            if not _same_update(values, slots[first], slots[other]):
                raise ValueError(
                    f"{first} and {other} are tied in the model, but their adapters are not: trained apart, "
                    f"they are two weights now, which a checkpoint of a tied model cannot hold. {_UNTIE} An "
                    "adapted embedding that was tied also loses its tie when the model moves to another "
                    "device: move it first."
                )


def _same_update(values: Values, one: Slot, two: Slot) -> bool:
    if one.copy is not None or two.copy is not None:
        return one.copy is not None and two.copy is not None and getattr(*one.copy) is getattr(*two.copy)
    if len(one.adapters) != len(two.adapters):
        return False
    for (layer, adapter), (other, other_adapter) in zip(one.adapters, two.adapters, strict=True):
        if layer is other and adapter == other_adapter:
            continue
        pairs = [
            factors
            for one_layer, one_adapter in ((layer, adapter), (other, other_adapter))
            if (factors := factors_of(values, one_layer, one_adapter, lambda part: tensor_on(part, None)))
        ]
        if any(factors.magnitude is not None for factors in pairs) or pairs[0].scaling != pairs[1].scaling:
            return False
        if is_embedding(layer) == is_embedding(other):
            return False
        if not (_shares(pairs[0].A_RN, pairs[1].B_MR) and _shares(pairs[0].B_MR, pairs[1].A_RN)):
            return False
    return True


def _shares(A: Tensor, B: Tensor) -> bool:
    return A.shape == B.T.shape and A.data_ptr() == B.data_ptr()


def _displacement(name: str, slot: Slot, configs: Mapping[str, Any]) -> str | None:
    """Why the tensor in memory is not the base of the trained one; None if it is."""
    if slot.tensor.requires_grad and slot.copy is None:
        return (
            f"{name} is trained in place (requires_grad), so its base is not in memory: pass base='snapshot' "
            "or the folder of the original model, or freeze it."
        )
    for layer, adapter in slot.adapters:
        init = getattr(configs.get(adapter), "init_lora_weights", None)
        if slot.key == getattr(layer, "parameter_name", "weight") and moves_base(init):
            return (
                f"{name} in memory is not the base: init_lora_weights={init!r} of {adapter!r} subtracted the "
                "first update from it. Pass the folder of the original model as the base."
            )
    return None
