"""Whole tensors out of sharded ones: on the rank that asks, nowhere else, and no byte more than needed."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch import nn

from daq_lightning.model import sharded
from daq_lightning.model.live import LiveModel
from daq_lightning.model.sharded import is_sharded, sharded_state, tensor_on


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_a_dtensor_is_gathered_to_its_owner(tmp_path, world):
    store = tmp_path / "store"
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(world), str(store)], start_new_session=True
        )
        for rank in range(world)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0] * world


def check_gathers(world: int) -> None:
    """In one rank: every kind of placement, over uneven sizes, to every owner."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    sent = []
    gather = dist.gather
    sharded.dist.gather = lambda data, *rest, **more: sent.append(data.numel()) or gather(data, *rest, **more)
    shapes = [(8, 12), (7, 5), (3, 16), (1, 4), (129, 3)]
    meshes = [((world,), [(Shard(0),), (Shard(1),), (Replicate(),)])]
    if world == 4:
        both = list(itertools.product([Shard(0), Shard(1), Replicate()], repeat=2))
        meshes.append(((2, 2), [*both, (_StridedShard(0, split_factor=2), Shard(0))]))
    for sizes, kinds in meshes:
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("a", "b")[: len(sizes)])
        for shape, placements in itertools.product(shapes, kinds):
            whole = torch.arange(shape[0] * shape[1]).reshape(shape).to(torch.bfloat16)
            if any(isinstance(placement, _StridedShard) for placement in placements):
                if shape != (8, 12):
                    continue
                inner = whole.chunk(2)[mesh.get_local_rank(1)].chunk(2)[mesh.get_local_rank(0)].contiguous()
                tensor = DTensor.from_local(inner, mesh, placements, shape=whole.shape, stride=whole.stride())
            else:
                tensor = distribute_tensor(whole, mesh, list(placements))
            assert is_sharded(tensor)
            for owner in range(world):
                got = tensor_on(tensor, owner)
                assert (got is not None) == (dist.get_rank() == owner), (placements, owner)
                assert got is None or torch.equal(got, whole), (placements, shape)
            assert torch.equal(tensor_on(tensor, None), whole)
    # what an owner receives is the tensor once: all ranks together send it once, padding aside
    sent.clear()
    mesh = init_device_mesh("cpu", (world,))
    tensor_on(distribute_tensor(torch.zeros(64, 32), mesh, [Shard(0)]), 0)
    assert sent == [64 * 32 * 4 // world]


class FullyShardedDataParallel(nn.Module):
    """Keeps the contract of torch's FSDP1: parameters are whole inside of `summon_full_params` alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module
        self._whole = {name: p.detach().clone() for name, p in module.named_parameters(recurse=True)}
        self._own = {name: p for name, p in module.named_parameters() if "_fsdp_wrapped_module" not in name}
        for p in self._own.values():
            p.data = p.data.reshape(-1)[:0]

    @staticmethod
    @contextlib.contextmanager
    def summon_full_params(unit, recurse=True, writeback=True):
        assert (recurse, writeback) == (False, False)
        for name, p in unit._own.items():
            p.data = unit._whole[name].clone()
        yield
        for p in unit._own.values():
            p.data = p.data.reshape(-1)[:0]


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_parameters_of_fsdp1_units_are_copied_out_of_them(group):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    expected = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    plain[1] = FullyShardedDataParallel(plain[1])
    model = FullyShardedDataParallel(plain)
    state = sharded_state(model)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }
    for name, tensor in state.items():
        assert is_sharded(tensor) == (not any(word in name for word in ("running", "num_batches")))
        whole = tensor_on(tensor, 0)
        assert whole is not None
        assert torch.equal(whole, expected[name])
        assert tensor_on(tensor, 5) is None
    assert all(p.numel() == 0 for p in model.parameters())  # no unit stays whole


class GatheredParameters:
    """Keeps the contract of DeepSpeed's: parameters are whole inside of it alone."""

    def __init__(self, parameters, modifier_rank=None) -> None:
        assert modifier_rank is None  # nobody writes
        self.parameters = parameters

    def __enter__(self) -> None:
        for p in self.parameters:
            p.data = p.whole.clone()

    def __exit__(self, *_: object) -> None:
        for p in self.parameters:
            p.data = torch.empty(0)


def test_zero_3_parameters_are_gathered_one_at_a_time(group, monkeypatch):
    deepspeed = ModuleType("deepspeed")
    deepspeed.zero = ModuleType("deepspeed.zero")
    deepspeed.zero.GatheredParameters = GatheredParameters
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number, p in enumerate(model.parameters()):
        p.ds_id, p.ds_shape, p.whole = number, p.shape, p.detach().clone()
        p.data = torch.empty(0)
    live = LiveModel(model)
    assert live.sharded
    assert live.weights.collective
    assert {spec.name: spec.shape for spec in live.specs} == {n: tuple(t.shape) for n, t in expected.items()}
    for name in expected:
        whole = live.weights.on(name, 0)
        assert whole is not None
        assert torch.equal(whole, expected[name])
        assert live.weights.on(name, 1) is None
    assert all(p.numel() == 0 for p in model.parameters())


if __name__ == "__main__":
    rank, world, store = sys.argv[1:]
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, int(world)), rank=int(rank), world_size=int(world)
    )
    check_gathers(int(world))
    dist.destroy_process_group()
    os._exit(0)  # what was checked has passed; threads of gloo may abort a process that ends in order
