"""An export holds every weight that its readers expect, shared and computed ones too, or is refused before
training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from live import Tuning, data, fit, make_trainer, tiny_llama
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import AutoModelForCausalLM

from daq_lightning import DeltaAwareQuantization, ScaleSearch, load_checkpoint

# no scale below absmax: nothing is clipped, so what is written is `close` to the weight
QUICK = ScaleSearch(metric="cosine", alpha_min=1.0, n_coarse=3, n_fine=0)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated.*"),
    pytest.mark.filterwarnings("ignore:.*parametrization.*:UserWarning"),
]


def quantization(folder: Path, **changes) -> DeltaAwareQuantization:
    return DeltaAwareQuantization(**({"dirpath": str(folder / "exports"), "search": QUICK} | changes))


class Noisy(nn.Module):
    """Draws random numbers whenever it computes, and counts that."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, weight):
        self.count += 1
        return weight * 2 + (torch.rand_like(weight) if self.training else torch.rand(1) * 0)


def shared(model):
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight = attention.q_proj.weight


def shared_layers(model):
    model.model.layers[1] = model.model.layers[0]


def weight_norm(model):
    for projection in ("q_proj", "o_proj"):
        parametrizations.weight_norm(getattr(model.model.layers[0].self_attn, projection))
    parametrizations.weight_norm(model.lm_head)


def spectral_norm(model):
    parametrizations.spectral_norm(model.model.layers[0].self_attn.q_proj)
    parametrizations.spectral_norm(model.lm_head)
    parametrizations.spectral_norm(model.model.embed_tokens)


def several(model):
    projection = model.model.layers[0].mlp.up_proj
    parametrizations.weight_norm(projection)
    parametrize.register_parametrization(projection, "weight", Noisy())


def old_weight_norm(model):
    nn.utils.weight_norm(model.model.layers[0].mlp.down_proj)


def old_spectral_norm(model):
    nn.utils.spectral_norm(model.model.layers[0].mlp.gate_proj)


def pruned(model):
    prune.l1_unstructured(model.model.layers[0].mlp.gate_proj, "weight", 0.5)
    prune.random_unstructured(model.model.layers[0].mlp.gate_proj, "weight", 0.5)


CHANGES = [
    shared, shared_layers, weight_norm, spectral_norm, several, old_weight_norm, old_spectral_norm, pruned
]  # fmt: skip


def model_with(change) -> nn.Module:
    model = tiny_llama(num_hidden_layers=2)
    torch.manual_seed(1)
    change(model)
    return model


def plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that the model computes with in evaluation, by torch's own means."""
    model.eval()
    with torch.no_grad():
        # hooks of older torch leave their weight on the module
        model(input_ids=torch.ones(1, 2, dtype=torch.long))
        names = tiny_llama(num_hidden_layers=2).state_dict()
        return {name: model.get_submodule(name.rpartition(".")[0]).weight.clone() for name in names}


def close(exported: torch.Tensor, weight: torch.Tensor) -> bool:
    return torch.allclose(exported.float(), weight, rtol=2**-4, atol=float(weight.abs().max()) * 2**-8)


@pytest.mark.parametrize("base", ["snapshot", "memory"])
@pytest.mark.parametrize("change", CHANGES)
def test_shared_and_computed_weights_are_exported_as_readers_know_them(tmp_path, change, base):
    callback = quantization(tmp_path, base=base)
    module = fit(tmp_path, callback, module=Tuning(model_with(change)))
    loaded, info = AutoModelForCausalLM.from_pretrained(callback.exports[0], output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = plain_state(module.model)
    exported = load_checkpoint(callback.exports[0])
    assert set(exported) == set(expected)
    for name, weight in expected.items():
        assert close(exported[name], weight), name
        assert torch.equal(loaded.state_dict()[name], exported[name].to(loaded.dtype)), name
    for name in ("lm_head.weight", "model.embed_tokens.weight"):  # kept: no codes, only a cast
        assert torch.equal(exported[name], expected[name].bfloat16()), name


@pytest.mark.parametrize("change", CHANGES)
def test_training_of_computed_weights_is_bit_identical_with_and_without_exports(tmp_path, change):
    with_it = fit(tmp_path, quantization(tmp_path, every_n_train_steps=1), module=Tuning(model_with(change)))
    random_state = torch.get_rng_state()
    without = fit(tmp_path, module=Tuning(model_with(change)))
    assert torch.equal(torch.get_rng_state(), random_state)
    expected = without.state_dict()
    for name, value in with_it.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert [part.training for part in with_it.modules()] == [part.training for part in without.modules()]


class Worsening(Tuning):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.tensor(float(self.trainer.global_step)))


@pytest.mark.parametrize("change", CHANGES)
def test_saved_states_of_shared_and_computed_weights_are_exported_too(tmp_path, change):
    saver = ModelCheckpoint(dirpath=tmp_path / "saved", monitor="val_loss", save_top_k=1, filename="{step}")
    callback = quantization(tmp_path, which="best")
    module = Worsening(model_with(change))
    make_trainer(tmp_path, callback, saver, max_steps=6, val_check_interval=2).fit(module, data(), data())
    before = plain_state(module.model)
    module.load_state_dict(torch.load(tmp_path / "saved" / "step=2.ckpt", weights_only=True)["state_dict"])
    expected, exported = plain_state(module.model), load_checkpoint(callback.exports[0])
    assert any(not torch.equal(before[name], expected[name]) for name in expected)
    assert set(exported) == set(expected)
    for name, weight in expected.items():
        assert close(exported[name], weight), name
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(exported[name], expected[name].bfloat16()), name


def test_a_checkpoint_from_before_the_parametrization_serves_as_base(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path / "saved", every_n_train_steps=2, filename="{step}")
    fit(tmp_path, saver, module=Tuning(tiny_llama(num_hidden_layers=2)), max_steps=2)
    for name, change in (("computed", weight_norm), ("plain", lambda model: None)):
        callback = quantization(
            tmp_path, base=str(tmp_path / "saved" / "step=2.ckpt"), dirpath=str(tmp_path / name)
        )
        fit(tmp_path, callback, module=Tuning(model_with(change)))
        assert callback.report.metrics()["cosine"] > 0.5


def test_a_plain_module_writes_shared_and_computed_weights_under_their_names(tmp_path):
    class Plain(Tuning):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16)))
            parametrizations.weight_norm(self.model[0])
            self.model[2].weight = self.model[1].weight

        def training_step(self, batch, batch_idx):
            return self.model(batch.float()).square().mean()

    callback, module = quantization(tmp_path), Plain()
    make_trainer(tmp_path, callback).fit(module, data())
    exported = load_checkpoint(callback.exports[0])
    assert set(exported) == {f"model.{layer}.{kind}" for layer in range(3) for kind in ("weight", "bias")}
    for layer in range(3):
        assert close(exported[f"model.{layer}.weight"], module.model[layer].weight.detach())


def _wrapped(model):
    attention = model.model.layers[0].self_attn
    attention.q_proj = nn.Sequential(attention.q_proj, nn.Identity())
    name = r"model\.layers\.0\.self_attn\.q_proj"
    return rf"would lack {name}\.weight.*It has {name}\.0\.weight"


def _fewer_layers(model):
    del model.model.layers[1]
    return r"would lack model\.layers\.1\.self_attn\.q_proj\.weight.* and 5 more"


def _computed_by_hand(model):
    projection = model.model.layers[0].mlp.up_proj
    projection.halved = nn.Parameter(projection.weight.detach() / 2)
    del projection.weight
    projection.weight = projection.halved * 2
    projection.register_forward_pre_hook(lambda module, inputs: setattr(module, "weight", module.halved * 2))
    return r"would lack model\.layers\.0\.mlp\.up_proj\.weight.*It has model\.layers\.0\.mlp\.up_proj\.halved"


def _untied(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return r"lm_head\.weight and model\.embed_tokens\.weight are tied by config\.json, but are two tensors"


def _tied_and_parametrized(model):
    parametrizations.weight_norm(model.lm_head)
    return r"lm_head\.weight and model\.embed_tokens\.weight are tied by config\.json"


@pytest.mark.parametrize(
    "spoil", [_wrapped, _fewer_layers, _computed_by_hand, _untied, _tied_and_parametrized]
)
def test_an_export_that_would_be_incomplete_is_refused_before_the_first_step(tmp_path, spoil):
    model = tiny_llama(num_hidden_layers=2, tie_word_embeddings=spoil in (_untied, _tied_and_parametrized))
    message = spoil(model)
    module = Tuning(model)
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, quantization(tmp_path), module=module)
    assert module.steps == 0
    assert not (tmp_path / "exports" / "base").exists()


def test_a_parametrized_layer_beside_adapters_is_refused_by_name(tmp_path):
    model = tiny_llama()
    parametrizations.weight_norm(model.model.layers[0].self_attn.o_proj)
    module = Tuning(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))
    with pytest.raises(ValueError, match=r"o_proj\.weight is parametrized .* PEFT adapters"):
        fit(tmp_path, quantization(tmp_path), module=module)
    assert module.steps == 0


def test_a_saved_state_that_lacks_trained_weights_is_refused_by_name(tmp_path):
    from daq_lightning.model.live import LiveModel

    module = Tuning()
    state = module.state_dict()
    del state["model.lm_head.weight"]
    with pytest.raises(ValueError, match=r"lm_head\.weight is trained .* but the checkpoint lacks it"):
        LiveModel(module, state=state)
    module.model.lm_head.requires_grad_(False)
    assert torch.equal(LiveModel(module, state=state).weights["lm_head.weight"], module.model.lm_head.weight)
