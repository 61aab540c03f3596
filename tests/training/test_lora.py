"""LoRA runs: the frozen weights are the base, the merged ones are exported, and live adapters stay as they
are."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from live import Tuning, fit, tiny_llama
from transformers import AutoModelForCausalLM

from daq_lightning import DeltaAwareQuantization, ScaleSearch, load_checkpoint, search_scale
from daq_lightning.numerics.formats import PerBlock

QUICK = ScaleSearch(metric="cosine", n_coarse=3, n_fine=0)


def adapted(**changes) -> Tuning:
    config = peft.LoraConfig(
        **({"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]} | changes)
    )
    torch.manual_seed(5)
    return Tuning(peft.get_peft_model(tiny_llama(), config), learning_rate=1e-2)  # type: ignore[arg-type]


def quantization(folder: Path, **changes) -> DeltaAwareQuantization:
    return DeltaAwareQuantization(**({"dirpath": str(folder / "exports"), "search": QUICK} | changes))


def float64_merge(module: Tuning, name: str) -> torch.Tensor:
    layer = module.model.get_submodule("base_model.model." + name.removesuffix(".weight"))
    if not hasattr(layer, "lora_A"):
        return layer.weight.detach().double()
    update = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    return layer.base_layer.weight.detach().double() + layer.scaling["default"] * update.detach()


def test_the_export_of_a_lora_run_holds_the_merged_weights_and_no_base_is_copied(tmp_path):
    callback, module = quantization(tmp_path), adapted()
    fit(tmp_path, callback, module=module)
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["step=4"]
    loaded, info = AutoModelForCausalLM.from_pretrained(callback.exports[0], output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    raw = load_checkpoint(callback.exports[0]).raw
    for tensor in callback.report.tensors:
        merged = float64_merge(module, tensor.name).float()
        frozen = merged if ("q_proj" not in tensor.name and "down_proj" not in tensor.name) else None
        if frozen is None:
            layer = module.model.get_submodule("base_model.model." + tensor.name.removesuffix(".weight"))
            frozen = layer.base_layer.weight.detach()
        expected = search_scale(merged, frozen, PerBlock(), QUICK)
        assert torch.equal(raw[tensor.name].view(torch.uint8), expected.codes.view(torch.uint8)), tensor.name
    changed = {tensor.name for tensor in callback.report.tensors if tensor.searched.n_changed > 0}
    assert changed == {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"}


def test_lora_training_is_bit_identical_with_and_without_the_callback(tmp_path):
    callback = quantization(tmp_path, every_n_train_steps=2)
    with_it = fit(tmp_path, callback, module=adapted())
    without = fit(tmp_path, module=adapted())
    assert [path.name for path in callback.exports] == ["step=2", "step=4"]
    for (name, one), two in zip(with_it.named_parameters(), without.parameters(), strict=True):
        assert torch.equal(one, two), name
        assert one.requires_grad == two.requires_grad


def test_adapters_can_stay_apart(tmp_path):
    callback, module = quantization(tmp_path, merge_adapters=False), adapted()
    fit(tmp_path, callback, module=module)
    assert all(tensor.searched.n_changed == 0 for tensor in callback.report.tensors)
    base = AutoModelForCausalLM.from_pretrained(callback.exports[0], dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, callback.exports[0] / "adapter")
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    live = module.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert torch.equal(layer.lora_B["default"].weight, live.lora_B["default"].weight)


def test_a_resumed_lora_run_finds_its_base_in_memory(tmp_path):
    saver = ModelCheckpoint(
        dirpath=tmp_path / "checkpoints", every_n_train_steps=2, save_top_k=-1, filename="{step}"
    )
    fit(tmp_path, saver, quantization(tmp_path), module=adapted(), max_steps=2)
    callback = quantization(tmp_path)
    fit(tmp_path, callback, module=adapted(), ckpt=tmp_path / "checkpoints" / "step=2.ckpt", max_steps=4)
    assert callback.exports[0].name == "step=4"
    with pytest.raises(Exception, match="not the one it started from: 1 of 7"):
        other = adapted()
        weight = other.model.get_submodule("base_model.model.model.layers.0.self_attn.k_proj").weight
        weight.data[0, 0] += 1
        content = torch.load(tmp_path / "checkpoints" / "step=2.ckpt", weights_only=True)
        content["state_dict"]["model.base_model.model.model.layers.0.self_attn.k_proj.weight"] = weight.data
        torch.save(content, tmp_path / "other.ckpt")
        fit(tmp_path, quantization(tmp_path), module=other, ckpt=tmp_path / "other.ckpt", max_steps=4)


def test_the_adapters_of_a_saved_checkpoint_are_exported_and_live_ones_stay(tmp_path):
    saver = ModelCheckpoint(
        dirpath=tmp_path / "checkpoints", every_n_train_steps=2, save_top_k=-1, filename="{step}"
    )
    callback = quantization(tmp_path, export_on="checkpoint")
    with_it = fit(tmp_path, EMAWeightAveraging(decay=0.5), saver, callback, module=adapted())
    without = fit(tmp_path, EMAWeightAveraging(decay=0.5), module=adapted())
    assert all(
        torch.equal(one, two) for one, two in zip(with_it.parameters(), without.parameters(), strict=True)
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    state = torch.load(tmp_path / "checkpoints" / "step=2.ckpt", weights_only=True)["state_dict"]
    prefix = "model.base_model.model." + name.removesuffix("weight")
    update = state[prefix + "lora_B.default.weight"] @ state[prefix + "lora_A.default.weight"]
    merged = state[prefix + "base_layer.weight"] + 4 * update
    expected = search_scale(merged, state[prefix + "base_layer.weight"], PerBlock(), QUICK)
    raw = load_checkpoint(callback.exports[0]).raw
    differing = (raw[name].view(torch.uint8) != expected.codes.view(torch.uint8)).float().mean()
    assert differing < 1e-3  # float32 sums in another order move a code now and then


def test_a_trained_output_head_is_saved(tmp_path):
    callback, module = quantization(tmp_path), adapted(modules_to_save=["lm_head"])
    fit(tmp_path, callback, module=module)
    head = module.model.base_model.model.lm_head.modules_to_save["default"].weight
    assert torch.equal(load_checkpoint(callback.exports[0])["lm_head.weight"], head.detach().bfloat16())


def test_other_adapters_are_refused_before_the_first_step(tmp_path):
    module = Tuning(peft.get_peft_model(tiny_llama(), peft.IA3Config(task_type="CAUSAL_LM")))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="merge_and_unload"):
        fit(tmp_path, quantization(tmp_path), module=module)
    assert module.steps == 0
