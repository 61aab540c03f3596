"""Other weights in a live model: all of them arrive, in every layout of memory, and its own come back."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from daq_lightning.model import swap as module
from daq_lightning.model.layers import computing_modules
from daq_lightning.model.live import LiveModel
from daq_lightning.model.swap import check_swappable, put_back

MODELS = ["llama", "qwen2", "gemma3", "phi3", "qwen3_moe"]


class Holder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("count", torch.zeros(()))


def holder(kind: str) -> Holder:
    torch.manual_seed(0)
    return Holder(getattr(tiny_models, kind)())


def state_of(part: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in part.state_dict().items()}


@pytest.mark.parametrize("kind", MODELS)
def test_the_weights_of_another_model_arrive_and_its_own_come_back(kind):
    one, two = holder(kind), holder(kind)
    with torch.no_grad():
        for parameter in two.parameters():
            parameter.mul_(-1.5)
    own = state_of(one)
    versions = [parameter._version for parameter in one.parameters()]
    model = LiveModel(one)
    check_swappable(model)
    with put_back(one) as swap:
        swap.weights(model, LiveModel(two).weights)
        assert all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())
        one.count += 1
    assert all(torch.equal(tensor, own[name]) for name, tensor in one.state_dict().items())
    assert [parameter._version for parameter in one.parameters()] == versions


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_some_weights_arrive_alone(kind):
    one = holder(kind)
    model = LiveModel(one)
    wanted = next(name for name in model.keys if "down_proj" in name)
    before = {name: model.weights[name].clone() for name in model.keys}
    with put_back(one) as swap:
        swap.weights(model, {wanted: before[wanted] + 1}, only=[wanted])
        for name, tensor in before.items():
            expected = tensor + 1 if name == wanted else tensor
            assert torch.equal(LiveModel(one).weights[name], expected), name


def test_a_saved_state_arrives_and_what_was_put_in_first_does_not_come_back():
    one, two = holder("llama"), holder("qwen2")
    state = {name: tensor + 2 for name, tensor in one.state_dict().items()}
    own = state_of(one)
    with put_back(one) as swap:
        swap.state(state)
        swap.state({name: tensor + 2 for name, tensor in state.items()} | {"foreign": torch.ones(3)})
        weight = one.model.lm_head.weight
        assert torch.equal(weight, own["model.lm_head.weight"] + 2 + 2)
    assert all(torch.equal(tensor, own[name]) for name, tensor in one.state_dict().items())
    with put_back(one) as swap, pytest.raises(ValueError, match="has shape"):
        swap.state({"model.lm_head.weight": torch.ones(3)})
    assert two is not one


def test_adapters_are_off_while_their_merged_weights_are_in():
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    one = Holder(get_peft_model(tiny_models.llama(), lora))  # type: ignore[arg-type]
    trained = [parameter.requires_grad for parameter in one.parameters()]
    own = state_of(one)
    tokens = torch.arange(8)[None]
    expected = one.model(input_ids=tokens).logits
    model = LiveModel(one)
    values = {name: model.weights[name].clone() for name in model.keys}
    with torch.no_grad(), put_back(one) as swap:
        swap.weights(model, values)
        assert torch.allclose(one.model(input_ids=tokens).logits, expected, atol=1e-5)
        swap.weights(model, {name: 0 * value for name, value in values.items()})
        assert not one.model(input_ids=tokens).logits.any()
    assert torch.equal(one.model(input_ids=tokens).logits, expected)
    assert [parameter.requires_grad for parameter in one.parameters()] == trained
    assert all(torch.equal(tensor, own[name]) for name, tensor in one.state_dict().items())
    names = computing_modules(model, [name for name in model.keys if "q_proj" in name])
    assert len(names) == 2
    [copy] = computing_modules(model, ["lm_head.weight"])
    assert copy is one.model.base_model.model.lm_head.modules_to_save["default"]
    assert all(type(part) is nn.Linear for part in names)


def test_an_interruption_while_they_come_back_is_raised_when_all_are_back(monkeypatch):
    one = holder("llama")
    own = state_of(one)
    local, calls = module._local, []

    def interrupted(tensor: torch.Tensor) -> torch.Tensor:
        if armed:
            calls.append(0)
            if len(calls) in (2, 5):
                raise KeyboardInterrupt
        return local(tensor)

    armed = False
    monkeypatch.setattr(module, "_local", interrupted)
    with pytest.raises(KeyboardInterrupt), put_back(one) as swap:
        swap.state({name: tensor + 1 for name, tensor in own.items()})
        armed = True
    assert len(calls) > len(list(one.parameters()))
    assert all(torch.equal(tensor, own[name]) for name, tensor in one.state_dict().items())


def test_compiled_modules_see_hooks_that_are_added_later():
    one = nn.Linear(4, 4)
    compiled = torch.compile(one, backend="eager")
    compiled(torch.ones(1, 4))
    with put_back(one), torch.no_grad():
        handle = one.register_forward_pre_hook(lambda _, arguments: (0 * arguments[0],))
        assert torch.equal(compiled(torch.ones(1, 4))[0], one.bias)
        handle.remove()
