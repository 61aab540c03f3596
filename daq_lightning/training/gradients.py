"""The curvature of weights from their own gradients, as they are when the optimizer steps: no hooks.

    A = sum over steps of g^T g        added up over the weights that share an input
    G = sum over steps of g g^T

Less is known this way than from the activations of each token, and it needs gradients of the weights, which
adapters leave them without; but a compiled model has them too. Every rank has the same ones under DDP.

Legend: M out, N in.

Source: Shampoo (arXiv 1802.09568).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from daq_lightning.model.observer import Layer, Sums
from daq_lightning.numerics.rounding.sums import KroneckerSum


class GradientObserver:
    """Reads the gradients of some layers when the optimizer is about to step.

    Args:
        layers: The layers.
        sums: What is added to.

    Attributes:
        error: None: unlike in a hook, what goes wrong is raised.
    """

    error: None = None

    def __init__(self, layers: Sequence[Layer], sums: Sums) -> None:
        self._layers, self._sums = layers, sums
        self._stepped = False

    def step(self) -> None:
        """Adds the gradients that there are: of all batches of the step, unscaled, not clipped yet."""
        found = {layer: gradient for layer in self._layers if (gradient := _gradient(layer)) is not None}
        self._stepped = self._stepped or bool(found)
        groups: dict[str, list[str]] = {}
        for layer in found:
            groups.setdefault(layer.group, []).append(layer.name)
        for layer, gradient_MN in found.items():
            key = tuple(groups[layer.group])
            if key not in self._sums.inputs:
                self._sums.inputs[key] = KroneckerSum(gradient_MN.shape[1], gradient_MN.device)
            if layer.name not in self._sums.outputs:
                self._sums.outputs[layer.name] = KroneckerSum(gradient_MN.shape[0], gradient_MN.device)
            self._sums.inputs[key].add_step(gradient_MN)
            self._sums.outputs[layer.name].add_step(gradient_MN.T)

    def close(self) -> None:
        """The batch is over; it counts if the optimizer stepped in it."""
        self._sums.batches += self._stepped


def _gradient(layer: Layer) -> Tensor | None:
    """The gradient of a weight (M, N), shared by all its layers."""
    weight = layer.modules[0].weight
    return weight.grad.detach() if isinstance(weight, Tensor) and weight.grad is not None else None
