"""What hooks sum is what NumPy sums of the same activations and gradients, whatever layers are wrapped in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from daq_lightning.export.collected import AllCollected, Collected
from daq_lightning.model.observer import Layer, Observer, Sums

N, M, TOKENS = 6, 4, 10


class Attention(nn.Module):
    """Projections of one input (or of two), and one after them."""

    def __init__(self, checkpointed: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(N, M) for _ in range(3))
        self.o = nn.Linear(M, N)
        self.checkpointed = checkpointed

    def mixed(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return self.o((self.q(x) * self.k(memory)).tanh() + self.v(memory))

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        memory = x if memory is None else memory
        if not self.checkpointed:
            return self.mixed(x, memory)
        return checkpoint(self.mixed, x, memory, use_reentrant=self.checkpointed == "reentrant")


def layers_of(module: Attention) -> list[Layer]:
    groups = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o"}
    layers = {name: getattr(module, name) for name in groups}
    return [
        Layer(name=name, group=groups[name], shape=tuple(layer.weight.shape), modules=(layer,))
        for name, layer in layers.items()
    ]


def batch(seed: int) -> torch.Tensor:
    return torch.randn(2, TOKENS // 2, N, generator=torch.Generator().manual_seed(seed))


def loss_of(out: torch.Tensor) -> torch.Tensor:
    return out[:, :3].square().sum()  # the last tokens say nothing


def observed(module: Attention, *inputs: tuple[torch.Tensor, ...], factor: float = 1.0) -> AllCollected:
    sums = Sums()
    for tensors in inputs:
        with Observer(layers_of(module), sums, factor):
            loss_of(module(*tensors)).backward()
    return AllCollected([Collected.of(sums)], "activations")


def oracle(module: Attention, *inputs: tuple[torch.Tensor, ...]) -> dict[str, list[np.ndarray]]:
    """x^T x, y^T y and |x|^2 |y|^2 of every layer in float64, over the tokens of which the loss depends on
    any output."""
    module = module.double()
    sums = {name: [np.zeros((N, N)), np.zeros((M, M)), np.zeros(())] for name in "qkv"}
    sums["o"] = [np.zeros((M, M)), np.zeros((N, N)), np.zeros(())]
    for tensors in inputs:
        x, memory = (tensor.double() for tensor in (tensors * 2)[:2])
        q, k, v = module.q(x), module.k(memory), module.v(memory)
        between = (q * k).tanh() + v
        out = module.o(between)
        gradients = torch.autograd.grad(loss_of(out), (q, k, v, out))
        values = {"q": x, "k": memory, "v": memory, "o": between}
        for name, y in zip("qkvo", gradients, strict=True):
            used = (y != 0).any(-1).numpy()
            a, b = values[name].detach().numpy()[used], y.numpy()[used]
            more = (a.T @ a, b.T @ b, ((a * a).sum(1) * (b * b).sum(1)).sum())
            sums[name] = [one + other for one, other in zip(sums[name], more, strict=True)]
    module.float()
    return sums


def assert_sums(found: AllCollected, expected: dict, factor: float = 1.0) -> None:
    assert set(found) == set(expected)
    for name, (inputs, outputs, joint) in expected.items():
        np.testing.assert_allclose(found[name].inputs.numpy(), inputs, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[name].outputs.numpy(), factor**2 * outputs, rtol=1e-4, atol=1e-6)
        assert found[name].joint == pytest.approx(factor**2 * joint, rel=1e-4)


@pytest.mark.parametrize("checkpointed", ["", "reentrant", "kept"])
def test_sums_are_those_of_numpy_with_and_without_checkpointing(checkpointed):
    module = Attention(checkpointed)
    inputs = [(batch(seed).requires_grad_(),) for seed in (1, 2, 3)]
    found = observed(module, *inputs)
    assert_sums(found, oracle(module, *inputs))
    assert found["q"].inputs is found["v"].inputs
    assert found["q"].tokens == 3 * 2 * 3
    assert not any(part._forward_hooks for part in module.modules())


def test_layers_with_other_inputs_do_not_share_their_sum():
    module, inputs = Attention(), [(batch(1), batch(2)), (batch(3), batch(4))]
    found = observed(module, *inputs)
    assert_sums(found, oracle(module, *inputs))
    assert found["k"].inputs is found["v"].inputs
    assert found["q"].inputs is not found["k"].inputs


def test_a_layer_that_is_called_twice_adds_both_calls():
    module, sums = Attention(), Sums()
    with Observer(layers_of(module), sums):
        (loss_of(module(batch(1))) + loss_of(module(batch(2)))).backward()
    found = AllCollected([Collected.of(sums)], "activations")
    assert_sums(found, oracle(module, (batch(1),), (batch(2),)))
    assert found["q"].inputs is found["k"].inputs


def test_the_scale_of_a_scaled_loss_is_taken_out():
    module = Attention()
    found = observed(module, (batch(1),), factor=1 / 1024)
    assert_sums(found, oracle(module, (batch(1),)), factor=1 / 1024)


def test_a_batch_with_nan_is_left_out_and_counted():
    module = Attention()
    found = observed(module, (batch(1),), (torch.full((2, 5, N), torch.nan),), (batch(2),))
    assert_sums(found, oracle(module, (batch(1),), (batch(2),)))
    assert found["o"].left_out > 0


def test_a_frozen_layer_below_all_that_is_trained_has_its_inputs_alone():
    module = Attention()
    for layer in (module.q, module.k, module.v):
        layer.requires_grad_(False)
    found = observed(module, (batch(1),))
    assert found["q"].outputs is None
    x = batch(1).reshape(-1, N).numpy()
    np.testing.assert_allclose(found["q"].inputs.numpy(), x.T @ x, rtol=1e-5, atol=1e-5)
    assert found["o"].outputs is not None


def test_a_frozen_layer_above_something_trained_has_both():
    module = Attention()
    module.o.requires_grad_(False)
    assert_sums(observed(module, (batch(1),)), oracle(module, (batch(1),)))


def test_an_input_that_is_overwritten_before_the_gradient_comes_is_left_out():
    module, sums = Attention(), Sums()
    module.requires_grad_(False)
    module.v.bias.requires_grad_(True)
    x = batch(1)
    with Observer(layers_of(module), sums):
        out = module(x)
        x.zero_()  # which autograd allows: only the bias of v is trained
        loss_of(out).backward()
    assert "v" not in {name for names in sums.inputs for name in names}


@pytest.mark.gpu
def test_layers_on_several_devices_are_summed_each_on_its_own():
    """v and o lie on a GPU, q and k on the CPU; what v is given is moved there by itself."""

    class Mixed(Attention):
        def mixed(self, x, memory):
            there = self.v.weight.device
            product = (self.q(x) * self.k(memory)).tanh().to(there)
            return self.o(product + self.v(memory.to(there))).cpu()

    module = Mixed()
    module.v.cuda()
    module.o.cuda()
    found = observed(module, (batch(1),), (batch(2),))
    assert found["o"].inputs.device.type == "cuda"
    module.cpu()
    expected = oracle(module, (batch(1),), (batch(2),))
    for name, (inputs, outputs) in expected.items():
        np.testing.assert_allclose(found[name].inputs.cpu().numpy(), inputs, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found[name].outputs.cpu().numpy(), outputs, rtol=1e-3, atol=1e-5)


def test_nothing_is_counted_without_gradients_or_after_the_batch():
    module, sums = Attention(), Sums()
    with Observer(layers_of(module), sums):
        with torch.no_grad():
            module(batch(1))
        late = loss_of(module(batch(2)))
    late.backward()
    assert Collected.of(sums).tokens == {}
