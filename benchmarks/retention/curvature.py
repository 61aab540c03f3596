"""Statistics of a fine-tuned model on batches, by plain hooks, and the factors that rounding takes.

    activations   A = sum x^T x, G = sum y^T y over tokens: x inputs of a layer, y gradients at its output
    gradients     A = sum g^T g, G = sum g g^T over batches: g gradient of the weight
    update        D^T D, summed over the layers that share an input, and D D^T: D = post - base

Tokens with y = 0, such as padding, are dropped.

Legend: T tokens, M out, N in.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.retention.settings import Setting
from benchmarks.retention.subjects import Batch, Subject
from daq_lightning.numerics.rounding.curvature import Factors, factor, update_statistics


class Sides(NamedTuple):
    """Statistics of the inputs (N, N) and the outputs (M, M) of a weight."""

    inputs: Tensor
    outputs: Tensor


class Statistics(NamedTuple):
    """Of one set of batches, by the name of the weight."""

    activations: dict[str, Sides]
    gradients: dict[str, Sides]
    shared: dict[str, tuple[str, ...]]
    """The names of all weights with the same input."""


class Curvature:
    """The statistics of a subject, each gathered when a setting first asks for it."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._statistics: dict[str, Statistics] = {}
        self._updates: dict[str, Sides] = {}

    def factors(self, name: str, setting: Setting) -> Factors:
        """What `round_with_curvature` takes for a weight."""
        source = setting.rounding
        batches = "whole run" if setting.whole_run else "self" if source == "self" else "training"
        statistics = self._gather(batches)
        update = self._update(name, statistics.shared[name])
        seen = (statistics.gradients if source == "gradients" else statistics.activations)[name]
        inputs, outputs = update if source == "update" else seen
        if source == "inputs+update":
            outputs = update.outputs
        side = partial(factor, share=setting.update, order=setting.ordered)
        return Factors(
            inputs=side(inputs, update.inputs, damping=setting.damping_in),
            outputs=None if source == "gptq" else side(outputs, update.outputs, damping=setting.damping_out),
        )

    def _update(self, name: str, shared: tuple[str, ...]) -> Sides:
        for other in shared:
            if other not in self._updates:
                delta_MN = self._subject.post[other].float() - self._subject.base[other].float()
                self._updates[other] = Sides(*update_statistics(delta_MN))
        inputs_NN = torch.stack([self._updates[other].inputs for other in shared]).sum(0)
        return Sides(inputs_NN, self._updates[name].outputs)

    def _gather(self, what: str) -> Statistics:
        if what not in self._statistics:
            self._subject.put(self._subject.post)
            if what == "self":
                assert self._subject.own_text is not None
                batches = self._subject.own_text()
            else:
                batches = self._subject.whole_run if what == "whole run" else self._subject.training
            self._statistics[what] = gather(self._subject.network, self._subject.quantized, batches)
        return self._statistics[what]


def gather(network: nn.Module, names: tuple[str, ...], batches: list[Batch]) -> Statistics:
    """Statistics of the weights that the network holds, on batches with their targets."""
    activations: dict[str, Sides] = {}
    gradients: dict[str, Sides] = {}
    inputs_of: dict[str, Tensor] = {}
    layers = {name: network.get_submodule(name.removesuffix(".weight")) for name in names}

    def forward(name: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs_of[name] = args[0]
        x_TN = args[0].detach().flatten(0, -2)

        def backward(gradient: Tensor) -> None:
            y_TM = gradient.flatten(0, -2)
            counts = (y_TM != 0).any(-1)
            _add(activations, name, _squares(x_TN[counts]), _squares(y_TM[counts]))

        output.register_hook(backward)

    hooks = [layer.register_forward_hook(partial(forward, name)) for name, layer in layers.items()]
    shared: dict[str, tuple[str, ...]] = {}
    for batch in batches:
        network.zero_grad()
        logits = network(**batch.inputs).logits
        if not shared:
            for name, x in inputs_of.items():
                shared[name] = tuple(other for other in names if inputs_of[other] is x)
        cross_entropy(logits.flatten(0, -2), batch.targets.flatten(), reduction="sum").backward()
        for name, layer in layers.items():
            gradient_MN = layer.weight.grad
            assert isinstance(gradient_MN, Tensor)
            _add(gradients, name, _squares(gradient_MN), _squares(gradient_MN.T))
    for hook in hooks:
        hook.remove()
    network.zero_grad()
    return Statistics(activations, gradients, shared)


def _squares(rows_TK: Tensor) -> Tensor:
    return rows_TK.T @ rows_TK


def _add(sums: dict[str, Sides], name: str, inputs: Tensor, outputs: Tensor) -> None:
    if name in sums:
        inputs, outputs = sums[name].inputs + inputs, sums[name].outputs + outputs
    sums[name] = Sides(inputs, outputs)
