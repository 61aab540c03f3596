"""Experts that transformers holds as stacks, each observed by its own tokens.

| in memory | x | y |
| --- | --- | --- |
| `gate_up_proj[e]` (or `up_proj[e]`) | tokens that the router sent to e | gradient at its output |
| `down_proj[e]` | what the gate made of them | routing weight * gradient at the output of the layer |

However a layer computes (eager, batched, grouped or a kernel of its own), a hook sees what comes in, to whom
each token goes with which weight, and the gradient at what goes out. What lies between is computed once more,
expert by expert, from the definition that all implementations share.

Legend: E experts, M out, N in, H the width of the layer, T tokens of one expert.

Source: transformers 5.23 `integrations/moe.py` (`use_experts_implementation`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from daq_lightning.model.observer import Layer, Observer, Sums, is_plain
from daq_lightning.numerics.rounding.sums import KroneckerSum, used_tokens

if TYPE_CHECKING:
    from daq_lightning.model.live import LiveModel

_ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")
_MARKS = ("has_gate", "has_bias", "is_transposed", "_is_expert_parallel")


class Place(NamedTuple):
    """Where the weight of one expert lies.

    Attributes:
        module: That holds the stack and computes with it.
        stack: Name of the stack in it.
        expert: Number of the expert.
        rows: Of its matrix in the stack.
    """

    module: nn.Module
    stack: str
    expert: int
    rows: slice


@dataclass(frozen=True, kw_only=True)
class ExpertLayer(Layer):
    """The weight of one expert, which its stack computes with."""

    place: Place


def places_of(model: LiveModel, names: Iterable[str]) -> tuple[dict[str, Place], dict[str, str]]:
    """Where the weights of stacked experts lie, and those that are computed in a way that is not known here.

    Args:
        model: The model.
        names: Checkpoint names.

    Returns:
        Checkpoint name -> its place; checkpoint name of a stacked weight that cannot be observed -> the class
        that computes with it.
    """
    sizes = Counter(model.keys.values())
    rows: dict[str, dict[str, tuple[int, slice]]] = {}
    found, unknown = {}, {}
    for name in names:
        key = model.keys[name]
        if sizes[key] == 1:
            continue
        module, leaf = _module_of(model, key), key.rpartition(".")[2]
        if module is None or not _is_known(module) or leaf not in (_up(module), "down_proj"):
            unknown[name] = type(module).__name__
            continue
        if key not in rows:
            stack = getattr(module, leaf)
            count = stack.shape[0] * stack.shape[1]
            probe = torch.arange(count, dtype=torch.int64, device="cpu").reshape(*stack.shape[:2], 1)
            parts = model.architecture.split(key, probe)
            rows[key] = {part: _rows(lines, stack.shape[1]) for part, lines in parts.items()}
        expert, where = rows[key][name]
        found[name] = Place(module, leaf, expert, where)
    return found, unknown


def observe_experts(
    layers: Sequence[ExpertLayer], observer: Observer, sums: Sums, factor: float = 1.0
) -> None:
    """Lets an observer see experts as well.

    Args:
        layers: Their weights.
        observer: Is open; what goes wrong goes to it.
        sums: What is added to.
        factor: Multiplies gradients: 1 over the scale of the loss.
    """
    modules: dict[nn.Module, dict[int, list[ExpertLayer]]] = {}
    for layer in layers:
        modules.setdefault(layer.place.module, {}).setdefault(layer.place.expert, []).append(layer)
    for module, experts in modules.items():
        observer.hang_up(module, _Stack(experts, observer, sums, factor).forward)


class _Call(NamedTuple):
    """What a layer was given, and the weights that it used: with adapters they are gone after the forward."""

    x: Tensor
    version: int
    chosen: Tensor
    weights: Tensor
    up: Tensor
    down: Tensor
    bias: Tensor | None  # of the first stack


class _Stack:
    """The experts of one layer that are observed."""

    def __init__(
        self, experts: Mapping[int, list[ExpertLayer]], observer: Observer, sums: Sums, factor: float
    ) -> None:
        self._experts, self._observer, self._sums, self._factor = experts, observer, sums, factor

    def forward(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """The hook."""
        given = dict(zip(_ARGUMENTS, args, strict=False)) | dict(kwargs)
        tensors: list[Any] = [given.get(name) for name in _ARGUMENTS]
        tensors += [getattr(module, _up(module)), module.down_proj, output]
        if not torch.is_grad_enabled() or not all(map(is_plain, tensors)):
            return
        x, chosen, weights, up, down, output = tensors
        bias = getattr(module, f"{_up(module)}_bias") if module.has_bias else None
        call = _Call(x.detach(), x._version, chosen, weights.detach(), up.detach(), down.detach(), bias)
        if output.requires_grad:
            self._observer.on_gradient(output, partial(self._add, module, call))
        else:  # nothing upstream is trained: there will be no gradient
            self._add(module, call, None)

    @torch.no_grad()
    def _add(self, module: Any, call: _Call, gradient: Tensor | None) -> None:
        if call.x._version != call.version or not call.up.untyped_storage().nbytes():
            return  # overwritten or resharded since
        x_SN = call.x.reshape(-1, call.x.shape[-1])
        y_SH = None if gradient is None else gradient.reshape(-1, gradient.shape[-1])
        many, chosen, weights = call.chosen.shape[-1], call.chosen.reshape(-1), call.weights.reshape(-1)
        ordered, counts = chosen.argsort(stable=True), torch.bincount(chosen).tolist()
        for expert, part in enumerate(ordered.split(counts)):
            if len(part) and expert in self._experts:
                y_TH = None if y_SH is None else y_SH[part // many] * weights[part, None]
                self._add_expert(module, call, expert, x_SN[part // many], y_TH)

    def _add_expert(self, module: Any, call: _Call, expert: int, x_TN: Tensor, y_TH: Tensor | None) -> None:
        """One expert: its tokens, and the gradients at what it made of them, before they were added up."""
        up_MN, down_HM = call.up[expert], call.down[expert]
        bias_M = None if call.bias is None else call.bias[expert].detach()
        made_TM = linear(x_TN.to(up_MN.dtype), up_MN, bias_M)
        with torch.enable_grad():
            made_TM.requires_grad_()
            inside_TM = module._apply_gate(made_TM) if module.has_gate else module.act_fn(made_TM)
        y_TM = None
        if y_TH is not None:
            [y_TM] = torch.autograd.grad(inside_TM, made_TM, y_TH.to(down_HM.dtype) @ down_HM)
        stacks = {_up(module): (x_TN, y_TM), "down_proj": (inside_TM.detach(), y_TH)}
        for stack, (inputs, outputs) in stacks.items():
            layers = [layer for layer in self._experts[expert] if layer.place.stack == stack]
            if layers:
                self._add_layers(layers, inputs, outputs)

    def _add_layers(self, layers: Sequence[ExpertLayer], x_TN: Tensor, y_TM: Tensor | None) -> None:
        used_T = torch.full((len(x_TN),), y_TM is None, dtype=torch.bool, device=x_TN.device)
        for layer in layers:
            if y_TM is not None:
                own = y_TM[:, layer.place.rows]
                used_T |= used_tokens(own)
                self._sums.add_outputs(layer.name, own, used_tokens(own), x_TN, self._factor)
        key = tuple(sorted(layer.name for layer in layers))
        if key not in self._sums.inputs:
            self._sums.inputs[key] = KroneckerSum(x_TN.shape[1], x_TN.device)
        self._sums.inputs[key].add(x_TN, used_T)


def _up(module: Any) -> str:
    """The stack that a layer of experts begins with."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def _is_known(module: Any) -> bool:
    """Whether a layer computes as the definition of transformers says, and all of it here."""
    if any(not hasattr(module, mark) for mark in _MARKS) or not hasattr(module, "_apply_gate"):
        return False
    normed = getattr(module, "has_post_expert_norm", False)  # transformers 5.18 has no such layers
    return not (module.is_transposed or normed or module._is_expert_parallel)


def _module_of(model: LiveModel, key: str) -> nn.Module | None:
    """The module that computes with a stack: the copy, where PEFT trains one."""
    if model.adapters is None:
        return model.architecture.module_of(key)
    slot = model.adapters.weights.slots[key]
    return slot.owner if slot.copy is None else slot.copy[0]


def _rows(lines_M1: Tensor, per_expert: int) -> tuple[int, slice]:
    """Expert, and rows of its matrix, of a tensor in a checkpoint that holds the numbers of its rows."""
    lines = lines_M1.flatten()
    first, last = int(lines[0]), int(lines[-1])
    step = int(lines[1]) - first if len(lines) > 1 else 1
    expert = first // per_expert
    rows = slice(first - expert * per_expert, last - expert * per_expert + 1, step)
    assert lines.tolist() == list(range(first, last + 1, step)), "evenly spaced rows of one expert"
    return expert, rows
