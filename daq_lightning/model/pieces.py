"""Pieces of weights in training: some rows and columns, read by a rank that holds them.

| the weight is | its piece is read | what moves |
| --- | --- | --- |
| plain | as a view | nothing |
| one expert of a plain stack | out of the stack of this one | nothing |
| a `DTensor` | as a view of the local shard, if the piece lies in it | nothing |
| adapted by LoRA | as frozen piece + scaling * B[rows] @ A[:, columns], in float32 | sharded factors |

What FSDP1 and ZeRO-3 hold cannot be read in pieces: a flat shard knows no rows. Nor can, in a sharded or an
adapted model, one expert out of a stack.

Source: torch `compute_local_shape_and_global_offset`, for the placements of FSDP2 and tensor parallel.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from daq_lightning.model.adapters.merged import factors_of
from daq_lightning.model.adapters.tree import Slot
from daq_lightning.model.sharded import is_sharded, tensor_on
from daq_lightning.numerics.lora import merge_lora
from daq_lightning.numerics.tiling import Box

if TYPE_CHECKING:
    from daq_lightning.model.live import LiveModel


class LivePieces:
    """The weights of a model in training, to be read in pieces at any step; nothing is copied or kept.

    Args:
        model: With the weights of the module, not of a saved state; its adapters are merged.
    """

    def __init__(self, model: LiveModel) -> None:
        self._model = model
        self._shapes = {spec.name: spec.shape for spec in model.specs}
        self._parts = Counter(model.keys.values())
        self._outlines = {
            key: torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            for key, parameter in model.model.named_parameters()
            if self._parts[key] > 1
        }

    @property
    def sharded(self) -> bool:
        """Whether the ranks hold different parts of the model."""
        return self._model.sharded

    def trained(self, names: Iterable[str]) -> list[str]:
        """Those of some weights that training changes and that can be read in pieces."""
        return [name for name in names if self._readable(name) and self._is_trained(name)]

    def box(self, name: str) -> Box | None:
        """What this rank holds of a weight; None if it is nothing."""
        return _box_of(self._stored(name), self._shapes[name])

    def read(self, name: str, box: Box | None) -> Tensor | None:
        """A piece as it is now, detached.

        A collective for a sharded model with adapters: all ranks ask for the same weights in the same order.

        Args:
            name: The weight.
            box: The piece, in what this rank holds; None to only take part.
        """
        adapters = self._model.adapters
        if adapters is None:
            return None if box is None else _cut(self._stored(name), box, self._shapes[name])
        slot = adapters.weights.slots[self._model.keys[name]]
        if slot.copy is not None:
            return None if box is None else _cut(getattr(*slot.copy).detach(), box, self._shapes[name])
        return _merged(slot, box, self._shapes[name])

    def frozen(self, name: str, box: Box) -> Tensor:
        """A piece of the weight under the adapters."""
        return _cut(self._stored(name), box, self._shapes[name])

    def _stored(self, name: str) -> Tensor:
        """The tensor in memory, frozen where adapters change it: a shard, where it is sharded."""
        key, adapters = self._model.keys[name], self._model.adapters
        if adapters is not None:
            return adapters.base.slots[key].tensor.detach()
        if self._parts[key] > 1:
            expert, as_first = _expert_of(name)
            one = self._model.model.get_parameter(key).detach()[expert : expert + 1]
            return self._model.architecture.split(key, one)[as_first]
        return copy.copy(self._model.weights)[name]  # what the mapping itself has read last, it would keep

    def _readable(self, name: str) -> bool:
        """Whether its piece can be read by itself: not out of a stack, but for plain stacks of experts."""
        key = self._model.keys[name]
        if self._parts[key] == 1:
            plain = not self._model.sharded and self._model.adapters is None
            return plain or tuple(self._stored(name).shape) == tuple(self._shapes[name])
        if self._model.sharded or self._model.adapters is not None or ".experts." not in name:
            return False
        stack = self._outlines.get(key)
        if stack is None:
            return False
        one = self._model.architecture.split(key, stack[:1])
        first = one.get(_expert_of(name)[1])
        experts = self._parts[key] == len(one) * stack.shape[0]
        return experts and first is not None and tuple(first.shape) == tuple(self._shapes[name])

    def _is_trained(self, name: str) -> bool:
        key, adapters = self._model.keys[name], self._model.adapters
        if adapters is not None:
            slot = adapters.weights.slots[key]
            transposed = any(layer.fan_in_fan_out for layer, _ in slot.adapters)
            return not transposed and (slot.changed or slot.tensor.requires_grad)
        owner, _, last = key.rpartition(".")
        try:
            parameter = getattr(self._model.model.get_submodule(owner), last)
        except AttributeError:  # under another name, or computed from other tensors
            return True
        return bool(parameter.requires_grad) or not isinstance(parameter, nn.Parameter)


def _expert_of(name: str) -> tuple[int, str]:
    """The number of an expert, and what its weight would be called if it were the first.

    Example:
        >>> _expert_of("layers.0.mlp.experts.17.up_proj.weight")
        (17, 'layers.0.mlp.experts.0.up_proj.weight')
    """
    before, _, after = name.rpartition(".experts.")
    number, _, rest = after.partition(".")
    return int(number), f"{before}.experts.0.{rest}"


def _merged(slot: Slot, box: Box | None, shape_MN: tuple[int, ...]) -> Tensor | None:
    """A piece of frozen weight and adapters, in float32."""

    def value(owner: nn.Module, key: str) -> Tensor:
        return getattr(owner, key).detach()

    def whole(part: Tensor) -> Tensor | None:
        return tensor_on(part, None)

    adapters = [factors_of(value, layer, adapter, whole) for layer, adapter in slot.adapters]
    if box is None:
        return None
    dora = any(factors is not None and factors.magnitude is not None for factors in adapters)
    # DoRA scales a row to a length, which all its columns have part in
    wide = Box(box.top, box.bottom, 0, shape_MN[1]) if dora else box
    rows, columns = slice(wide.top, wide.bottom), slice(wide.left, wide.right)
    frozen = _cut(slot.tensor.detach(), wide, shape_MN)
    cut = [
        replace(
            factors,
            A_RN=factors.A_RN[:, columns],
            B_MR=factors.B_MR[rows],
            magnitude=None if factors.magnitude is None else factors.magnitude[rows],
        )
        for factors in adapters
        if factors is not None
    ]
    return box.within(merge_lora(frozen, cut) if cut else frozen, wide)


def _cut(tensor: Any, box: Box, shape_MN: tuple[int, ...]) -> Tensor:
    held = _box_of(tensor, shape_MN)
    assert held is not None, "a piece is read by a rank that holds it"
    return box.within(tensor.to_local() if is_sharded(tensor) else tensor, held)


def _box_of(tensor: Any, shape_MN: tuple[int, ...]) -> Box | None:
    """The rows and columns of a weight that this rank holds; None without any, or if they lie scattered."""
    if not is_sharded(tensor):
        return Box(0, shape_MN[0], 0, shape_MN[1])
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, (top, left) = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    if tuple(shape) != tuple(tensor.to_local().shape) or 0 in shape:
        return None
    return Box(top, top + shape[0], left, left + shape[1])
