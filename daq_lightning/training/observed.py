"""The layers of a run that are observed: Linear layers, and experts that lie in stacks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from daq_lightning.model.layers import linear_layers
from daq_lightning.model.observer import Layer, Observer, Sums
from daq_lightning.training.experts import ExpertLayer, observe_experts, places_of

if TYPE_CHECKING:
    from daq_lightning.export.plan import TensorPlan
    from daq_lightning.model.live import LiveModel


def layers_of(model: LiveModel, tensors: Sequence[TensorPlan], *, experts: bool) -> list[Layer]:
    """Those of some weights that can be observed, in their order; says which experts cannot.

    Args:
        model: What is trained.
        tensors: The weights.
        experts: Whether stacked ones are among them.
    """
    names = [tensor.spec.name for tensor in tensors]
    modules = linear_layers(model, names, model.adapters)
    places, unknown = places_of(model, names) if experts else ({}, {})
    for kind, count in Counter(unknown.values()).items():
        rank_zero_info(f"{count} weights are not observed, since {kind} computes with them in its own way.")
    layers: list[Layer] = []
    for tensor in tensors:
        name = tensor.spec.name
        of = {"name": name, "group": tensor.together, "shape": tensor.spec.shape}
        if name in modules:
            layers.append(Layer(**of, modules=modules[name]))
        elif name in places:
            layers.append(ExpertLayer(**of, modules=(places[name].module,), place=places[name]))
    return layers


def observe(
    layers: Sequence[Layer], sums: Sums, factor: float, when: Callable[[], bool] | None = None
) -> Observer:
    """Opens an observer of some layers; see `Observer`."""
    experts = [layer for layer in layers if isinstance(layer, ExpertLayer)]
    observer = Observer([layer for layer in layers if not isinstance(layer, ExpertLayer)], sums, factor, when)
    observe_experts(experts, observer, sums, factor)
    return observer
