"""Each expert is observed by its own tokens: sums are NumPy's, from its inputs and what the router said."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from live import Tuning, fit
from test_curvature import quantization
from tiny_models import mixtral, qwen3_moe
from torch import nn

from daq_lightning.export.collected import AllCollected, Collected
from daq_lightning.model.live import LiveModel
from daq_lightning.model.observer import Sums
from daq_lightning.training.experts import ExpertLayer, places_of
from daq_lightning.training.observed import observe

SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "head_dim": 16}
QWEN = {**SMALL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXTRAL = {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24}
NAMES = {"qwen": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}


def model_of(kind: str, implementation: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    model = qwen3_moe(**QWEN) if kind == "qwen" else mixtral(**MIXTRAL)
    model.set_experts_implementation(implementation)
    return model


def layers_in(model: nn.Module) -> list[ExpertLayer]:
    live = LiveModel(Tuning(model))
    names = [name for name in live.keys if ".experts." in name]
    places, unknown = places_of(live, names)
    assert not unknown
    specs = {spec.name: spec.shape for spec in live.specs}
    return [
        ExpertLayer(name=name, group="", shape=specs[name], modules=(place.module,), place=place)
        for name, place in places.items()
    ]


BATCH = torch.randint(1, 64, (3, 16), generator=torch.Generator().manual_seed(2))
LABELS = BATCH.masked_fill(torch.arange(16) > 11, -100)


def observed(model: nn.Module, scale: float = 1.0) -> AllCollected:
    sums = Sums()
    with observe(layers_in(model), sums, 1 / scale):
        (scale * model(input_ids=BATCH, labels=LABELS).loss).backward()
    return AllCollected([Collected.of(sums)], "activations")


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """What a layer of experts was given by the router, in float64, and the gradient at what it gave."""
    seen: dict[str, torch.Tensor] = {}
    [experts] = [part for name, part in model.named_modules() if name.endswith(".experts")]

    def see(_, args, kwargs, output):
        seen.update(zip(("x", "index", "weights"), (one.detach() for one in args), strict=True))
        output.register_hook(lambda gradient: seen.update(y=gradient))

    handle = experts.register_forward_hook(see, with_kwargs=True)
    yield seen
    handle.remove()
    seen["up"], seen["down"] = experts.gate_up_proj.detach(), experts.down_proj.detach()


def oracle(model: nn.Module) -> dict[int, dict[str, tuple[np.ndarray, np.ndarray, int]]]:
    """Expert -> weight -> x^T x, y^T y and tokens, by hand: h = silu(x G^T) * (x U^T)."""
    with recorded(model) as seen:
        model(input_ids=BATCH, labels=LABELS).loss.backward()
    model.zero_grad()
    values = {name: tensor.double().numpy() for name, tensor in seen.items() if name != "index"}
    found = {}
    for expert in range(4):
        tokens, places = np.nonzero(seen["index"].numpy() == expert)
        x = values["x"][tokens]
        y = values["y"][tokens] * values["weights"][tokens, places][:, None]
        gate, up = np.split(values["up"][expert], 2)
        g, u = x @ gate.T, x @ up.T
        sigmoid = 1 / (1 + np.exp(-g))
        h = g * sigmoid * u
        dh = y @ values["down"][expert]
        dg = dh * u * (sigmoid + g * sigmoid * (1 - sigmoid))
        du = dh * g * sigmoid
        used = (y != 0).any(1)
        found[expert] = {
            "gate": (x[used].T @ x[used], dg.T @ dg, int(used.sum())),
            "up": (x[used].T @ x[used], du.T @ du, int(used.sum())),
            "down": (h[used].T @ h[used], y.T @ y, int(used.sum())),
        }
    return found


def assert_sums(found: AllCollected, expected: dict, kind: str) -> None:
    """Own tokens; of all experts on the side of the rest of the model, for less than half of its width."""
    shared = 0
    for expert, weights in expected.items():
        for leaf, (weight, (inputs, outputs, tokens)) in zip(NAMES[kind], weights.items(), strict=True):
            name = next((one for one in found if f".experts.{expert}.{leaf}." in one), "")
            if not tokens:
                assert not name
                continue
            one = found[name]
            few = tokens * 2 < 32
            if few and weight == "down":
                outputs = sum(other[weight][1] for other in expected.values())
            elif few:
                inputs = sum(other[weight][0] for other in expected.values())
            shared += few
            assert one.tokens == tokens
            assert one.source == "activations" + ", one side of all experts" * few
            np.testing.assert_allclose(one.inputs.numpy(), inputs, rtol=1e-4, atol=1e-6 * inputs.max())
            np.testing.assert_allclose(one.outputs.numpy(), outputs, rtol=1e-3, atol=1e-5 * outputs.max())
    assert 0 < shared < 12


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", NAMES)
def test_sums_are_those_of_numpy_in_every_implementation(kind, implementation):
    model = model_of(kind, implementation)
    assert_sums(observed(model), oracle(model), kind)


def test_the_scale_of_a_scaled_loss_is_taken_out():
    model = model_of("qwen")
    assert_sums(observed(model, scale=1024.0), oracle(model), "qwen")


def tuned(**changes) -> Tuning:
    torch.manual_seed(0)
    return Tuning(qwen3_moe(num_hidden_layers=1, num_experts=3, num_experts_per_tok=1, **changes))


def adapted() -> Tuning:
    """The stacks themselves have adapters."""
    model = tuned().model
    stacks = [f"mlp.experts.{stack}" for stack in ("gate_up_proj", "down_proj")]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=stacks)
    return Tuning(peft.get_peft_model(model, config))  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [tuned, adapted], ids=["full", "lora"])
def test_training_is_bit_identical_while_experts_are_observed(tmp_path, make):
    callback = quantization(tmp_path)
    with_it = fit(tmp_path, callback, module=make(), max_steps=2)
    without = fit(tmp_path, module=make(), max_steps=2)
    for (name, one), two in zip(with_it.named_parameters(), without.named_parameters(), strict=True):
        assert torch.equal(one, two[1]), name
    found = {t.name: t.rounding for t in callback.report.tensors if ".experts." in t.name}
    assert len(found) == 9
    assert any(rounding.source.startswith("activations") for rounding in found.values())
    assert sum(one.tokens for name, one in found.items() if "down_proj" in name) == 2 * 2 * 7
    assert any("one side of all experts" in note for note in callback.report.notes)


def test_an_expert_that_no_token_reached_is_named(tmp_path):
    module = tuned()
    module.model.model.layers[0].mlp.gate.weight.requires_grad_(False).zero_()  # all tokens go one way
    callback = quantization(tmp_path)
    fit(tmp_path, callback, module=adapters_on_attention(module.model), max_steps=2)
    tokens = {
        t.name.split(".")[5]: t.rounding.tokens for t in callback.report.tensors if ".experts." in t.name
    }
    assert sorted(tokens.values()) == [0, 0, 2 * 2 * 7]
    [alone] = [expert for expert, count in tokens.items() if not count][:1]
    assert any("no token reached it" in note and "experts" in note for note in callback.report.notes), alone


def adapters_on_attention(model: nn.Module) -> Tuning:
    config = peft.LoraConfig(r=2, target_modules=["v_proj"])
    return Tuning(peft.get_peft_model(model, config))  # type: ignore[arg-type]


@pytest.mark.parametrize("mark", ["is_transposed", "has_post_expert_norm", "_is_expert_parallel"])
def test_experts_that_are_computed_in_another_way_are_named(tmp_path, caplog, mark):
    module = tuned()
    setattr(module.model.model.layers[0].mlp.experts, mark, True)
    live = LiveModel(module)
    places, unknown = places_of(live, live.keys)
    assert not places
    assert set(unknown.values()) == {"Qwen3MoeExperts"}
    assert len(unknown) == 9


def test_ranks_have_the_inputs_of_all_experts_wherever_one_is_exported(monkeypatch):
    """Two ranks with the same tokens: sums are twice those of one, on the owner of each expert."""
    monkeypatch.setattr("daq_lightning.export.collected.FEW", 0.5)  # few tokens each
    model = model_of("qwen")
    sums = Sums()
    with observe(layers_in(model), sums, 1.0):
        model(input_ids=BATCH, labels=LABELS).loss.backward()
    names = [layer.name for layer in layers_in(model)]
    owners = {name: int(".experts.0." in name or ".experts.1." in name) for name in names}
    one = AllCollected([Collected.of(sums)], "activations")
    both = {}
    for rank in (0, 1):
        ranks = SimpleNamespace(
            rank=rank, size=2, gather=lambda value: [value, value], group=None,
            add_up=lambda tensor, owner, rank=rank: tensor.mul_(2 if owner == rank else 0),
        )  # fmt: skip
        monkeypatch.setattr("daq_lightning.export.collected.Agreement", lambda _: Alone())
        both |= dict(AllCollected([Collected.of(sums).summed(owners, ranks)], "activations"))  # type: ignore[arg-type]
    assert set(both) == set(one)
    for name in both:
        assert both[name].tokens == 2 * one[name].tokens
        torch.testing.assert_close(both[name].inputs, 2 * one[name].inputs)
        torch.testing.assert_close(both[name].outputs, 2 * one[name].outputs)
    first = [found for name, found in both.items() if "gate_proj" in name and "one side" in found.source]
    of_all = sum(sums.inputs[key].total for key in sums.inputs if "gate_proj" in key[0])
    for found in first:
        torch.testing.assert_close(found.inputs, 2 * of_all)
    assert first


class Alone:
    """An agreement of a process by itself."""

    def attempt(self):
        return nullcontext()

    def end(self) -> None:
        pass
