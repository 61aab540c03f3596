"""Parameters that are whole on no rank, as FSDP1 and DeepSpeed ZeRO-3 leave them, and how to read one.

    FSDP1    a parameter is a view into the flat shard of its unit; inside of `summon_full_params` it is whole
    ZeRO-3   a parameter is empty; inside of `GatheredParameters` it is whole

FSDP1 wraps modules, which shows in their names: `layers.0._fsdp_wrapped_module.mlp`. The names here are those
that the model has without it.

Sources: torch `FullyShardedDataParallel.summon_full_params`, DeepSpeed `zero.GatheredParameters`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_WRAPPER = "_fsdp_wrapped_module."


@dataclass(frozen=True, kw_only=True)
class Placeholder:
    """A tensor that is not whole on any rank, with what is known of it without communication."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool
    parameter: Tensor = field(repr=False, compare=False)

    def on(self, owner: int | None) -> Tensor | None:
        """A copy of the whole tensor on one rank (None: on all), None on the others. A collective."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class UnitTensor(Placeholder):
    """A parameter of an FSDP1 unit."""

    unit: Any = field(repr=False, compare=False)
    module: nn.Module = field(repr=False, compare=False)
    key: str

    def on(self, owner: int | None) -> Tensor | None:
        """See `Placeholder`."""
        with type(self.unit).summon_full_params(self.unit, recurse=False, writeback=False):
            wanted = owner is None or dist.get_rank() == owner
            return getattr(self.module, self.key).detach().clone() if wanted else None


@dataclass(frozen=True, kw_only=True)
class ZeroTensor(Placeholder):
    """A parameter that DeepSpeed ZeRO-3 partitioned."""

    @classmethod
    def of(cls, parameter: Any) -> ZeroTensor:
        """The placeholder of a parameter that has the attributes of ZeRO-3."""
        return cls(
            shape=torch.Size(parameter.ds_shape),
            dtype=parameter.dtype,
            requires_grad=parameter.requires_grad,
            parameter=parameter,
        )

    def on(self, owner: int | None) -> Tensor | None:
        """See `Placeholder`."""
        with sys.modules["deepspeed"].zero.GatheredParameters([self.parameter], modifier_rank=None):
            return self.parameter.detach().clone() if owner is None or dist.get_rank() == owner else None


def is_unit(module: nn.Module) -> bool:
    """Whether a module is a unit of FSDP1."""
    return any(cls.__name__ == "FullyShardedDataParallel" for cls in type(module).__mro__)


def unwrapped(name: str) -> str:
    """The name that a module or tensor has without FSDP1.

    Example:
        >>> unwrapped("layers.0._fsdp_wrapped_module.mlp"), unwrapped("_fsdp_wrapped_module")
        ('layers.0.mlp', '')
    """
    return f"{name}.".replace(_WRAPPER, "")[:-1]


def state_names(module: nn.Module) -> list[str]:
    """The names in the `state_dict` of a module, without gathering what is in it."""
    if any(is_unit(part) for part in module.modules()):
        return [name for name, _, owner, key in _walk(module, None) if getattr(owner, key) is not None]
    return list(module.state_dict())


def units_state(module: nn.Module, trained: nn.Module) -> dict[str, Tensor | Placeholder]:
    """The state of a module with FSDP1 units in it or around it. A collective: shapes come out of the units.

    Args:
        module: The module.
        trained: What the strategy trains, in which the module lies.

    Raises:
        ValueError: FSDP without parameters of the model's own names.
    """
    around = [part for part in trained.modules() if is_unit(part) and module in set(part.modules())]
    found = list(_walk(module, around[-1] if around else None))
    shapes: dict[int, dict[str, tuple[torch.Size, torch.dtype]]] = {}
    for _, unit, _, _ in found:
        if unit is None or id(unit) in shapes:
            continue
        with type(unit).summon_full_params(unit, recurse=False, writeback=False):
            shapes[id(unit)] = {
                name: (getattr(owner, key).shape, getattr(owner, key).dtype)
                for name, other, owner, key in found
                if other is unit and getattr(owner, key) is not None
            }
    state: dict[str, Tensor | Placeholder] = {}
    for name, unit, owner, key in found:
        tensor = getattr(owner, key)
        if key == "_flat_param":
            raise ValueError(
                "FSDP with use_orig_params=False has no parameters of the model's own names: pass "
                "FSDPStrategy(use_orig_params=True), which is Lightning's default."
            )
        if unit is None and tensor is not None:
            state[name] = tensor
        elif tensor is not None:
            shape, dtype = shapes[id(unit)][name]
            state[name] = UnitTensor(
                shape=shape,
                dtype=dtype,
                requires_grad=tensor.requires_grad,
                parameter=tensor,
                unit=unit,
                module=owner,
                key=key,
            )
    return state


def _walk(module: nn.Module, unit: Any, path: str = "") -> Iterator[tuple[str, Any, nn.Module, str]]:
    """Name, unit (None for a buffer, which is whole), owner and key of all that a `state_dict` holds."""
    unit = module if is_unit(module) else unit
    yield from ((path + key, unit, module, key) for key in module._parameters)
    for key in module._buffers:
        if key not in module._non_persistent_buffers_set:
            yield path + key, None, module, key
    for key, child in module._modules.items():
        if child is not None:
            yield from _walk(child, unit, path + f"{key}.".replace(_WRAPPER, ""))
