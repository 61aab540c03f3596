"""Modules that see their input as servers quantize it, for as long as a block lasts."""

import contextlib
import copy
import functools

import pytest
import tiny_models
import torch
from torch import nn

from daq_lightning.checkpoint.schemes import SCHEMES
from daq_lightning.model.activations import quantized_activations
from daq_lightning.numerics.activations import quantized_input
from daq_lightning.numerics.formats.int8 import INT8

SEEN = {
    "FP8_DYNAMIC": quantized_input,
    "FP8_BLOCK": functools.partial(quantized_input, group=128),
    "MXFP8": functools.partial(quantized_input, group=32, scale_format="ue8m0"),
    "W8A8": functools.partial(quantized_input, fmt=INT8),
}
QUANTIZED = pytest.mark.parametrize("scheme", SEEN)


class TwoLinears(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(200, 160), nn.Linear(160, 3)

    def forward(self, x):
        return self.second(torch.relu(self.first(input=x)))


def tokens(model):
    return torch.randint(model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))


def by_hand(model, seen_as):
    """A copy of a dense model whose Linear layers round their input themselves, the head apart."""
    changed = copy.deepcopy(model)
    for name, module in changed.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            forward = module.forward
            module.forward = lambda x, forward=forward: forward(seen_as(x))
    return changed


def layers(model):
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]


@QUANTIZED
@torch.no_grad()
def test_a_linear_sees_its_input_quantized_by_position_or_by_name(scheme):
    model, x = TwoLinears(), torch.randn(4, 7, 200)
    inner = torch.relu(model.first(SEEN[scheme](x)))
    expected = model.second(SEEN[scheme](inner))
    with quantized_activations([model.first, model.second], SCHEMES[scheme]):
        assert torch.equal(model(x), expected)


@QUANTIZED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_model_gives_what_it_gives_by_hand(scheme, dtype):
    model = tiny_models.llama().to(dtype)
    expected = by_hand(model, SEEN[scheme])(tokens(model)).logits
    plain = model(tokens(model)).logits
    with quantized_activations(layers(model), SCHEMES[scheme]):
        seen = model(tokens(model)).logits
    assert torch.equal(seen, expected)
    assert not torch.equal(seen, plain)
    assert torch.equal(model(tokens(model)).logits, plain)


@torch.no_grad()
def test_weights_only_changes_nothing():
    model = tiny_models.llama()
    plain = model(tokens(model)).logits
    with quantized_activations(layers(model), SCHEMES["FP8A16"]):
        assert torch.equal(model(tokens(model)).logits, plain)


def experts_by_hand(module, seen_as):
    """The experts of Qwen3-MoE, one expert after another, with each product's input rounded."""

    def forward(x_TN, chosen_TK, weight_TK):
        total = torch.zeros_like(x_TN)
        for token, (chosen, weights) in enumerate(zip(chosen_TK, weight_TK, strict=True)):
            for expert, weight in zip(chosen, weights, strict=True):
                seen = seen_as(x_TN[token])
                gate, up = (module.gate_up_proj[expert] @ seen).chunk(2)
                inner = seen_as(module.act_fn(gate) * up)
                total[token] += weight * (module.down_proj[expert] @ inner)
        return total

    return forward


@QUANTIZED
@pytest.mark.parametrize("kind", ["eager", "grouped_mm", "batched_mm"])
@torch.no_grad()
def test_both_projections_of_stacked_experts_see_their_input_quantized(scheme, kind):
    torch.manual_seed(0)
    model = tiny_models.qwen3_moe(num_experts=4, num_experts_per_tok=2)
    model.config._experts_implementation = kind
    module = model.model.layers[0].mlp.experts
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    x_TN, chosen_TK = torch.randn(9, 128), torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    weight_TK = torch.rand(9, 2)
    expected = experts_by_hand(module, SEEN[scheme])(x_TN, chosen_TK, weight_TK)
    plain = module(x_TN, chosen_TK, weight_TK)
    with quantized_activations([module], SCHEMES[scheme]):
        seen = module(x_TN, chosen_TK, weight_TK)
    # a code of the second projection may flip where the sums of the first are added in another order
    error = (seen - expected).norm() / expected.norm()
    assert error < 0.1 * (plain - expected).norm() / expected.norm()
    assert torch.equal(module(x_TN, chosen_TK, weight_TK), plain)
    assert "forward" not in vars(module)


class OneKernel(nn.Module):
    def __init__(self, product):
        super().__init__()
        self.stack, self.product = nn.Parameter(torch.ones(2, 4, 4)), product

    def forward(self, x):
        return self.product(x, self.stack)


@pytest.mark.parametrize("product", [lambda x, w: x * w.sum(), lambda x, w: torch.einsum("tn,emn->tm", x, w)])
@torch.no_grad()
def test_experts_whose_products_cannot_be_seen_are_refused(product):
    module = OneKernel(product)
    refused = pytest.raises(ValueError, match='experts_implementation="eager"')
    with quantized_activations([module], SCHEMES["FP8_DYNAMIC"]), refused:
        module(torch.ones(3, 4))
    module(torch.ones(3, 4))


def hooks(model):
    return [module for module in model.modules() if module._forward_pre_hooks or "forward" in vars(module)]


@torch.no_grad()
def test_all_is_as_before_after_an_exception_and_random_numbers_are_not_drawn():
    model = tiny_models.qwen3_moe()
    modules = [*layers(model), *(layer.mlp.experts for layer in model.model.layers)]
    state, inside = torch.get_rng_state(), 0
    with contextlib.suppress(KeyError), quantized_activations(modules, SCHEMES["FP8_BLOCK"]):
        inside = len(hooks(model))
        model(tokens(model))
        raise KeyError
    assert inside == len(modules)
    assert hooks(model) == []
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_a_module_that_comes_twice_is_quantized_once():
    linear, x = nn.Linear(64, 2), torch.randn(3, 64)
    with quantized_activations([linear, linear], SCHEMES["FP8_DYNAMIC"]):
        assert len(linear._forward_pre_hooks) == 1
        assert torch.equal(linear(x), linear.forward(quantized_input(x)))


def test_another_module_is_refused_before_anything_is_changed():
    linear = nn.Linear(4, 4)
    modules = [linear, nn.LayerNorm(4)]
    with (
        pytest.raises(ValueError, match="LayerNorm is neither a Linear"),
        quantized_activations(modules, SCHEMES["FP8_DYNAMIC"]),
    ):
        pass
    assert not linear._forward_pre_hooks


def test_a_gradient_is_refused_rather_than_lost():
    linear = nn.Linear(4, 4)
    with quantized_activations([linear], SCHEMES["FP8_DYNAMIC"]), pytest.raises(ValueError, match="no_grad"):
        linear(torch.ones(1, 4, requires_grad=True))


@torch.no_grad()
def test_autocast_casts_first():
    linear, x = nn.Linear(64, 2), torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        expected = linear(quantized_input(x.bfloat16()))
        with quantized_activations([linear], SCHEMES["FP8_DYNAMIC"]):
            assert torch.equal(linear(x), expected)
