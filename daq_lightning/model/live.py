"""The model inside a LightningModule, as a source for an export.

A Trainer trains a LightningModule; servers load the `PreTrainedModel` inside it. This finds it, and gathers
what an export needs from it: weights under checkpoint names, config, generation config, tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from daq_lightning.checkpoint.tensor_file import LazyTensors, Renamed, spec_of
from daq_lightning.model.adapters.merged import find_adapters
from daq_lightning.model.adapters.save import save_adapter
from daq_lightning.model.architecture import Architecture, class_of
from daq_lightning.model.computed import ComputedTensors, find_computed
from daq_lightning.model.live_weights import LiveWeights
from daq_lightning.model.placeholders import Placeholder
from daq_lightning.model.saved_state import InFull, adapters_in, check_adapters
from daq_lightning.model.sharded import is_sharded, sharded_state, tensor_on


def find_model(module: nn.Module, path: str | None) -> tuple[str, nn.Module]:
    """The model to export and its name in the LightningModule.

    Args:
        module: The LightningModule.
        path: Name of a submodule, or None to look for the one `PreTrainedModel`; a module that is one, or
            has none in it, is exported itself.

    Raises:
        ValueError: No such submodule, or several models to choose from.
    """
    if path is not None:
        try:
            return path, module.get_submodule(path)
        except AttributeError as error:
            children = ", ".join(name for name, _ in module.named_children()) or "none"
            raise ValueError(
                f"module={path!r}: {type(module).__name__} has no such submodule. Its submodules: {children}."
            ) from error
    found = [("", module)] if _is_model(module) else list(_outermost_models(module))
    if len(found) == 1 and any(type(part).__module__.startswith("peft.") for part in module.modules()):
        return "", module  # the adapters know their model; a PeftModel around it holds their configuration
    if len(found) > 1:
        raise ValueError(
            f"{type(module).__name__} holds {len(found)} models ({', '.join(name for name, _ in found)}): "
            f"say which one to export, for example module={found[0][0]!r}."
        )
    return found[0] if found else ("", module)


class LiveModel:
    """A model in training, under the names of its checkpoint.

    Args:
        module: The LightningModule that holds it.
        path: Name of the submodule, see `find_model`.
        state: A saved `state_dict` of the LightningModule, to read the values from; None reads the module.
        merge: Whether adapters are merged; else the frozen weights alone are taken.
        trained: What the strategy trains, where it has wrapped the LightningModule.

    Attributes:
        model: The model that the names refer to.
        adapters: Its adapters, if it has any.
        weights: Checkpoint name -> tensor; computed when asked for.
        specs: The same with dtypes and shapes; nothing is computed.
        keys: Checkpoint name -> memory name.
        architecture: The modules.
        sharded: Whether no rank has the whole model: reading a weight is work for all ranks, by `on`.

    Raises:
        ValueError: As for `find_model`; or adapters that cannot be merged, or that the module does not have.
    """

    def __init__(
        self,
        module: nn.Module,
        path: str | None = None,
        state: Mapping[str, Tensor] | None = None,
        *,
        merge: bool = True,
        trained: nn.Module | None = None,
    ) -> None:
        self._module, self._path, self._trained = module, path, trained
        self._merge = merge
        self._name, found = find_model(module, path)
        self._found = found
        self._state = None if state is None else _inside(state, self._name)
        own = sharded_state(found, trained)
        self.sharded = any(map(is_sharded, own.values()))
        computed = find_computed(found)
        _check_sharded(found, own, computed)
        self.adapters = find_adapters(found, self._state)
        if self.adapters is not None:
            if computed:
                raise ValueError(
                    f"{next(iter(computed))} is parametrized (weight norm or the like) in a model with PEFT "
                    "adapters, which cannot be merged exactly. Remove the parametrization first, with "
                    "torch.nn.utils.parametrize.remove_parametrizations, or call merge_and_unload()."
                )
            self.model: nn.Module = self.adapters.model
            tensors = self.adapters.weights if merge else self.adapters.base
            outlines, identities = self.adapters.outlines, self.adapters.identities
            if not merge:
                outlines = self.adapters.frozen
        else:
            self.model = found
            check_adapters(found, self._state or {})
            tensors = ComputedTensors(own if self._state is None else InFull(own, self._state), computed)
            lazy = isinstance(self._state, LazyTensors)  # it has the shapes of the model, or cannot be read
            outlines = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                for name, tensor in (ComputedTensors(own, computed) if lazy else tensors).items()
            }
            identities = {name: id(getattr(own.get(name), "parameter", own.get(name))) for name in tensors}
            identities |= {name: id(weight.module) for name, weight in computed.items() if name in tensors}
        self.architecture = Architecture(self.model)
        saved = self.architecture.saved(outlines, identities)
        self.keys = {name: key for name, (key, _) in saved.items()}
        specs = {name: spec_of(name, outline) for name, (_, outline) in saved.items()}
        self.specs = tuple(specs.values())
        self.weights = LiveWeights(
            tensors, self.keys, self.architecture, specs, collective=self.sharded and state is None
        )

    def saved(self, state: Mapping[str, Tensor]) -> LiveWeights:
        """The weights that a saved state of the LightningModule holds, under the names of this model.

        Args:
            state: With the adapters of this model, which are merged as here; or without any, from a run
                before they were added.
        """
        inside = _inside(state, self._name)
        if self.adapters is None:
            check_adapters(self._found, inside)
            return self.view(ComputedTensors(inside, find_computed(self._found)))
        if adapters_in(state):
            return LiveModel(
                self._module, self._path, state, merge=self._merge, trained=self._trained
            ).weights
        return self.view(_inside(inside, self.adapters.path))

    @property
    def merges(self) -> bool:
        """Whether adapters are merged into the weights."""
        return self.adapters is not None and self._merge

    def places(self) -> dict[str, Any]:
        """Memory name -> the live tensor that the model computes with, or the placeholder of a sharded one.

        With adapters that is the frozen tensor, or the trained copy where they are merged.
        """
        if self.adapters is None:
            return sharded_state(self._found, self._trained)
        slots = self.adapters.weights.slots
        return {name: slot.trained if self._merge else slot.tensor for name, slot in slots.items()}

    def module_of(self, key: str) -> nn.Module | None:
        """The module that computes with a tensor, by its memory name; None if there is none of that name."""
        if self.adapters is None:
            return self.architecture.module_of(key)
        slot = self.adapters.weights.slots[key]
        return slot.copy[0] if self._merge and slot.copy is not None else slot.owner

    def view(self, tensors: Mapping[str, Tensor], *, collective: bool = False) -> LiveWeights:
        """Other tensors in memory names, such as a base, under checkpoint names.

        Args:
            tensors: Memory name -> tensor.
            collective: Whether they are sharded.
        """
        specs = {spec.name: spec for spec in self.specs} if collective else None
        return LiveWeights(tensors, self.keys, self.architecture, specs, collective=collective)

    def gather_adapters(self) -> None:
        """Reads the adapters that `copy_files` is to write, where they are sharded. A collective."""
        if self.sharded and self.adapters is not None and not self._merge and self._state is None:
            state = self._found.state_dict()
            whole = ((name, tensor_on(state[name], None)) for name in adapters_in(state))
            self._state = {name: tensor for name, tensor in whole if tensor is not None}

    def config(self) -> dict[str, Any] | None:
        """Content of config.json; None for a model that has none."""
        if not self.architecture.is_transformers:
            return None
        config = json.loads(self.model.config.to_json_string())  # type: ignore[union-attr, operator]
        return config | {"architectures": [class_of(self.model).__name__]}

    def copy_files(self, folder: Path, *owners: object) -> None:
        """Saves generation config and tokenizer, and adapters that are not merged, in a subfolder `adapter`.

        Args:
            folder: Destination.
            owners: Objects (LightningModule, DataModule) whose `tokenizer`, `processor` or `processing_class`
                is saved if there is one.
        """
        if self.architecture.is_transformers and self.model.can_generate():  # type: ignore[operator]
            self.model.generation_config.save_pretrained(folder)  # type: ignore[union-attr, operator]
        if self.adapters is not None and not self._merge:
            save_adapter(self._found, folder / "adapter", self._state)
        for owner in owners:
            for name in ("processor", "processing_class", "tokenizer"):
                candidate = getattr(owner, name, None)
                save = getattr(candidate, "save_pretrained", None)
                if save is not None and not isinstance(candidate, nn.Module):
                    save(folder)
                    return


def _check_sharded(model: nn.Module, state: Mapping[str, Any], computed: Mapping[str, object]) -> None:
    """Refuses what cannot be computed out of shards."""
    peft = any(type(part).__module__.startswith("peft.") for part in model.modules())
    if peft and any(isinstance(tensor, Placeholder) for tensor in state.values()):
        raise ValueError(
            "PEFT adapters in a model that FSDP1 or DeepSpeed ZeRO-3 sharded cannot be merged: train with "
            "ModelParallelStrategy (FSDP2), or with ZeRO-2, or save the adapter and run `daq-lightning "
            "quantize POST --adapter FOLDER`."
        )
    if computed and any(map(is_sharded, state.values())):
        raise ValueError(
            f"{next(iter(computed))} is parametrized (weight norm or the like) in a sharded model, where it "
            "cannot be computed. Remove the parametrization first, with "
            "torch.nn.utils.parametrize.remove_parametrizations."
        )


def _inside(state: Mapping[str, Any], name: str) -> Mapping[str, Tensor]:
    """The tensors of a submodule under the names they have inside it; lazy ones stay so."""
    prefix = f"{name}." if name else ""
    if isinstance(state, LazyTensors):
        return Renamed(state, {key.removeprefix(prefix): key for key in state if key.startswith(prefix)})
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix) and isinstance(value, Tensor)
    }


def _outermost_models(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        full = f"{prefix}.{name}" if prefix else name
        if _is_model(child):
            yield full, child
        else:
            yield from _outermost_models(child, full)


def _is_model(module: nn.Module) -> bool:
    return any(cls.__module__ == "transformers.modeling_utils" for cls in type(module).__mro__)
