"""Whole tensors out of sharded ones: one at a time, on the one rank that is to have it.

| the tensor is | under | how | what moves |
| --- | --- | --- | --- |
| plain | one process, DDP, ZeRO-1 and 2 | taken as it is | nothing |
| a `DTensor` | FSDP2, tensor parallel, both | gathered along each dimension of the mesh | 1 x |
| a `UnitTensor` | FSDP1 | its unit is summoned, and copied from | its unit, to all ranks |
| a `ZeroTensor` | ZeRO-3 | `GatheredParameters` | 1 x, to all ranks |

`tensor_on` is a collective unless the tensor is plain: all ranks call it for the same tensors in the same
order. Nothing is kept, and never more than one tensor (with FSDP1, one unit) is whole.

Sources: torch `DTensor` (placements; `_StridedShard`: FSDP2 over tensor parallel shards what is sharded
already), torch `FullyShardedDataParallel.summon_full_params`, DeepSpeed `zero.GatheredParameters`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_FLAT = "_fsdp_wrapped_module."


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

    def on(self, owner: int | None) -> Tensor | None:
        """See `Placeholder`."""
        with sys.modules["deepspeed"].zero.GatheredParameters([self.parameter], modifier_rank=None):
            return self.parameter.detach().clone() if owner is None or dist.get_rank() == owner else None


Sharded = Tensor | Placeholder


def is_sharded(tensor: Sharded) -> bool:
    """Whether a tensor lies on several ranks, so that reading it is work for all of them."""
    return isinstance(tensor, Placeholder) or _is_dtensor(tensor)


def tensor_on(tensor: Sharded, owner: int | None) -> Tensor | None:
    """The whole tensor, detached, on one rank; None on the others. A collective if it is sharded.

    Args:
        tensor: Plain (equal on all ranks), a DTensor, or a placeholder.
        owner: The rank that gets it; None gives it to all.
    """
    if isinstance(tensor, Placeholder):
        return tensor.on(owner)
    if _is_dtensor(tensor):
        detached: Any = tensor.detach()
        return detached.full_tensor() if owner is None else _gather(detached, owner)
    here = owner is None or not dist.is_initialized() or dist.get_rank() == owner
    return tensor.detach() if here else None


def sharded_state(module: nn.Module) -> dict[str, Any]:
    """Parameters and persistent buffers of a module under their names, tensors or placeholders: not copies.

    A collective where there is FSDP1, whose shapes are known to a summoned unit alone.
    """
    if any(_is_unit(part) for part in module.modules()):
        return dict(_units_state(module))
    return {
        name: _zero(tensor) if hasattr(tensor, "ds_id") else tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
    }


def _zero(tensor: Any) -> Sharded:
    return ZeroTensor(
        shape=torch.Size(tensor.ds_shape),
        dtype=tensor.dtype,
        requires_grad=tensor.requires_grad,
        parameter=tensor,
    )


def _is_unit(module: nn.Module) -> bool:
    return any(cls.__name__ == "FullyShardedDataParallel" for cls in type(module).__mro__)


def _units_state(root: nn.Module) -> Iterator[tuple[str, Sharded]]:
    """The state of a module with FSDP1 units inside, under the names that it has without them."""
    found: list[tuple[str, Any, nn.Module, str]] = []

    def walk(module: nn.Module, path: str, unit: Any) -> None:
        unit = module if _is_unit(module) else unit
        found.extend((path + key, unit, module, key) for key in module._parameters)
        persistent = (key for key in module._buffers if key not in module._non_persistent_buffers_set)
        found.extend((path + key, None, module, key) for key in persistent)
        for key, child in module._modules.items():
            if child is not None:
                walk(child, path + f"{key}.".replace(_FLAT, ""), unit)

    walk(root, "", None)
    shapes: dict[int, dict[str, tuple[torch.Size, torch.dtype]]] = {}
    for _, unit, _, _ in found:
        if unit is None or id(unit) in shapes:
            continue
        with type(unit).summon_full_params(unit, recurse=False, writeback=False):
            shapes[id(unit)] = {
                name: (getattr(module, key).shape, getattr(module, key).dtype)
                for name, other, module, key in found
                if other is unit and getattr(module, key) is not None
            }
    for name, unit, module, key in found:
        tensor = getattr(module, key)
        if key == "_flat_param" or name.endswith("._flat_param"):
            raise ValueError(
                "FSDP with use_orig_params=False has no parameters of its own names: pass "
                "FSDPStrategy(use_orig_params=True), which is Lightning's default."
            )
        if tensor is None:
            continue
        if unit is None:
            yield name, tensor
            continue
        shape, dtype = shapes[id(unit)][name]
        yield (
            name,
            UnitTensor(
                shape=shape,
                dtype=dtype,
                requires_grad=tensor.requires_grad,
                parameter=tensor,
                unit=unit,
                module=module,
                key=key,
            ),
        )


def _is_dtensor(tensor: object) -> bool:
    return hasattr(tensor, "full_tensor")  # of an instance, one has been made: nothing is imported for it


def _gather(tensor: Any, owner: int) -> Tensor | None:
    """A DTensor, whole, on one rank of its mesh.

    Along each dimension of the mesh the shards go to the rank with the owner's coordinate there; the others
    are done. What was sharded last is put together first.
    """
    mesh, placements = tensor.device_mesh, tensor.placements
    applied = _applied(placements, mesh)
    if applied is None:
        whole = tensor.full_tensor()
        return whole if dist.get_rank() == owner else None
    found = (mesh.mesh == owner).nonzero().tolist()
    if not found:  # of a mesh for some ranks; the owner has the same tensor in a mesh of its own
        return None
    me, there = mesh.get_coordinate(), found[0]
    local: Tensor | None = tensor.to_local()
    for position in reversed(range(len(applied))):
        dim = applied[position]
        if not placements[dim].is_replicate():
            axis = placements[dim].dim
            length = tensor.shape[axis]
            for earlier in applied[:position]:
                if not placements[earlier].is_replicate() and placements[earlier].dim == axis:
                    length = _piece(length, mesh.size(earlier), me[earlier])
            assert local is not None
            local = _gather_along(local, axis, length, mesh, dim, there[dim])
        if me[dim] != there[dim]:
            return None
    return local


def _applied(placements: Any, mesh: Any) -> list[int] | None:
    """The dimensions of a mesh in the order in which they sharded the tensor; None if that is not known."""
    strided = [dim for dim, placement in enumerate(placements) if type(placement).__name__ == "_StridedShard"]
    if any(
        not (placement.is_replicate() or type(placement).__name__ in ("Shard", "_StridedShard"))
        for placement in placements
    ):
        return None
    if not strided:
        return list(range(len(placements)))
    [first, *more] = strided
    later = [
        dim
        for dim in range(first + 1, len(placements))
        if not placements[dim].is_replicate() and placements[dim].dim == placements[first].dim
    ]
    parts = 1
    for dim in later:
        parts *= mesh.size(dim)
    if more or placements[first].split_factor != parts:
        return None
    return [dim for dim in range(len(placements)) if dim != first] + [first]


def _piece(length: int, parts: int, index: int) -> int:
    """Length of one of the parts that `torch.chunk` makes, which may be empty."""
    chunk = -(-length // parts)
    return max(0, min(chunk, length - index * chunk))


def _gather_along(local: Tensor, axis: int, length: int, mesh: Any, dim: int, there: int) -> Tensor | None:
    """Shards of one axis, put together on one rank of a dimension of the mesh."""
    group, parts = mesh.get_group(dim), mesh.size(dim)
    device, rank = local.device, mesh.get_local_rank(dim)
    if device.type != "cpu" and dist.get_backend(group) == "gloo":  # which carries no memory of a GPU
        local = local.cpu()
    elif device.type == "cpu" and dist.get_backend(group) == "nccl":  # of a model that is offloaded
        local = local.to(mesh.device_type)
    shape = list(local.shape)
    shape[axis] = -(-length // parts)
    filled = local.contiguous()
    if shape[axis] != local.shape[axis]:  # the last shards are shorter; a gather wants them equal
        filled = local.new_zeros(shape)
        filled.narrow(axis, 0, local.shape[axis]).copy_(local)
    data = filled.reshape(-1).view(torch.uint8)
    received = [torch.empty_like(data) for _ in range(parts)] if rank == there else None
    dist.gather(data, received, dst=dist.get_global_rank(group, there), group=group)
    if received is None:
        return None
    shards = [
        part.view(local.dtype).reshape(shape).narrow(axis, 0, _piece(length, parts, index))
        for index, part in enumerate(received)
    ]
    return torch.cat(shards, dim=axis).to(device)
