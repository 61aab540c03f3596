"""The callback: training is untouched, the export holds the trained weights, and whatever is wrong is said
early."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from live import Tuning, data, fit, folder_bytes, make_trainer, tiny_llama
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from daq_lightning import CheckpointError, DeltaAwareQuantization, ExportReport, ScaleSearch, load_checkpoint
from daq_lightning.numerics.objectives import measure
from daq_lightning.report.figures import figures

QUICK = ScaleSearch(metric="cosine", n_coarse=3, n_fine=0)


def quantization(folder: Path, **changes) -> DeltaAwareQuantization:
    return DeltaAwareQuantization(**({"dirpath": str(folder / "exports"), "search": QUICK} | changes))


def test_a_fit_ends_in_a_folder_that_transformers_loads(tmp_path):
    callback = quantization(tmp_path)
    module = fit(tmp_path, callback)
    out = tmp_path / "exports" / "step=4"
    assert callback.exports == [out]
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    exported = load_checkpoint(out)
    state = module.model.state_dict()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, exported[name].to(value.dtype)), name
        # FP8 keeps three bits of the mantissa; kept tensors are rounded to bfloat16
        assert torch.allclose(
            value.float(), state[name], rtol=2**-4, atol=float(state[name].abs().max()) * 2**-9
        ), name
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
    assert (out / "generation_config.json").exists()


@pytest.mark.parametrize("base", ["auto", "memory"])
def test_training_is_bit_identical_with_and_without_it(tmp_path, base):
    with_it = fit(tmp_path, quantization(tmp_path, base=base, every_n_train_steps=2))
    random_with = torch.get_rng_state()
    optimizer_with = with_it.trainer.optimizers[0].state_dict()["state"]
    without = fit(tmp_path)
    assert torch.equal(torch.get_rng_state(), random_with)
    for (name, one), two in zip(with_it.named_parameters(), without.parameters(), strict=True):
        assert torch.equal(one, two), name
        assert one.requires_grad == two.requires_grad
    for one, two in zip(
        optimizer_with.values(), without.trainer.optimizers[0].state_dict()["state"].values(), strict=True
    ):
        assert torch.equal(one["exp_avg"], two["exp_avg"])


def test_the_report_can_be_recomputed_from_the_folders(tmp_path):
    base = tiny_llama().bfloat16()
    base.save_pretrained(tmp_path / "base")
    callback = quantization(tmp_path, base=str(tmp_path / "base"))
    module = fit(tmp_path, callback, module=Tuning(tiny_llama().bfloat16().float()))
    report = ExportReport.load(callback.exports[0])
    raw = load_file(callback.exports[0] / "model.safetensors")
    state = module.model.state_dict()
    total = None
    for tensor in report.tensors:
        scale = raw[tensor.name + "_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        stats = measure(state[tensor.name], base.state_dict()[tensor.name], raw[tensor.name].float() * scale)
        assert figures(stats) == pytest.approx(figures(tensor.searched), rel=1e-5), tensor.name
        total = stats if total is None else total.add(stats)
    assert figures(total) == pytest.approx(report.metrics(), rel=1e-5)
    assert {
        name: callback.metrics[f"daq/{name}"] for name in ("sign_rate", "cosine", "gain", "mse")
    } == pytest.approx(
        {
            name: value
            for name, value in report.metrics().items()
            if name in ("sign_rate", "cosine", "gain", "mse")
        }
    )


def test_metrics_reach_loggers_the_trainer_and_a_short_summary(tmp_path, caplog):
    callback = quantization(tmp_path)
    trainer = make_trainer(tmp_path, callback, logger=CSVLogger(tmp_path))
    with caplog.at_level("INFO"):
        trainer.fit(Tuning(), data())
    assert float(trainer.callback_metrics["daq/cosine"]) == pytest.approx(callback.metrics["daq/cosine"])
    assert "daq/absmax_cosine" in Path(trainer.logger.experiment.metrics_file_path).read_text()
    assert callback.metrics["daq/cosine"] >= callback.metrics["daq/absmax_cosine"]
    summary = callback.report.summary()
    assert summary in caplog.text
    assert len(summary.splitlines()) <= 10


def test_a_run_that_changes_no_weight_says_so_and_logs_no_nan(tmp_path):
    callback = quantization(tmp_path)
    trainer = make_trainer(tmp_path, callback, logger=CSVLogger(tmp_path))
    with pytest.warns(UserWarning, match=r"No weight changed: .* equals the base"):
        trainer.fit(Tuning(learning_rate=0.0), data())
    assert math.isnan(callback.metrics["daq/gain"])  # what was measured stays there
    told = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("daq/")}
    finite = {name: value for name, value in callback.metrics.items() if math.isfinite(value)}
    assert told == pytest.approx(finite, rel=1e-6)  # the Trainer's are float32
    assert "daq/mse" in told
    assert "nan" not in Path(trainer.logger.experiment.metrics_file_path).read_text().lower()


def test_a_metric_that_is_no_number_any_more_leaves_the_trainer(tmp_path):
    class Stalling(Tuning):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] = 0.0

    callback = quantization(tmp_path, every_n_train_steps=1, reference="previous_checkpoint")
    trainer = make_trainer(tmp_path, callback, max_steps=2)
    with pytest.warns(UserWarning, match="No weight changed"):
        trainer.fit(Stalling(), data())
    assert math.isnan(callback.metrics["daq/gain"])
    assert "daq/gain" not in trainer.callback_metrics


def test_a_run_that_changes_weights_warns_of_nothing(tmp_path, recwarn):
    fit(tmp_path, quantization(tmp_path))
    assert [str(warning.message) for warning in recwarn if "No weight changed" in str(warning.message)] == []


@pytest.mark.parametrize("action", ["fast_dev_run", "validate", "test", "predict"])
def test_nothing_happens_outside_of_training(tmp_path, action):
    callback = quantization(tmp_path, base="does/not/exist")
    module, trainer = Tuning(), make_trainer(tmp_path, callback, fast_dev_run=action == "fast_dev_run")
    getattr(trainer, "fit" if action == "fast_dev_run" else action)(module, data())
    assert not (tmp_path / "exports").exists()
    assert callback.report is None


def test_snapshot_memory_and_folder_bases_give_the_same_export(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    contents = []
    for kind in ("snapshot", "memory", str(tmp_path / "base")):
        callback = quantization(tmp_path, base=kind, dirpath=str(tmp_path / f"exports{len(contents)}"))
        fit(tmp_path, callback)
        contents.append(folder_bytes(callback.exports[0], skip=("daq_manifest.json",)))
    assert contents[0] == contents[1] == contents[2]


class Plain(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 1))

    def training_step(self, batch, batch_idx):
        return self.body(batch.float().repeat(1, 4)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_plain_module_is_exported_and_read_back(tmp_path):
    callback = quantization(tmp_path)
    trainer, module = make_trainer(tmp_path, callback), Plain()
    trainer.fit(module, data())
    exported = load_checkpoint(callback.exports[0])
    assert set(exported) == set(module.state_dict())
    assert exported.quantized
    weight = module.body[0].weight
    assert torch.allclose(
        exported["body.0.weight"].float(), weight, rtol=2**-4, atol=float(weight.abs().max()) / 448
    )
    assert "FP8_DYNAMIC instead of FP8_BLOCK" in callback.report.summary()


def test_two_models_need_a_choice_and_a_wrong_path_names_the_submodules(tmp_path):
    module = Tuning()
    module.teacher = tiny_llama(1)
    with pytest.raises(MisconfigurationException, match=r"2 models \(model, teacher\)"):
        fit(tmp_path, quantization(tmp_path), module=module)
    with pytest.raises(MisconfigurationException, match="no such submodule"):
        fit(tmp_path, quantization(tmp_path, module="body"), module=module)
    assert module.steps == 0
    fit(tmp_path, quantization(tmp_path, module="model"), module=module)
    assert (tmp_path / "exports" / "step=4" / "config.json").exists()


def _base_that_lacks_tensors(folder: Path) -> str:
    tensors = tiny_llama().state_dict()
    del tensors["model.layers.0.mlp.up_proj.weight"]
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return r"does not fit 1 of 7 weights: model.layers.0.mlp.up_proj.weight: the base has no such weight"


def _base_of_other_shapes(folder: Path) -> str:
    tiny_llama(intermediate_size=256).save_pretrained(folder)
    return r"does not fit 3 of 7 weights.*the base has shape \(256, 128\), the weight \(128, 128\)"


def _base_of_other_names(folder: Path) -> str:
    folder.mkdir()
    save_file({"other": torch.zeros(2, 2)}, folder / "model.safetensors")
    return r"does not fit 7 of 7 weights"


def _base_without_safetensors(folder: Path) -> str:
    folder.mkdir()
    return "has no safetensors files"


def _no_base(folder: Path) -> str:
    return "does not exist"


@pytest.mark.parametrize(
    "make",
    [
        _base_that_lacks_tensors,
        _base_of_other_shapes,
        _base_of_other_names,
        _base_without_safetensors,
        _no_base,
    ],
)
def test_a_base_that_does_not_fit_is_refused_before_the_first_step(tmp_path, make):
    message = make(tmp_path / "base")
    module = Tuning()
    with pytest.raises(CheckpointError, match=message):
        fit(tmp_path, quantization(tmp_path, base=str(tmp_path / "base")), module=module)
    assert module.steps == 0


def test_weights_that_the_base_lacks_are_quantized_without_a_search_if_that_was_asked_for(tmp_path):
    _base_that_lacks_tensors(tmp_path / "base")
    callback = quantization(tmp_path, base=str(tmp_path / "base"), missing_base="absmax")
    fit(tmp_path, callback)
    lacking = [tensor for tensor in callback.report.tensors if tensor.without_base]
    assert [tensor.name for tensor in lacking] == ["model.layers.0.mlp.up_proj.weight"]
    assert lacking[0].alpha["moved"] == 0
    with pytest.raises(
        MisconfigurationException, match="missing_base='ignore': expected one of 'error', 'absmax'"
    ):
        quantization(tmp_path, missing_base="ignore")


@pytest.mark.slow
def test_the_example_in_the_docstring_can_be_copied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = DeltaAwareQuantization.__doc__.partition("Example:")[2]
    lines = [line.strip()[4:] for line in example.splitlines() if line.strip().startswith((">>>", "..."))]
    code = "\n".join(lines)
    assert "trainer.fit(" in code
    small = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
    }
    monkeypatch.setattr(L, "Trainer", functools.partial(L.Trainer, **small))
    names = {"module": Tuning(), "data": data(4000)}
    exec(code, names)
    assert names["export"].exports == [Path("exports/step=1000")]
    AutoModelForCausalLM.from_pretrained(tmp_path / "exports" / "step=1000")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": None, "alpha_range": (0.0, 1.0)}, "alpha_min must be a finite number > 0"),
        ({"search": None, "alpha_range": (2.0, 1.0)}, "alpha_max must be a finite number >= alpha_min"),
        ({"metric": "sign"}, "leave metric and alpha_range out"),
        ({"base": "s3://bucket/base"}, "only local folders"),
        ({"dirpath": "s3://bucket/exports", "push_to_hub": "org/name"}, "leave one of them out"),
        ({"export_on": "epoch"}, "export_on='epoch': expected one of"),
        ({"which": "best", "export_on": "checkpoint"}, "Leave one of them out"),
    ],
)
def test_bad_settings_are_refused_when_the_callback_is_made(tmp_path, changes, message):
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        quantization(tmp_path, **changes)


def test_a_model_that_has_nothing_to_quantize_is_refused_before_the_first_step(tmp_path):
    module = Plain()
    module.body = nn.Sequential(nn.Embedding(40, 1), nn.Flatten())
    with pytest.raises(CheckpointError, match="no Linear weight to quantize"):
        make_trainer(tmp_path, quantization(tmp_path)).fit(module, data())


def test_a_destination_that_is_a_file_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "exports").write_text("mine")
    module = Tuning()
    with pytest.raises(CheckpointError, match="could not be written|not a folder"):
        fit(tmp_path, quantization(tmp_path, base="memory"), module=module)
    assert module.steps == 0
    assert (tmp_path / "exports").read_text() == "mine"


def test_an_earlier_export_stays_and_the_new_one_gets_a_version(tmp_path):
    fit(tmp_path, quantization(tmp_path))
    before = folder_bytes(tmp_path / "exports" / "step=4")
    again = quantization(tmp_path)
    fit(tmp_path, again)
    assert again.exports == [tmp_path / "exports" / "step=4-v1"]
    assert folder_bytes(tmp_path / "exports" / "step=4") == before
    assert folder_bytes(tmp_path / "exports" / "step=4-v1") == before


def test_a_failed_export_costs_no_checkpoint_and_surfaces_after_them(tmp_path):
    def spoil(trainer, module):  # runs before the export: callbacks keep their order
        module.model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan

    saver = ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True, every_n_train_steps=2)
    with (
        pytest.warns(UserWarning, match="The export failed"),
        pytest.raises(ValueError, match="up_proj.*1 NaN"),
    ):
        fit(tmp_path, saver, LambdaCallback(on_train_end=spoil), quantization(tmp_path))
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["base"]


def test_an_exception_in_training_is_not_hidden_and_nothing_is_exported(tmp_path):
    class Failing(Tuning):
        def training_step(self, batch, batch_idx):
            if self.steps == 2:
                raise RuntimeError("the data is gone")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="the data is gone"):
        fit(tmp_path, quantization(tmp_path), module=Failing())
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["base"]
    with pytest.raises(RuntimeError, match="the data is gone"):
        fit(tmp_path, quantization(tmp_path, export_on_exception=True), module=Failing())
    assert (tmp_path / "exports" / "step=2" / "config.json").exists()


def test_a_run_without_steps_says_that_nothing_was_exported(tmp_path):
    with pytest.warns(UserWarning, match="exported nothing"):
        fit(tmp_path, quantization(tmp_path), max_steps=-1, max_epochs=0)


def test_a_tilde_in_a_path_is_the_home_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained(tmp_path / "home" / "base")
    first = quantization(tmp_path, dirpath="~/exports", base="~/base")
    fit(tmp_path, first)
    assert [path.name for path in (tmp_path / "home" / "exports").iterdir()] == ["step=4"]
    chained = {"base": "~/exports/step=4", "parent": "~/exports/step=4", "chain_from": "deployed"}
    fit(tmp_path, quantization(tmp_path, dirpath="~/exports", **chained), max_steps=2)
    assert (tmp_path / "home" / "exports" / "step=2" / "config.json").exists()
    assert not (tmp_path / "~").exists()
