"""The module tree of a model with PEFT adapters, read as if PEFT had never touched it.

PEFT wraps: `X` becomes a layer that holds `X.base_layer` and its factors, or a wrapper that holds
`X.original_module` and a trained copy; a PeftModel puts `base_model.model.` in front. `walk` visits the tree
in the order of `state_dict`, steps through the wrappers, and says of each tensor where it lives and what
adapts it.

Everything whose update cannot be expressed as one weight per layer is refused here, by name and with what to
do. Classes are recognised by name and module, so that peft is not imported for a model that does not use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

_LAYERS = ("Linear", "Embedding", "ParamWrapper")  # of peft.tuners.lora.layer
DORA = ("DoraLinearVariant", "DoraEmbeddingVariant")
_PLAIN = ("MiCALinearVariant", "MiCAEmbeddingVariant")  # another initialisation; the update is still B @ A
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MERGE = (
    "Call merge_and_unload() and export the merged model with the original model as its base, or train with "
    "peft.LoraConfig."
)


@dataclass(frozen=True)
class Slot:
    """Where a tensor of the checkpoint lives: by owner and key, since training may replace the tensor itself.

    Attributes:
        owner: The module that holds the frozen tensor.
        key: Its name there.
        copy: Owner and key of the trained copy, where PEFT trains one (modules_to_save).
        adapters: LoRA layer and adapter name of every active adapter, in the order of their sum.
    """

    owner: nn.Module
    key: str
    copy: tuple[nn.Module, str] | None = None
    adapters: tuple[tuple[Any, str], ...] = ()

    @property
    def tensor(self) -> Tensor:
        """The frozen tensor."""
        return getattr(self.owner, self.key)

    @property
    def trained(self) -> Tensor:
        """The tensor that the model computes with, without what adapters add to it."""
        return self.tensor if self.copy is None else getattr(*self.copy)

    @property
    def changed(self) -> bool:
        """Whether anything active changes it."""
        return self.copy is not None or bool(self.adapters)


def walk(module: nn.Module, path: str) -> Iterator[tuple[str, Slot]]:
    """The tensors of a module as its `state_dict` lists them, as if PEFT had never touched it."""
    module = unwrap(module)
    if is_a(module, "AuxiliaryTrainingWrapper"):
        yield from _walk_copied(module, path)
        return
    layers: list[Any] = []
    while is_a(module, "BaseTunerLayer"):  # nested where several parameters of one module are adapted
        layer: Any = module
        _check_layer(path, layer)
        layers.insert(0, layer)
        module = layer.base_layer
    for key, parameter in module._parameters.items():
        if parameter is not None:
            yield _join(path, key), Slot(module, key, adapters=tuple(_adapters(layers, key)))
    for key, buffer in module._buffers.items():
        if buffer is not None and key not in module._non_persistent_buffers_set:
            yield _join(path, key), Slot(module, key)
    for key, child in module._modules.items():
        if child is not None:
            yield from walk(child, _join(path, key))


def _walk_copied(wrapper: Any, path: str) -> Iterator[tuple[str, Slot]]:
    """The tensors of a module that PEFT trains as a copy, with the active copy's beside them."""
    if not is_a(wrapper, "ModulesToSaveWrapper"):
        raise ValueError(f"{path} is a {type(wrapper).__name__} of PEFT, which is not supported. {_MERGE}")
    if any(from_peft(part) for part in wrapper.original_module.modules()):
        raise ValueError(
            f"{path} is in modules_to_save and has adapters inside, which is not supported. {_MERGE}"
        )
    if wrapper.disable_adapters:
        raise ValueError(_disabled(path))
    # as its forward has it: one copy, and the original module where an active adapter has none
    active = list(wrapper.active_adapters)
    if not all(adapter in wrapper.modules_to_save for adapter in active):
        active = []
    copies = dict(walk(wrapper.modules_to_save[active[0]], path)) if active else {}
    for name, slot in walk(wrapper.original_module, path):
        copy = copies.get(name)
        if active and copy is None:
            raise ValueError(
                f"The trained copy of {path} lacks {name}: expected the tensors of the original module."
            )
        yield name, slot if copy is None else replace(slot, copy=(copy.owner, copy.key))


def _adapters(layers: list[Any], key: str) -> Iterator[tuple[Any, str]]:
    """The adapters that change one parameter of a wrapped module."""
    for layer in layers:
        if key == "bias":
            names = [name for name in layer.active_adapters if layer.lora_bias.get(name)]
        elif key == getattr(layer, "parameter_name", "weight"):
            factors = layer.lora_embedding_A if is_embedding(layer) else layer.lora_A
            names = [name for name in layer.active_adapters if name in factors]
        else:
            names = []
        yield from ((layer, name) for name in names)


def find_root(module: nn.Module) -> nn.Module:
    """The outermost adapted model: of transformers, a PeftModel, or one that PEFT injected layers into."""
    for candidate in module.modules():
        is_model = is_a(candidate, "PreTrainedModel", package="transformers") or "peft_config" in vars(
            candidate
        )
        if (is_model or is_a(candidate, "PeftModel", "PeftMixedModel")) and any(
            map(from_peft, candidate.modules())
        ):
            inside = set(candidate.modules())
            outside = [
                name for name, part in module.named_modules() if from_peft(part) and part not in inside
            ]
            if outside:
                raise ValueError(
                    f"Expected one model with adapters, found adapters inside {type(candidate).__name__} and "
                    f"at {outside[0]}: keep the second model out of this module, or export each by itself."
                )
            return candidate
    return module


def unwrap(module: Any) -> nn.Module:
    """Steps through wrappers that add a level to names: PEFT, torch.compile, activation checkpointing."""
    while True:
        if is_a(module, "PeftModel", "PeftMixedModel"):
            module = module.base_model
        elif is_a(module, "BaseTuner") or is_a(module, "MixedModel"):
            module = module.model
        elif type(module).__name__ == "OptimizedModule":
            module = module._orig_mod
        elif type(module).__name__ == "CheckpointWrapper":
            module = module._checkpoint_wrapped_module
        else:
            return module


def adapter_configs(root: nn.Module) -> dict[str, Any]:
    """The configurations of all adapters, by name: PEFT keeps them on the model that it changed."""
    found: dict[str, Any] = {}
    for part in root.modules():
        if is_a(part, "PeftModel", "PeftMixedModel") or "peft_config" in vars(part):
            found |= part.peft_config  # type: ignore[operator]
    return found


def from_peft(module: nn.Module) -> bool:
    """Whether the class of a module, or one it derives from, is PEFT's."""
    return any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__)


def is_a(module: nn.Module, *names: str, package: str = "peft") -> bool:
    """`isinstance` by name, without importing the package."""
    return any(
        cls.__name__ in names and cls.__module__.partition(".")[0] == package for cls in type(module).__mro__
    )


def is_embedding(layer: Any) -> bool:
    """Whether a LoRA layer of PEFT adapts an embedding, whose weight is stored as (in, out)."""
    return type(layer).__name__ == "Embedding"


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


# What is refused, and why


def check_config(name: str, config: Any) -> None:
    """Refuses an adapter that is not LoRA on the layers of the base."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise ValueError(f"The adapter {name!r} is of kind {kind}, expected LORA. {_MERGE}")
    if getattr(config, "layer_replication", None):
        raise ValueError(
            f"The adapter {name!r} has layer_replication, which makes another model of the base. {_MERGE}"
        )


def _check_layer(path: str, layer: Any) -> None:
    cls = type(layer)
    if cls.__module__ != "peft.tuners.lora.layer" or cls.__name__ not in _LAYERS:
        kind = f"{cls.__module__}.{cls.__name__}"
        if cls.__module__.startswith("peft.tuners.lora.") and cls.__module__ != "peft.tuners.lora.layer":
            raise ValueError(
                f"{path} is adapted by {kind}, for a quantized or parallel base: expected a weight in high "
                "precision. Train on the unquantized model (or one that dequantize() returns), or call "
                "merge_and_unload()."
            )
        raise ValueError(
            f"{path} is adapted by {kind}, expected LoRA on Linear, Embedding or Conv1D. {_MERGE}"
        )
    check_state(path, layer)
    factors = layer.lora_embedding_A if is_embedding(layer) else layer.lora_A
    active = [name for name in layer.active_adapters if name in factors]
    variants = {
        name: type(layer.lora_variant[name]).__name__ for name in active if name in layer.lora_variant
    }
    for name, variant in variants.items():
        if variant not in DORA + _PLAIN:
            raise ValueError(f"{path} is adapted by {variant} ({name!r}), expected LoRA or DoRA. {_MERGE}")
    if len(active) > 1 and any(variant in DORA for variant in variants.values()):
        raise ValueError(
            f"{path} has several active adapters, of which {', '.join(variants)} is DoRA: PEFT merges them "
            f"to another weight than it trains with, active are {', '.join(active)}. Activate one with "
            "set_adapter(name)."
        )


def check_state(path: str, layer: Any) -> None:
    """Refuses a layer whose adapters are merged in place or switched off."""
    if layer.merged:
        raise ValueError(
            f"The adapters {', '.join(layer.merged_adapters)} are merged into {path} in place, where the "
            "base and most of the update are lost to rounding. Call unmerge_adapter(), better: load the "
            "model again, unmerged."
        )
    if layer.disable_adapters:
        raise ValueError(_disabled(path))


def _disabled(path: str) -> str:
    return (
        f"The adapters of {path} are disabled. Enable them (enable_adapters(), or leave disable_adapter())."
    )


def check_slot(name: str, slot: Slot) -> None:
    """Refuses a tensor that is not a plain one in memory."""
    tensor = slot.tensor
    if "_fsdp_wrapped_module" in name or hasattr(tensor, "ds_status"):
        raise ValueError(
            f"{name} is in a flat shard of FSDP1 or DeepSpeed ZeRO-3, which cannot be read: train on a "
            "single device or with DDP."
        )
    parts = [tensor] if slot.copy is None else [tensor, getattr(*slot.copy)]
    for layer, adapter in slot.adapters:
        stacks = (
            layer.lora_A,
            layer.lora_B,
            layer.lora_embedding_A,
            layer.lora_embedding_B,
            layer.lora_magnitude_vector,
        )
        parts += [getattr(stack[adapter], "weight", stack[adapter]) for stack in stacks if adapter in stack]
    if any(part.is_meta for part in parts):
        raise ValueError(
            f"{name} (or its adapter) is on the meta device: not loaded yet, or offloaded. Load the model "
            "without offloading (no device_map='auto'), and materialize it before the fit starts."
        )
    if not isinstance(tensor, nn.Parameter):
        return
    data = type(tensor.data).__name__
    if tensor.dtype not in _FLOATS or data not in ("Tensor", "Parameter", "DTensor"):
        raise ValueError(
            f"{name} is quantized ({data} of {tensor.dtype}): expected float32, bfloat16 or float16. Train "
            "on the unquantized model (or one that dequantize() returns), or call merge_and_unload()."
        )
