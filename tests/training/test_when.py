"""When exports happen, of which weights, and that a resumed run exports what an uninterrupted one would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LambdaCallback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from live import Tuning, data, fit, folder_bytes, make_trainer

from daq_lightning import DeltaAwareQuantization, ScaleSearch, export_checkpoint, load_checkpoint
from daq_lightning.training.base import read_lightning_checkpoint

QUICK = ScaleSearch(metric="cosine", n_coarse=3, n_fine=0)


def quantization(folder: Path, **changes) -> DeltaAwareQuantization:
    return DeltaAwareQuantization(**({"dirpath": str(folder / "exports"), "search": QUICK} | changes))


def saver(folder: Path, **changes) -> ModelCheckpoint:
    settings = {"every_n_train_steps": 2, "save_top_k": -1, "filename": "{step}"}
    return ModelCheckpoint(dirpath=folder / "checkpoints", **(settings | changes))


def saved_model(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors = read_lightning_checkpoint(str(checkpoint))
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def kept_tensors_equal(export: Path, checkpoint: Path) -> bool:
    """Whether an export was made from the weights of a .ckpt file: kept tensors are those in bfloat16."""
    exported, tensors = load_checkpoint(export), saved_model(checkpoint)
    names = ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"]
    return all(torch.equal(exported[name], tensors[name].bfloat16()) for name in names)


class Repeatable(Tuning):
    """The random state of a run is not part of its checkpoints: here it depends on the step alone."""

    def training_step(self, batch, batch_idx):
        torch.manual_seed(self.global_step)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("reference", ["initial", "previous_checkpoint"])
def test_a_resumed_run_exports_the_same_bytes_as_an_uninterrupted_one(tmp_path, reference):
    settings = {"export_on": "checkpoint", "reference": reference}
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def run(folder: Path, epochs: int, ckpt: Path | None = None) -> DeltaAwareQuantization:
        callback = quantization(folder, **settings)
        by_epoch = saver(folder, every_n_train_steps=None, every_n_epochs=1)
        fit(folder, by_epoch, callback, module=Repeatable(), ckpt=ckpt, max_steps=-1, max_epochs=epochs)
        return callback

    run(whole, 2)
    run(parts, 1)
    resumed = run(parts, 2, ckpt=parts / "checkpoints" / "step=4.ckpt")
    expected = saved_model(whole / "checkpoints" / "step=8.ckpt")
    actual = saved_model(parts / "checkpoints" / "step=8.ckpt")
    assert all(torch.equal(expected[name], actual[name]) for name in expected), "the training itself differs"
    assert resumed.exports == [parts / "exports" / "step=8"]
    assert folder_bytes(parts / "exports" / "step=8") == folder_bytes(whole / "exports" / "step=8")


def test_the_state_of_the_callback_loads_with_weights_only(tmp_path):
    callback = quantization(tmp_path, export_on="checkpoint")
    fit(tmp_path, saver(tmp_path), callback)
    content = torch.load(tmp_path / "checkpoints" / "step=2.ckpt", weights_only=True)
    state = content["callbacks"][callback.state_key]["base"]
    assert state["kind"] == "snapshot"
    assert len(state["fingerprints"]) == 7


def _remove(base: Path) -> str:
    for file in base.iterdir():
        file.unlink()
    base.rmdir()
    return r"base snapshot .* does not exist"


def _alter(base: Path) -> str:
    file = base / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    return r"not the one it started from: 1 of 7 weights"


@pytest.mark.parametrize("spoil", [_remove, _alter])
def test_a_resumed_run_whose_base_is_gone_or_altered_stops_before_the_first_step(tmp_path, spoil):
    fit(tmp_path, saver(tmp_path), quantization(tmp_path), max_steps=2)
    message, module = spoil(tmp_path / "exports" / "base"), Tuning()
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, quantization(tmp_path), module=module, ckpt=tmp_path / "checkpoints" / "step=2.ckpt")
    assert module.steps == 0


def test_a_base_in_memory_cannot_be_resumed_and_the_error_names_the_remedy(tmp_path):
    fit(tmp_path, saver(tmp_path), quantization(tmp_path, base="memory"), max_steps=2)
    with pytest.raises(MisconfigurationException, match=r"kept in memory .*Pass base='<folder>'"):
        fit(tmp_path, quantization(tmp_path, base="memory"), ckpt=tmp_path / "checkpoints" / "step=2.ckpt")


def test_a_run_resumed_with_the_callback_added_later_asks_for_a_base(tmp_path):
    fit(tmp_path, saver(tmp_path), max_steps=2)
    with pytest.raises(MisconfigurationException, match="its callback state holds no base"):
        fit(tmp_path, quantization(tmp_path), ckpt=tmp_path / "checkpoints" / "step=2.ckpt")


def test_a_lightning_checkpoint_serves_as_base(tmp_path):
    fit(tmp_path, saver(tmp_path), quantization(tmp_path), max_steps=4)
    first = tmp_path / "checkpoints" / "step=2.ckpt"
    later = quantization(tmp_path, base=str(first), dirpath=str(tmp_path / "later"))
    module = fit(tmp_path, later)
    weights = {name: tensor.detach() for name, tensor in module.model.state_dict().items()}
    base = saved_model(first)
    report = export_checkpoint(weights, base, tmp_path / "offline", scheme="FP8_BLOCK", search=QUICK)
    assert report.metrics() == later.report.metrics()


@pytest.mark.parametrize("weights_only", [False, True])
def test_every_saved_checkpoint_is_exported_with_the_same_weights(tmp_path, weights_only):
    callback = quantization(tmp_path, export_on="checkpoint")
    fit(tmp_path, saver(tmp_path, save_weights_only=weights_only), callback)
    assert [path.name for path in callback.exports] == ["step=2", "step=4"]
    for step in (2, 4):
        assert kept_tensors_equal(
            tmp_path / f"exports/step={step}", tmp_path / f"checkpoints/step={step}.ckpt"
        )
    assert not kept_tensors_equal(tmp_path / "exports/step=2", tmp_path / "checkpoints/step=4.ckpt")


def test_steps_epochs_names_and_keep_last(tmp_path):
    callback = quantization(
        tmp_path, every_n_train_steps=1, keep_last=2, filename="{epoch}-{step}-{train_loss:.1f}"
    )
    fit(tmp_path, callback, max_steps=3)
    names = sorted(path.name for path in (tmp_path / "exports").iterdir() if path.name != "base")
    assert names == [path.name for path in callback.exports]
    assert [name[:15] for name in names] == ["epoch=0-step=2-", "epoch=0-step=3-"]
    by_epoch = quantization(tmp_path, every_n_epochs=1, dirpath=str(tmp_path / "by_epoch"))
    fit(tmp_path, by_epoch, max_steps=-1, max_epochs=2)
    assert [path.name for path in by_epoch.exports] == ["step=4", "step=8"]


class Chosen(DeltaAwareQuantization):
    """Exports when its function says so, and notes when it was asked."""

    def __init__(self, decide, **settings) -> None:
        super().__init__(**settings)
        self.decide, self.asked = decide, []

    def should_export(self, trainer) -> bool:
        self.asked.append((self.moment, trainer.global_step))
        return self.decide(self, trainer)


def chosen(folder: Path, decide, **changes) -> Chosen:
    return Chosen(decide, **({"dirpath": str(folder / "exports"), "search": QUICK} | changes))


def test_a_user_decides_when_to_export(tmp_path):
    callback = chosen(tmp_path, lambda self, trainer: trainer.global_step in (1, 3))
    fit(tmp_path, callback, max_steps=-1, max_epochs=1)
    assert [path.name for path in callback.exports] == ["step=1", "step=3"]
    assert callback.asked == [*(("step", step) for step in (1, 2, 3, 4)), ("epoch", 4), ("end", 4)]


def test_a_user_can_add_to_the_schedule_and_veto_it(tmp_path):
    def decide(self, trainer):
        return trainer.global_step == 1 or (
            trainer.global_step != 4 and super(Chosen, self).should_export(trainer)
        )

    callback = chosen(tmp_path, decide, every_n_train_steps=2)
    fit(tmp_path, callback, max_steps=6)
    assert [path.name for path in callback.exports] == ["step=1", "step=2", "step=6"]


def test_a_user_is_asked_once_for_each_optimizer_step_and_each_checkpoint(tmp_path):
    callback = chosen(tmp_path, lambda self,
    trainer: self.moment == "checkpoint" and trainer.global_step == 1,
                      export_on="checkpoint")  # fmt: skip
    fit(tmp_path, callback, saver(tmp_path, every_n_train_steps=1), accumulate_grad_batches=2, max_steps=2)
    assert [path.name for path in callback.exports] == ["step=1"]
    assert callback.asked == [
        ("step", 1),
        ("checkpoint", 1),
        ("step", 2),
        ("checkpoint", 2),
        ("epoch", 2),
        ("end", 2),
    ]


def test_a_resumed_run_is_not_asked_before_its_first_step(tmp_path):
    fit(
        tmp_path,
        saver(tmp_path, every_n_train_steps=1),
        quantization(tmp_path),
        accumulate_grad_batches=2,
        max_steps=1,
    )
    callback = chosen(tmp_path, lambda self, trainer: True)
    ckpt = tmp_path / "checkpoints" / "step=1.ckpt"
    fit(tmp_path, callback, ckpt=ckpt, accumulate_grad_batches=2, max_steps=2)
    assert [path.name for path in callback.exports] == ["step=2"]


def test_a_user_who_always_says_no_is_told_that_nothing_was_exported(tmp_path):
    with pytest.warns(UserWarning, match="exported nothing: .*should_export"):
        fit(tmp_path, chosen(tmp_path, lambda self, trainer: False))


def test_a_slash_in_the_name_of_a_metric_makes_no_folder(tmp_path):
    class Slashed(Tuning):
        def training_step(self, batch, batch_idx):
            self.log("train/steps", float(self.global_step + 1))
            return super().training_step(batch, batch_idx)

    callback = quantization(tmp_path, filename="{step}-{train/steps:.2f}-{not/logged}")
    fit(tmp_path, callback, module=Slashed())
    assert [path.name for path in callback.exports] == ["step=4-train_steps=4.00-not_logged=0.0"]
    assert (tmp_path / "exports" / callback.exports[0].name / "config.json").exists()


def test_previous_checkpoint_measures_each_export_against_the_one_before(tmp_path):
    callback = quantization(tmp_path, every_n_train_steps=1, reference="previous_checkpoint", keep_last=1)
    reports = []
    listener = LambdaCallback(on_train_batch_end=lambda *args: reports.append(callback.report))
    initial = quantization(tmp_path, every_n_train_steps=1, dirpath=str(tmp_path / "initial"))
    fit(tmp_path, callback, initial, listener, max_steps=3)
    norms = [report.metrics()["delta_norm"] for report in reports]
    assert len(norms) == 3
    assert norms[-1] < initial.report.metrics()["delta_norm"]
    assert sorted(path.name for path in (tmp_path / "exports").iterdir()) == [
        "base", "base-step=2", "base-step=3", "step=3"
    ]  # fmt: skip


def test_best_exports_the_best_checkpoint_after_model_checkpoint_is_done(tmp_path):
    class Worsening(Tuning):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", torch.tensor(float(self.trainer.global_step)))

    callback = quantization(tmp_path, which="best")
    best = saver(tmp_path, monitor="val_loss", save_top_k=1, every_n_train_steps=None)
    trainer = make_trainer(tmp_path, callback, best, max_steps=8, val_check_interval=2)
    trainer.fit(Worsening(), data(), data())
    assert kept_tensors_equal(callback.exports[0], tmp_path / "checkpoints" / "step=2.ckpt")


def test_best_is_an_error_after_training_if_no_checkpoint_was_saved(tmp_path):
    best = saver(tmp_path, monitor="train_loss", save_top_k=1, every_n_train_steps=100)
    with (
        pytest.warns(UserWarning, match="The export failed"),
        pytest.raises(MisconfigurationException, match="saved none in this run"),
    ):
        fit(tmp_path, quantization(tmp_path, which="best"), best)


@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_are_exported_whatever_the_order_of_callbacks(tmp_path, first):
    averaging, callback = EMAWeightAveraging(decay=0.5), quantization(tmp_path)
    callbacks = (callback, averaging) if first else (averaging, callback)
    module = fit(tmp_path, *callbacks, saver(tmp_path, every_n_train_steps=4))
    averaged = saved_model(tmp_path / "checkpoints" / "step=4.ckpt")
    assert torch.equal(module.model.lm_head.weight, averaged["lm_head.weight"])
    assert kept_tensors_equal(callback.exports[0], tmp_path / "checkpoints" / "step=4.ckpt")


@pytest.mark.parametrize("first", [True, False])
def test_exports_during_training_hold_the_averaged_weights_as_the_checkpoints_do(tmp_path, first):
    class Watching(Tuning):
        def on_train_batch_start(self, batch, batch_idx):
            self.seen = getattr(self, "seen", [])
            self.seen.append({name: tensor.clone() for name, tensor in self.state_dict().items()})

    averaging = EMAWeightAveraging(decay=0.5)
    callback = quantization(tmp_path, every_n_train_steps=2)
    callbacks = (callback, averaging) if first else (averaging, callback)
    module = fit(tmp_path, *callbacks, saver(tmp_path), module=Watching())
    for step in (2, 4):
        assert kept_tensors_equal(
            tmp_path / f"exports/step={step}", tmp_path / f"checkpoints/step={step}.ckpt"
        )
    assert not kept_tensors_equal(tmp_path / "exports/step=2", tmp_path / "checkpoints/step=4.ckpt")
    # and training went on with its own weights
    without = fit(tmp_path, EMAWeightAveraging(decay=0.5), module=Watching())
    for one, two in zip(module.seen, without.seen, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_export_of_a_run_that_fails_in_validation_holds_the_averaged_weights(tmp_path):
    class Failing(Tuning):
        def validation_step(self, batch, batch_idx):
            if self.global_step == 2:
                self.averaged = self.model.lm_head.weight.detach().clone()
                raise RuntimeError("the disk is gone")

    callback, module = quantization(tmp_path, export_on_exception=True), Failing()
    trainer = make_trainer(tmp_path, EMAWeightAveraging(decay=0.5), callback, val_check_interval=2)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        trainer.fit(module, data(), data())
    exported = load_checkpoint(callback.exports[0])["lm_head.weight"]
    assert torch.equal(exported, module.averaged.bfloat16())


def test_two_callbacks_live_side_by_side(tmp_path):
    one, two = (
        quantization(tmp_path),
        quantization(tmp_path, dirpath=str(tmp_path / "other"), scheme="FP8_DYNAMIC"),
    )
    fit(tmp_path, one, two)
    assert one.state_key != two.state_key
    assert (one.report.scheme, two.report.scheme) == ("FP8_BLOCK", "FP8_DYNAMIC")


def test_the_default_model_checkpoint_stays(tmp_path):
    trainer = make_trainer(tmp_path, quantization(tmp_path), enable_checkpointing=True)
    trainer.fit(Tuning(), data())
    assert Path(trainer.checkpoint_callback.best_model_path).exists()
