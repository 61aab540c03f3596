"""A `.ckpt` file as the base of a LoRA run, and saved adapters instead of live ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from live import Tuning, fit, folder_bytes, make_trainer
from live import data as training_data
from safetensors.torch import load_file
from test_lora import adapted, quantization
from test_when import Repeatable, saver
from torch import Tensor

from daq_lightning import export_checkpoint
from daq_lightning.checkpoint.manifest import Manifest
from daq_lightning.checkpoint.reader import Checkpoint

Q = "model.layers.0.self_attn.q_proj.weight"


def state_of(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def float64_weights(state: dict[str, Tensor], scaling: float = 4) -> dict[str, Tensor]:
    """The weights of a LoRA state dict under the names of the plain model, merged in NumPy's float64."""
    weights = {}
    for key, value in state.items():
        if "lora_" in key:
            continue
        name = key.removeprefix("model.base_model.model.")
        if ".base_layer." in name:
            stem = key.removesuffix("base_layer.weight")
            A, B = (state[f"{stem}lora_{part}.default.weight"].numpy().astype("float64") for part in "AB")
            value = torch.from_numpy((value.numpy().astype("float64") + scaling * (B @ A)).astype("float32"))
        weights[name.replace(".base_layer", "")] = value
    return weights


@pytest.fixture
def lora_checkpoint(tmp_path) -> Path:
    fit(tmp_path, saver(tmp_path), module=adapted(), max_steps=2)
    return tmp_path / "checkpoints" / "step=2.ckpt"


def test_a_checkpoint_with_adapters_is_merged_to_be_the_base(tmp_path, lora_checkpoint):
    callback = quantization(tmp_path, base=str(lora_checkpoint))
    fit(tmp_path, saver(tmp_path, every_n_train_steps=4), callback, module=adapted())
    base = float64_weights(state_of(lora_checkpoint))
    snapshot = Checkpoint(tmp_path / "exports" / "base")
    for name in snapshot:
        torch.testing.assert_close(snapshot[name], base[name], rtol=1e-6, atol=1e-9)
    weights = float64_weights(state_of(tmp_path / "checkpoints" / "step=4.ckpt"))
    settings = {"scheme": callback.report.scheme, "search": callback._settings.choices.search}
    expected = export_checkpoint(weights, base, tmp_path / "offline", **settings).metrics()
    assert callback.report.metrics() == pytest.approx(expected, rel=1e-4)
    against_frozen = quantization(tmp_path, dirpath=str(tmp_path / "frozen"))
    fit(tmp_path, against_frozen, module=adapted())
    assert against_frozen.report.metrics()["delta_norm"] != pytest.approx(expected["delta_norm"], rel=1e-2)


def test_a_checkpoint_from_before_the_adapters_serves_as_base(tmp_path):
    plain = fit(tmp_path, saver(tmp_path), max_steps=2)
    first = tmp_path / "checkpoints" / "step=2.ckpt"
    callback = quantization(tmp_path, base=str(first))
    fit(tmp_path, callback, module=adapted())
    assert Manifest.load(callback.exports[0]).lineage.base_kind == "ckpt"
    assert not (tmp_path / "exports" / "base").exists()
    trained = {tensor.name: tensor for tensor in callback.report.tensors}
    live = (
        adapted().model.base_model.model.model.layers[0].self_attn.k_proj.weight
    )  # not adapted: as it began
    delta = live.detach().double() - plain.model.model.layers[0].self_attn.k_proj.weight.detach().double()
    found = float(trained[Q.replace("q_proj", "k_proj")].searched.delta_sq)
    assert found == pytest.approx(float(delta.square().sum()), rel=1e-5)


def test_a_resumed_run_needs_the_checkpoint_with_adapters_no_more(tmp_path, lora_checkpoint):
    def run(name: str, epochs: int, ckpt: Path | None = None) -> None:
        folder, module = tmp_path / name, Repeatable(adapted().model, learning_rate=1e-2)
        callback = quantization(folder, base=str(lora_checkpoint))
        by_epoch = saver(folder, every_n_train_steps=None, every_n_epochs=1)
        fit(folder, by_epoch, callback, module=module, ckpt=ckpt, max_steps=-1, max_epochs=epochs)

    run("whole", 2)
    run("parts", 1)
    lora_checkpoint.unlink()
    run("parts", 2, tmp_path / "parts" / "checkpoints" / "step=4.ckpt")
    assert folder_bytes(tmp_path / "parts/exports/step=8") == folder_bytes(tmp_path / "whole/exports/step=8")


def test_a_checkpoint_of_adapters_alone_takes_what_is_frozen_from_the_model(tmp_path, lora_checkpoint):
    whole = quantization(tmp_path, base=str(lora_checkpoint))
    fit(tmp_path, whole, module=adapted())
    content = torch.load(lora_checkpoint, weights_only=True)
    content["state_dict"] = {name: value for name, value in content["state_dict"].items() if "lora_" in name}
    torch.save(content, tmp_path / "adapters.ckpt")
    alone = quantization(tmp_path, base=str(tmp_path / "adapters.ckpt"), dirpath=str(tmp_path / "alone"))
    fit(tmp_path, alone, module=adapted())
    assert alone.report.metrics() == whole.report.metrics()


def refused(folder: Path, path: Path, module: Tuning, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(folder, quantization(folder, base=str(path)), module=module)
    assert module.steps == 0
    assert list((folder / "exports").glob("*")) == []


def test_adapters_that_the_model_does_not_have_are_refused(tmp_path, lora_checkpoint):
    refused(
        tmp_path, lora_checkpoint, Tuning(), r"holds adapters.*does not have.*down_proj.*merge_and_unload"
    )
    refused(tmp_path, lora_checkpoint, adapted(target_modules=["k_proj"]), r"holds adapters.*does not have")


def test_adapters_of_another_rank_are_refused(tmp_path, lora_checkpoint):
    refused(
        tmp_path,
        lora_checkpoint,
        adapted(r=8),
        r"lora_A.*shape \(8, 128\) in the model.*has the shape \(4, 128\)",
    )


def test_a_checkpoint_that_lacks_a_trained_adapter_is_refused(tmp_path, lora_checkpoint):
    more = adapted(target_modules=["q_proj", "down_proj", "k_proj"])
    refused(tmp_path, lora_checkpoint, more, r"k_proj\.lora_A\.default\.weight is trained.*lacks it")


def test_a_checkpoint_of_another_module_is_refused(tmp_path):
    fit(tmp_path, saver(tmp_path), max_steps=2)
    content = torch.load(tmp_path / "checkpoints" / "step=2.ckpt", weights_only=True)
    content["state_dict"] = {f"net.{name}": value for name, value in content["state_dict"].items()}
    torch.save(content, tmp_path / "other.ckpt")
    refused(tmp_path, tmp_path / "other.ckpt", Tuning(), r"lacks 7 of 7 weights.*It holds net\.model\.")


def test_unmerged_adapters_of_the_best_checkpoint_are_those_it_holds(tmp_path):
    class Worsening(Tuning):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", torch.tensor(float(self.trainer.global_step)))

    module = Worsening(adapted().model, learning_rate=1e-2)
    callback = quantization(tmp_path, which="best", merge_adapters=False)
    best = saver(tmp_path, monitor="val_loss", save_top_k=1, every_n_train_steps=None)
    trainer = make_trainer(tmp_path, callback, best, max_steps=8, val_check_interval=2)
    trainer.fit(module, training_data(), training_data())
    saved = load_file(callback.exports[0] / "adapter" / "adapter_model.safetensors")
    name = "base_model.model." + Q.removesuffix("weight") + "lora_B"
    expected = state_of(tmp_path / "checkpoints" / "step=2.ckpt")[f"model.{name}.default.weight"]
    assert torch.equal(saved[f"{name}.weight"], expected)
    assert not torch.equal(module.state_dict()[f"model.{name}.default.weight"], expected)
