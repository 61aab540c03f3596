"""The layers of a model in memory that compute with the weights of its checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

from torch import nn

if TYPE_CHECKING:
    from daq_lightning.model.adapters.merged import AdaptedWeights
    from daq_lightning.model.architecture import Architecture
    from daq_lightning.model.live import LiveModel


class Named(Protocol):
    """A model whose modules are found by checkpoint names.

    Attributes:
        architecture: Of the model.
        keys: Checkpoint name -> memory name.
    """

    @property
    def architecture(self) -> Architecture: ...

    @property
    def keys(self) -> Mapping[str, str]: ...


def linear_layers(
    model: Named, names: Iterable[str], adapters: AdaptedWeights | None = None
) -> dict[str, tuple[nn.Module, ...]]:
    """Checkpoint name of a weight -> the layers that compute with it: one, or several that share it.

    Of a layer with adapters it is what PEFT put around it: it takes the same input, and at its output there
    is a gradient even where nothing upstream is trained. Of a module that PEFT trains as a copy it is the
    copy, which the model computes with. Weights that no Linear layer has to itself are left out: stacked
    experts, and what a checkpoint splits.

    Args:
        model: The model.
        names: Checkpoint names.
        adapters: Of the model.
    """
    architecture, parts = model.architecture, Counter(model.keys.values())
    around: dict[int, nn.Module] = {}
    for module in architecture.model.modules():  # from the outside in
        inside = module._modules.get("base_layer")
        if inside is not None:
            around[id(inside)] = around.get(id(module), module)
    users: dict[int, list[nn.Module]] = {}
    for layer in architecture.linear_modules():
        users.setdefault(id(layer.weight), []).append(around.get(id(layer), layer))
    found = {}
    for name in names:
        key = model.keys[name]
        layer = architecture.module_of(key)
        if not isinstance(layer, nn.Linear) or parts[key] > 1:
            continue
        copy = None if adapters is None else adapters.weights.slots[key].copy
        found[name] = tuple(users[id(layer.weight)]) if copy is None else (copy[0],)
    return found


def computing_modules(model: LiveModel, names: Iterable[str]) -> list[nn.Module]:
    """The modules whose own products take the weights of a checkpoint: Linear layers, and stacks of experts.

    Of a layer with adapters it is the layer inside; of a module that PEFT trains as a copy, the copy where
    that is merged. Each comes once.

    Args:
        model: The model.
        names: Checkpoint names.

    Raises:
        ValueError: A weight lies in no module that is found under its name.
    """
    found: dict[int, nn.Module] = {}
    for name in names:
        module = model.module_of(model.keys[name])
        if module is None:
            raise ValueError(
                f"The module that computes with {name} is not found under this name: a wrapper around it has "
                "renamed it."
            )
        found[id(module)] = module
    return list(found.values())
