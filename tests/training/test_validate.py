"""Validation with the exported weights: what it says is what a server will say, and nothing remembers it."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import tiny_models
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from live import Tuning, data, make_trainer, tiny_llama
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModelForCausalLM

from daq_lightning import CheckpointError, DeltaAwareQuantization, ExportReport, ScaleSearch, load_checkpoint
from daq_lightning.model.live import LiveModel
from daq_lightning.model.swap import put_back
from daq_lightning.training.gate import ExportRejectedError
from daq_lightning.training.validate import validate

QUICK = ScaleSearch(metric="cosine", n_coarse=3, n_fine=0)


class Validated(Tuning):
    """Validates with random numbers, a torchmetric, and a buffer that counts."""

    def __init__(self, model: nn.Module | None = None, **changes: Any) -> None:
        super().__init__(model, **changes)
        self.accuracy = MulticlassAccuracy(num_classes=32)
        self.register_buffer("seen", torch.zeros(()))
        self.dropout = nn.Dropout(0.1)
        self.dropout.eval()  # a mode of its own

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen += 1
        torch.rand(3)
        output = self.model(input_ids=batch, labels=batch)
        self.accuracy(output.logits[:, :-1].argmax(-1).flatten(), batch[:, 1:].flatten())
        self.log("val_loss", output.loss)
        self.log("val_acc", self.accuracy)


def held_out(shuffle: bool = True) -> DataLoader[Any]:
    tokens = torch.randint(1, 32, (6, 8), generator=torch.Generator().manual_seed(11))
    return DataLoader(tokens, batch_size=2, shuffle=shuffle, generator=torch.Generator().manual_seed(5))  # type: ignore[arg-type]


def quantization(folder: Path, **changes: Any) -> DeltaAwareQuantization:
    settings = {
        "dirpath": str(folder / "exports"),
        "search": QUICK,
        "scheme": "FP8_DYNAMIC",
        "validate": True,
    }
    return DeltaAwareQuantization(**(settings | changes))


def fit(folder: Path, *callbacks: L.Callback, module: L.LightningModule | None = None, **changes: Any) -> Any:
    L.seed_everything(3, verbose=False)
    module = Validated() if module is None else module
    trainer = make_trainer(folder, *callbacks, **({"num_sanity_val_steps": 0} | changes))
    trainer.fit(module, data(), held_out())
    return module


def adapted(**changes: Any) -> nn.Module:
    model = tiny_llama()
    torch.manual_seed(5)
    lora = LoraConfig(**({"r": 4, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1} | changes))
    return get_peft_model(model, lora)  # type: ignore[arg-type]


def everything_of(module: Any) -> dict[str, Any]:
    """All that a fit may depend on next, copied."""
    optimizer = module.trainer.optimizers[0].state_dict()["state"]
    return {
        "state": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "modes": {name: part.training for name, part in module.named_modules()},
        "gradients": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "optimizer": copy.deepcopy(optimizer),
        "random": torch.get_rng_state(),
        "metric": {name: getattr(module.accuracy, name).clone() for name in module.accuracy._defaults},
        "updates": module.accuracy._update_count,
        "callback_metrics": {
            name: value for name, value in module.trainer.callback_metrics.items() if "daq/" not in name
        },
        "stage": module.trainer.state.stage,
        "function": module._current_fx_name,
        "loop": module.trainer.fit_loop.epoch_loop.val_loop,
        "disabled": [vars(part).get("_disable_adapters") for part in module.modules()],
    }


def same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return one is two or one == two


class Watches(L.Callback):
    """Exports on its own in the middle of a fit, and compares all before and after."""

    def __init__(self, export: DeltaAwareQuantization) -> None:
        self.export, self.compared = export, 0

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        before = everything_of(module)
        self.export._consider("step", trainer)
        after = everything_of(module)
        for name, value in before.items():
            assert same(value, after[name]), name
        self.compared += bool(self.export.exports)


@pytest.mark.parametrize("model", [tiny_llama, adapted], ids=["full", "lora"])
def test_nothing_is_different_after_it(tmp_path, model):
    export = quantization(tmp_path, every_n_train_steps=2)
    watches = Watches(export)
    fit(tmp_path, watches, export, module=Validated(model()))
    assert watches.compared >= 2
    assert "daq/val_loss" in export.metrics


@pytest.mark.parametrize("model", [tiny_llama, adapted], ids=["full", "lora"])
def test_training_is_bit_identical_with_and_without_it(tmp_path, model):
    with_it = fit(tmp_path, quantization(tmp_path, every_n_train_steps=1), module=Validated(model()))
    random = torch.get_rng_state()
    without = fit(tmp_path, module=Validated(model()))
    assert torch.equal(torch.get_rng_state(), random)
    assert same(with_it.state_dict(), without.state_dict())
    one, two = (module.trainer.optimizers[0].state_dict()["state"] for module in (with_it, without))
    assert same(one, two)
    logged = [float(module.trainer.callback_metrics["val_loss"]) for module in (with_it, without)]
    assert logged[0] == logged[1]


class Fails(Validated):
    error: type[BaseException] = RuntimeError

    def __init__(self, at: int, error: type[BaseException]) -> None:
        super().__init__()
        self.at, self.error, self.calls = at, error, 0

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise self.error("in the middle")
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("at", [2, 5])  # of the unquantized weights, and of those that were swapped in
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_middle_leaves_all_as_it_was(tmp_path, at, error):
    seen = []

    class Compares(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            before = everything_of(module)
            with pytest.raises(error, match="in the middle"):
                judged(export)
            after = everything_of(module)
            seen.append([name for name in before if not same(before[name], after[name])])

    def judged(export: DeltaAwareQuantization) -> None:
        module.calls = 0
        run = export._run
        assert run is not None
        kept, run.error = run.error, None
        run.export()
        error, run.error = run.error, kept
        if error is not None:
            raise error

    export = quantization(tmp_path, every_n_epochs=100)
    module = Fails(at, error)
    trainer = make_trainer(tmp_path, Compares(), export, max_steps=2, num_sanity_val_steps=0)
    with contextlib.suppress(RuntimeError, KeyboardInterrupt, SystemExit):
        trainer.fit(module, data(), held_out())
    assert seen
    assert seen[0] == []


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W8A8", "NVFP4A16"])
def test_its_loss_is_that_of_the_reloaded_export(tmp_path, scheme):
    export = quantization(tmp_path, quantize_activations=False, scheme=scheme)
    module = fit(tmp_path, export)
    loaded = AutoModelForCausalLM.from_pretrained(export.exports[0]).eval()
    with torch.no_grad():
        losses = [float(loaded(input_ids=batch, labels=batch).loss) for batch in held_out(shuffle=False)]
    served = export.metrics["daq/val_loss"]
    assert served == pytest.approx(sum(losses) / len(losses), rel=2**-8)
    # and with the values of the files in float32, to the last digits: no bfloat16 activations there
    exact = tiny_llama()
    exact.load_state_dict({name: load_checkpoint(export.exports[0], torch.float32)[name].float()
                           for name in exact.state_dict()})  # fmt: skip
    with torch.no_grad():
        losses = [float(exact.eval()(input_ids=b, labels=b).loss) for b in held_out(shuffle=False)]
    assert served == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    with torch.no_grad():
        module.eval()
        own = [float(module.model(input_ids=b, labels=b).loss) for b in held_out(shuffle=False)]
    assert export.metrics["daq/unquantized_val_loss"] == pytest.approx(sum(own) / len(own), rel=1e-6)
    assert served != export.metrics["daq/unquantized_val_loss"]


def test_activations_are_quantized_as_servers_do_unless_that_is_switched_off(tmp_path):
    losses = []
    for switched in (True, False):
        export = quantization(tmp_path / str(switched), quantize_activations=switched)
        fit(tmp_path, export)
        losses.append(export.metrics["daq/val_loss"])
    assert losses[0] != losses[1]
    weight_only = quantization(tmp_path / "16", scheme="FP8A16")  # whose servers do not
    fit(tmp_path, weight_only)
    assert weight_only.metrics["daq/val_loss"] == losses[1]


def test_merged_adapters_are_served_merged_and_others_beside(tmp_path):
    merged, beside = (
        quantization(tmp_path / "merged"),
        quantization(tmp_path / "beside", merge_adapters=False),
    )
    module = fit(tmp_path, merged, beside, module=Validated(adapted(lora_dropout=0.0)), max_steps=8)
    exact = tiny_llama()
    values = load_checkpoint(merged.exports[0], torch.float32)
    exact.load_state_dict({name: values[name].float() for name in exact.state_dict()})
    with torch.no_grad():
        losses = [float(exact.eval()(input_ids=b, labels=b).loss) for b in held_out(shuffle=False)]
    plain = quantization(tmp_path / "plain", quantize_activations=False)
    fit(tmp_path, plain, module=Validated(adapted(lora_dropout=0.0)), max_steps=8)
    assert plain.metrics["daq/val_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    for export in (merged, beside):
        figures = export.metrics
        assert figures["daq/val_loss"] == pytest.approx(figures["daq/unquantized_val_loss"], rel=0.05)
    assert not any(vars(part).get("_disable_adapters") for part in module.modules())


def test_figures_reach_loggers_report_and_whoever_watches(tmp_path):
    export = quantization(tmp_path)
    logger = CSVLogger(tmp_path, name="", version="")
    module = fit(tmp_path, export, logger=logger)
    report = ExportReport.load(export.exports[0])
    names = {"val_loss", "val_acc"}
    assert set(report.validation) == names
    for name in names:
        served, own = export.metrics[f"daq/{name}"], export.metrics[f"daq/unquantized_{name}"]
        assert report.validation[name] == {"unquantized": own, "served": served}
        assert float(module.trainer.callback_metrics[f"daq/{name}"]) == pytest.approx(served)
    logged = (tmp_path / "metrics.csv").read_text()
    assert "daq/unquantized_val_acc" in logged
    assert "as it will be served" in report.summary()
    content = json.loads((export.exports[0] / "daq_report.json").read_text())
    assert content["validation"]["val_loss"]["served"] == export.metrics["daq/val_loss"]
    shown = f"{export.metrics['daq/val_loss']:.6g}"
    assert shown in (export.exports[0] / "daq_report.html").read_text()
    assert "| val loss unquantized |" in (export.exports[0] / "README.md").read_text()
    content["validation"]["val_loss"]["served"] = "low"
    (export.exports[0] / "daq_report.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="unquantized and served figures in validation"):
        ExportReport.load(export.exports[0])


def test_it_runs_inside_a_save_at_the_end_of_validation_and_for_the_best_checkpoint(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path / "checkpoints", monitor="val_loss", save_top_k=-1)
    stopper = EarlyStopping("val_loss", patience=1, min_delta=100.0, check_on_train_epoch_end=False)
    export = quantization(tmp_path / "saves", export_on="checkpoint")
    best = quantization(tmp_path / "best", which="best")
    fit(tmp_path, saver, stopper, export, best, max_steps=-1, max_epochs=2)
    assert len(export.exports) == 2
    assert stopper.wait_count == 1
    reports = {path.name: ExportReport.load(path).validation for path in export.exports}
    [chosen] = best.exports
    assert best.metrics["daq/unquantized_val_loss"] == pytest.approx(float(saver.best_model_score), rel=1e-6)
    for validation in reports.values():
        assert validation["val_loss"]["unquantized"] != validation["val_loss"]["served"]
    expected = min(reports.values(), key=lambda one: one["val_loss"]["unquantized"])["val_loss"]
    assert ExportReport.load(chosen).validation["val_loss"] == pytest.approx(expected, rel=1e-6)


def test_averaged_weights_are_validated_as_averages(tmp_path):
    averaging = WeightAveraging(avg_fn=lambda averaged, current, n: 0.5 * averaged + 0.5 * current)
    export = quantization(tmp_path, quantize_activations=False)
    module = fit(tmp_path, averaging, export)
    with torch.no_grad():  # WeightAveraging leaves its averages in the module
        own = [float(module.eval().model(input_ids=b, labels=b).loss) for b in held_out(shuffle=False)]
    assert export.metrics["daq/unquantized_val_loss"] == pytest.approx(sum(own) / len(own), rel=1e-6)


def test_without_validation_it_is_refused_before_the_first_step(tmp_path):
    module = Validated()
    trainer = make_trainer(tmp_path, quantization(tmp_path))
    with pytest.raises(MisconfigurationException, match="validation dataloaders"):
        trainer.fit(module, data())
    assert module.steps == 0
    weighted = Tuning(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8)))
    trainer = make_trainer(tmp_path, quantization(tmp_path))
    with pytest.raises(MisconfigurationException, match="remove_parametrizations"):
        trainer.fit(weighted, data(), held_out())
    assert weighted.steps == 0


class Limits(Tuning):
    """Logs what it is told to, first for the unquantized weights and then for each attempt."""

    def __init__(self, values: list[float], name: str = "val_loss") -> None:
        super().__init__(tiny_llama(num_hidden_layers=2))
        self.values, self.name, self.own = list(values), name, None

    def on_validation_start(self) -> None:
        weight = self.model.model.layers[0].self_attn.q_proj.weight
        if self.own is None:
            self.own = weight.detach().clone()
        self.quantized = not torch.equal(weight, self.own)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.model(input_ids=batch)

    def on_validation_epoch_end(self) -> None:
        self.log(self.name, self.values.pop(0) if len(self.values) > 1 else self.values[0])


def limited(
    folder: Path, values: list[float], name: str = "val_loss", **changes: Any
) -> DeltaAwareQuantization:
    settings = {"max_degradation": {name: 0.02}} | changes
    export = quantization(folder, **settings)
    fit(folder, export, module=Limits(values, name.partition(":")[0]), max_steps=2, limit_val_batches=1,
        check_val_every_n_epoch=100)  # fmt: skip
    return export


def test_an_export_that_loses_too_much_is_not_published(tmp_path):
    assert limited(tmp_path / "good", [1.0, 1.0199]).exports
    with pytest.raises(ExportRejectedError, match=r"val_loss went from 1 to 1.03, worse by 0.03 where 0.02"):
        limited(tmp_path, [1.0, 1.03])
    assert not list(tmp_path.glob("exports/*step*"))
    with pytest.raises(ExportRejectedError, match="inf"):
        limited(tmp_path, [1.0, float("nan")])
    with pytest.raises(ExportRejectedError, match="val_acc went from 0.5 to 0.4"):
        limited(tmp_path, [0.5, 0.4], "val_acc")
    assert limited(tmp_path / "higher", [0.5, 0.6], "val_acc").exports
    with pytest.raises(ExportRejectedError, match="val_odd went"):
        limited(tmp_path, [0.5, 0.4], "val_odd:max")
    with pytest.raises(MisconfigurationException, match="val_odd:min"):
        limited(tmp_path, [0.5, 0.4], "val_odd")
    with pytest.raises(
        ExportRejectedError, match="'val_other', which validation did not log; it .* val_loss"
    ):
        limited(tmp_path, [1.0, 1.0], max_degradation={"val_other:min": 1})


def test_or_is_published_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="loses more than it may"):
        export = limited(tmp_path, [1.0, 1.5], on_failure="warn")
    assert "max_degradation is exceeded: val_loss went from 1 to 1.5" in " ".join(export.report.notes)


def test_or_the_next_scheme_is_tried_and_the_worst_layers_are_kept(tmp_path):
    # one value for each look at the model: unquantized and served of FP8_DYNAMIC, then of FP8A16
    export = limited(tmp_path / "scheme", [1.0, 1.5, 1.0, 1.01], on_failure="fallback", schemes=["FP8A16"])
    assert export.report.scheme == "FP8A16"
    assert "FP8_DYNAMIC was rejected: val_loss went from 1 to 1.5" in export.report.notes[0]
    # 8 fused layers are measured, after one more look for the reference
    looks = [1.0, 1.5, *[0.0] * 9, 1.0, 1.01]
    export = limited(tmp_path / "kept", looks, on_failure="fallback", schemes=["keep:3"])
    notes = " ".join(export.report.notes)
    assert "Kept in 16 bit, the largest KL alone" in notes
    kept = [name for name, reason in export.report.kept.items() if "ignored" in reason]
    assert 3 <= len(kept) <= 7
    assert len(kept) + len(export.report.tensors) == 14
    with pytest.raises(ExportRejectedError, match="as FP8A16, val_loss .* FP8_DYNAMIC was rejected"):
        limited(tmp_path, [1.0, 1.5, 1.0, 1.5], on_failure="fallback", schemes=["FP8A16"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validate": "yes"}, "validate='yes'"),
        ({"validate": False, "max_degradation": {"val_loss": 1}}, "needs validate=True"),
        ({"max_degradation": {"val_loss": -1}}, "in its own unit"),
        ({"max_degradation": ["val_loss"]}, "in its own unit"),
        ({"on_failure": "fallback", "max_degradation": {"val_loss": 1}}, "belong together"),
        ({"schemes": ["FP8A16"], "max_degradation": {"val_loss": 1}}, "belong together"),
        ({"schemes": "FP8A16", "on_failure": "fallback"}, "schemes='FP8A16'"),
        ({"schemes": ["keep:0"], "on_failure": "fallback"}, "keep:8"),
        ({"on_failure": "warn"}, "needs max_degradation"),
        ({"on_failure": "stop"}, "one of 'raise', 'warn', 'fallback'"),
        ({"quantize_activations": 1}, "True or False"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, settings, message):
    with pytest.raises(MisconfigurationException, match=message):
        quantization(tmp_path, **settings)


def test_a_fallback_that_the_model_cannot_have_is_refused_before_the_first_step(tmp_path):
    export = quantization(
        tmp_path, max_degradation={"val_loss": 1}, on_failure="fallback", schemes=["FP8_BLOCK"]
    )
    module = Validated(tiny_llama(intermediate_size=192))
    with pytest.raises(ValueError, match="multiples of 128"):
        fit(tmp_path, export, module=module)
    assert module.steps == 0


def test_all_batches_of_all_dataloaders_are_seen_once(tmp_path):
    class Counts(Tuning):
        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_mean", batch.double().mean())

    found = {}

    class Looks(L.Callback):
        def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            found.update(validate(trainer))

    trainer = make_trainer(tmp_path, Looks(), max_steps=2)
    loaders = [held_out(), data()]
    trainer.fit(Counts(), data(), loaders)
    expected = [torch.cat(list(loader)).double().mean() for loader in (held_out(), data())]
    assert found["val_mean/dataloader_idx_0"] == pytest.approx(float(expected[0]), rel=1e-6)
    assert found["val_mean/dataloader_idx_1"] == pytest.approx(float(expected[1]), rel=1e-6)


def test_stacked_experts_are_validated_as_they_will_be_served(tmp_path):
    torch.manual_seed(0)
    module = Tuning(tiny_models.qwen3_moe())
    export = quantization(tmp_path, scheme="FP8_BLOCK", quantize_activations=False)
    fit(tmp_path, export, module=module)
    exact = Tuning(tiny_models.qwen3_moe()).eval()
    with torch.no_grad(), put_back(exact) as swap:
        swap.weights(LiveModel(exact), load_checkpoint(export.exports[0], torch.float32))
        losses = [float(exact.model(input_ids=b, labels=b).loss) for b in held_out(shuffle=False)]
    assert export.metrics["daq/val_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert export.metrics["daq/val_loss"] != export.metrics["daq/unquantized_val_loss"]
    activations = quantization(tmp_path / "activations", scheme="FP8_BLOCK")
    torch.manual_seed(0)
    fit(tmp_path, activations, module=Tuning(tiny_models.qwen3_moe()))
    assert activations.metrics["daq/val_loss"] != export.metrics["daq/val_loss"]
