"""PEFT adapters inside a live model: the frozen weight, and the merged weight in float32, under checkpoint names.

    base[name]     the frozen weight in memory, as it is          (original_module, where PEFT trains a copy)
    weights[name]  base + scaling * B @ A, on access              (the trained copy, where there is one)

With LoRA the base of the delta is already in memory: nothing is stored. PEFT's own `merge_adapter` adds in place and in
the model's dtype, which rounds much of a small update away and leaves other weights behind after `unmerge`; here one
weight at a time is merged out of place, and the model is only read.

The names are those of the model as it was before PEFT (adapter_tree.py). Tied weights that training pulled apart are
refused: PEFT's merge would add both updates to the one tensor. `save_adapter` writes the adapter by itself.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from daq_lightning.checkpoint.adapter_folder import PREFIX, moves_base, write_adapter_tensors
from daq_lightning.numerics.lora import LoraFactors, merge_lora, merge_lora_bias, merge_lora_experts
from daq_lightning.training.adapter_tree import (
    DORA,
    Slot,
    adapter_configs,
    check_config,
    check_slot,
    check_state,
    find_root,
    from_peft,
    is_a,
    is_embedding,
    unwrap,
    walk,
)

_UNTIE = (
    "Train them as one with LoraConfig(ensure_weight_tying=True); or untie the model before adding adapters "
    "(tie_word_embeddings=False in its config, the output layer a clone of the embedding); or export the model that "
    "merge_and_unload() returns, if only modules_to_save are concerned."
)


@dataclass(frozen=True, kw_only=True)
class AdaptedWeights:
    """A model with PEFT adapters as two mappings over the names of its checkpoint.

    Both are ordered like the `state_dict` of the model without adapters, and hold its parameters and persistent
    buffers, tied names included. Tensors are read from the live model on access: they are detached, and neither the
    model nor the mapping keeps anything.

    Attributes:
        weights: What the model computes with: merged in float32 where LoRA adapts it (on the device of the weight),
            the trained copy as it is for `modules_to_save`, else the tensor of `base`. A merged weight whose parts are
            DTensors is gathered: all ranks ask for the same names in the same order.
        base: The frozen tensors, without a copy. Raises ValueError for `displaced` names.
        model: The model that the names refer to, such as the `PreTrainedModel`.
        outlines: The dtypes and shapes of `weights`, as tensors on the meta device: nothing is computed.
        identities: Equal for names of one tensor in memory (tied weights).
        adapted: Names whose tensor in `weights` differs from that in `base`.
        displaced: Names whose tensor in memory is not the base: left trainable (`bias="all"`, unfrozen layers), or
            moved by the initialisation (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA). Their base must come from elsewhere.
    """

    weights: Mapping[str, Tensor]
    base: Mapping[str, Tensor]
    model: nn.Module
    outlines: Mapping[str, Tensor]
    identities: Mapping[str, int]
    adapted: tuple[str, ...]
    displaced: tuple[str, ...]


def find_adapters(module: nn.Module) -> AdaptedWeights | None:
    """Finds the PEFT adapters inside a module: a PeftModel, or layers injected into a model.

    Args:
        module: A LightningModule, a PeftModel, a transformers model with `add_adapter`, or any module.

    Returns:
        None if there is no PEFT layer.

    Raises:
        ValueError: Adapters that cannot be merged exactly, by name and with what to do; or two adapted models.
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
            f"The model has PEFT layers, but none of its adapters ({', '.join(configs) or 'none configured'}) is "
            "active: activate one with set_adapter(name)."
        )
    _check_ties(slots)
    displaced = {
        name: reason for name, slot in slots.items() if (reason := _displacement(name, slot, configs)) is not None
    }

    def base(name: str, slot: Slot) -> Tensor:
        if name in displaced:
            raise ValueError(displaced[name])
        return slot.tensor.detach()

    return AdaptedWeights(
        weights=_Lazy(slots, _merged),
        base=_Lazy(slots, base),
        model=unwrap(root),
        outlines={name: _outline(slot) for name, slot in slots.items()},
        identities={name: id(slot.tensor) for name, slot in slots.items()},
        adapted=adapted,
        displaced=tuple(displaced),
    )


def save_adapter(module: nn.Module, folder: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Writes the active adapters as PEFT does, to be loaded with ``PeftModel.from_pretrained`` beside an exported base.

    The folder gets adapter_config.json and adapter_model.safetensors; of several active adapters, each gets a
    subfolder with its name. Embeddings that are not trained stay with the base. Where the initialisation moved the
    frozen weights (PiSSA and its like), the saved configuration asks for the default one: the exported base is the
    moved one already.

    Args:
        module: As for `find_adapters`.
        folder: Made if missing.

    Returns:
        The folders written, on every rank; the files come from rank 0. With DTensors all ranks take part.

    Raises:
        ValueError: No adapter, or a scaling that was changed by hand and that no configuration can hold.
    """
    holder: Any = next((part for part in module.modules() if _holds_adapters(part)), None)
    layers: list[Any] = [part for part in module.modules() if is_a(part, "BaseTunerLayer")]
    active = [
        name for name in getattr(holder, "peft_config", {}) if any(name in layer.active_adapters for layer in layers)
    ]
    if not active:
        raise ValueError("Expected a model with an active PEFT adapter, found none: call set_adapter(name).")
    from peft import get_peft_model_state_dict  # in sys.modules since a class of peft was found

    write = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    folders = []
    for name in active:
        for layer in layers:
            _check_scaling(layer, name)
        state = get_peft_model_state_dict(holder, adapter_name=name, save_embedding_layers=False)
        prefix = "" if is_a(holder, "PeftModel", "PeftMixedModel") else PREFIX
        tensors = {prefix + key: _whole(tensor).cpu() for key, tensor in state.items()}
        target = Path(folder) if len(active) == 1 else Path(folder) / name
        folders.append(target)
        if write:
            target.mkdir(parents=True, exist_ok=True)
            write_adapter_tensors(target, tensors)
            _saved_config(holder, name).save_pretrained(str(target))
    return tuple(folders)


class _Lazy(Mapping[str, Tensor]):
    """Slots read on access."""

    def __init__(self, slots: Mapping[str, Slot], read: Callable[[str, Slot], Tensor]) -> None:
        self._slots, self._read = slots, read

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name, self._slots[name])

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)


def _outline(slot: Slot) -> Tensor:
    tensor = getattr(*slot.copy) if slot.copy is not None else slot.tensor
    merged = slot.copy is None and bool(slot.adapters)
    return torch.empty(tensor.shape, dtype=torch.float32 if merged else tensor.dtype, device="meta")


@torch.no_grad()
def _merged(name: str, slot: Slot) -> Tensor:
    if slot.copy is not None:
        return getattr(*slot.copy).detach()
    if not slot.adapters:
        return slot.tensor.detach()
    for layer, _ in slot.adapters:
        check_state(name, layer)
    weight = _whole(slot.tensor)
    if slot.key == "bias":
        return merge_lora_bias(weight, [(_whole(layer.lora_B[a].bias), layer.scaling[a]) for layer, a in slot.adapters])
    adapters = [_factors(layer, adapter) for layer, adapter in slot.adapters]
    layouts = {is_embedding(layer) or bool(layer.fan_in_fan_out) for layer, _ in slot.adapters}
    if len(layouts) > 1:
        raise ValueError(f"{name} has adapters for both (in, out) and (out, in) storage: adapt it in one way only.")
    if weight.ndim == 3:  # stacked experts: (E, out, in) in transformers unless they say is_transposed
        return merge_lora_experts(weight, adapters, transposed=not slot.adapters[0][0]._did_swap_in_out_features)
    return merge_lora(weight, adapters, transposed=layouts.pop())


def _factors(layer: Any, adapter: str) -> LoraFactors:
    if is_embedding(layer):
        A_RN, B_MR = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    else:
        A_RN, B_MR = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    dora = type(layer.lora_variant.get(adapter)).__name__ in DORA
    return LoraFactors(
        A_RN=_whole(A_RN),
        B_MR=_whole(B_MR),
        scaling=float(layer.scaling[adapter]),
        magnitude=_whole(layer.lora_magnitude_vector[adapter].weight) if dora else None,
    )


def _whole(tensor: Tensor) -> Tensor:
    full_tensor = getattr(tensor, "full_tensor", None)  # of a DTensor: a collective
    return tensor.detach() if full_tensor is None else full_tensor().detach()


def _check_ties(slots: Mapping[str, Slot]) -> None:
    """Names of one tensor must stay one tensor: PEFT adapts each of them by itself, and its merge adds to both."""
    groups: dict[int, list[str]] = {}
    for name, slot in slots.items():
        groups.setdefault(id(slot.tensor), []).append(name)
    for first, *others in groups.values():
        for other in others:
            if not _same_update(slots[first], slots[other]):
                raise ValueError(
                    f"{first} and {other} are tied in the model, but their adapters are not: trained apart, they are "
                    f"two weights now, which a checkpoint of a tied model cannot hold. {_UNTIE} An adapted embedding "
                    "that was tied also loses its tie when the model moves to another device: move it first."
                )


def _same_update(one: Slot, two: Slot) -> bool:
    if one.copy is not None or two.copy is not None:
        return one.copy is not None and two.copy is not None and getattr(*one.copy) is getattr(*two.copy)
    if len(one.adapters) != len(two.adapters):
        return False
    for (layer, adapter), (other, other_adapter) in zip(one.adapters, two.adapters, strict=True):
        if layer is other and adapter == other_adapter:
            continue
        pairs = [_factors(layer, adapter), _factors(other, other_adapter)]
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
            f"{name} is trained in place (requires_grad), so its base is not in memory: pass base='snapshot' or the "
            "folder of the original model, or freeze it."
        )
    for layer, adapter in slot.adapters:
        init = getattr(configs.get(adapter), "init_lora_weights", None)
        if slot.key == getattr(layer, "parameter_name", "weight") and moves_base(init):
            return (
                f"{name} in memory is not the base: init_lora_weights={init!r} of {adapter!r} subtracted the first "
                "update from it. Pass the folder of the original model as the base."
            )
    return None


def _holds_adapters(module: nn.Module) -> bool:
    return is_a(module, "PeftModel", "PeftMixedModel") or "peft_config" in vars(module)


def _saved_config(holder: Any, name: str) -> Any:
    config = copy.copy(holder.peft_config[name])
    model = unwrap(holder)
    config.inference_mode = True
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
    if moves_base(getattr(config, "init_lora_weights", None)):
        config.init_lora_weights = True
    return config


def _check_scaling(layer: Any, name: str) -> None:
    scaling, rank = getattr(layer, "scaling", {}).get(name), getattr(layer, "r", {}).get(name)
    if scaling is None or rank is None:
        return
    expected = layer.lora_alpha[name] / (math.sqrt(rank) if layer.use_rslora[name] else rank)
    if not math.isclose(scaling, expected, rel_tol=1e-9):
        raise ValueError(
            f"The adapter {name!r} has the scaling {scaling}, its configuration gives {expected}: PEFT cannot save a "
            "scaling set by hand. Call unscale_layer() on its layers, or merge the adapter into the export."
        )
