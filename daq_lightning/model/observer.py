"""Hooks on Linear layers, for a few batches: what comes in, and the gradient of the loss at what goes out.

    forward     keep the input; hang a hook on the output
    backward    y^T y of the gradient, and |x|^2 |y|^2; x^T x once all layers that had this input have their
                gradients

Nothing that the layers compute changes, and no hook is left when the batch is over. Of frozen weights, as
with LoRA, the gradient at the output comes all the same wherever the layer has adapters or anything upstream
is trained; where nothing is, the inputs alone are summed.

Layers share the sum of their inputs if they were always given the same tensor, which q, k and v of
cross-attention are not. A layer that is called twice adds both calls. Under activation checkpointing the
first forward has no gradient and is left out, or is the only one whose output is in the graph.

Legend: M out, N in, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from daq_lightning.numerics.rounding.sums import KroneckerSum, used_tokens


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A weight that is observed.

    Attributes:
        name: Checkpoint name.
        group: Equal for layers that may be given the same input.
        shape: (M, N).
        modules: The layers that compute with the weight.
    """

    name: str
    group: str
    shape: tuple[int, ...]
    modules: tuple[nn.Module, ...]


@dataclass(kw_only=True)
class Sums:
    """What was seen of some layers.

    Attributes:
        inputs: Names of the layers that were given the same inputs -> the sum of these.
        outputs: Name of a layer -> the sum of the gradients at its output.
        joint: Name of a layer -> the sum over tokens of |x|^2 |y|^2, of both: a matrix of one number.
        batches: How many batches were observed.
    """

    inputs: dict[tuple[str, ...], KroneckerSum] = field(default_factory=dict)
    outputs: dict[str, KroneckerSum] = field(default_factory=dict)
    joint: dict[str, KroneckerSum] = field(default_factory=dict)
    batches: int = 0

    def add_outputs(self, name: str, y_TM: Tensor, used_T: Tensor, x_TN: Tensor, factor: float) -> None:
        """Adds the gradients at the output of a layer.

        Args:
            name: Of the layer.
            y_TM: The gradients.
            used_T: bool: the tokens that have one.
            x_TN: What the layer was given.
            factor: Multiplies gradients.
        """
        for sums, size in ((self.outputs, y_TM.shape[1]), (self.joint, 1)):
            if name not in sums:
                sums[name] = KroneckerSum(size, y_TM.device)
        self.outputs[name].add(y_TM, used_T, factor)
        sizes_T = _sizes(x_TN).to(y_TM.device) * _sizes(y_TM)
        self.joint[name].add(sizes_T[:, None], used_T, factor)


@dataclass(kw_only=True)
class _Input:
    """An input of this batch, while layers wait for their gradients."""

    x: Tensor
    version: int
    used: Tensor
    names: list[str] = field(default_factory=list)
    waiting: int = 0
    seen: bool = False  # whether any gradient came


class Observer:
    """Hooks on some layers while it is open; use as a context manager, or call `close`.

    Args:
        layers: The layers.
        sums: What is added to.
        factor: Multiplies gradients: 1 over the scale of the loss.
        when: Whether a forward is to be observed; None observes all.

    Attributes:
        error: What went wrong in a hook, such as too little memory; the hooks did nothing from then on.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        sums: Sums,
        factor: float = 1.0,
        when: Callable[[], bool] | None = None,
    ) -> None:
        self.error: Exception | None = None
        self._sums, self._factor, self._when = sums, factor, when
        self._latest: dict[str, _Input] = {}  # by group
        self._inputs: list[_Input] = []
        self._handles: list[RemovableHandle] = []
        for layer in layers:
            for module in layer.modules:
                self.hang_up(module, partial(self._forward, layer))

    def hang_up(self, module: nn.Module, act: Callable[..., None]) -> None:
        """Acts after each forward of a module until `close`, on the arguments of a hook with `kwargs`."""

        def hook(*arguments: Any) -> None:
            if self._when is None or self._when():
                self._hook(act, *arguments)

        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def on_gradient(self, output: Tensor, act: Callable[[Tensor], None]) -> None:
        """Acts on the gradient of an output, if it comes before `close`."""
        output.register_hook(partial(self._hook, lambda gradient: act(gradient) if self._handles else None))

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes the hooks away; a gradient that comes later is not counted any more."""
        for handle in self._handles:
            handle.remove()
        inputs, self._handles, self._inputs, self._latest = self._inputs, [], [], {}
        self._sums.batches += 1
        for one in inputs:
            if one.seen:
                self._add_input(one)

    def _hook(self, act: Callable[..., None], *arguments: Any) -> None:
        """Acts in the middle of a batch, which goes on whatever happens."""
        if self.error is not None:
            return
        try:
            act(*arguments)
        except Exception as error:
            # without its frames, which hold tensors
            self.error, self._inputs, self._latest = error.with_traceback(None), [], {}

    def _forward(
        self, layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        x = args[0] if args else kwargs.get("input")
        if not torch.is_grad_enabled() or not (is_plain(x) and is_plain(output)):
            return
        with torch.no_grad():
            one = self._input(layer, x.detach())
        one.names.append(layer.name)
        if output.requires_grad:
            one.waiting += 1
            self.on_gradient(output, partial(self._backward, layer, one))
        elif not one.waiting:  # nothing upstream is trained: there will be no gradient
            one.used.fill_(True)
            one.seen = True

    def _input(self, layer: Layer, x: Tensor) -> _Input:
        """The input of this call: that of the layer before it in the group, if it is the same tensor."""
        last = self._latest.get(layer.group)
        if last is not None and layer.name not in last.names and _is_same(last, x):
            return last
        used_T = torch.zeros(x.shape[:-1].numel(), dtype=torch.bool, device=x.device)
        one = _Input(x=x, version=x._version, used=used_T)
        self._latest[layer.group] = one
        self._inputs.append(one)
        return one

    @torch.no_grad()
    def _backward(self, layer: Layer, one: _Input, gradient: Tensor) -> None:
        if not is_plain(gradient):
            return
        y_TM = gradient.detach().reshape(-1, gradient.shape[-1])
        used_T = used_tokens(y_TM)
        self._sums.add_outputs(layer.name, y_TM, used_T, one.x.reshape(len(y_TM), -1), self._factor)
        one.used |= used_T.to(one.used.device)
        one.seen = True
        one.waiting -= 1
        if not one.waiting:
            self._add_input(one)
            self._inputs = [other for other in self._inputs if other is not one]
            self._latest = {group: other for group, other in self._latest.items() if other is not one}

    def _add_input(self, one: _Input) -> None:
        if one.x._version != one.version:  # overwritten since: another input by now
            return
        key, x_TN = tuple(sorted(one.names)), one.x.reshape(-1, one.x.shape[-1])
        if key not in self._sums.inputs:
            self._sums.inputs[key] = KroneckerSum(x_TN.shape[1], x_TN.device)
        self._sums.inputs[key].add(x_TN, one.used)


def _sizes(values_TK: Tensor) -> Tensor:
    """The length of each vector, float32."""
    return torch.linalg.vector_norm(values_TK, dim=1, dtype=torch.float32)


def _is_same(one: _Input, x: Tensor) -> bool:
    return (
        one.x.data_ptr() == x.data_ptr()
        and one.x.shape == x.shape
        and one.x.stride() == x.stride()
        and one.version == x._version
    )


def is_plain(tensor: object) -> TypeGuard[Tensor]:
    """Whether it is a tensor that this process has whole."""
    return isinstance(tensor, Tensor) and not hasattr(tensor, "full_tensor") and tensor.ndim >= 2
