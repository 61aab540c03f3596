"""Whole tensors out of sharded ones: one at a time, on the one rank that is to have it.

| the tensor is | under | how | what moves |
| --- | --- | --- | --- |
| plain | one process, DDP, ZeRO-1 and 2 | taken as it is | nothing |
| a `DTensor` | FSDP2, tensor parallel, both | gathered along each dimension of the mesh | 1 x |
| a `UnitTensor` | FSDP1 | its unit is summoned, and copied from | its unit, to all ranks |
| a `ZeroTensor` | ZeRO-3 | `GatheredParameters` | 1 x, to all ranks |

`tensor_on` is a collective unless the tensor is plain: all ranks call it for the same tensors in the same
order. Nothing is kept, and never more than one tensor (with FSDP1, one unit) is whole.

Source: torch `DTensor` (placements; `_StridedShard`: FSDP2 over tensor parallel shards what is sharded
already).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from daq_lightning.checkpoint.flat_bytes import flat_bytes
from daq_lightning.model.placeholders import Placeholder, ZeroTensor, is_unit, units_state

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


def sharded_state(module: nn.Module, trained: nn.Module | None = None) -> dict[str, Any]:
    """Parameters and persistent buffers of a module under their names, tensors or placeholders: not copies.

    A collective where there is FSDP1, whose shapes are known to a summoned unit alone.

    Args:
        module: The module.
        trained: What the strategy trains, in which the module lies; None for the module itself.
    """
    trained = module if trained is None else trained
    if any(is_unit(part) for part in trained.modules()):
        return dict(units_state(module, trained))
    return {
        name: ZeroTensor.of(tensor) if hasattr(tensor, "ds_id") else tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
    }


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
    data = flat_bytes(filled)
    received = [torch.empty_like(data) for _ in range(parts)] if rank == there else None
    dist.gather(data, received, dst=dist.get_global_rank(group, there), group=group)
    if received is None:
        return None
    shards = [
        part.view(local.dtype).reshape(shape).narrow(axis, 0, _piece(length, parts, index))
        for index, part in enumerate(received)
    ]
    return torch.cat(shards, dim=axis).to(device)
